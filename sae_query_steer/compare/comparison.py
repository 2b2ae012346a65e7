"""Methods in one form, what they do at growing strengths, and the strength at which they count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.scores import distinct_n
from sae_query_steer.diagnostics.metrics import wilson_interval

MAX_PERPLEXITY_RATIO = 1.5
"""What a strength may cost to be chosen. Source: our choice."""

GRID_ENDS_AT_RATIO = 3.0
"""A grid of strengths ends where the perplexity ratio passes this."""

GRID_ENDS_BELOW_BEST = 0.05
"""... or where the target rate has fallen this far below its best."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to get texts of a target class from cases: by another prompt, or by steering."""

    name: str
    objective: str | None = None
    centroids: str | None = None
    """From which prompts the centroids were taken, such as "requested" or "open"."""

    span: str | None = None
    scope: str | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    """None means all."""

    n_steps: int | None = None
    steerer: Callable[[Sequence[SteeringCase], float], Any] | None = None
    """From cases and a strength to a steerer with a row for each case, in this order; None for
    methods that change the prompt alone."""

    prompts: Callable[[Sequence[SteeringCase]], list[str]] | None = None
    """The prompts to continue; None means each case's own."""

    strengths: Sequence[float] = (0.0,)
    """Growing strengths to try, step sizes of the descents; one is enough where none is chosen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one method wrote at one strength, and how it was judged."""

    strength: float
    texts: list[str]
    judged: Sequence[str | None]
    """The class that the judge finds in each text."""

    target: list[bool]
    """Whether that is the target."""

    success: list[bool]
    """What the task calls a success: the target, and where it knows more, that too."""

    perplexity_ratio: float
    """Perplexity of the texts given the prompts that request the target, over that of the model's
    own texts there; where no prompt requests it, given the prompts themselves."""

    perplexity_ratio_original: float
    """The same given the prompts themselves."""

    delta_q_ratio: float
    """Mean of |delta q| / |q|."""

    source: list[bool] | None = None
    """Whether the class is still the prompt's own; None where that is not known of every case."""

    specificity: float | None = None
    """Mean KL(unsteered || steered), in nats, of the next tokens of texts of the target class
    itself, where nothing should change much; None where nothing is steered or none is measured."""

    taken_up: Sequence[str | None] | None = None
    """The class whose part of its prompt each text takes up; None where nothing tells it."""

    grounded: list[bool] | None = None
    """Whether that is the target's part."""

    @property
    def target_rate(self) -> float:
        """Share of the texts that the judge finds to be of the target class."""
        return sum(self.target) / len(self.target)

    @property
    def success_rate(self) -> float:
        """Share of the texts that are a success."""
        return sum(self.success) / len(self.success)


@runtime_checkable
class Scorer(Protocol):
    """Scores methods on the cases of some tasks."""

    @property
    def cases(self) -> Mapping[str, Sequence[SteeringCase]]:
        """The cases of each task."""
        ...

    def score(self, method: Method, strength: float, tasks: Sequence[str]) -> Mapping[str, Outcome]:
        """Return what a method does at a strength, task by task."""
        ...


def strength_curves(scorer: Scorer, method: Method) -> dict[str, list[Outcome]]:
    """Return a method's outcomes at growing strengths, for each task until more does not help.

    A curve ends where the target rate has fallen by more than 0.05 from its best, or the perplexity
    ratio passes 3, or the method's strengths are used up.
    """
    curves: dict[str, list[Outcome]] = {task: [] for task in scorer.cases}
    for strength in method.strengths:
        going = [task for task, curve in curves.items() if not _ended(curve)]
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


def what_was_done(task: str, method: Method) -> dict[str, Any]:
    """Return the columns that say which row of a table is which."""
    return {
        "task": task,
        "method": method.name,
        "objective": method.objective,
        "centroids": method.centroids,
        "span": method.span,
        "scope": method.scope,
        "layers": "" if method.layers is None else ",".join(map(str, method.layers)),
        "heads": "all" if method.heads is None else ",".join(map(str, method.heads)),
    }


def outcome_row(task: str, method: Method, outcome: Outcome) -> dict[str, Any]:
    """Return one row of a table: what was done, and what it scored, with 95 % intervals."""
    n = len(outcome.target)
    low, high = wilson_interval(sum(outcome.target), n)
    success_low, success_high = wilson_interval(sum(outcome.success), n)
    steered, told, source = method.steerer is not None, outcome.grounded, outcome.source
    return what_was_done(task, method) | {
        "n_steps": method.n_steps,
        "step_size": outcome.strength if method.n_steps is not None else None,
        "delta_q_ratio": outcome.delta_q_ratio if steered else None,
        "n": n,
        "target_rate": outcome.target_rate,
        "ci_low": low,
        "ci_high": high,
        "source_rate": None if source is None else sum(source) / n,
        "grounded": None if told is None else sum(told) / n,
        "success": outcome.success_rate,
        "success_low": success_low,
        "success_high": success_high,
        "perplexity_ratio": outcome.perplexity_ratio,
        "perplexity_ratio_original": outcome.perplexity_ratio_original,
        "specificity": outcome.specificity,
        **{f"distinct_{k}": distinct_n(outcome.texts, k) for k in (1, 2, 3)},
    }
