"""Tokenised examples: an exact boundary between prompt and response, and the span to read."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, overload

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_query_steer.arguments import check_kind, check_number, check_texts, listed
from sae_query_steer.data.examples import LabelledExample, Long, place_of
from sae_query_steer.data.prompts import ChatTemplate, bos_id, chat_prompt, tokenizer_of
from sae_query_steer.scopes.joins import check_scope, scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Span


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
                f"prompt_length must be 1 to the example's {len(self.tokens)} tokens, got "
                f"{self.prompt_length}"
            )

    @property
    def response_length(self) -> int:
        """Tokens of the response; 0 where there is none."""
        return len(self.tokens) - self.prompt_length


def tokenize_example(
    model: Any,
    example: LabelledExample,
    *,
    prepend_bos: bool | None = None,
    chat_template: ChatTemplate = False,
) -> TokenizedExample:
    """Return the tokens of an example, with an exact boundary between prompt and response.

    Prompt and response are tokenised as one text. The boundary is exact if this text begins with
    the tokens of the prompt alone and none of them reaches into the response: then the prompt has
    the same tokens as when the model generates from it.

    Args:
        model: gives the tokenizer.
        example: the texts.
        prepend_bos: begin with BOS; None means as the model does, see `bos_id`, but never twice. No
            effect with `chat_template`, which adds its own.
        chat_template: make the prompt the user's turn and the response the model's, after the turns
            that are given, if any.

    Raises:
        ValueError: a token spans the boundary, or the model has no tokenizer, no BOS or no chat
            template.
    """
    tokenizer = tokenizer_of(model)
    start: list[int] = []
    prompt = example.prompt
    if chat_template:
        prompt = chat_prompt(prompt, tokenizer, chat_template)
    elif (bos := bos_id(model, prepend_bos)) is not None:
        start = [bos]
    prompt_ids, _ = _encode(prompt, tokenizer)
    if start and prompt_ids[:1] == start:
        if prepend_bos:
            raise ValueError(
                f"the prompt begins with {tokenizer.bos_token!r}, so BOS would come twice: pass "
                "prepend_bos=None, or the text alone and chat_template=True"
            )
        start = []
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


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return ids and the character at which each ends; no ends if the tokenizer is a slow one."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: what is too long is the caller's to refuse, not a warning.
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )
    return encoded["input_ids"], [end for _, end in encoded.get("offset_mapping", ())]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedExamples(Sequence[TokenizedExample]):
    """Examples tokenised for a model, and how they are read: an immutable sequence."""

    examples: Sequence[TokenizedExample]
    """The examples, one or more."""

    span: Span = LastPromptToken()
    """The positions of each example that are read; each example must have one."""

    prepend_bos: bool = True
    """Whether the examples begin with BOS that is not part of a chat template."""

    chat_template: ChatTemplate = False
    """Whether the prompts are in the tokenizer's chat template, or the turns before them."""

    batch_size: int = 32
    """Examples of one forward pass."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", tuple(self.examples))
        if not isinstance(self.chat_template, bool):
            object.__setattr__(self, "chat_template", [dict(turn) for turn in self.chat_template])
        if not self.examples:
            raise ValueError("examples must be one or more, got none")
        for index, example in enumerate(self.examples):
            remedy = "use tokenize_examples(model, examples)"
            check_kind(f"example {index}", example, TokenizedExample, remedy)
        check_number("batch_size", self.batch_size, whole=True, least=1)
        check_scope(self.span, name="span")

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedExamples": ...
    def __getitem__(self, index: int | slice) -> "TokenizedExample | TokenizedExamples":
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    def __repr__(self) -> str:
        counts = ", ".join(f"{label} {n}" for label, n in Counter(self.labels).items())
        return f"TokenizedExamples({counts}; span {scope_name(self.span)})"

    @property
    def labels(self) -> tuple[str, ...]:
        """The class of each example."""
        return tuple(example.label for example in self.examples)

    def subset(self, indices: Iterable[int]) -> "TokenizedExamples":
        """Return the examples with these indices, in this order."""
        return replace(self, examples=[self.examples[i] for i in indices])

    def with_responses_of(self, n_tokens: int) -> "TokenizedExamples":
        """Return the examples with the first n tokens of their responses."""
        cut = [replace(e, tokens=e.tokens[: e.prompt_length + n_tokens]) for e in self.examples]
        return replace(self, examples=cut)


def _cut(
    tokens: TokenizedExample, n_ctx: int, long: Long, *, has_bos: bool
) -> TokenizedExample | None:
    """Return an example cut to a length; None where prompt or response would be lost."""
    excess = len(tokens.tokens) - n_ctx
    if long == "cut-end" and tokens.prompt_length <= n_ctx:
        return replace(tokens, tokens=tokens.tokens[:n_ctx])
    if long == "cut-start" and tokens.prompt_length - has_bos > excess:
        return replace(
            tokens,
            tokens=torch.cat([tokens.tokens[:has_bos], tokens.tokens[has_bos + excess :]]),
            prompt_length=tokens.prompt_length - excess,
        )
    return None


def check_tokenized(examples: object, *, name: str = "examples") -> None:
    """Raise unless a value is tokenised examples.

    Raises:
        TypeError: the message says how to tokenise.
    """
    check_kind(name, examples, TokenizedExamples, "use tokenize_examples(model, examples)")


def tokenize_examples(
    model: Any,
    examples: Iterable[LabelledExample],
    *,
    span: Span | None = None,
    prepend_bos: bool | None = None,
    chat_template: ChatTemplate = False,
    long: Long = "refuse",
    batch_size: int = 32,
) -> TokenizedExamples:
    """Return the tokens of each example, in order.

    Args:
        model: gives the tokenizer and the largest number of tokens, `n_ctx`.
        examples: the texts.
        span: the positions to read; None means the last prompt token.
        prepend_bos: begin every prompt with BOS; None means as `generate` does, which goes by
            `model.cfg.default_prepend_bos`; a prompt that begins with BOS gets no second one.
        chat_template: put every prompt into the tokenizer's chat template, as the user's turn; a
            list of messages, such as [{"role": "system", "content": "Be brief."}], comes before it.
        long: what to do with examples that are longer than the model's context: "refuse" all,
            "drop" them, or cut tokens off: "cut-start" from the prompt, after BOS, or "cut-end"
            from the response.
        batch_size: examples of one forward pass when they are read.

    Raises:
        ValueError: no examples, or some that are longer than the model's context or have no exact
            boundary; the message lists up to 10 with their index.

    Warns:
        UserWarning: prompts end in a space, which is then their last token.
    """
    if long not in get_args(Long):
        raise ValueError(f"long must be one of {get_args(Long)}, got {long!r}")
    tokenizer_of(model)
    check_texts("examples", examples)
    n_ctx = int(model.cfg.n_ctx)
    has_bos = not chat_template and bos_id(model, prepend_bos) is not None
    tokenized: list[TokenizedExample] = []
    problems: list[str] = []
    spaced: list[str] = []
    index = -1
    for index, example in enumerate(examples):
        check_kind(f"example {index}", example, LabelledExample, "read them with read_examples")
        try:
            tokens = tokenize_example(
                model, example, prepend_bos=prepend_bos, chat_template=chat_template
            )
        except ValueError as error:
            problems.append(f"{place_of(example, index)}: {error}")
            continue
        if len(tokens.tokens) > n_ctx:
            cut = None if long == "drop" else _cut(tokens, n_ctx, long, has_bos=has_bos)
            if cut is None:
                if long != "drop":
                    problems.append(
                        f"{place_of(example, index)} has {len(tokens.tokens)} tokens "
                        f"({tokens.prompt_length} of the prompt), more than the model's context of "
                        f"{n_ctx}; shorten it, or pass long='drop', 'cut-start' or 'cut-end'"
                    )
                continue
            tokens = cut
        if not chat_template and example.prompt.endswith((" ", "\t")):
            spaced.append(place_of(example, index))
        tokenized.append(tokens)
    if problems:
        raise ValueError(listed(problems))
    if not tokenized and index >= 0:
        raise ValueError(f"all {index + 1} examples are longer than the model's context of {n_ctx}")
    if spaced:
        warnings.warn(
            f"{len(spaced)} of {index + 1} prompts end in white space (the first is "
            f"{spaced[0]}), which is then their last prompt token: pass strip=True to "
            "read_examples (--strip), unless the response should follow a space",
            stacklevel=2,
        )
    return TokenizedExamples(
        examples=tokenized,
        span=LastPromptToken() if span is None else span,
        prepend_bos=has_bos,
        chat_template=chat_template,
        batch_size=batch_size,
    )
