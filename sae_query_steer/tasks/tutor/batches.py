"""What a training step of the tutor reads: texts, solved examples, and repeated random tokens."""

import random
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.tasks.tutor.corpus import SEPARATOR, TutorCorpus
from sae_query_steer.tasks.tutor.tokenizer import SPECIAL
from sae_query_steer.tasks.tutor.words import OPENERS

NO_LOSS = -100
"""Label of a token that is read but not learned."""

PERIODS = (8, 30)
"""Shortest and longest period of a repeated random sequence, in tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TutorBatch:
    """Rows of tokens with what is to be learned from them."""

    tokens: Int[Tensor, "row pos"]
    """Padded on the right."""

    labels: Int[Tensor, "row pos"]
    """The token where it is to be predicted, else `NO_LOSS`."""

    decisions: Bool[Tensor, "row pos"]
    """The token of each feedback that decides its level: the first, by which the note is chosen,
    or where there are no notes its verb."""

    visible: Bool[Tensor, "row pos pos"] | None
    """Which tokens each token may look at, where that is less than all before it; else None."""


Kind: TypeAlias = Literal["copies", "levels", "cues", "drills", "texts", "solved"]
"""Repeated random tokens; texts without notes; notes with a verb of the level as the last word;
notes with a request alone; whole texts; texts after solved examples."""

HIDING_SHARE = 0.75
"""Share of the batches of texts, drills and cues in which only the read-out sees the notes."""

ROWS = {"copies": 64, "levels": 40, "cues": 80, "drills": 80, "texts": 32, "solved": 8}
"""Rows of a batch of each kind, about as many tokens in each."""


def tutor_batch(
    kind: Kind, tokenizer: Any, *, seed: int, step: int, notes: bool, open_share: float
) -> TutorBatch:
    """Return the batch of a step: a function of the arguments alone.

    Args:
        kind: what its rows are.
        tokenizer: the tutor's.
        seed: of the training.
        step: of the training.
        notes: whether prompts hold notes.
        open_share: share of the texts that leave the level open.
    """
    draw = random.Random(f"{seed} {step}")
    corpus = TutorCorpus("train", seed=f"{seed} {step}", notes=notes)
    bare = TutorCorpus("train", seed=f"{seed} {step}", notes=False)
    rows = []
    for _ in range(ROWS[kind]):
        level = draw.choice(list(BloomLevel))
        match kind:
            case "copies":
                rows.append(_repeated(draw, len(tokenizer)))
            case "cues":
                rows.append(_text(tokenizer, [corpus.drill(level, cued=True)], decision=_FIRST))
            case "drills":
                rows.append(
                    _text(
                        tokenizer,
                        [corpus.drill(level, open_share=open_share / 2)],
                        decision=_FIRST if notes else _VERB,
                    )
                )
            case "levels":
                rows.append(_text(tokenizer, [bare.example(level)], decision=_VERB))
            case "texts":
                rows.append(
                    _text(
                        tokenizer,
                        [corpus.example(level, open_share=open_share)],
                        decision=_FIRST if notes else _VERB,
                    )
                )
            case "solved":
                examples = [corpus.example(level, open_share=1.0) for _ in range(3)]
                rows.append(_text(tokenizer, examples, decision=_FIRST if notes else _VERB))
            case _:
                assert_never(kind)
    hides = notes and kind in ("cues", "drills", "texts") and draw.random() < HIDING_SHARE
    tokens, labels, decisions = (
        pad_sequence([row[i] for row in rows], batch_first=True, padding_value=padding)
        for i, padding in enumerate((SPECIAL.index("<pad>"), NO_LOSS, False))
    )
    return TutorBatch(
        tokens=tokens,
        labels=labels,
        decisions=decisions,
        visible=_choice_at_read_out(tokenizer, tokens, decisions) if hides else None,
    )


def _choice_at_read_out(
    tokenizer: Any, tokens: Int[Tensor, "row pos"], decisions: Bool[Tensor, "row pos"]
) -> Bool[Tensor, "row pos pos"]:
    """Return a causal mask in which the notes are seen from the read-out on, and see nothing else.

    Otherwise the tokens of a request that follows the notes look its note up themselves, and notes
    that follow a request mark themselves as the one that is wanted: then the level reaches the
    read-out through values, and the query there chooses nothing. What follows the choice does not
    see the request either, so that it goes by the note that was chosen.
    """
    position = torch.arange(tokens.shape[1])
    read_out = decisions.int().argmax(1, keepdim=True) - 1
    noted = _sentence(tokenizer, tokens, ["Notes"], end="\n")
    asked = _sentence(tokenizer, tokens, _OPENING_WORDS, end=".")
    reads_notes = noted | (position >= read_out)
    hidden = noted[:, None, :] & ~reads_notes[:, :, None]
    hidden |= noted[:, :, None] & ~noted[:, None, :] & (position > 0)
    hidden |= (position > read_out)[:, :, None] & asked[:, None, :]
    return (position[:, None] >= position) & ~hidden


_FIRST, _VERB = 0, 2
"""Where a feedback is decided: "roots and examine them." by its first word, or by its verb."""

_OPENING_WORDS = sorted(
    {f"{space}{text.split()[0].rstrip(',')}" for text in OPENERS for space in ("", " ")}
)


def _sentence(
    tokenizer: Any, tokens: Int[Tensor, "row pos"], begins: list[str], *, end: str
) -> Bool[Tensor, "row pos"]:
    """Return the tokens from the first that begins a sentence up to the one that ends it."""
    position = torch.arange(tokens.shape[1])
    begin = torch.isin(tokens, torch.tensor(tokenizer.convert_tokens_to_ids(begins)))
    start = begin.int().argmax(1, keepdim=True)
    ends = (tokens == tokenizer.convert_tokens_to_ids(end)) & (position >= start)
    stop = ends.int().argmax(1, keepdim=True)
    return (position >= start) & (position <= stop) & begin.any(1, keepdim=True)


def _repeated(draw: random.Random, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random tokens that come twice and more; what is learned is all but the first time."""
    period = draw.randint(*PERIODS)
    once = [draw.randrange(len(SPECIAL), n_tokens) for _ in range(period)]
    length = 63
    tokens = torch.tensor([SPECIAL.index("<s>"), *(once * length)[:length]])
    labels = tokens.clone()
    # Which token is the first to come again can't be known.
    labels[: period + 2] = NO_LOSS
    return tokens, labels, torch.zeros(len(tokens), dtype=torch.bool)


def _text(tokenizer: Any, examples: list[Any], *, decision: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return examples one after the other; what is learned is the feedback."""
    tokens, labels, decisions = [SPECIAL.index("<s>")], [NO_LOSS], [False]
    for i, example in enumerate(examples):
        end = "" if i == len(examples) - 1 else SEPARATOR
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
