"""The sweep: methods over layers, spans, scopes and objectives, each at its own best strength."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from sae_query_steer.baselines.simple import few_shot_prompt, random_direction
from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.comparison import (
    Method,
    Outcome,
    operating_point,
    outcome_row,
    strength_curves,
    what_was_done,
)
from sae_query_steer.compare.descents import Descent
from sae_query_steer.compare.text_scorer import TextScorer
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.positions import LastPromptToken, Scope, scope_name
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.targets.centroids import CentroidTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """What a sweep found."""

    rows: pd.DataFrame
    """Every method on the test cases at the strength that was chosen for it, a row for each."""

    curves: pd.DataFrame
    """Every strength that was tried on the validation cases."""

    texts: pd.DataFrame
    """Every text on the test cases: method, prompt, source, target, text, what it was judged to be,
    what it takes up where that is told, and whether it is a success."""


def descent_methods(
    name: str,
    encoders: Mapping[str, QueryEncoder],
    targets: Mapping[str, CentroidTargets],
    descents: Sequence[Descent],
    *,
    layers: Iterable[Sequence[int]],
    heads: Iterable[Sequence[int] | None] = (None,),
    scopes: Iterable[Scope] = (LastPromptToken(),),
    centroids: str | None = None,
) -> list[Method]:
    """Return descent over some encoders, a method for each combination of the choices.

    Args:
        name: of the methods, such as "SAE descent".
        encoders: by hook name; over `identity_encoders` it is dense steering.
        targets: centroids of these encoders, by the name of the span that they were taken over.
        descents: the objectives.
        layers: sets of layers that are steered together.
        heads: sets of heads; None means all.
        scopes: where to steer.
        centroids: of which prompts the centroids are, to tell the methods apart by.
    """
    methods = []
    choices = product(targets, layers, heads, scopes, descents)
    for span, some_layers, some_heads, scope, descent in choices:

        def steerer(
            cases: Sequence[SteeringCase],
            step_size: float,
            made: Mapping[str, Any] = {
                "targets": targets[span],
                "objective": descent.objective,
                "n_steps": descent.n_steps,
                "scope": scope,
                "layers": some_layers,
                "heads": some_heads,
            },
        ) -> LatentGradientSteerer:
            wanted = [case.target for case in cases]
            return LatentGradientSteerer(encoders, target=wanted, step_size=step_size, **made)

        methods.append(
            Method(
                name=name,
                objective=descent.name,
                centroids=centroids,
                span=span,
                scope=scope_name(scope),
                layers=tuple(some_layers),
                heads=None if some_heads is None else tuple(some_heads),
                n_steps=descent.n_steps,
                strengths=descent.step_sizes,
                steerer=steerer,
            )
        )
    return methods


def prompt_methods(
    solved: Sequence[LabelledExample],
    *,
    shots: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    separator: str = "\n\n",
) -> list[Method]:
    """Return the methods that change the prompt: nothing, the request, and solved examples.

    Args:
        solved: labelled prompts with responses, to show; none of the cases.
        shots: how many are shown, a method for each.
        seed: of which are shown.
        separator: what stands between two examples, and before the prompt.
    """

    def own(case: SteeringCase) -> int:
        # Of the case, not of its place: the same examples in every batch.
        return seed + zlib.crc32(f"{case.prompt}\0{case.target}".encode())

    def few_shot(k: int) -> Method:
        def prompts(cases: Sequence[SteeringCase]) -> list[str]:
            return [
                few_shot_prompt(
                    case.prompt,
                    solved,
                    target=case.target,
                    k=k,
                    seed=own(case),
                    separator=separator,
                )
                for case in cases
            ]

        return Method(name=f"few-shot (k={k})", prompts=prompts)

    def request(cases: Sequence[SteeringCase]) -> list[str]:
        return [case.requesting or case.prompt for case in cases]

    return [
        Method(name="unsteered"),
        Method(name="instruction", prompts=request),
        *(few_shot(k) for k in shots),
    ]


def random_methods(model_of: Method, seeds: Sequence[int]) -> list[Method]:
    """Return the controls of a descent: random directions, as long as its changes.

    Raises:
        ValueError: the method does not steer.
    """
    make = model_of.steerer
    if make is None:
        raise ValueError(f"{model_of.name} does not steer: there is no change to be as long as")

    def control(seed: int) -> Method:
        return Method(
            name=f"random direction (seed {seed})",
            centroids=model_of.centroids,
            span=model_of.span,
            scope=model_of.scope,
            layers=model_of.layers,
            heads=model_of.heads,
            steerer=lambda cases, strength: random_direction(make(cases, strength), seed=seed),
        )

    return [control(seed) for seed in seeds]


def run_sweep(
    validation: TextScorer,
    test: TextScorer,
    methods: Sequence[Method],
    *,
    control_seeds: Sequence[int] = (0, 1, 2),
) -> SweepResult:
    """Return what each method does at the strength that serves it best.

    Strengths are tried on the validation cases, growing until the target rate has fallen by 0.05
    or the perplexity ratio passes 3; the one of most success at a perplexity ratio of 1.5 or less
    is taken to the test cases. Random directions, as long as the change of the descent that did
    best on validation, are the control. Scorers that have a log go on where they were stopped.

    Args:
        validation: scores the cases on which strengths are chosen.
        test: scores the cases of the table; no case of the validation should be among them.
        methods: what is compared.
        control_seeds: of the random directions.

    Raises:
        ValueError: no methods, or tasks that differ.
    """
    if not methods:
        raise ValueError("methods=[] is not allowed: give at least one")
    if list(validation.cases) != list(test.cases):
        raise ValueError(
            f"validation has the tasks {list(validation.cases)}, test {list(test.cases)}: give "
            "both the same"
        )
    tasks = list(validation.cases)
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
                texts += _texts(task, method, test.cases[task], outcome)
    for found in (rows, curves, texts):
        found.sort(key=lambda row: tasks.index(row["task"]))
    return SweepResult(
        rows=pd.DataFrame(rows), curves=pd.DataFrame(curves), texts=pd.DataFrame(texts)
    )


def _texts(
    task: str, method: Method, cases: Sequence[SteeringCase], outcome: Outcome
) -> list[dict[str, Any]]:
    taken_up = outcome.taken_up or [None] * len(cases)
    return [
        what_was_done(task, method)
        | {"prompt": case.prompt, "source": case.source, "target": case.target}
        | {"text": text, "judged": judged, "taken_up": noted, "success": success}
        for case, text, judged, noted, success in zip(
            cases, outcome.texts, outcome.judged, taken_up, outcome.success, strict=True
        )
    ]
