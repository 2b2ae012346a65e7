"""The demo: from the tutor to a table that says whether steering worked, and what a sceptic asks.

Split "train" trains the SAEs, the centroids and the judge; "validation" chooses the site and every
method's strength; "test" gives the table.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from sae_query_steer.centroids import CentroidTargets
from sae_query_steer.data import LabelledExample
from sae_query_steer.evaluation.comparison import Method, operating_point, strength_curves
from sae_query_steer.evaluation.descents import DESCENTS
from sae_query_steer.positions import LastPromptToken, ResponseTokens, Span
from sae_query_steer.sae.encoders import QueryEncoder, identity_encoders
from sae_query_steer.sae.topk import QueryHeadTopKTrainingSAEConfig
from sae_query_steer.sites import QuerySite, query_sites
from sae_query_steer.targets import CentroidTargetBuilder
from sae_query_steer.tasks.tutor.comparison import (
    TASKS,
    Case,
    CaseScorer,
    TutorOutcome,
    table_row,
    tutor_cases,
)
from sae_query_steer.tasks.tutor.corpus import Split
from sae_query_steer.tasks.tutor.judges import LevelClassifier
from sae_query_steer.tasks.tutor.methods import (
    descent_method,
    interchange_method,
    mean_difference_method,
    prompt_methods,
    random_method,
)
from sae_query_steer.tasks.tutor.preparation import chosen_layers, site_table, training_examples
from sae_query_steer.tasks.tutor.results import MAIN, OTHERS, DemoResult, label_of
from sae_query_steer.tasks.tutor.settings import DemoSettings
from sae_query_steer.training import train_query_saes

SPANS: Mapping[str, Span] = {
    "last prompt token": LastPromptToken(),
    "response tokens": ResponseTokens(),
}


def run_demo(model: Any, *, notes: bool = True, settings: DemoSettings | None = None) -> DemoResult:
    """Return the comparison of steering methods on a tutor; nothing is written.

    Args:
        model: a tutor on either host, trained by `train_tutor`.
        notes: whether its prompts hold notes, as it was trained.
        settings: sizes and seed; None means the defaults. Equal ones give equal numbers on one
            machine, times apart.

    Raises:
        ValueError: settings that are too small.

    Source: our choice; the methods compared are those of arXiv 2502.18644 and more.
    """
    settings = DemoSettings() if settings is None else settings
    seconds: dict[str, float] = {}
    sites = query_sites(model)
    with _timed("train the judge", seconds):
        classifier = LevelClassifier()
        judge = classifier.held_out_accuracy()
    with _timed("read what the tutor writes on open prompts", seconds):
        requested, opened = training_examples(model, notes, settings)
    with _timed("train the SAEs", seconds):
        saes = train_query_saes(
            model,
            [e.prompt + e.response for e in requested + opened],
            sites,
            sae=QueryHeadTopKTrainingSAEConfig(
                d_sae_per_head=settings.d_sae_per_head, k=settings.k
            ),
            training_tokens=settings.training_tokens,
            seed=settings.seed,
        )
    dense = identity_encoders(sites)
    with _timed("look at the sites", seconds):
        table = site_table(model, saes, sites, requested, notes, settings)
        layers = chosen_layers(table)
    with _timed("find the centroids", seconds):
        found = {
            (kind, centroids, span): CentroidTargetBuilder(model, own, span=SPANS[span]).fit(
                requested if centroids == "requested" else opened
            )
            for kind, own in (("dense", dense), ("SAE", saes))
            for centroids, span in (MAIN, *OTHERS)
        }
    methods = all_methods(model, saes, dense, found, sites, layers, opened, settings)
    with _timed("choose the strengths", seconds):
        scorer = _scorer(
            model,
            classifier,
            "validation",
            settings.n_validation,
            seed=settings.seed + 1,
            notes=notes,
        )
        points, curves = _choose(scorer, methods, settings.seed)
    with _timed("compare on the test cases", seconds):
        scorer = _scorer(
            model, classifier, "test", settings.n_test, seed=settings.seed + 2, notes=notes
        )
        outcomes = _compare(scorer, points)
    if notes:
        judge |= agreement(outcomes)
    assert saes.metrics is not None
    return DemoResult(
        settings=settings,
        notes=notes,
        rows=pd.DataFrame(
            [table_row(t, m, o) for t, written in outcomes.items() for m, o in written]
        ),
        curves=curves,
        sites=table,
        layers=layers,
        examples=shown_examples(outcomes, scorer.cases),
        judge=judge,
        saes=pd.DataFrame(saes.metrics.groupby("layer").mean()).reset_index().drop(columns="head"),
        seconds=seconds,
    )


def all_methods(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    dense: Mapping[str, QueryEncoder],
    found: Mapping[tuple[str, str, str], CentroidTargets],
    sites: Sequence[QuerySite],
    layers: Sequence[int],
    solved: Sequence[LabelledExample],
    settings: DemoSettings,
) -> list[Method[Case]]:
    """Return the methods of the table, in its order."""
    steered = [site for site in sites if site.layer in layers]
    methods = prompt_methods(solved, seed=settings.seed)
    methods.append(interchange_method(model, steered))
    contrast = next(d for d in DESCENTS if d.name == "contrast")
    methods.append(
        mean_difference_method(
            steered,
            found["dense", *MAIN],
            contrast.step_sizes,
            centroids=MAIN[0],
            span=MAIN[1],
        )
    )
    for kind, encoders in (("dense", dense), ("SAE", saes)):
        for descent in DESCENTS:
            for centroids, span in (MAIN, *OTHERS):
                if (centroids, span) == MAIN or descent.name == "prototype":
                    methods.append(
                        descent_method(
                            f"{kind} descent",
                            encoders,
                            found[kind, centroids, span],
                            descent,
                            layers,
                            centroids=centroids,
                            span=span,
                        )
                    )
    return methods


def _scorer(
    model: Any, classifier: LevelClassifier, split: Split, n: int, *, seed: int, notes: bool
) -> CaseScorer:
    cases: dict[str, Sequence[Case]] = {
        task: tutor_cases(task, split, n, seed=seed, notes=notes) for task in TASKS
    }
    return CaseScorer(model, cases, classifier)


def _choose(
    scorer: CaseScorer, methods: Sequence[Method[Case]], seed: int
) -> tuple[list[tuple[Method[Case], dict[str, float]]], pd.DataFrame]:
    """Return each method's strength for each task, and the curves they were chosen from."""
    points: list[tuple[Method[Case], dict[str, float]]] = []
    curve_rows = []
    for method in tqdm(methods, desc="Choosing strengths", unit="method"):
        if len(method.strengths) == 1:
            points.append((method, dict.fromkeys(TASKS, method.strengths[0])))
            continue
        curves = strength_curves(scorer, method)
        points.append((method, {t: operating_point(curve).strength for t, curve in curves.items()}))
        curve_rows += [table_row(t, method, o) for t, curve in curves.items() for o in curve]
    sae, strengths = next((m, s) for m, s in points if m.name == "SAE descent")
    points.append((random_method(sae, seed=seed), strengths))
    return points, pd.DataFrame(curve_rows)


def _compare(
    scorer: CaseScorer, points: Sequence[tuple[Method[Case], Mapping[str, float]]]
) -> dict[str, list[tuple[Method[Case], TutorOutcome]]]:
    """Return what each method does on the test cases, at the strength chosen for each task."""
    outcomes: dict[str, list[tuple[Method[Case], TutorOutcome]]] = {task: [] for task in TASKS}
    for method, strengths in tqdm(points, desc="Comparing methods", unit="method"):
        for strength in sorted(set(strengths.values())):
            tasks = [task for task in TASKS if strengths[task] == strength]
            for task, outcome in scorer.score(method, strength, tasks).items():
                outcomes[task].append((method, outcome))
    return outcomes


def agreement(
    outcomes: Mapping[str, Sequence[tuple[Method[Case], TutorOutcome]]],
) -> dict[str, float]:
    """Return how often classifier and rule name the same level, unsteered and over all rows."""

    def share(chosen: Sequence[TutorOutcome]) -> float:
        pairs = [pair for o in chosen for pair in zip(o.judged, o.restated, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs)

    every = [(method.name, outcome) for rows in outcomes.values() for method, outcome in rows]
    return {
        "agrees_with_rule_unsteered": share([o for name, o in every if name == "unsteered"]),
        "agrees_with_rule_all_rows": share([o for _, o in every]),
    }


def shown_examples(
    outcomes: Mapping[str, Sequence[tuple[Method[Case], TutorOutcome]]],
    cases: Mapping[str, Sequence[Case]],
) -> tuple[Mapping[str, str], ...]:
    """Return three cases in full, the first of the test cases: two open, one redirected."""
    shown = []
    wanted: tuple[tuple[str, int], ...] = (("open", 0), ("open", 5), ("redirect", 3))
    for task, index in wanted:
        case = cases[task][min(index, len(cases[task]) - 1)]
        example = {
            "task": task,
            "prompt": case.prompt.text,
            "requested": str(case.prompt.requested or ""),
            "target": str(case.target),
        }
        for method, outcome in outcomes[task]:
            if (method.centroids, method.span) in ((None, None), MAIN):
                label = label_of(vars(method) | {"method": method.name})
                example[label] = outcome.texts[min(index, len(cases[task]) - 1)].strip()
        shown.append(example)
    return tuple(shown)


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
