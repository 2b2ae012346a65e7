"""The sweep: methods over layers, spans, scopes and objectives, each at its own best strength."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from sae_query_steer.baselines import RandomDirectionSteerer, few_shot_prompt
from sae_query_steer.centroids import CentroidTargets
from sae_query_steer.data import LabelledExample
from sae_query_steer.evaluation.comparison import (
    Method,
    Outcome,
    operating_point,
    outcome_row,
    strength_curves,
)
from sae_query_steer.evaluation.descents import Descent
from sae_query_steer.evaluation.text_scorer import SteeringCase, TextScorer
from sae_query_steer.positions import LastPromptToken, Scope, scope_name
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.steering import LatentGradientSteerer


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """What a sweep found."""

    rows: pd.DataFrame
    """Every method on the test cases at the strength that was chosen for it, a row for each."""

    curves: pd.DataFrame
    """Every strength that was tried on the validation cases."""

    texts: pd.DataFrame
    """Every text on the test cases: method, prompt, source, target, text, and what it was judged
    to be."""


def descent_methods(
    name: str,
    encoders: Mapping[str, QueryEncoder],
    targets: Mapping[str, CentroidTargets],
    descents: Sequence[Descent],
    *,
    layers: Iterable[Sequence[int]],
    heads: Iterable[Sequence[int] | None] = (None,),
    scopes: Iterable[Scope] = (LastPromptToken(),),
) -> list[Method[SteeringCase]]:
    """Return descent over some encoders, a method for each combination of the choices.

    Args:
        name: of the methods, such as "SAE descent".
        encoders: by hook name; over `identity_encoders` it is dense steering.
        targets: centroids of these encoders, by the name of the span that they were taken over.
        descents: the objectives.
        layers: sets of layers that are steered together.
        heads: sets of heads; None means all.
        scopes: where to steer.
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
    solved: Sequence[LabelledExample], *, shots: Sequence[int] = (1, 2, 4), seed: int = 0
) -> list[Method[SteeringCase]]:
    """Return the methods that change the prompt: nothing, the request, and solved examples.

    Args:
        solved: labelled prompts with responses, to show; none of the cases.
        shots: how many are shown, a method for each.
        seed: of which are shown.
    """

    def own(case: SteeringCase) -> int:
        # Of the case, not of its place: the same examples in every batch.
        return seed + zlib.crc32(f"{case.prompt}\0{case.target}".encode())

    def few_shot(k: int) -> Method[SteeringCase]:
        def prompts(cases: Sequence[SteeringCase]) -> list[str]:
            return [
                few_shot_prompt(case.prompt, solved, target=case.target, k=k, seed=own(case))
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


def random_methods(
    model_of: Method[SteeringCase], seeds: Sequence[int]
) -> list[Method[SteeringCase]]:
    """Return the controls of a descent: random directions, as long as its changes.

    Raises:
        ValueError: the method does not steer.
    """
    make = model_of.steerer
    if make is None:
        raise ValueError(f"{model_of.name} does not steer: there is no change to be as long as")

    def control(seed: int) -> Method[SteeringCase]:
        return Method(
            name=f"random direction (seed {seed})",
            span=model_of.span,
            scope=model_of.scope,
            layers=model_of.layers,
            heads=model_of.heads,
            steerer=lambda cases, strength: RandomDirectionSteerer(
                make(cases, strength), seed=seed
            ),
        )

    return [control(seed) for seed in seeds]


def run_sweep(
    validation: TextScorer,
    test: TextScorer,
    methods: Sequence[Method[SteeringCase]],
    *,
    control_seeds: Sequence[int] = (0, 1, 2),
) -> SweepResult:
    """Return what each method does at the strength that serves it best.

    Strengths are tried on the validation cases, growing until the target rate has fallen by 0.05
    or the perplexity ratio passes 3; the one of most success at a perplexity ratio of 1.5 or less
    is taken to the test cases. Random directions, as long as the change of the method that did
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
    chosen: list[tuple[Method[SteeringCase], dict[str, Outcome]]] = []
    curves = []
    for method in tqdm(methods, desc="Choosing strengths", unit="method"):
        if len(method.strengths) > 1:
            found = strength_curves(validation, method)
            curves += [sweep_row(t, method, o) for t, curve in found.items() for o in curve]
            points = {task: operating_point(curve) for task, curve in found.items()}
        else:
            points = dict(validation.score(method, method.strengths[0], list(validation.cases)))
        chosen.append((method, points))
    chosen += _controls(chosen, control_seeds)
    rows, texts = [], []
    for method, points in tqdm(chosen, desc="Comparing methods", unit="method"):
        for task, point in points.items():
            outcome = test.score(method, point.strength, [task])[task]
            rows.append(sweep_row(task, method, outcome))
            for case, text, judged in zip(
                test.cases[task], outcome.texts, outcome.judged, strict=True
            ):
                told = {"prompt": case.prompt, "source": case.source, "target": case.target}
                texts.append(_named(task, method) | told | {"text": text, "judged": judged})
    return SweepResult(
        rows=pd.DataFrame(rows), curves=pd.DataFrame(curves), texts=pd.DataFrame(texts)
    )


def sweep_row(task: str, method: Method[Any], outcome: Outcome) -> dict[str, Any]:
    """Return one row of a sweep's table: that of `outcome_row`, with layers and heads."""
    return _named(task, method) | outcome_row(task, method, outcome)


def _named(task: str, method: Method[Any]) -> dict[str, Any]:
    return {
        "task": task,
        "method": method.name,
        "layers": "" if method.layers is None else ",".join(map(str, method.layers)),
        "heads": "all" if method.heads is None else ",".join(map(str, method.heads)),
        "objective": method.objective,
        "span": method.span,
        "scope": method.scope,
    }


def _controls(
    chosen: Sequence[tuple[Method[SteeringCase], Mapping[str, Outcome]]], seeds: Sequence[int]
) -> list[tuple[Method[SteeringCase], dict[str, Outcome]]]:
    """Return the random controls of the descent that had most success, over all tasks."""
    steering = [(m, points) for m, points in chosen if m.objective is not None]
    if not steering:
        return []
    best, points = max(steering, key=lambda pair: sum(o.success_rate for o in pair[1].values()))
    return [(control, dict(points)) for control in random_methods(best, seeds)]
