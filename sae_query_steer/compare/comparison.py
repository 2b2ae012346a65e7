"""The comparison: every method on the same cases, each at its own best strength."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sae_query_steer.compare.methods import Method, random_methods
from sae_query_steer.compare.scorer import Outcome, TextScorer
from sae_query_steer.compare.scores import distinct_n
from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.models.launch import ALONE, Ranks

MAX_PERPLEXITY_RATIO = 1.5
"""Highest perplexity ratio of a strength that is chosen. Source: our choice."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The result of a comparison."""

    rows: pd.DataFrame
    """Every method on the test cases at the strength chosen for it, a row for each."""

    curves: pd.DataFrame
    """Every strength that was tried on the validation cases."""

    texts: pd.DataFrame
    """Every text on the test cases, with the class that it is judged to be and that it takes up,
    and whether it is a success."""

    sites: pd.DataFrame | None = None
    """Separability, interchange effect and verdict by layer, measured before steering."""

    saes: pd.DataFrame | None = None
    """Metrics of the SAEs by layer, if they were trained for the comparison."""

    judge: Mapping[str, float] = field(default_factory=dict)
    """Held-out scores of the judge, see `Judge`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, seeds, and what else the numbers depend on."""


def compare_methods(
    validation: TextScorer,
    test: TextScorer,
    methods: Sequence[Method],
    *,
    control_seeds: Sequence[int] = (0, 1, 2),
    ranks: Ranks = ALONE,
) -> Comparison:
    """Return the result of each method at its best strength.

    Strengths are tried on the validation cases, growing until the target rate has fallen by 0.05
    or the perplexity ratio passes 3; the one of most success at a perplexity ratio of 1.5 or less
    is used on the test cases. Random directions, as long as the change of the descent that did
    best on validation, are the negative control. A scorer with a log continues a stopped run.

    Args:
        validation: scores the cases on which strengths are chosen.
        test: scores the cases of the table, which should be others.
        methods: what is compared.
        control_seeds: of the random directions.
        ranks: the processes of a launch; each scores its share of the methods, and reads the
            outcomes of the others from the log, which both scorers must have.

    Returns:
        The same in every process.

    Raises:
        RuntimeError: another process has ended, or can't be reached.
        ValueError: no methods, tasks that differ, or several processes without a log.
    """
    if not methods:
        raise ValueError("methods must hold at least one, got []")
    tasks = list(validation.cases)
    if tasks != list(test.cases):
        raise ValueError(
            f"validation and test must have the same tasks, got {tasks} and {list(test.cases)}"
        )
    logs = [scorer.log for scorer in (validation, test) if scorer.log is not None]
    if ranks.n > 1 and len(logs) < 2:
        raise ValueError(f"scorers must have a log for {ranks.n} processes, got None")

    def each(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
        own = work(ranks.own(items))
        if ranks.n == 1:
            return own
        ranks.wait()
        for log in logs:
            log.read_others()
        return work(items)  # all are in the log

    def curves_of(some: Sequence[Method]) -> list[dict[str, list[Outcome]] | None]:
        several = [m for m in some if len(m.strengths) > 1 or m.objective is not None]
        found = dict(zip(map(id, several), strength_curves(validation, several), strict=True))
        return [found.get(id(method)) for method in some]

    chosen: list[tuple[Method, dict[str, float]]] = []
    curves = []
    best: tuple[float, int] | None = None
    for method, found in zip(methods, each(curves_of, methods), strict=True):
        strengths = dict.fromkeys(tasks, float(method.strengths[0]))
        if found is not None:
            curves += [outcome_row(t, method, o) for t, curve in found.items() for o in curve]
            points = {task: operating_point(curve) for task, curve in found.items()}
            strengths = {task: point.strength for task, point in points.items()}
            success = sum(point.success_rate for point in points.values())
            if method.objective is not None and (best is None or success > best[0]):
                best = success, len(chosen)
        chosen.append((method, strengths))
    if best is not None:
        model_of, strengths = chosen[best[1]]
        chosen += [(control, strengths) for control in random_methods(model_of, control_seeds)]

    def tested(some: Sequence[tuple[Method, dict[str, float]]]) -> list[dict[str, Outcome]]:
        conditions = [
            (method, strength, [task for task in tasks if strengths[task] == strength])
            for method, strengths in some
            for strength in sorted(set(strengths.values()))
        ]
        scored = iter(test.score_all(conditions, description="Comparing methods"))
        found = []
        for _, strengths in some:
            parts = [next(scored) for _ in set(strengths.values())]
            found.append({task: outcome for part in parts for task, outcome in part.items()})
        return found

    rows: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for (method, _), outcomes in zip(chosen, each(tested, chosen), strict=True):
        for task, outcome in outcomes.items():
            rows.append(outcome_row(task, method, outcome))
            texts += _text_rows(task, method, outcome)

    def table(some: list[dict[str, Any]]) -> pd.DataFrame:
        ordered = sorted(some, key=lambda row: tasks.index(row["task"]))
        return pd.DataFrame(ordered)

    return Comparison(
        rows=table(rows), curves=table(curves), texts=table(texts), judge=test.judge.held_out
    )


def strength_curves(
    scorer: TextScorer, methods: Sequence[Method]
) -> list[dict[str, list[Outcome]]]:
    """Return the outcomes of methods at growing strengths, by task.

    A curve ends where the target rate has fallen by more than 0.05 from its best, or the perplexity
    ratio passes 3, or the method's strengths are used up. The next strengths of all methods are
    measured together.
    """
    curves: list[dict[str, list[Outcome]]] = [{task: [] for task in scorer.cases} for _ in methods]
    going = {i: list(scorer.cases) for i in range(len(methods))}
    for step in range(max((len(method.strengths) for method in methods), default=0)):
        going = {i: some for i, some in going.items() if some and step < len(methods[i].strengths)}
        if not going:
            break
        conditions = [(methods[i], methods[i].strengths[step], some) for i, some in going.items()]
        description = f"Choosing strengths, round {step + 1}"
        scored = scorer.score_all(conditions, description=description)
        for i, outcomes in zip(going, scored, strict=True):
            for task, outcome in outcomes.items():
                curves[i][task].append(outcome)
                best = max(other.target_rate for other in curves[i][task])
                if outcome.target_rate < best - 0.05 or outcome.perplexity_ratio > 3:
                    going[i] = [other for other in going[i] if other != task]
    return curves


def operating_point(curve: Sequence[Outcome]) -> Outcome:
    """Return the outcome of most success at a perplexity ratio of 1.5 or less.

    Of equals the weaker; if no strength is that fluent, the most fluent one.
    """
    fluent = [o for o in curve if o.perplexity_ratio <= MAX_PERPLEXITY_RATIO]
    if not fluent:
        return min(curve, key=lambda o: o.perplexity_ratio)
    return max(fluent, key=lambda o: (o.success_rate, -o.strength))


def outcome_row(task: str, method: Method, outcome: Outcome) -> dict[str, Any]:
    """Return one row of a table: the method and its scores, with 95 % intervals."""
    n = len(outcome.target)
    low, high = wilson_interval(sum(outcome.target), n)
    success_low, success_high = wilson_interval(sum(outcome.success), n)
    grounded, source = outcome.grounded, outcome.source
    return {
        "task": task,
        **method.columns(),
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


def _text_rows(task: str, method: Method, outcome: Outcome) -> list[dict[str, Any]]:
    taken_up = outcome.taken_up or [None] * len(outcome.cases)
    found = zip(outcome.texts, outcome.judged, taken_up, outcome.success, strict=True)
    return [
        {
            "task": task,
            **method.columns(),
            **{name: getattr(case, name) for name in ("prompt", "source", "target")},
            **dict(zip(("text", "judged", "taken_up", "success"), own, strict=True)),
        }
        for case, own in zip(outcome.cases, found, strict=True)
    ]
