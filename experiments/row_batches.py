"""Rows of tokens for training a tiny model: responses after prompts, and repeated random tokens.

Shared by the tasks, whose texts differ while what is learned of them, and what a token may look
at meanwhile, is the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.word_tokens import SPECIAL
from sae_query_steer.data.examples import LabelledExample

NO_LOSS = -100
"""Label of a token that is read but not learned."""

PERIODS = (8, 30)
"""Shortest and longest period of a repeated random sequence, in tokens."""

Row: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Tokens, labels and decisions of one row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskBatch:
    """Rows of tokens with what is to be learned from them."""

    tokens: Int[Tensor, "row pos"]
    """Padded on the right."""

    labels: Int[Tensor, "row pos"]
    """The token where it is to be predicted, else `NO_LOSS`."""

    decisions: Bool[Tensor, "row pos"]
    """The token of each response that decides its class."""

    visible: Bool[Tensor, "row pos pos"] | None
    """Which tokens each token may look at, where that is less than all before it; else None."""

    later: tuple[Bool[Tensor, "row pos pos"], ...] = ()
    """What takes its place in layer 1, 2 and so on, the last of them in all layers after; empty
    where it is the same in all. Given only with `visible`."""


def padded(rows: Sequence[Row]) -> Row:
    """Return rows as one, padded on the right."""
    tokens, labels, decisions = (
        pad_sequence([row[i] for row in rows], batch_first=True, padding_value=padding)
        for i, padding in enumerate((SPECIAL.index("<pad>"), NO_LOSS, False))
    )
    return tokens, labels, decisions


def choice_at_read_out(
    tokens: Int[Tensor, "row pos"],
    decisions: Bool[Tensor, "row pos"],
    shown: Bool[Tensor, "row pos"],
    asked: Bool[Tensor, "row pos"],
) -> Bool[Tensor, "row pos pos"]:
    """Return a causal mask: what is shown is seen from the read-out on, and sees only itself.

    Otherwise the tokens of a request that follows what is shown look their part of it up
    themselves, and parts that follow a request mark themselves as the one that is wanted: then the
    class reaches the read-out through values, and the query there chooses nothing. What follows the
    choice does not see the request either, so that it goes by the part that was chosen.

    Args:
        tokens: of the rows.
        decisions: the token that chooses; the read-out is the one before it.
        shown: the tokens among whose parts is chosen.
        asked: the tokens of the request.
    """
    position = torch.arange(tokens.shape[1])
    read_out = decisions.int().argmax(1, keepdim=True) - 1
    reads = shown | (position >= read_out)
    hidden = shown[:, None, :] & ~reads[:, :, None]
    hidden |= shown[:, :, None] & ~shown[:, None, :] & (position > 0)
    hidden |= (position > read_out)[:, :, None] & asked[:, None, :]
    return (position[:, None] >= position) & ~hidden


def one_look(
    visible: Bool[Tensor, "row pos pos"],
    decisions: Bool[Tensor, "row pos"],
    shown: Bool[Tensor, "row pos"],
    asked: Bool[Tensor, "row pos"],
    *,
    layer: int,
) -> tuple[Bool[Tensor, "row pos pos"], ...]:
    """Return masks of layer 0, 1 and so on with which one layer's query has to make the choice.

    The read-out sees the request in the layers before, what is shown in this one, and neither in
    those after; no other token sees the request. Otherwise one head can always look for one part
    and another for another, with the words of a request as keys that draw the wrong one's look
    away, or with a choice between two parts found already: then no query has to change.

    Args:
        visible: what may be seen at all, from `choice_at_read_out`.
        decisions: the token that chooses; the read-out is the one before it.
        shown: the tokens among whose parts is chosen.
        asked: the tokens of the request.
        layer: whose query chooses; 1 or more.

    Returns:
        A mask for each layer up to this one, and one for all after.
    """
    position = torch.arange(visible.shape[1])
    read_out = position == decisions.int().argmax(1, keepdim=True) - 1
    visible = visible & ~((~asked & ~read_out)[:, :, None] & asked[:, None, :])
    reading = visible & ~(read_out[:, :, None] & shown[:, None, :])
    looking = visible & ~(read_out[:, :, None] & asked[:, None, :])
    return (*[reading] * layer, looking, reading & looking)


def sentence(
    tokenizer: Any, tokens: Int[Tensor, "row pos"], begins: Sequence[str], *, end: str
) -> Bool[Tensor, "row pos"]:
    """Return the tokens from the first that begins a sentence up to the one that ends it."""
    position = torch.arange(tokens.shape[1])
    begin = torch.isin(tokens, torch.tensor(tokenizer.convert_tokens_to_ids(list(begins))))
    start = begin.int().argmax(1, keepdim=True)
    ends = (tokens == tokenizer.convert_tokens_to_ids(end)) & (position >= start)
    stop = ends.int().argmax(1, keepdim=True)
    return (position >= start) & (position <= stop) & begin.any(1, keepdim=True)


def repeated_row(draw: random.Random, n_tokens: int) -> Row:
    """Return random tokens that come twice and more; what is learned is all but the first time."""
    period = draw.randint(*PERIODS)
    once = [draw.randrange(len(SPECIAL), n_tokens) for _ in range(period)]
    length = 63
    tokens = torch.tensor([SPECIAL.index("<s>"), *(once * length)[:length]])
    labels = tokens.clone()
    # Which token is the first to come again can't be known.
    labels[: period + 2] = NO_LOSS
    return tokens, labels, torch.zeros(len(tokens), dtype=torch.bool)


def text_row(
    tokenizer: Any, examples: Sequence[LabelledExample], *, decision: int, separator: str
) -> Row:
    """Return examples one after the other; what is learned is the response.

    Args:
        tokenizer: of the task.
        examples: one or more.
        decision: which token of a response decides its class.
        separator: what stands between two examples, and is learned with the response before it.
    """
    tokens, labels, decisions = [SPECIAL.index("<s>")], [NO_LOSS], [False]
    for i, example in enumerate(examples):
        end = "" if i == len(examples) - 1 else separator
        prompt, response = tokenizer(
            [example.prompt, example.response + end], add_special_tokens=False
        )["input_ids"]
        tokens += prompt + response
        labels += [NO_LOSS] * len(prompt) + response
        decisions += [False] * len(prompt) + [i == decision for i in range(len(response))]
    eos = SPECIAL.index("</s>")
    return (
        torch.tensor([*tokens, eos]),
        torch.tensor([*labels, eos]),
        torch.tensor([*decisions, False]),
    )
