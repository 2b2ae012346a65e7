"""What a training step of the tutor reads: texts, solved examples, and repeated random tokens."""

import random
from typing import Any, Literal, TypeAlias, assert_never

from jaxtyping import Bool, Int
from torch import Tensor

from experiments.row_batches import (
    Row,
    TaskBatch,
    choice_at_read_out,
    padded,
    repeated_row,
    sentence,
    text_row,
)
from experiments.tutor.drills import DrillCorpus
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.toy.corpus import SEPARATOR
from sae_query_steer.toy.words import OPENERS

Kind: TypeAlias = Literal["copies", "levels", "cues", "drills", "texts", "solved"]
"""Repeated random tokens; texts without notes; notes with a verb of the level as the last word;
notes with a request alone; whole texts; texts after solved examples."""

HIDING_SHARE = 0.75
"""Share of the batches of texts, drills and cues in which only the read-out sees the notes."""

ROWS = {"copies": 64, "levels": 40, "cues": 80, "drills": 80, "texts": 32, "solved": 8}
"""Rows of a batch of each kind, about as many tokens in each."""


def tutor_batch(
    kind: Kind, tokenizer: Any, *, seed: int, step: int, notes: bool, open_share: float
) -> TaskBatch:
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
    corpus = DrillCorpus("train", seed=f"{seed} {step}", notes=notes)
    bare = DrillCorpus("train", seed=f"{seed} {step}", notes=False)
    rows = []
    for _ in range(ROWS[kind]):
        level = draw.choice(list(BloomLevel))
        match kind:
            case "copies":
                rows.append(repeated_row(draw, len(tokenizer)))
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
    tokens, labels, decisions = padded(rows)
    return TaskBatch(
        tokens=tokens,
        labels=labels,
        decisions=decisions,
        visible=_visible(tokenizer, tokens, decisions) if hides else None,
    )


def _visible(
    tokenizer: Any, tokens: Int[Tensor, "row pos"], decisions: Bool[Tensor, "row pos"]
) -> Bool[Tensor, "row pos pos"]:
    """Return the mask that leaves the choice of a note to the read-out's query."""
    noted = sentence(tokenizer, tokens, ["Notes"], end="\n")
    asked = sentence(tokenizer, tokens, _OPENING_WORDS, end=".")
    return choice_at_read_out(tokens, decisions, noted, asked)


_FIRST, _VERB = 0, 2
"""Where a feedback is decided: "roots and examine them." by its first word, or by its verb."""

_OPENING_WORDS = sorted(
    {f"{space}{text.split()[0].rstrip(',')}" for text in OPENERS for space in ("", " ")}
)


def _text(tokenizer: Any, examples: list[LabelledExample], *, decision: int) -> Row:
    return text_row(tokenizer, examples, decision=decision, separator=SEPARATOR)
