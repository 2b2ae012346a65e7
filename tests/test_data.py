from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.examples import (
    LabelledExample,
    TokenizedExample,
    check_classes,
    length_sorted_batches,
    tokenize_example,
    tokenize_examples,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words at white space; unknown words are all `?`."""
    words = ["?", "<s>", "red", "blue", "green", "moon", "[user]", "[assistant]"]
    words = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2, over a handful of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the caterpillar sat"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def example(prompt: str, response: str = "", label: str = "a") -> LabelledExample:
    return LabelledExample(prompt=prompt, response=response, label=label)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- LabelledExample, TokenizedExample -------------------------------------------------------


@pytest.mark.parametrize("blank", ["", " \n"])
@pytest.mark.parametrize("field", ["prompt", "label"])
def test_a_blank_prompt_or_label_is_refused(field: str, blank: str):
    fields = {"prompt": "p", "label": "l"} | {field: blank}
    with pytest.raises(ValueError, match=f"^{field}={blank!r} is blank".replace("\\", r"\\")):
        LabelledExample(**fields)


def test_an_example_keeps_its_text_to_the_letter_and_can_not_be_changed():
    given = example(" p\n", " r ")
    assert (given.prompt, given.response) == (" p\n", " r ")
    with pytest.raises(FrozenInstanceError):
        given.prompt = "q"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("prompt_length", [-1, 0, 4])
def test_a_prompt_length_outside_the_tokens_is_refused(prompt_length: int):
    with pytest.raises(
        ValueError, match=rf"^prompt_length={prompt_length} is not allowed: the example has 3 token"
    ):
        TokenizedExample(tokens=torch.tensor([5, 6, 7]), prompt_length=prompt_length, label="a")


# --- the boundary ----------------------------------------------------------------------------


def test_bos_counts_as_a_token_of_the_prompt():
    tokenizer = word_tokenizer(bos_token="<s>")
    with_bos = tokenize_example(example("red blue", " green moon red"), tokenizer)
    without = tokenize_example(example("red blue", " green moon red"), tokenizer, prepend_bos=False)
    assert with_bos.tokens.tolist() == [1, 2, 3, 4, 5, 2]
    assert (with_bos.prompt_length, with_bos.response_length) == (3, 3)
    assert without.tokens.tolist() == [2, 3, 4, 5, 2]
    assert (without.prompt_length, without.response_length) == (2, 3)
    assert with_bos.tokens.dtype == torch.int64
    assert with_bos.label == "a"


def test_without_a_response_all_tokens_are_the_prompts():
    tokens = tokenize_example(example("red blue"), word_tokenizer(bos_token="<s>"))
    assert tokens.tokens.tolist() == [1, 2, 3]
    assert (tokens.prompt_length, tokens.response_length) == (3, 0)


def test_a_tokenizer_that_adds_bos_by_itself_does_not_give_two(stories_tokenizer):
    bos = stories_tokenizer.bos_token_id
    assert stories_tokenizer("Once")["input_ids"][0] == bos
    tokens = tokenize_example(example("Once", " upon"), stories_tokenizer)
    assert tokens.tokens.tolist().count(bos) == 1


def test_a_tokenizer_without_bos_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no BOS token: pass prepend_bos=False$"):
        tokenize_example(example("red"), word_tokenizer())


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Once upon a time, there was", " a little girl named Lily."),
        ("Once upon a time", ", there was"),
        ("She said:\n", "Hello!"),
        (" Lily", "  went home"),
        ("Lily likes", ""),
    ],
)
def test_on_a_real_tokenizer_the_parts_join_to_the_tokens_of_the_whole(
    stories_tokenizer, prompt: str, response: str
):
    tokens = tokenize_example(example(prompt, response), stories_tokenizer)
    whole = [stories_tokenizer.bos_token_id, *ids(stories_tokenizer, prompt + response)]
    assert tokens.tokens.tolist() == whole
    # What the model is given when it is asked to go on from the prompt.
    asked = stories_tokenizer(prompt)["input_ids"]
    assert tokens.tokens[: tokens.prompt_length].tolist() == asked


def test_on_a_real_tokenizer_the_response_gets_no_space_of_its_own(stories_tokenizer):
    joined = tokenize_example(example("He said\n", "Lily"), stories_tokenizer)
    apart = ids(stories_tokenizer, "Lily")
    assert joined.tokens[joined.prompt_length :].tolist() != apart
    text = stories_tokenizer.decode(joined.tokens, skip_special_tokens=True)
    assert text == "He said\nLily"


def test_a_space_that_merges_into_the_response_is_refused_with_tokens_and_remedy(
    stories_tokenizer,
):
    with pytest.raises(
        ValueError,
        match=r"^no exact boundary between the prompt, which ends in ', there was ', and the "
        r"response, which starts with 'a little gir': the prompt's last tokens \['▁'\] become "
        r"\['▁a'\] when the response follows; move the white space or punctuation at the boundary "
        r"to the other side$",
    ):
        tokenize_example(
            example("Once upon a time, there was ", "a little girl"), stories_tokenizer
        )


def test_a_word_cut_in_two_is_refused_on_a_real_tokenizer(stories_tokenizer):
    with pytest.raises(ValueError, match=r"last tokens \['▁t', 'i'\] become \['▁time'"):
        tokenize_example(example("Once upon a ti", "me there"), stories_tokenizer)


def test_byte_level_bpe_has_its_boundary_before_the_space():
    tokenizer = bpe_tokenizer()
    tokens = tokenize_example(example("the cat", " sat on"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.tokens.tolist()) == [
        *("<s>", "the", "Ġcat", "Ġsat", "Ġon")
    ]
    assert tokens.prompt_length == 3
    with pytest.raises(ValueError, match=r"last tokens \['Ġ'\] become \['Ġsat'\]"):
        tokenize_example(example("the cat ", "sat on"), tokenizer)
    with pytest.raises(ValueError, match=r"last tokens \['Ġcat'\] become \['Ġcaterpillar'\]"):
        tokenize_example(example("the cat", "erpillar"), tokenizer)


def test_an_unknown_token_that_swallows_the_boundary_is_refused():
    tokenizer = word_tokenizer(bos_token="<s>")
    assert ids(tokenizer, "foo") == ids(tokenizer, "foobar") == [0]
    with pytest.raises(ValueError, match=r"last tokens \['\?'\] become \['\?'\] when"):
        tokenize_example(example("red foo", "bar blue"), tokenizer)
    tokens = tokenize_example(example("red foo", " bar blue"), tokenizer)
    assert (tokens.prompt_length, tokens.response_length) == (3, 2)


def test_the_chat_template_counts_as_prompt_and_brings_its_own_bos():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokens = tokenize_example(example("red blue", " moon"), tokenizer, chat_template=True)
    assert tokenizer.convert_ids_to_tokens(tokens.tokens.tolist()) == [
        *("[user]", "red", "blue", "[assistant]", "moon")
    ]
    assert (tokens.prompt_length, tokens.response_length) == (4, 1)


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="no chat template: pass chat_template=False, or set"):
        tokenize_example(example("red"), word_tokenizer(bos_token="<s>"), chat_template=True)


# --- many examples ---------------------------------------------------------------------------


def test_examples_keep_their_order_and_labels():
    tokens = tokenize_examples(
        (example(prompt, label=prompt) for prompt in ["moon red", "blue"]),
        word_tokenizer(),
        prepend_bos=False,
    )
    assert [row.tokens.tolist() for row in tokens] == [[5, 2], [3]]
    assert [row.label for row in tokens] == ["moon red", "blue"]


def test_options_reach_every_example():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    (tokens,) = tokenize_examples([example("red")], tokenizer, chat_template=True)
    assert tokens.tokens.tolist() == [6, 2, 7]


def test_an_error_names_the_index_of_the_example(stories_tokenizer):
    with pytest.raises(ValueError, match=r"^example 1: no exact boundary"):
        tokenize_examples([example("A", " b"), example("A ", "b")], stories_tokenizer)


def test_a_long_example_is_refused_and_never_cut():
    tokenizer = word_tokenizer(bos_token="<s>")
    examples = [example("red"), example("red blue", " green")]
    assert [len(row.tokens) for row in tokenize_examples(examples, tokenizer, max_length=4)] == [
        2,
        4,
    ]
    with pytest.raises(
        ValueError, match=r"^example 1 has 4 tokens, more than max_length=3: shorten it or leave it"
    ):
        tokenize_examples(examples, tokenizer, max_length=3)


def test_no_examples_at_all_are_refused():
    with pytest.raises(ValueError, match="^there are no examples to tokenise: give at least one"):
        tokenize_examples([], word_tokenizer())


# --- batching --------------------------------------------------------------------------------


@st.composite
def tokenized_examples(draw) -> list[TokenizedExample]:
    rows = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), max_size=12))
    return [
        TokenizedExample(
            tokens=torch.tensor(row),
            prompt_length=draw(st.integers(1, len(row))),
            label=draw(st.sampled_from("ab")),
        )
        for row in rows
    ]


@given(tokenized_examples(), st.integers(1, 5))
def test_batching_neither_loses_nor_alters_a_row(examples, batch_size):
    seen = []
    for batch in length_sorted_batches(examples, batch_size):
        n_rows = len(batch.indices)
        assert 1 <= n_rows <= batch_size
        assert batch.tokens.shape == (n_rows, int(batch.lengths.max()))
        assert len(batch.labels) == len(batch.lengths) == len(batch.prompt_lengths) == n_rows
        for row, index in enumerate(batch.indices):
            length = int(batch.lengths[row])
            assert torch.equal(batch.tokens[row, :length], examples[index].tokens)
            assert not batch.tokens[row, length:].any()
            assert int(batch.prompt_lengths[row]) == examples[index].prompt_length
            assert batch.labels[row] == examples[index].label
            seen.append(index)
    assert sorted(seen) == list(range(len(examples)))
    assert seen == sorted(seen, key=lambda index: (len(examples[index].tokens), index))


def test_all_batches_but_the_last_are_full():
    examples = [
        TokenizedExample(tokens=torch.ones(n, dtype=torch.long), prompt_length=1, label="a")
        for n in [3, 1, 2, 5, 4]
    ]
    batches = list(length_sorted_batches(examples, 2))
    assert [batch.indices for batch in batches] == [(1, 2), (0, 4), (3,)]


@pytest.mark.parametrize("batch_size", [0, -2])
def test_a_batch_size_below_one_is_refused_at_once(batch_size: int):
    with pytest.raises(ValueError, match=rf"^batch_size={batch_size} is not allowed: give 1 or"):
        length_sorted_batches([], batch_size)


# --- classes ---------------------------------------------------------------------------------


def test_classes_are_counted_in_the_order_of_their_names():
    assert list(check_classes("bacabc").items()) == [("a", 2), ("b", 2), ("c", 2)]


def test_bloom_levels_are_counted_in_their_order_and_as_plain_names():
    labels = [BloomLevel.EVALUATE, "apply", "evaluate", BloomLevel.APPLY, "remember", "remember"]
    counts = check_classes(labels)
    assert list(counts.items()) == [("remember", 2), ("apply", 2), ("evaluate", 2)]
    assert {type(name) for name in counts} == {str}


def test_one_name_outside_bloom_makes_the_order_alphabetical():
    assert list(check_classes(["remember", "apply", "x"] * 2)) == ["apply", "remember", "x"]


@pytest.mark.parametrize("labels", [[], ["a", "a"]])
def test_fewer_than_two_classes_are_refused(labels: list[str]):
    with pytest.raises(
        ValueError, match=rf"^the labels name {len(set(labels))} class\(es\), .*; add examples of"
    ):
        check_classes(labels)


def test_a_class_with_too_few_examples_is_refused():
    assert check_classes("abb", at_least=1) == {"a": 1, "b": 2}
    with pytest.raises(
        ValueError, match=r"^class 'a' has 1 example\(s\), fewer than at_least=2: add examples of"
    ):
        check_classes("abb")
