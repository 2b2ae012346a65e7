from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.batches import PAD, example_batches, row_batches
from sae_query_steer.data.examples import LabelledExample, check_classes
from sae_query_steer.data.token_rows import _packed, token_rows
from sae_query_steer.data.tokenized import (
    TokenizedExample,
    TokenizedExamples,
    tokenize_example,
    tokenize_examples,
)
from sae_query_steer.scopes.named import EveryPosition, LastPromptToken

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


def example(prompt: str, response: str = "", label: str = "a", place: str = "") -> LabelledExample:
    return LabelledExample(prompt=prompt, response=response, label=label, place=place)


def model_with(tokenizer, n_ctx: int = 99, default_prepend_bos: bool = True):
    cfg = SimpleNamespace(n_ctx=n_ctx, default_prepend_bos=default_prepend_bos)
    return SimpleNamespace(tokenizer=tokenizer, cfg=cfg)


def tokens_of(given: LabelledExample, tokenizer, **options) -> TokenizedExample:
    return tokenize_example(model_with(tokenizer), given, **options)


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
        ValueError, match=rf"prompt_length must be 1 to .* 3 tokens, got {prompt_length}$"
    ):
        TokenizedExample(tokens=torch.tensor([5, 6, 7]), prompt_length=prompt_length, label="a")


# --- the boundary ----------------------------------------------------------------------------


def test_bos_counts_as_a_token_of_the_prompt():
    tokenizer = word_tokenizer(bos_token="<s>")
    given = example("red blue", " green moon red")
    with_bos = tokens_of(given, tokenizer)
    without = tokens_of(given, tokenizer, prepend_bos=False)
    assert with_bos.tokens.tolist() == [1, 2, 3, 4, 5, 2]
    assert (with_bos.prompt_length, with_bos.response_length) == (3, 3)
    assert without.tokens.tolist() == [2, 3, 4, 5, 2]
    assert (without.prompt_length, without.response_length) == (2, 3)
    assert with_bos.tokens.dtype == torch.int64
    assert with_bos.label == "a"


def test_without_a_response_all_tokens_are_the_prompts():
    tokens = tokens_of(example("red blue"), word_tokenizer(bos_token="<s>"))
    assert tokens.tokens.tolist() == [1, 2, 3]
    assert (tokens.prompt_length, tokens.response_length) == (3, 0)


def test_a_tokenizer_that_adds_bos_by_itself_does_not_give_two(stories_tokenizer):
    bos = stories_tokenizer.bos_token_id
    assert stories_tokenizer("Once")["input_ids"][0] == bos
    tokens = tokens_of(example("Once", " upon"), stories_tokenizer)
    assert tokens.tokens.tolist().count(bos) == 1


def test_a_tokenizer_without_bos_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no BOS token: pass prepend_bos=False$"):
        tokens_of(example("red"), word_tokenizer(), prepend_bos=True)


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("default", [True, False])
def test_bos_is_as_the_model_has_it_unless_given(default, given):
    model = model_with(word_tokenizer(bos_token="<s>"), default_prepend_bos=default)
    begins = default if given is None else given
    tokens = tokenize_examples(model, [example("red")], prepend_bos=given)
    assert tokens.prepend_bos == begins
    assert tokens[0].tokens.tolist() == ([1, 2] if begins else [2])
    rows = token_rows(model, ["red blue"], context_size=2 + begins, prepend_bos=given)
    assert rows.tolist() == [[1, 2, 3] if begins else [2, 3]]
    assert not tokenize_examples(model_with(word_tokenizer()), [example("red")]).prepend_bos


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
    tokens = tokens_of(example(prompt, response), stories_tokenizer)
    whole = [stories_tokenizer.bos_token_id, *ids(stories_tokenizer, prompt + response)]
    assert tokens.tokens.tolist() == whole
    # What the model is given when it is asked to go on from the prompt.
    asked = stories_tokenizer(prompt)["input_ids"]
    assert tokens.tokens[: tokens.prompt_length].tolist() == asked


def test_on_a_real_tokenizer_the_response_gets_no_space_of_its_own(stories_tokenizer):
    joined = tokens_of(example("He said\n", "Lily"), stories_tokenizer)
    apart = ids(stories_tokenizer, "Lily")
    assert joined.tokens[joined.prompt_length :].tolist() != apart
    text = stories_tokenizer.decode(joined.tokens, skip_special_tokens=True)
    assert text == "He said\nLily"


def test_a_space_that_merges_into_the_response_is_refused_with_tokens_and_remedy(
    stories_tokenizer,
):
    with pytest.raises(
        ValueError, match=r"', there was '.*'a little gir'.*\['▁'\] become \['▁a'\]"
    ):
        tokens_of(example("Once upon a time, there was ", "a little girl"), stories_tokenizer)


def test_a_word_cut_in_two_is_refused_on_a_real_tokenizer(stories_tokenizer):
    with pytest.raises(ValueError, match=r"last tokens \['▁t', 'i'\] become \['▁time'"):
        tokens_of(example("Once upon a ti", "me there"), stories_tokenizer)


def test_byte_level_bpe_has_its_boundary_before_the_space():
    tokenizer = bpe_tokenizer()
    tokens = tokens_of(example("the cat", " sat on"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.tokens.tolist()) == [
        *("<s>", "the", "Ġcat", "Ġsat", "Ġon")
    ]
    assert tokens.prompt_length == 3
    with pytest.raises(ValueError, match=r"last tokens \['Ġ'\] become \['Ġsat'\]"):
        tokens_of(example("the cat ", "sat on"), tokenizer)
    with pytest.raises(ValueError, match=r"last tokens \['Ġcat'\] become \['Ġcaterpillar'\]"):
        tokens_of(example("the cat", "erpillar"), tokenizer)


def test_an_unknown_token_that_swallows_the_boundary_is_refused():
    tokenizer = word_tokenizer(bos_token="<s>")
    assert ids(tokenizer, "foo") == ids(tokenizer, "foobar") == [0]
    with pytest.raises(ValueError, match=r"last tokens \['\?'\] become \['\?'\] when"):
        tokens_of(example("red foo", "bar blue"), tokenizer)
    tokens = tokens_of(example("red foo", " bar blue"), tokenizer)
    assert (tokens.prompt_length, tokens.response_length) == (3, 2)


def test_the_chat_template_counts_as_prompt_and_brings_its_own_bos():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokens = tokens_of(example("red blue", " moon"), tokenizer, chat_template=True)
    assert tokenizer.convert_ids_to_tokens(tokens.tokens.tolist()) == [
        *("[user]", "red", "blue", "[assistant]", "moon")
    ]
    assert (tokens.prompt_length, tokens.response_length) == (4, 1)


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="no chat template: pass chat_template=False, or set"):
        tokens_of(example("red"), word_tokenizer(bos_token="<s>"), chat_template=True)


PARTS_TEMPLATE = "{% for m in messages %}[user] {{ m['content'][0]['text'] }} {% endfor %}"


def test_a_chat_template_that_expects_parts_gets_them():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = PARTS_TEMPLATE
    tokens = tokens_of(example("red blue"), tokenizer, chat_template=True)
    assert tokenizer.convert_ids_to_tokens(tokens.tokens.tolist()) == ["[user]", "red", "blue"]


def test_a_chat_template_that_drops_the_prompt_is_refused():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = "[user] moon"
    with pytest.raises(ValueError, match="must write every turn of .*'red'.* drops or changes one"):
        tokens_of(example("red"), tokenizer, chat_template=True)


def test_turns_before_the_prompt_are_written_and_kept():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = PARTS_TEMPLATE
    before = [{"role": "system", "content": "moon"}, {"role": "user", "content": "blue"}]
    found = tokenize_examples(model_with(tokenizer), [example("red")], chat_template=before)
    assert tokenizer.convert_ids_to_tokens(found[0].tokens.tolist()) == [
        *("[user]", "moon", "[user]", "blue", "[user]", "red")
    ]
    assert found.chat_template == before
    tokenizer.chat_template = "[user] {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="must write every turn of .*'moon'"):
        tokens_of(example("red"), tokenizer, chat_template=before)
    with pytest.raises(ValueError, match="must be True, False or messages such as .*, got 'moon'"):
        tokens_of(example("red"), tokenizer, chat_template=["moon"])


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = word_tokenizer(bos_token="<s>")
    with pytest.raises(ValueError, match="begins with '<s>', so BOS would come twice"):
        tokens_of(example("<s> red"), tokenizer, prepend_bos=True)
    for begin in (False, None):
        assert len(tokens_of(example("<s> red"), tokenizer, prepend_bos=begin).tokens) == 2


def test_prompts_that_end_in_a_space_are_warned_of_with_the_remedy():
    model = model_with(word_tokenizer(bos_token="<s>"))
    with pytest.warns(UserWarning, match=r"1 of 2 prompts end in white space .*example 1.*strip="):
        tokenize_examples(model, [example("red\n"), example("red ")])


# --- many examples ---------------------------------------------------------------------------


def test_examples_keep_their_order_and_labels():
    given = (example(prompt, label=prompt) for prompt in ["moon red", "blue"])
    tokens = tokenize_examples(model_with(word_tokenizer()), given, prepend_bos=False)
    assert [row.tokens.tolist() for row in tokens] == [[5, 2], [3]]
    assert tokens.labels == ("moon red", "blue")
    assert not tokens.prepend_bos


def test_options_reach_every_example_and_are_kept():
    tokenizer = word_tokenizer(bos_token="<s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    found = tokenize_examples(
        model_with(tokenizer),
        [example("red")],
        span=EveryPosition(),
        chat_template=True,
        batch_size=3,
    )
    assert found[0].tokens.tolist() == [6, 2, 7]
    assert (found.span, found.chat_template, found.batch_size) == (EveryPosition(), True, 3)
    assert tokenize_examples(model_with(tokenizer), [example("red")]).span == LastPromptToken()


def test_an_error_names_the_index_of_the_example(stories_tokenizer):
    with pytest.raises(ValueError, match=r"^example 1: no exact boundary"):
        tokenize_examples(model_with(stories_tokenizer), [example("A", " b"), example("A ", "b")])


def test_an_example_longer_than_the_context_is_refused_and_never_cut():
    tokenizer = word_tokenizer(bos_token="<s>")
    examples = [example("red"), example("red blue", " green")]
    found = tokenize_examples(model_with(tokenizer, n_ctx=4), examples)
    assert [len(row.tokens) for row in found] == [2, 4]
    with pytest.raises(ValueError, match=r"^example 1 has 4 tokens.* 3\b"):
        tokenize_examples(model_with(tokenizer, n_ctx=3), examples)
    kept = tokenize_examples(model_with(tokenizer, n_ctx=3), examples, long="drop")
    assert [len(row.tokens) for row in kept] == [2]
    with pytest.raises(ValueError, match="all 2 examples are longer than .* 1$"):
        tokenize_examples(model_with(tokenizer, n_ctx=1), examples, long="drop")


def test_an_example_longer_than_the_context_is_cut_at_one_side():
    tokenizer = word_tokenizer(bos_token="<s>")
    long = [example("red blue", " green moon", place="row 8")]
    (whole,) = tokenize_examples(model_with(tokenizer), long)
    bos, red, blue, green, moon = whole.tokens.tolist()
    for side, tokens, prompt_length in (
        ("cut-end", [bos, red, blue, green], 3),
        ("cut-start", [bos, blue, green, moon], 2),
    ):
        (cut,) = tokenize_examples(model_with(tokenizer, n_ctx=4), long, long=side)
        assert (cut.tokens.tolist(), cut.prompt_length) == (tokens, prompt_length)
    (all_of_the_prompt,) = tokenize_examples(model_with(tokenizer, n_ctx=3), long, long="cut-end")
    assert all_of_the_prompt.tokens.tolist() == [bos, red, blue]
    for side, n_ctx in (("cut-end", 2), ("cut-start", 3)):
        with pytest.raises(ValueError, match="row 8 has 5 tokens .3 of the prompt., more than"):
            tokenize_examples(model_with(tokenizer, n_ctx=n_ctx), long, long=side)
    with pytest.raises(ValueError, match="long must be one of .*'cut-start'.*, got 'left'"):
        tokenize_examples(model_with(tokenizer), long, long="left")


def test_part_of_the_examples_keeps_their_settings():
    rows = [TokenizedExample(tokens=torch.arange(n), prompt_length=1, label="a") for n in (2, 3, 4)]
    whole = TokenizedExamples(examples=rows, span=EveryPosition(), batch_size=7)
    for part, wanted in ((whole[1:], rows[1:]), (whole.subset([2, 0]), [rows[2], rows[0]])):
        assert list(part) == wanted
        assert (part.span, part.batch_size) == (EveryPosition(), 7)
    assert len(whole) == 3
    assert "a 3" in repr(whole)


@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        ({"examples": []}, ValueError, "none"),
        ({"examples": [example("red")]}, TypeError, "LabelledExample"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number >= 1, got 0"),
        ({"span": 3}, TypeError, "span must be a scope"),
    ],
)
def test_what_is_no_set_of_examples_is_refused(untyped, settings, error, names):
    row = TokenizedExample(tokens=torch.arange(2), prompt_length=1, label="a")
    with pytest.raises(error, match=names):
        TokenizedExamples(**({"examples": [row]} | settings))


def test_no_examples_and_a_model_without_tokenizer_are_refused():
    with pytest.raises(ValueError, match="got none"):
        tokenize_examples(model_with(word_tokenizer()), [])
    with pytest.raises(ValueError, match="no tokenizer"):
        tokenize_examples(model_with(None), [example("red")])


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
    for batch in example_batches(examples, batch_size):
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
    batches = list(example_batches(examples, 2))
    assert [batch.indices for batch in batches] == [(1, 2), (0, 4), (3,)]


def test_token_rows_come_in_their_order_cut_after_the_longest_of_a_batch():
    rows = torch.tensor([[1, 5, PAD, PAD], [1, 5, 6, PAD], [1, PAD, PAD, PAD]])
    found = list(row_batches(rows, 2, "Reading"))
    assert [batch.start for batch in found] == [0, 2]
    assert found[0].tokens.tolist() == [[1, 5, 0], [1, 5, 6]]
    assert found[0].real.tolist() == [[True, True, False], [True, True, True]]
    assert found[1].tokens.tolist() == [[1]]


@given(
    st.lists(st.lists(st.integers(1, 5), max_size=9), min_size=1, max_size=6),
    st.integers(2, 6),
    st.sampled_from([None, 1]),
)
def test_documents_are_packed_as_saelens_packs_them(documents, context_size, bos):
    wanted = concat_and_batch_sequences(
        tokens_iterator=(torch.tensor(document) for document in documents),
        context_size=context_size,
        begin_batch_token_id=bos,
        sequence_separator_token_id=bos,
    )
    assert list(_packed(documents, context_size, bos)) == [row.tolist() for row in wanted]


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


def test_a_column_of_ids_is_not_taken_for_classes():
    with pytest.raises(ValueError, match="30 classes in 30 examples.* the class, not of an id"):
        check_classes(str(i) for i in range(30))


def test_what_is_no_labelled_example_or_no_model_is_refused(model, examples):
    with pytest.raises(TypeError, match="example 0 must be LabelledExample, got str: read"):
        tokenize_examples(model, ["w1 w2"])
    with pytest.raises(TypeError, match="TransformerBridge, such as load_model returns, got list"):
        tokenize_examples(examples, model)
