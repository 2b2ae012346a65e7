"""What a method wrote, and what it scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.methods import Method
from sae_query_steer.compare.scores import distinct_n
from sae_query_steer.diagnostics.metrics import wilson_interval

MAX_PERPLEXITY_RATIO = 1.5
"""Highest perplexity ratio of a strength that is chosen. Source: our choice."""

GRID_ENDS_AT_RATIO = 3.0
"""A grid of strengths ends where the perplexity ratio passes this."""

GRID_ENDS_BELOW_BEST = 0.05
"""... or where the target rate has fallen this far below its best."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one method wrote on some cases at one strength, and how it was judged."""

    cases: Sequence[SteeringCase]
    strength: float
    texts: Sequence[str]
    """One for each case, as the sequences below."""

    judged: Sequence[str | None]
    """The class that the judge finds in each text."""

    perplexity_ratio: float
    """Perplexity of the texts given the prompts that request the target, over that of the model's
    own texts there; where no prompt requests it, given the prompts themselves."""

    perplexity_ratio_original: float
    """The same given the prompts themselves."""

    delta_q_ratio: float
    """Mean of |delta q| / |q|."""

    specificity: float | None = None
    """Mean KL(unsteered || steered), in nats, of the next tokens of the model's texts of the target
    class, which should change little; None where nothing is steered or none is measured."""

    taken_up: Sequence[str | None] | None = None
    """The class whose part of its prompt each text takes up; None without a grounding judge."""

    @property
    def target(self) -> list[bool]:
        """Whether the judge finds the target class."""
        return _equal(self.judged, [case.target for case in self.cases])

    @property
    def source(self) -> list[bool] | None:
        """Whether the class is still the prompt's own; None if a case's source is unknown."""
        sources = [case.source for case in self.cases]
        return None if None in sources else _equal(self.judged, sources)

    @property
    def grounded(self) -> list[bool] | None:
        """Whether the text takes up the target's part; None without a grounding judge."""
        targets = [case.target for case in self.cases]
        return None if self.taken_up is None else _equal(self.taken_up, targets)

    @property
    def success(self) -> list[bool]:
        """Whether the text is of the target class and, where that is judged, grounded."""
        return [a and b for a, b in zip(self.target, self.grounded or self.target, strict=True)]

    @property
    def target_rate(self) -> float:
        """Share of the texts of the target class."""
        return sum(self.target) / len(self.target)

    @property
    def success_rate(self) -> float:
        """Share of the texts that are a success."""
        return sum(self.success) / len(self.success)


def _equal(found: Sequence[str | None], wanted: Sequence[str | None]) -> list[bool]:
    return [a == b for a, b in zip(found, wanted, strict=True)]


def curve_ended(curve: Sequence[Outcome]) -> bool:
    """Return whether greater strengths are not worth trying after the outcomes of a curve."""
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


def row_key(task: str, method: Method) -> dict[str, Any]:
    """Return the columns that tell the rows of a table apart."""
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
    grounded, source = outcome.grounded, outcome.source
    return row_key(task, method) | {
        "n_steps": method.n_steps,
        "step_size": outcome.strength if method.n_steps is not None else None,
        "delta_q_ratio": outcome.delta_q_ratio if method.steerer is not None else None,
        "n": n,
        "target_rate": outcome.target_rate,
        "ci_low": low,
        "ci_high": high,
        "source_rate": None if source is None else sum(source) / n,
        "grounded": None if grounded is None else sum(grounded) / n,
        "success": outcome.success_rate,
        "success_low": success_low,
        "success_high": success_high,
        "perplexity_ratio": outcome.perplexity_ratio,
        "perplexity_ratio_original": outcome.perplexity_ratio_original,
        "specificity": outcome.specificity,
        **{f"distinct_{k}": distinct_n(outcome.texts, k) for k in (1, 2, 3)},
    }


def text_rows(task: str, method: Method, outcome: Outcome) -> list[dict[str, Any]]:
    """Return a row for each text of an outcome."""
    return [
        row_key(task, method)
        | {"prompt": case.prompt, "source": case.source, "target": case.target}
        | {"text": text, "judged": judged, "taken_up": taken_up, "success": success}
        for case, text, judged, taken_up, success in zip(
            outcome.cases,
            outcome.texts,
            outcome.judged,
            outcome.taken_up or [None] * len(outcome.cases),
            outcome.success,
            strict=True,
        )
    ]
