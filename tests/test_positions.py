import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_query_steer.scopes.joins import AnyOf, check_scope
from sae_query_steer.scopes.named import (
    EveryPosition,
    LastPromptToken,
    LastResponseToken,
    ResponseTokens,
)
from sae_query_steer.scopes.positions import Positions, select

# Three left-padded rows of seven columns: 5 tokens of which 3 are prompt, 7 of which 4 are
# prompt, and 3 that are all prompt. x marks a column that is selected.
LENGTHS, PROMPTS, WIDTH = (5, 7, 3), (3, 4, 3), 7
SELECTED = {
    EveryPosition(): "..xxxxx xxxxxxx ....xxx",
    LastPromptToken(): "....x.. ...x... ......x",
    ResponseTokens(): ".....xx ....xxx .......",
    LastResponseToken(): "......x ......x .......",
    LastPromptToken() | ResponseTokens(): "....xxx ...xxxx ......x",
    LastPromptToken() | LastResponseToken(): "....x.x ...x..x ......x",
}


def left_padded(lengths, prompts, width: int, padding_index: int = 0) -> Positions:
    column = torch.arange(width)
    index = torch.stack([column - (width - n) for n in lengths])
    valid = index >= 0
    return Positions(
        index=torch.where(valid, index, padding_index),
        valid=valid,
        prompt_lengths=torch.tensor(prompts),
        lengths=torch.tensor(lengths),
    )


def mask(text: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in text.split()])


def without(positions: Positions, *names: str) -> Positions:
    kept = {n: getattr(positions, n) for n in ("index", "valid", "prompt_lengths", "lengths")}
    return Positions(**(kept | dict.fromkeys(names)))


ROWS = left_padded(LENGTHS, PROMPTS, WIDTH)


@pytest.mark.parametrize("scope", SELECTED, ids=repr)
def test_each_scope_selects_the_columns_that_its_name_says(scope):
    assert torch.equal(select(scope, ROWS), mask(SELECTED[scope]))


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 5), st.integers(-7, 7))
def test_left_padding_selects_the_same_absolute_positions(data, length, padding, padding_index):
    prompt = data.draw(st.integers(1, length))
    bare = left_padded([length], [prompt], length)
    padded = left_padded([length], [prompt], padding + length, padding_index)
    for scope in SELECTED:
        expected = torch.cat([torch.zeros(1, padding).bool(), select(scope, bare)], 1)
        assert torch.equal(select(scope, padded), expected)


@pytest.mark.parametrize("scope", SELECTED, ids=repr)
def test_a_decode_step_selects_what_the_whole_row_does_at_that_column(scope):
    for column in range(WIDTH):
        step = Positions(
            index=ROWS.index[:, column : column + 1],
            valid=ROWS.valid[:, column : column + 1],
            prompt_lengths=ROWS.prompt_lengths,
            lengths=ROWS.lengths,
        )
        assert torch.equal(select(scope, step), mask(SELECTED[scope])[:, column : column + 1])


def test_scopes_of_a_running_generation_need_no_row_lengths():
    generating = without(ROWS, "lengths")
    for scope in (EveryPosition(), LastPromptToken(), ResponseTokens()):
        assert torch.equal(select(scope, generating), mask(SELECTED[scope]))


def test_a_users_function_is_a_scope_alone_and_in_a_union():
    def third(positions: Positions) -> torch.Tensor:
        return positions.index == 2

    check_scope(third, name="scope")
    assert torch.equal(select(third, ROWS), mask("....x.. ..x.... ......x"))
    union = LastResponseToken() | third
    assert torch.equal(select(union, ROWS), mask("....x.x ..x...x ......x"))


def test_padding_is_never_selected():
    assert torch.equal(select(lambda p: torch.ones_like(p.valid), ROWS), ROWS.valid)


def test_a_union_prints_as_it_is_written():
    union = LastPromptToken() | ResponseTokens() | EveryPosition()
    assert repr(union) == "LastPromptToken() | ResponseTokens() | EveryPosition()"
    assert LastPromptToken() | ResponseTokens() == AnyOf(LastPromptToken(), ResponseTokens())


def test_a_union_of_nothing_is_refused():
    with pytest.raises(ValueError, match="AnyOf must have at least one scope, got none"):
        AnyOf()


@pytest.mark.parametrize("scope", [LastPromptToken(), ResponseTokens()], ids=repr)
def test_a_scope_that_needs_prompt_lengths_says_how_to_give_them(scope):
    for asked in (scope, EveryPosition() | scope):
        with pytest.raises(ValueError, match=r"must know where the prompt ends.*prompt_lengths="):
            select(asked, without(ROWS, "prompt_lengths"))


def test_the_last_response_token_can_not_be_a_scope():
    with pytest.raises(ValueError, match=r"LastResponseToken\(\) can't be a scope"):
        select(LastResponseToken(), without(ROWS, "lengths"))


class Returns:
    """A scope with a name that does not change from run to run."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "mine"

    def __call__(self, _: Positions) -> object:
        return self.value


@pytest.mark.parametrize(
    "value",
    [
        *(torch.ones(3, 7), [[True] * 7] * 3, None),
        *(torch.ones(shape).bool() for shape in [(7,), (1, 7), (3, 6), (3, 7, 1)]),
    ],
)
def test_a_scope_that_returns_no_boolean_tensor_of_the_columns_is_refused(untyped, value):
    with pytest.raises(
        ValueError, match=r"mine must be a torch.bool tensor of shape \[3, 7\], got "
    ):
        select(Returns(value), ROWS)


def test_a_value_that_can_not_be_called_is_no_scope():
    with pytest.raises(TypeError, match="scope must be a scope, .* got 'last'"):
        check_scope("last", name="scope")


def test_a_class_where_an_instance_is_meant_is_no_scope():
    with pytest.raises(TypeError, match="scope must be a scope, .* got .*LastPromptToken'"):
        check_scope(LastPromptToken, name="scope")


def test_a_function_joins_and_prints_by_its_name():
    def second(positions):
        return positions.index == 1

    joined = LastPromptToken() | second
    assert isinstance(joined, AnyOf)
    assert repr(joined).startswith("LastPromptToken() | ") and repr(joined).endswith("second")
    assert "0x" not in repr(joined)
