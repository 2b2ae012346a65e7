"""Labelled examples: tokenising with an exact prompt/response boundary, classes, batching."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from sae_query_steer.bloom import BloomLevel


@dataclass(frozen=True, kw_only=True)
class LabelledExample:
    """A prompt, the response to it where there is one, and the class they belong to."""

    prompt: str
    """Text before the response; not blank. Kept to the letter, white space included."""

    response: str = ""
    """Text right after the prompt, with any space between the two; may be empty."""

    label: str
    """Name of the class; not blank."""

    def __post_init__(self) -> None:
        for name in ("prompt", "response", "label"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(
                    f"{name}={getattr(self, name)!r} is no text: every example's {name} is a string"
                )
        for name in ("prompt", "label"):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is blank in an example: every example needs "
                    f"a {name} with some text in it"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedExample:
    """The tokens of an example; those of the prompt come first, and none is in both parts."""

    tokens: Int[Tensor, " pos"]
    """Ids of prompt and response, without padding."""

    prompt_length: int
    """Tokens of the prompt, BOS and chat template included; 1 or more."""

    label: str
    """Name of the class."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.tokens):
            raise ValueError(
                f"prompt_length={self.prompt_length} is not allowed: the example has "
                f"{len(self.tokens)} tokens, and from 1 to all of them are the prompt's"
            )

    @property
    def response_length(self) -> int:
        """Tokens of the response; 0 where there is none."""
        return len(self.tokens) - self.prompt_length


def tokenize_example(
    example: LabelledExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepend_bos: bool = True,
    chat_template: bool = False,
) -> TokenizedExample:
    """Return the tokens of an example, with an exact boundary between prompt and response.

    Prompt and response are tokenised as one text, as the model would meet them. The boundary is
    exact if the tokens of the prompt alone are the first of these and none reaches into the
    response; then the prompt reads the same here and when the model is asked to go on from it.

    Args:
        example: the texts.
        tokenizer: the model's; it adds no special tokens of its own.
        prepend_bos: begin with BOS. Of no effect with `chat_template`, which brings its own.
        chat_template: make the prompt the user's turn, and let the response follow on it.

    Raises:
        ValueError: a token spans the boundary, or the tokenizer has no BOS or no chat template.

    Source: our choice.
    """
    start: list[int] = []
    prompt = example.prompt
    if chat_template:
        prompt = chat_prompt(prompt, tokenizer)
    elif prepend_bos:
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no BOS token: pass prepend_bos=False")
        start = [cast(int, tokenizer.bos_token_id)]
    prompt_ids, _ = _encode(prompt, tokenizer)
    ids, ends = _encode(prompt + example.response, tokenizer)
    n_same = 0
    while n_same < len(prompt_ids) and ids[n_same : n_same + 1] == [prompt_ids[n_same]]:
        n_same += 1
    # Equal ids can still overlap: the unknown token for "foo" is also that for "foobar".
    if n_same == len(prompt_ids) and ends and max(ends[:n_same], default=0) > len(prompt):
        n_same -= 1
    if n_same < len(prompt_ids):
        alone = tokenizer.convert_ids_to_tokens(prompt_ids[n_same:])
        merged = tokenizer.convert_ids_to_tokens(ids[n_same : len(prompt_ids)])
        raise ValueError(
            f"no exact boundary between the prompt, which ends in {prompt[-12:]!r}, and the "
            f"response, which starts with {example.response[:12]!r}: the prompt's last tokens "
            f"{alone} become {merged} when the response follows; move the white space or "
            "punctuation at the boundary to the other side"
        )
    return TokenizedExample(
        tokens=torch.tensor(start + ids, dtype=torch.long),
        prompt_length=len(start) + len(prompt_ids),
        label=example.label,
    )


def chat_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as the user's turn in the tokenizer's chat template, special tokens and all.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: pass chat_template=False, or set "
            "tokenizer.chat_template to the one that the model was trained with"
        )
    turns = [{"role": "user", "content": prompt}]
    written = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert isinstance(written, str)
    return written


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return ids and the character at which each ends; no ends where the tokenizer can't tell."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: what is too long is the caller's to refuse, not a warning.
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )
    return encoded["input_ids"], [end for _, end in encoded.get("offset_mapping", ())]


def tokenize_examples(
    examples: Iterable[LabelledExample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepend_bos: bool = True,
    chat_template: bool = False,
    max_length: int | None = None,
) -> list[TokenizedExample]:
    """Return the tokens of each example, in order; none is cut short.

    Args:
        examples: the texts.
        tokenizer: the model's.
        prepend_bos: see `tokenize_example`.
        chat_template: see `tokenize_example`.
        max_length: most tokens of an example, BOS included; None means any number.

    Raises:
        ValueError: there are no examples, one is too long, or one can't be tokenised exactly; the
            message gives its index.
    """
    tokenized = []
    for index, example in enumerate(examples):
        try:
            tokens = tokenize_example(
                example, tokenizer, prepend_bos=prepend_bos, chat_template=chat_template
            )
        except ValueError as error:
            raise ValueError(f"example {index}: {error}") from error
        length = len(tokens.tokens)
        if max_length is not None and length > max_length:
            raise ValueError(
                f"example {index} has {length} tokens, more than max_length={max_length}: shorten "
                "it or leave it out (max_length can't be more than the model's context)"
            )
        tokenized.append(tokens)
    if not tokenized:
        raise ValueError("there are no examples to tokenise: give at least one")
    return tokenized


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Examples as the rows of one tensor, each padded on the right."""

    tokens: Int[Tensor, "batch pos"]
    """Ids; columns at or after a row's length are padding (id 0), to be masked by `lengths`."""

    lengths: Int[Tensor, " batch"]
    """Tokens of each row without padding."""

    prompt_lengths: Int[Tensor, " batch"]
    """Tokens of the prompt of each row."""

    labels: tuple[str, ...]
    """Class of each row."""

    indices: tuple[int, ...]
    """Index of each row in the sequence that was batched."""


def length_sorted_batches(
    examples: Sequence[TokenizedExample], batch_size: int
) -> Iterator[TokenBatch]:
    """Return an iterator of batches, shortest examples first, so that there is little padding.

    Args:
        examples: each comes once; those of equal length keep their order.
        batch_size: rows of a batch, 1 or more; the last batch may have fewer.

    Raises:
        ValueError: a batch size below 1, at once and not at the first batch.

    Source: our choice.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not allowed: give 1 or more")
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    starts = range(0, len(order), batch_size)
    return (_batch(examples, order[start : start + batch_size]) for start in starts)


def _batch(examples: Sequence[TokenizedExample], indices: Sequence[int]) -> TokenBatch:
    rows = [examples[index] for index in indices]
    return TokenBatch(
        tokens=pad_sequence([row.tokens for row in rows], batch_first=True),
        lengths=torch.tensor([len(row.tokens) for row in rows]),
        prompt_lengths=torch.tensor([row.prompt_length for row in rows]),
        labels=tuple(row.label for row in rows),
        indices=tuple(indices),
    )


def check_classes(labels: Iterable[str], *, at_least: int = 2) -> dict[str, int]:
    """Return the number of examples of each class, Bloom's levels in their order, else by name.

    Args:
        labels: the class of each example.
        at_least: fewest examples of a class.

    Raises:
        ValueError: fewer than two classes, or a class with too few examples.

    Source: our choice.
    """
    counts = Counter(str(label) for label in labels)
    names = ordered_classes(counts)
    if len(names) < 2:
        raise ValueError(
            f"the labels name {len(names)} class(es), {list(names)}: a target needs at least "
            "two to tell apart; add examples of another class"
        )
    for name in names:
        if counts[name] < at_least:
            raise ValueError(
                f"class {name!r} has {counts[name]} example(s), fewer than at_least={at_least}: "
                "add examples of it or leave the class out"
            )
    return {name: counts[name] for name in names}


def ordered_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """Return the names of classes in order: Bloom's levels in theirs, others by name."""
    names = {str(name) for name in classes}
    bloom = [level.value for level in BloomLevel]
    return tuple(sorted(names, key=bloom.index if names <= set(bloom) else None))
