"""The demo on a real instruct model: exercises of each of Bloom's levels, steered by every target.

Split "train" gives SAEs, centroids and learned targets; "judge" the judge; "validation" chooses
every method's strength; "test" gives the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.arguments import check_number
from sae_query_steer.compare import exercise_task
from sae_query_steer.compare.attention_methods import attention_bias_method, attention_method
from sae_query_steer.compare.comparison import Comparison, compare_methods
from sae_query_steer.compare.demo import metrics_by_layer, trained_saes
from sae_query_steer.compare.exercise_judges import exercise_judge
from sae_query_steer.compare.exercise_task import (
    ExerciseSplit,
    ExerciseTask,
    exercise_cases,
    exercise_examples,
)
from sae_query_steer.compare.interchange import interchange_methods
from sae_query_steer.compare.learned import MOVE, POINT, SCOPE, Learning, kept
from sae_query_steer.compare.log import ComparisonLog
from sae_query_steer.compare.methods import Descent, Method, descent_methods, prompt_methods
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.descent.objectives import CentroidContrast, SquaredDistance
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.sites import query_sites
from sae_query_steer.targets.builder import CentroidTargetBuilder

CENTROID = Descent(
    name="squared distance", objective=SquaredDistance(), n_steps=1, step_sizes=(1.0, 2.0)
)
MEAN = Descent(name="contrast", objective=CentroidContrast(), n_steps=1, step_sizes=(2.0, 10.0))


@dataclass(frozen=True, kw_only=True)
class ExerciseSettings:
    """Sizes of the demo on a real model."""

    seed: int = 0
    n_train: int = 20
    """Topics that targets are learned from, each with an example of every level."""

    n_judge: int = 16
    """Topics that the judge is trained on, with two answers for every level."""

    n_validation: int = 12
    """Cases of each task on which strengths are chosen."""

    n_test: int = 36
    """Cases of each task in the table."""

    layers: tuple[int, ...] | None = None
    """The run of layers that are steered; None means those from 60 to 75 % of the depth."""

    training_tokens: int = 16_384
    """Tokens that the SAEs are trained on."""

    d_sae_per_head: int = 256
    k: int = 16
    n_updates: int = 40
    """Updates of each learned target."""

    max_relative_change: float = 0.5
    """||change of q|| / ||q|| of a head at most, of every method that changes queries."""

    l1: float = 0.1
    """Penalty of sparse targets."""

    every_method: bool = False
    """Also learned points, dense targets, interchange, few-shot prompts, and attention targets."""

    def __post_init__(self) -> None:
        least = {"n_train": 4, "n_judge": 8, "n_validation": 6, "n_test": 6, "n_updates": 1}
        for name, smallest in least.items():
            check_number(name, getattr(self, name), whole=True, least=smallest)


EXERCISE_SIZES = {
    "quick": ExerciseSettings(
        n_train=8, n_judge=8, n_validation=6, n_test=12, training_tokens=4096, n_updates=20
    ),
    "default": ExerciseSettings(),
    "full": ExerciseSettings(
        n_judge=40,
        n_validation=60,
        n_test=720,
        training_tokens=40_960,
        n_updates=60,
        every_method=True,
    ),
}
"""Settings by name: "quick" is too small to tell methods apart, "full" has 120 topics a level."""


def run_exercise_demo(
    model: Any,
    *,
    settings: ExerciseSettings | None = None,
    log: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Return the comparison of steering methods on an instruct model, such as SmolLM2.

    Args:
        model: a HookedTransformer or a TransformerBridge with a chat template.
        settings: sizes and seed; None means the defaults.
        log: a file for what the methods wrote, beside which SAEs and learned targets are kept, so
            that a stopped run continues; None keeps none.
        ranks: the processes of a launch, which share learning and the methods; they need a log.

    Raises:
        ValueError: a model without chat template, or a log of other settings.

    Source: our choice.
    """
    settings = ExerciseSettings() if settings is None else settings
    n_layers, every_method = int(model.cfg.n_layers), settings.every_method
    run = range(round(0.6 * n_layers), round(0.77 * n_layers))
    layers = tuple(run if settings.layers is None else settings.layers)
    sites = query_sites(model, layers)
    told = vars(settings) | {"layers": list(layers), "model": str(model.cfg.model_name)}
    outcomes = None if log is None else ComparisonLog(log, told, rank=ranks.rank)
    folder = None if log is None else Path(log).parent
    opened, requested = exercise_examples(model, settings.n_train, seed=settings.seed)
    judge = exercise_judge(
        model, settings.n_judge, n_held_out=max(4, settings.n_judge // 4), seed=settings.seed
    )
    saes = kept(
        folder,
        "saes",
        QuerySAEs.load,
        lambda: trained_saes(model, opened + requested, sites, settings, metric_tokens=4096),
        ranks,
    )
    examples, counterparts = (tokenize_examples(model, some) for some in (opened, requested))
    dense = identity_encoders(sites)
    centroids = CentroidTargetBuilder(model, saes).fit(counterparts)
    # Topics in their order, six levels of each: the last quarter chooses the update.
    n = len(examples)
    learned = Learning(
        model,
        examples,
        counterparts,
        held_out=range(6 * round(n / 6 * 0.75), n),
        n_updates=settings.n_updates,
        max_relative_change=settings.max_relative_change,
        seed=settings.seed,
        folder=folder,
        ranks=ranks,
    )
    moves = [("SAE", saes, learned("sae-moves", saes, l1=settings.l1))]
    methods = prompt_methods(opened, shots=(2,) if every_method else (), separator="<|im_end|>\n")
    descents = partial(
        descent_methods, layers=[layers], max_relative_change=settings.max_relative_change
    )
    span = scope_name(LastPromptToken())
    plain: dict[str, Any] = {"centroids": "requested", "scopes": [LastPromptToken(), SCOPE]}
    methods += descents("SAE centroids", saes, {span: centroids}, [CENTROID], **plain)
    if every_method:
        moves.append(("dense", dense, learned("dense-moves", dense)))
        means = CentroidTargetBuilder(model, dense).fit(counterparts)
        points = {"learned": learned("sae-points", saes, start=centroids)}
        methods += descents("mean difference", dense, {span: means}, [MEAN], **plain)
        methods += interchange_methods(model, [layers])
        methods += descents("learned points, SAE", saes, points, [POINT], scopes=[SCOPE])
    for kind, encoders, targets in moves:
        name, targets = f"learned moves, {kind}", {"learned": targets}
        methods += descents(name, encoders, targets, [MOVE], scopes=[SCOPE])

    def compared(some: Sequence[Method], *tasks: ExerciseTask, n_controls: int) -> Comparison:
        def scorer(split: ExerciseSplit, n: int) -> TextScorer:
            seed = settings.seed + 1
            return TextScorer(
                model,
                {task: exercise_cases(model, task, split, n, seed=seed) for task in tasks},
                judge,
                max_new_tokens=exercise_task.MAX_NEW_TOKENS,
                split=split,
                log=outcomes,
                batch_size=72,
            )

        scorers = scorer("validation", settings.n_validation), scorer("test", settings.n_test)
        return compare_methods(*scorers, some, control_seeds=range(n_controls), ranks=ranks)

    result = compared(methods, "open", "redirected", n_controls=1)
    if every_method:
        by_name = {method.name: method for method in methods}
        later = query_sites(model, range(n_layers // 2, n_layers))
        attention = [
            by_name["unsteered"],
            by_name["instruction"],
            attention_method("attention, dense", identity_encoders(later)),
            attention_method("attention, SAE", saes),
            attention_bias_method("attention bias", later),
            by_name["learned moves, SAE"],
        ]
        listed = compared(attention, "listed", "listed redirected", n_controls=0)
        tables = {
            part: pd.concat([getattr(result, part), getattr(listed, part)], ignore_index=True)
            for part in ("rows", "curves", "texts")
        }
        result = replace(result, **tables)
    return replace(result, saes=metrics_by_layer(saes), settings=told)
