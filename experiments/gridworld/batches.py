"""What a training step of the gridworld reads: texts, drills, and repeated random tokens."""

import random
from typing import Any, Literal, TypeAlias, assert_never

import torch

from experiments.gridworld.corpus import GridCorpus
from experiments.gridworld.words import OPENERS, Aim
from experiments.row_batches import (
    TaskBatch,
    choice_at_read_out,
    one_look,
    padded,
    repeated_row,
    sentence,
    text_row,
)

Kind: TypeAlias = Literal["copies", "cues", "drills", "texts"]
"""Repeated random tokens; routes with what was seen along one as the last words; routes with a
request alone; whole texts."""

ROWS = {"copies": 64, "cues": 48, "drills": 48, "texts": 32}
"""Rows of a batch of each kind."""

HIDING_SHARE = 0.75
"""Share of the batches of texts, drills and cues in which one query has to choose the route."""


def grid_batch(
    kind: Kind, tokenizer: Any, *, seed: int, step: int, open_share: float, look_layer: int | None
) -> TaskBatch:
    """Return the batch of a step: a function of the arguments alone.

    Args:
        kind: what its rows are.
        tokenizer: the gridworld's.
        seed: of the training.
        step: of the training.
        open_share: share of the texts that leave the aim open.
        look_layer: whose query at the read-out is to choose the route, in the batches that hide,
            and which copies the random tokens; None leaves the layer open.
    """
    draw = random.Random(f"{seed} {step}")
    corpus = GridCorpus("train", seed=f"{seed} {step}")
    if kind == "copies":
        rows = [repeated_row(draw, len(tokenizer)) for _ in range(ROWS[kind])]
    else:
        rows = []
        for _ in range(ROWS[kind]):
            aim = draw.choice(list(Aim))
            match kind:
                case "cues":
                    example = corpus.drill(aim, cued=True)
                case "drills":
                    example = corpus.drill(aim)
                case "texts":
                    example = corpus.example(aim, open_share=open_share)
                case _:
                    assert_never(kind)
            rows.append(text_row(tokenizer, [example], decision=0, separator=""))
    tokens, labels, decisions = padded(rows)
    if kind == "copies" and look_layer is not None:
        own = torch.eye(tokens.shape[1], dtype=torch.bool).expand(len(tokens), -1, -1)
        before = torch.ones_like(own).tril()
        later = (*[own] * (look_layer - 1), before, own)
        return TaskBatch(
            tokens=tokens, labels=labels, decisions=decisions, visible=before, later=later
        )
    hides = kind != "copies" and draw.random() < HIDING_SHARE
    if not hides:
        return TaskBatch(tokens=tokens, labels=labels, decisions=decisions, visible=None)
    shown = sentence(tokenizer, tokens, ["Routes"], end=".")
    asked = sentence(tokenizer, tokens, _OPENING_WORDS, end=".")
    visible = choice_at_read_out(tokens, decisions, shown, asked)
    if look_layer is None:
        return TaskBatch(tokens=tokens, labels=labels, decisions=decisions, visible=visible)
    first, *later = one_look(visible, decisions, shown, asked, layer=look_layer)
    return TaskBatch(
        tokens=tokens, labels=labels, decisions=decisions, visible=first, later=tuple(later)
    )


_OPENING_WORDS = sorted({text.split()[0] for text in OPENERS})
