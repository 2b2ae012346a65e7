"""The comparison: every method on the same cases, each at its own best strength."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from sae_query_steer.compare.methods import Method, random_methods
from sae_query_steer.compare.outcomes import (
    Outcome,
    curve_ended,
    operating_point,
    outcome_row,
    text_rows,
)
from sae_query_steer.compare.scorer import TextScorer


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What a comparison found."""

    rows: pd.DataFrame
    """Every method on the test cases at the strength that was chosen for it, a row for each."""

    curves: pd.DataFrame
    """Every strength that was tried on the validation cases."""

    texts: pd.DataFrame
    """Every text on the test cases: method, prompt, source, target, text, the class that it is
    judged to be and that it takes up, and whether it is a success."""

    sites: pd.DataFrame | None = None
    """Separability, interchange effect and verdict by layer, measured before steering."""

    saes: pd.DataFrame | None = None
    """Metrics of the SAEs by layer, if they were trained for the comparison."""

    judge: Mapping[str, float] = field(default_factory=dict)
    """Held-out accuracy of the judge."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, seeds, and what else the numbers depend on."""


def compare_methods(
    validation: TextScorer,
    test: TextScorer,
    methods: Sequence[Method],
    *,
    control_seeds: Sequence[int] = (0, 1, 2),
) -> Comparison:
    """Return what each method does at the strength that serves it best.

    Strengths are tried on the validation cases, growing until the target rate has fallen by 0.05
    or the perplexity ratio passes 3; the one of most success at a perplexity ratio of 1.5 or less
    is taken to the test cases. Random directions, as long as the change of the descent that did
    best on validation, are the negative control. A scorer with a log continues a stopped run.

    Args:
        validation: scores the cases on which strengths are chosen.
        test: scores the cases of the table; no case of the validation should be among them.
        methods: what is compared.
        control_seeds: of the random directions.

    Raises:
        ValueError: no methods, or tasks that differ.
    """
    if not methods:
        raise ValueError("methods must hold at least one, got []")
    tasks = list(validation.cases)
    if tasks != list(test.cases):
        raise ValueError(
            f"validation and test must have the same tasks, got {tasks} and {list(test.cases)}"
        )
    chosen: list[tuple[Method, dict[str, float]]] = []
    curves = []
    best: tuple[float, int] | None = None
    for method in tqdm(methods, desc="Choosing strengths", unit="method"):
        strengths = dict.fromkeys(tasks, float(method.strengths[0]))
        if len(method.strengths) > 1 or method.objective is not None:
            found = strength_curves(validation, method)
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
    rows, texts = [], []
    for method, strengths in tqdm(chosen, desc="Comparing methods", unit="method"):
        for strength in sorted(set(strengths.values())):
            same = [task for task in tasks if strengths[task] == strength]
            for task, outcome in test.score(method, strength, same).items():
                rows.append(outcome_row(task, method, outcome))
                texts += text_rows(task, method, outcome)
    for table in (rows, curves, texts):
        table.sort(key=lambda row: tasks.index(row["task"]))
    return Comparison(
        rows=pd.DataFrame(rows), curves=pd.DataFrame(curves), texts=pd.DataFrame(texts)
    )


def strength_curves(scorer: TextScorer, method: Method) -> dict[str, list[Outcome]]:
    """Return a method's outcomes at growing strengths, for each task until more does not help.

    A curve ends where the target rate has fallen by more than 0.05 from its best, or the perplexity
    ratio passes 3, or the method's strengths are used up.
    """
    curves: dict[str, list[Outcome]] = {task: [] for task in scorer.cases}
    for strength in method.strengths:
        going = [task for task, curve in curves.items() if not curve_ended(curve)]
        if not going:
            break
        for task, outcome in scorer.score(method, strength, going).items():
            curves[task].append(outcome)
    return curves
