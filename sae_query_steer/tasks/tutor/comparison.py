"""The comparison on the tutor: cases, methods, scores, and the strength of each method."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.evaluation.generation import (
    Continuations,
    continuations,
    negative_log_likelihoods,
)
from sae_query_steer.intervention import Steerer
from sae_query_steer.metrics import wilson_interval
from sae_query_steer.tasks.tutor.corpus import Split, TutorCorpus, TutorPrompt
from sae_query_steer.tasks.tutor.judges import LevelClassifier, restated_level

MAX_NEW_TOKENS = 32
"""Longer than any feedback of the corpus."""

BATCH_SIZE = 120
"""Cases of one call of `generate`; more cost more each on small machines."""

MAX_PERPLEXITY_RATIO = 1.5
"""What a strength may cost to be chosen. Source: shared definition of the operating point."""

GRID_ENDS_AT_RATIO = 3.0
"""A grid of strengths ends where the perplexity ratio passes this."""

GRID_ENDS_BELOW_BEST = 0.05
"""... or where the target rate has fallen this far below its best."""

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


SteererOf: TypeAlias = Callable[[Sequence[Case], float], Steerer]
"""From cases and a strength to a steerer with a row for each case."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to get feedback of the target level."""

    name: str
    objective: str | None = None
    centroids: str | None = None
    """From which prompts the centroids were taken: "requested" or "open"."""

    span: str | None = None
    scope: str | None = None
    n_steps: int | None = None
    steerer: SteererOf | None = None
    """None for methods that change the prompt alone."""

    prompts: Callable[[Sequence[Case]], list[str]] | None = None
    """The prompts to continue; None means each case's own."""

    strengths: Sequence[float] = (0.0,)
    """Growing strengths to try, step sizes of the descents; one is enough where none is chosen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one method wrote at one strength, and how it was judged."""

    strength: float
    texts: list[str]
    judged: list[BloomLevel | None]
    """The classifier's judgement."""

    restated: list[BloomLevel | None]
    """The level of the note that was restated."""

    target: list[bool]
    grounded: list[bool] | None
    """Whether the target's note was restated; None where the prompts hold no notes."""

    success: list[bool]
    perplexity_ratio: float
    perplexity_ratio_original: float
    delta_q_ratio: float

    @property
    def target_rate(self) -> float:
        """Share of the texts that the classifier finds at the target level."""
        return sum(self.target) / len(self.target)

    @property
    def success_rate(self) -> float:
        """Share of the texts that are at the target level and grounded."""
        return sum(self.success) / len(self.success)


@dataclass(eq=False)
class CaseScorer:
    """Scores methods on the cases of several tasks, all in one batch."""

    model: Any
    cases: Mapping[Task, Sequence[Case]]
    classifier: LevelClassifier
    _known: dict[tuple[str, tuple[int, ...]], float] = field(init=False, default_factory=dict)
    """-log p of the tokens after a prompt: steers that succeed mostly write the same text."""

    _reference: dict[tuple[Task, str], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("requesting", "prompt"):
            for task, cases in self.cases.items():
                prompts = [getattr(case, name).text for case in cases]
                own = continuations(self.model, prompts, max_new_tokens=MAX_NEW_TOKENS)
                self._reference[task, name] = self._mean_loss(prompts, own.tokens)

    def score(
        self, method: Method, strength: float, tasks: Sequence[Task] = TASKS
    ) -> dict[Task, Outcome]:
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
        outcomes: dict[Task, Outcome] = {}
        start = 0
        for task in tasks:
            rows = slice(start, start + len(self.cases[task]))
            outcomes[task] = self._outcome(task, strength, written, judged, rows)
            start = rows.stop
        return outcomes

    def _written(self, method: Method, strength: float, cases: Sequence[Case]) -> Continuations:
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
        task: Task,
        strength: float,
        written: Continuations,
        judged: Sequence[BloomLevel | None],
        rows: slice,
    ) -> Outcome:
        cases, texts = self.cases[task], written.texts[rows]
        pairs = list(zip(texts, cases, strict=True))
        restated = [restated_level(text, case.prompt) for text, case in pairs]
        on_target = [a == c.target for a, c in zip(judged[rows], cases, strict=True)]
        grounded = None
        if cases[0].prompt.notes:
            grounded = [a == c.target for a, c in zip(restated, cases, strict=True)]
        changes = written.relative_changes[rows]
        return Outcome(
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

    def _ratio(self, task: Task, name: str, tokens: Sequence[Tensor]) -> float:
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


def strength_curves(scorer: CaseScorer, method: Method) -> dict[Task, list[Outcome]]:
    """Return a method's outcomes at growing strengths, for each task until more does not help.

    A curve ends where the target rate has fallen by more than 0.05 from its best, or the perplexity
    ratio passes 3, or the method's strengths are used up.
    """
    curves: dict[Task, list[Outcome]] = {task: [] for task in scorer.cases}
    for strength in method.strengths:
        going: list[Task] = [task for task, curve in curves.items() if not _ended(curve)]
        if not going:
            break
        for task, outcome in scorer.score(method, strength, going).items():
            curves[task].append(outcome)
    return curves


def _ended(curve: Sequence[Outcome]) -> bool:
    if not curve:
        return False
    best = max(outcome.target_rate for outcome in curve)
    fell = curve[-1].target_rate < best - GRID_ENDS_BELOW_BEST
    return fell or curve[-1].perplexity_ratio > GRID_ENDS_AT_RATIO


def operating_point(curve: Sequence[Outcome]) -> Outcome:
    """Return the outcome of most success at a perplexity ratio of 1.5 or less.

    Of equals the weaker; where no strength is that fluent, the most fluent one.
    """
    fluent = [o for o in curve if o.perplexity_ratio <= MAX_PERPLEXITY_RATIO]
    if not fluent:
        return min(curve, key=lambda o: o.perplexity_ratio)
    return max(fluent, key=lambda o: (o.success_rate, -o.strength))


def table_row(task: Task, method: Method, outcome: Outcome) -> dict[str, Any]:
    """Return one row of the table, as `results.json` holds it."""
    n = len(outcome.target)
    low, high = wilson_interval(sum(outcome.target), n)
    success_low, success_high = wilson_interval(sum(outcome.success), n)
    steered = method.steerer is not None
    return {
        "task": task,
        "method": method.name,
        "objective": method.objective,
        "centroids": method.centroids,
        "span": method.span,
        "scope": method.scope,
        "n_steps": method.n_steps,
        "step_size": outcome.strength if method.n_steps is not None else None,
        "delta_q_ratio": outcome.delta_q_ratio if steered else None,
        "n": n,
        "target_rate": outcome.target_rate,
        "ci_low": low,
        "ci_high": high,
        "grounded": None if outcome.grounded is None else sum(outcome.grounded) / n,
        "success": outcome.success_rate,
        "success_low": success_low,
        "success_high": success_high,
        "perplexity_ratio": outcome.perplexity_ratio,
        "perplexity_ratio_original": outcome.perplexity_ratio_original,
    }
