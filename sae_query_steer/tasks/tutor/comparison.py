"""The comparison on the tutor: its cases, and how what is written there scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.evaluation.comparison import Method, Outcome, outcome_row
from sae_query_steer.evaluation.generation import (
    Continuations,
    continuations,
    negative_log_likelihoods,
)
from sae_query_steer.tasks.tutor.corpus import Split, TutorCorpus, TutorPrompt
from sae_query_steer.tasks.tutor.judges import LevelClassifier, restated_level

MAX_NEW_TOKENS = 32
"""Longer than any feedback of the corpus."""

BATCH_SIZE = 120
"""Cases of one call of `generate`; more cost more each on small machines."""

Task: TypeAlias = Literal["open", "redirect"]
TASKS: tuple[Task, ...] = ("open", "redirect")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt and the level that its feedback is to have."""

    prompt: TutorPrompt
    """Open, or with a request for another level than the target."""

    requesting: TutorPrompt
    """The same prompt with a request for the target."""

    target: BloomLevel


def tutor_cases(task: Task, split: Split, n: int, *, seed: int, notes: bool = True) -> list[Case]:
    """Return n cases that go through the targets, and the other levels as sources, in turn.

    Args:
        task: "open" prompts leave the level open, "redirect" prompts ask for another one.
        split: whose lessons, notes and phrasings.
        n: how many.
        seed: of the prompts.
        notes: whether the prompts hold notes.
    """
    corpus = TutorCorpus(split, seed=seed, notes=notes)
    levels = list(BloomLevel)
    cases = []
    for i in range(n):
        target = levels[i % 6]
        source = None if task == "open" else levels[(i + 1 + i // 6 % 5) % 6]
        prompt = corpus.prompt(source)
        requesting = prompt.with_request(target, *corpus.request(target))
        cases.append(Case(prompt=prompt, requesting=requesting, target=target))
    return cases


@dataclass(frozen=True, kw_only=True, eq=False)
class TutorOutcome(Outcome):
    """What one method wrote at one strength, judged by both judges."""

    restated: Sequence[BloomLevel | None]
    """The level of the note that was restated."""

    grounded: list[bool] | None
    """Whether the target's note was restated; None where the prompts hold no notes."""


@dataclass(eq=False)
class CaseScorer:
    """Scores methods on the cases of several tasks, all in one batch."""

    model: Any
    cases: Mapping[str, Sequence[Case]]
    classifier: LevelClassifier
    _known: dict[tuple[str, tuple[int, ...]], float] = field(init=False, default_factory=dict)
    """-log p of the tokens after a prompt: steers that succeed mostly write the same text."""

    _reference: dict[tuple[str, str], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("requesting", "prompt"):
            for task, cases in self.cases.items():
                prompts = [getattr(case, name).text for case in cases]
                own = continuations(self.model, prompts, max_new_tokens=MAX_NEW_TOKENS)
                self._reference[task, name] = self._mean_loss(prompts, own.tokens)

    def score(
        self, method: Method[Case], strength: float, tasks: Sequence[str] = TASKS
    ) -> dict[str, TutorOutcome]:
        """Return what a method does at a strength, task by task."""
        every = [case for task in tasks for case in self.cases[task]]
        parts = [
            self._written(method, strength, every[start : start + BATCH_SIZE])
            for start in range(0, len(every), BATCH_SIZE)
        ]
        written = Continuations(
            texts=[text for part in parts for text in part.texts],
            tokens=[row for part in parts for row in part.tokens],
            relative_changes=[change for part in parts for change in part.relative_changes],
        )
        judged = self.classifier.levels(written.texts)
        outcomes: dict[str, TutorOutcome] = {}
        start = 0
        for task in tasks:
            rows = slice(start, start + len(self.cases[task]))
            outcomes[task] = self._outcome(task, strength, written, judged, rows)
            start = rows.stop
        return outcomes

    def _written(
        self, method: Method[Case], strength: float, cases: Sequence[Case]
    ) -> Continuations:
        prompts = [case.prompt.text for case in cases]
        if method.prompts is not None:
            prompts = method.prompts(cases)
        return continuations(
            self.model,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            steerer=None if method.steerer is None else method.steerer(cases, strength),
            batch_size=len(prompts),
        )

    def _outcome(
        self,
        task: str,
        strength: float,
        written: Continuations,
        judged: Sequence[BloomLevel | None],
        rows: slice,
    ) -> TutorOutcome:
        cases, texts = self.cases[task], written.texts[rows]
        pairs = list(zip(texts, cases, strict=True))
        restated = [restated_level(text, case.prompt) for text, case in pairs]
        on_target = [a == c.target for a, c in zip(judged[rows], cases, strict=True)]
        grounded = None
        if cases[0].prompt.notes:
            grounded = [a == c.target for a, c in zip(restated, cases, strict=True)]
        changes = written.relative_changes[rows]
        return TutorOutcome(
            strength=strength,
            texts=texts,
            judged=list(judged[rows]),
            restated=restated,
            target=on_target,
            grounded=grounded,
            success=[a and b for a, b in zip(on_target, grounded or on_target, strict=True)],
            perplexity_ratio=self._ratio(task, "requesting", written.tokens[rows]),
            perplexity_ratio_original=self._ratio(task, "prompt", written.tokens[rows]),
            delta_q_ratio=sum(changes) / len(changes),
        )

    def _ratio(self, task: str, name: str, tokens: Sequence[Tensor]) -> float:
        prompts = [getattr(case, name).text for case in self.cases[task]]
        return math.exp(self._mean_loss(prompts, tokens) - self._reference[task, name])

    def _mean_loss(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        keys = [(p, tuple(row.tolist())) for p, row in zip(prompts, tokens, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            found = negative_log_likelihoods(
                self.model, [prompts[i] for i in new], [tokens[i] for i in new]
            )
            self._known |= {keys[i]: loss for i, loss in zip(new, found, strict=True)}
        return sum(self._known[key] for key in keys) / sum(map(len, tokens))


def table_row(task: str, method: Method[Case], outcome: TutorOutcome) -> dict[str, Any]:
    """Return one row of the table, as `results.json` holds it."""
    row = outcome_row(task, method, outcome)
    told = outcome.grounded
    grounded = None if told is None else sum(told) / len(told)
    # Where the reader looks for it: before the success that it is a part of.
    return {
        key: value
        for name, score in row.items()
        for key, value in ([("grounded", grounded)] if name == "success" else []) + [(name, score)]
    }
