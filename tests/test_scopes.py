"""Scopes against a slow reference, token by token; and what is refused before anything runs."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_query_steer as sqs
from sae_query_steer.scopes.joins import AllOf, AnyOf, Not, check_scope, needs_tokens
from sae_query_steer.scopes.marked import AfterToken, AtPositions, RowMask
from sae_query_steer.scopes.named import (
    EveryPosition,
    FirstResponseTokens,
    LastPromptToken,
    LastPromptTokens,
    LastResponseToken,
    PromptTokens,
    ResponseTokens,
    Window,
    WindowAroundPromptEnd,
)
from sae_query_steer.scopes.positions import Positions, by_position, fixed_positions, select

# --- The slow reference: rows without padding, one token at a time, in plain Python.


@dataclass
class Row:
    number: int
    tokens: list[int]
    prompt: int


def named(tree, row: Row, p: int) -> bool:
    """Whether the scope that a tree describes names position p of a row."""
    match tree:
        case ("any", *parts):
            return any(named(part, row, p) for part in parts)
        case ("all", *parts):
            return all(named(part, row, p) for part in parts)
        case ("not", part):
            return not named(part, row, p)
        case ("every",):
            return True
        case ("last",):
            return p + 1 == row.prompt
        case ("response",):
            return not p < row.prompt
        case ("prompt",):
            return p in range(row.prompt)
        case ("last k", k):
            return p in list(range(row.prompt))[-k:]
        case ("first n", n):
            return p in range(row.prompt, row.prompt + n)
        case ("window", start, stop):
            return start <= p and (stop is None or p < stop)
        case ("around", start, stop):
            r = p - row.prompt
            return (start is None or start <= r) and (stop is None or r < stop)
        case ("at", positions):
            return p in positions
        case ("at by row", lists):
            return p in lists[row.number]
        case ("mask", lists):
            return p < len(lists[row.number]) and lists[row.number][p]
        case ("after", ids, inclusive):
            return any(token in ids for token in row.tokens[: p + 1 if inclusive else p])
        case ("function",):
            return p % 3 == 1
    raise AssertionError(tree)


def third(positions: Positions) -> torch.Tensor:
    return positions.index % 3 == 1


def build(tree):
    """The scope that a tree describes; half of the joins by operator, half by class."""
    match tree:
        case (("any" | "all") as kind, *parts):
            made = [build(part) for part in parts]
            if len(parts) == 2 and made[0] is not third:
                return made[0] | made[1] if kind == "any" else made[0] & made[1]
            return {"any": AnyOf, "all": AllOf}[kind](*made)
        case ("not", part):
            made = build(part)
            return Not(made) if made is third else ~made
        case ("mask", lists):
            return RowMask(torch.tensor(lists))
        case ("function",):
            return third
        case (kind, *arguments):
            classes = {
                "every": EveryPosition,
                "last": LastPromptToken,
                "response": ResponseTokens,
                "prompt": PromptTokens,
                "last k": LastPromptTokens,
                "first n": FirstResponseTokens,
                "window": Window,
                "around": WindowAroundPromptEnd,
                "at": AtPositions,
                "at by row": AtPositions,
                "after": AfterToken,
            }
            return classes[kind](*arguments)


def windows(lowest: int):
    def ordered(start, width):
        return start, None if width is None else start + width

    return st.builds(ordered, st.integers(lowest, 6), st.none() | st.integers(1, 6))


def just(*values):
    return st.sampled_from([(value,) for value in values])


NAMED = (
    just("every", "last", "response", "prompt")
    | st.tuples(st.just("last k"), st.integers(1, 5))
    | st.tuples(st.just("first n"), st.integers(1, 5))
    | windows(0).map(lambda w: ("window", *w))
    | windows(-6).map(lambda w: ("around", *w))
    | st.integers(-4, 4).map(lambda stop: ("around", None, stop))
    | st.lists(st.integers(0, 8), min_size=1, max_size=3).map(lambda p: ("at", p))
)


def expressions(leaves):
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("any", *parts))
            | st.lists(inner, min_size=2, max_size=3).map(lambda parts: ("all", *parts))
            | inner.map(lambda part: ("not", part))
        ),
        max_leaves=6,
    )


def marked(n_rows: int):
    lists = st.lists(
        st.lists(st.integers(0, 8), max_size=3), min_size=n_rows, max_size=n_rows
    ).filter(any)
    masks = st.integers(1, 7).flatmap(
        lambda width: st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width),
            min_size=n_rows,
            max_size=n_rows,
        )
    )
    ids = st.integers(0, 4).map(lambda i: [i]) | st.lists(st.integers(0, 4), min_size=1, max_size=2)
    return (
        just("function")
        | lists.map(lambda own: ("at by row", own))
        | masks.filter(lambda m: any(map(any, m))).map(lambda own: ("mask", own))
        | st.tuples(st.just("after"), ids, st.booleans())
    )


@st.composite
def batches(draw):
    """Columns of real tokens and padding of a batch, and each row without padding.

    Padding stands anywhere; its ids are those of real tokens, markers too.
    """
    n_rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 9))

    def table(values):
        row = st.lists(values, min_size=width, max_size=width)
        return draw(st.lists(row, min_size=n_rows, max_size=n_rows))

    valid, tokens = table(st.sampled_from([True, True, False])), table(st.integers(0, 4))
    rows = []
    for number in range(n_rows):
        if not any(valid[number]):
            valid[number][-1] = True
        own = [t for t, real in zip(tokens[number], valid[number], strict=True) if real]
        rows.append(Row(number, own, draw(st.integers(1, len(own) + 2))))
    return torch.tensor(valid), torch.tensor(tokens), rows


def positions_of(valid, tokens, rows, start, stop, at_padding):
    """What a forward pass over the columns from start to stop is told, all before them cached."""
    index = (valid.long().cumsum(1) - 1)[:, start:stop]
    own = valid[:, start:stop]
    return Positions(
        index=torch.where(own, index, at_padding),
        valid=own,
        prompt_lengths=torch.tensor([row.prompt for row in rows]),
        tokens=by_position(tokens[:, :stop], valid[:, :stop]),
    )


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data(), batches(), st.integers(-3, 9))
def test_a_random_scope_names_what_the_slow_reference_names_in_one_pass_and_step_by_step(
    data, batch, at_padding
):
    valid, tokens, rows = batch
    width = valid.shape[1]
    tree = data.draw(expressions(NAMED | marked(len(rows))))
    scope = build(tree)
    check_scope(scope, name="scope", generating=True)
    expected = torch.zeros_like(valid)
    for row in rows:
        columns = valid[row.number].nonzero()[:, 0].tolist()
        for p, column in enumerate(columns):
            expected[row.number, column] = named(tree, row, p)
    cuts = data.draw(st.sets(st.integers(1, width - 1)) if width > 1 else st.just(set()))
    for edges in ([0, width], [0, *sorted(cuts), width]):
        steps = [
            select(scope, positions_of(valid, tokens, rows, start, stop, at_padding))
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        assert torch.equal(torch.cat(steps, dim=1), expected)


# --- A table to read: 5 tokens of which 3 are prompt, 7 of which 4, 3 that are all prompt.

TOKENS = torch.tensor([[0, 0, 1, 5, 6, 9, 5], [1, 7, 9, 8, 9, 5, 5], [0, 0, 0, 0, 1, 6, 9]])
VALID = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool()
ROWS = Positions(
    index=torch.where(VALID, VALID.long().cumsum(1) - 1, 0),
    valid=VALID,
    prompt_lengths=torch.tensor([3, 4, 3]),
    tokens=by_position(TOKENS, VALID),
)
SELECTED = {
    PromptTokens(): "..xxx.. xxxx... ....xxx",
    LastPromptTokens(2): "...xx.. ..xx... .....xx",
    LastPromptTokens(9): "..xxx.. xxxx... ....xxx",
    FirstResponseTokens(1): ".....x. ....x.. .......",
    Window(1, 3): "...xx.. .xx.... .....xx",
    Window(4): "......x ....xxx .......",
    WindowAroundPromptEnd(-1, 1): "....xx. ...xx.. ......x",
    WindowAroundPromptEnd(None, -1): "..xx... xxx.... ....xx.",
    AtPositions([0, 4]): "..x...x x...x.. ....x..",
    AtPositions([[1], [], [0, 9]]): "...x... ....... ....x..",
    RowMask(torch.tensor([[0, 0, 1], [1, 0, 0], [1, 1, 1]]).bool()): "....x.. x...... ....xxx",
    AfterToken(9): "......x ...xxxx .......",
    AfterToken([6, 7], inclusive=True): "....xxx .xxxxxx .....xx",
    AfterToken(0): "....... ....... .......",  # the id of the padding, which is no marker
    ResponseTokens() & ~AfterToken(9): ".....x. ....... .......",
    ~LastPromptToken(): "..xx.xx xxx.xxx ....xx.",
    ~(PromptTokens() | AtPositions([4])): ".....x. .....xx .......",
}


@pytest.mark.parametrize("scope", SELECTED, ids=repr)
def test_each_scope_selects_the_columns_that_its_name_says(scope):
    expected = [[letter == "x" for letter in row] for row in SELECTED[scope].split()]
    assert torch.equal(select(scope, ROWS), torch.tensor(expected))


def test_tokens_by_position_leave_padding_out():
    assert by_position(TOKENS, VALID)[:, :6].tolist() == [
        [1, 5, 6, 9, 5, -1],
        [1, 7, 9, 8, 9, 5],
        [1, 6, 9, -1, -1, -1],
    ]


def test_plain_forward_passes_are_told_their_tokens():
    hidden = torch.zeros(3, 7, 4)
    positions = fixed_positions(hidden, None, VALID, TOKENS)
    assert torch.equal(positions.tokens, ROWS.tokens)
    assert fixed_positions(hidden, None, VALID).tokens is None
    with pytest.raises(ValueError, match=r"tokens must .* \[3, 7\], got \[3, 6\]: fwd_hooks"):
        fixed_positions(hidden, None, VALID, TOKENS[:, 1:])


def test_scopes_print_as_they_are_written_and_brackets_stand_where_they_are_needed():
    prompt, response = PromptTokens(), ResponseTokens()
    assert repr(~prompt & (response | Window(1, 5))) == (
        "~PromptTokens() & (ResponseTokens() | Window(start=1, stop=5))"
    )
    assert repr(prompt | response & Window(2)) == (
        "PromptTokens() | ResponseTokens() & Window(start=2, stop=None)"
    )
    assert repr(~(prompt & Window(2))) == "~(PromptTokens() & Window(start=2, stop=None))"
    assert repr(~~prompt) == "~~PromptTokens()"
    assert repr(prompt & third) == f"PromptTokens() & {__name__}.third"
    assert repr(Not(third)) == f"~{__name__}.third"
    assert repr(AfterToken(9)) == "AfterToken(token=(9,), inclusive=False)"
    assert repr(AtPositions([3, 7])) == "AtPositions(positions=(3, 7))"
    assert repr(RowMask(torch.ones(2, 3).bool())) == "RowMask(2 rows of 3, 6 positions)"


def test_scopes_of_equal_settings_are_equal_and_have_equal_hashes():
    for make in (
        lambda: ~LastPromptTokens(2) & (Window(1, 5) | AfterToken([3, 4])),
        lambda: AtPositions([[1], [2, 3]]),
        lambda: AllOf(ResponseTokens(), third),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert AnyOf(PromptTokens(), Window(1)) != AllOf(PromptTokens(), Window(1))
    assert Not(PromptTokens()) != PromptTokens()
    mask = RowMask(torch.ones(1, 2).bool())
    assert mask == mask
    assert mask != RowMask(torch.ones(1, 2).bool()), "masks are compared as objects"


def test_numbers_and_ids_may_come_as_tensors_arrays_and_ranges(untyped):
    assert AtPositions(torch.tensor([3, 7])) == AtPositions(range(3, 8, 4)) == AtPositions([3, 7])
    assert AtPositions([range(1, 2), range(2)]) == AtPositions([[1], [0, 1]])
    assert AfterToken(torch.tensor(5)) == AfterToken(np.int64(5)) == AfterToken([5])


def test_a_mask_that_is_changed_afterwards_does_not_change_the_scope():
    mask = torch.tensor([[True, False]])
    scope = RowMask(mask)
    mask.fill_(False)
    assert scope.mask.tolist() == [[True, False]]


def test_a_scope_says_whether_it_reads_tokens_and_a_join_says_it_for_its_parts():
    def told(positions):
        return positions.valid

    told.needs_tokens = False
    for scope in (AfterToken(1), ~AfterToken(1), PromptTokens() & (Window(1) | AfterToken(1))):
        assert needs_tokens(scope)
    for scope in (PromptTokens(), ~Window(1), PromptTokens() & (Window(1) | told), told):
        assert not needs_tokens(scope)
    assert needs_tokens(third), "a function may read them"


def test_every_scope_is_exported():
    for name in (
        *("AllOf", "AnyOf", "Not", "EveryPosition", "PromptTokens", "LastPromptTokens"),
        *("FirstResponseTokens", "Window", "WindowAroundPromptEnd", "AtPositions", "RowMask"),
        "AfterToken",
    ):
        assert name in sqs.scopes.__all__
        assert getattr(sqs.scopes, name).__name__ == name


# --- What is refused, with the words.


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: LastPromptTokens(0), ValueError, "k must be a whole number >= 1, got 0"),
        (lambda: LastPromptTokens(True), TypeError, "k must be a whole number >= 1, got True"),
        (lambda: FirstResponseTokens(2.0), TypeError, "n must be a whole number >= 1, got 2.0"),
        (lambda: Window(-3), ValueError, "start must be a whole number >= 0, got -3"),
        (lambda: Window(0, "end"), TypeError, "stop must be a whole number > 0, got 'end'"),
        (lambda: Window(5, 5), ValueError, "stop must be a whole number > 5, got 5"),
        (
            lambda: WindowAroundPromptEnd(2, -1),
            ValueError,
            "stop must be a whole number > 2, got -1",
        ),
        (lambda: WindowAroundPromptEnd(0.5), TypeError, "start must be a whole number, got 0.5"),
        (lambda: AtPositions(3), ValueError, "positions must be a list such as [3, 7]"),
        (lambda: AtPositions("37"), TypeError, "positions must be a whole number >= 0, got '37'"),
        (lambda: AtPositions([3, -1]), ValueError, "positions must be a whole number >= 0, got -1"),
        (lambda: AtPositions([[3], [1.0]]), TypeError, "positions must be a whole number >= 0"),
        (lambda: AtPositions([]), ValueError, "positions must be a list such as [3, 7]"),
        (lambda: AtPositions([[], []]), ValueError, "one for each row, got ((), ())"),
        (lambda: RowMask(torch.ones(2, 3)), ValueError, "mask must be a boolean tensor"),
        (lambda: RowMask(torch.ones(3).bool()), ValueError, "got torch.bool [3]"),
        (lambda: RowMask(torch.zeros(2, 3).bool()), ValueError, "True somewhere"),
        (lambda: AfterToken(-1), ValueError, "token must be a whole number >= 0, got -1"),
        (lambda: AfterToken("###"), TypeError, "token must be a whole number >= 0, got '###'"),
        (lambda: AfterToken([]), ValueError, "token must have at least one id"),
        (lambda: AllOf(), ValueError, "AllOf must have at least one scope"),
        (lambda: PromptTokens() & Window, TypeError, "scope must be a scope, such as"),
        (lambda: Not(PromptTokens), TypeError, "scope must be a scope, such as"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(untyped, make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    "scope",
    [
        LastResponseToken(),
        ~LastResponseToken(),
        ResponseTokens() & ~LastResponseToken(),
        PromptTokens() | Window(2) & LastResponseToken(),
    ],
    ids=repr,
)
def test_the_last_response_token_is_no_scope_inside_a_join_either(scope):
    check_scope(scope, name="span")
    with pytest.raises(ValueError, match=r"^LastResponseToken\(\) can't be a scope"):
        check_scope(scope, name="scope", generating=True)


@pytest.mark.parametrize(
    "scope",
    [
        PromptTokens(),
        LastPromptTokens(2),
        FirstResponseTokens(2),
        WindowAroundPromptEnd(0),
        ~PromptTokens(),
        Window(1) & PromptTokens(),
    ],
    ids=repr,
)
def test_a_scope_that_hangs_on_the_prompt_raises_where_its_length_is_not_known(scope):
    unknown = Positions(index=ROWS.index, valid=ROWS.valid, tokens=ROWS.tokens)
    with pytest.raises(ValueError, match=r"must know where the prompt ends, .*prompt_lengths="):
        select(scope, unknown)


@pytest.mark.parametrize("scope", [Window(1), AtPositions([1]), AfterToken(9)], ids=repr)
def test_absolute_positions_and_markers_need_no_prompt_lengths(scope):
    select(scope, Positions(index=ROWS.index, valid=ROWS.valid, tokens=ROWS.tokens))


def test_a_marker_raises_where_the_tokens_are_not_known():
    text = (
        "AfterToken(token=(9,), inclusive=False) must know the tokens of each row from its "
        "beginning, and this forward pass does not show them: give the model text or token ids and "
        "no embeddings, begin the KV cache inside apply(), and pass tokens=[batch pos] to "
        "fwd_hooks()"
    )
    for scope in (AfterToken(9), ~AfterToken(9), PromptTokens() | AfterToken(9)):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            select(
                scope,
                Positions(index=ROWS.index, valid=ROWS.valid, prompt_lengths=ROWS.prompt_lengths),
            )


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        (AtPositions([[1], [2]]), "AtPositions(positions=((1,), (2,)))"),
        (RowMask(torch.ones(2, 7).bool()), "RowMask(2 rows of 7, 14 positions)"),
    ],
)
def test_something_for_each_row_is_refused_where_there_are_other_rows(scope, name):
    text = (
        f"{name} is for 2 rows, the batch has 3: give all prompts in one call of generate(), in "
        "order"
    )
    for asked in (scope, Window(1) | scope, ~scope):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            select(asked, ROWS)
