"""The demo: every method on the tutor, from training its SAEs to the table.

Split "train" trains the SAEs, the centroids and the judge; "validation" chooses the site and every
method's strength; "test" gives the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.arguments import check_number
from sae_query_steer.baselines.directions import class_means
from sae_query_steer.compare import tutor_task
from sae_query_steer.compare.comparison import Comparison, compare_methods
from sae_query_steer.compare.interchange import interchange_methods
from sae_query_steer.compare.log import ComparisonLog, digest_of
from sae_query_steer.compare.methods import (
    DESCENTS,
    Layers,
    Method,
    decoder_rows_methods,
    descent_methods,
    mean_difference_methods,
    prompt_methods,
)
from sae_query_steer.compare.own_texts import layer_verdicts
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import TokenizedExamples, tokenize_examples
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.encoders import QueryEncoder, identity_encoders
from sae_query_steer.scopes.named import LastPromptToken, ResponseTokens
from sae_query_steer.sites import QuerySite, query_sites
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.toy.corpus import SEPARATOR, Split, TutorCorpus
from sae_query_steer.training.train import train_query_saes

SPANS = {"last prompt token": LastPromptToken(), "response tokens": ResponseTokens()}

MAIN = ("requested", "last prompt token")
"""The centroids with which every objective is tried: of which prompts, over which span."""

OPEN, RESPONSE = ("open", "last prompt token"), ("requested", "response tokens")
"""Other centroids, each different from the main ones in one thing."""

DESCENTS_OF_ALL = (
    ("mean difference", MAIN, ("contrast",)),
    ("dense descent", MAIN, ("prototype", "squared distance")),
    ("dense descent", OPEN, ("prototype",)),
    ("dense descent", RESPONSE, ("prototype",)),
    ("SAE descent", MAIN, ("prototype", "squared distance", "contrast")),
    ("SAE descent", OPEN, ("prototype",)),
    ("SAE descent", RESPONSE, ("prototype",)),
)
"""Name, centroids and objectives. One step of contrast over queries adds the mean difference."""

DESCENTS_OF_FULL = (
    ("mean difference", RESPONSE, ("contrast",)),
    ("dense descent", RESPONSE, ("squared distance",)),
    ("SAE descent", RESPONSE, ("squared distance", "contrast")),
)

DESCENTS_BY_LAYER = (
    ("mean difference", MAIN, ("contrast",)),
    ("dense descent", MAIN, ("squared distance",)),
    ("SAE descent", MAIN, ("squared distance",)),
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo."""

    seed: int = 0
    n_train: int = 300
    """Labelled prompts, of each kind, for SAEs and centroids."""

    n_validation: int = 36
    """Cases of each task on which strengths are chosen."""

    n_test: int = 204
    """Cases of each task in the table."""

    n_pairs: int = 180
    """Pairs of the interchange effect."""

    training_tokens: int = 100_000
    """Tokens that the SAEs are trained on."""

    d_sae_per_head: int = 64
    k: int = 8

    every_method: bool = False
    """Also centroids over the response for every objective, decoder rows, the residual stream, each
    layer alone, few-shot prompts of 1 and 4, and three random directions."""

    def __post_init__(self) -> None:
        for name, least in (("n_train", 60), ("n_validation", 6), ("n_test", 6), ("n_pairs", 6)):
            check_number(name, getattr(self, name), whole=True, least=least)


DEMO_SIZES = {
    "quick": DemoSettings(
        n_train=120, n_validation=12, n_test=36, n_pairs=60, training_tokens=60_000
    ),
    "default": DemoSettings(),
    "full": DemoSettings(n_validation=60, n_test=300, every_method=True),
}
"""Settings by name: "quick" is too small to tell methods apart, "full" takes half an hour."""


def run_demo(
    model: Any,
    *,
    notes: bool = True,
    settings: DemoSettings | None = None,
    log: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Return the comparison of steering methods on a tutor.

    Args:
        model: a tutor on either backend, such as `load_tutor` returns.
        notes: whether its prompts hold notes, as it was trained.
        settings: sizes and seed; None means the defaults. Equal ones give equal numbers on one
            machine.
        log: a file for what the methods wrote, from which a stopped run continues; None keeps none.
        ranks: the processes of a launch; see `compare_methods`.

    Raises:
        ValueError: a log of other settings or another tutor.

    Source: our choice; the methods compared are those of arXiv 2502.18644 and more.
    """
    settings = DemoSettings() if settings is None else settings
    sites, seed = query_sites(model), settings.seed
    judge = tutor_task.level_judge()
    requested, opened = tutor_task.training_examples(
        model, settings.n_train, seed=seed, notes=notes
    )
    saes = trained_saes(model, requested + opened, sites, settings)
    held_out = TutorCorpus("validation", seed=seed, notes=notes).examples(240)
    validation = tokenize_examples(model, held_out)
    table = layer_verdicts(model, saes, sites, validation, n_pairs=settings.n_pairs, seed=seed)
    examples = {"requested": requested, "open": opened}
    tokenized = {
        (prompts, span): tokenize_examples(model, examples[prompts], span=SPANS[span])
        for prompts, span in (MAIN, OPEN, RESPONSE)
    }
    encoders = {"dense": identity_encoders(sites), "SAE": saes}
    centroids = {
        (kind, *which): CentroidTargetBuilder(model, own).fit(some)
        for kind, own in encoders.items()
        for which, some in tokenized.items()
    }
    layers = chosen_layers(table)
    methods = _methods(model, settings, opened, tokenized, encoders, centroids, layers)
    told = vars(settings) | {"notes": notes}
    kept = None
    if log is not None:
        digest = digest_of(centroids.values(), requested + opened)
        kept = ComparisonLog(log, told | {"contents": digest}, rank=ranks.rank)

    def scorer(split: Split, n: int, seed: int) -> TextScorer:
        tasks = tutor_task.TASKS
        cases = {t: tutor_task.tutor_cases(t, split, n, seed=seed, notes=notes) for t in tasks}
        return TextScorer(
            model,
            cases,
            judge,
            max_new_tokens=tutor_task.MAX_NEW_TOKENS,
            split=split,
            log=kept,
            batch_size=120,
            measures_specificity=split == "test",
            grounding=tutor_task.note_judge([case for some in cases.values() for case in some]),
        )

    compared = compare_methods(
        scorer("validation", settings.n_validation, seed + 1),
        scorer("test", settings.n_test, seed + 2),
        methods,
        control_seeds=range(3 if settings.every_method else 1),
        ranks=ranks,
    )
    return replace(
        compared,
        sites=table,
        saes=metrics_by_layer(saes),
        settings=told | {"layers": list(layers)},
    )


def trained_saes(
    model: Any,
    examples: Sequence[LabelledExample],
    sites: Sequence[QuerySite],
    settings: Any,
    **more: Any,
) -> QuerySAEs:
    """Return TopK SAEs trained on examples with the sizes of a demo's settings."""
    config = TrainingConfig(
        sae=TopK(d_sae_per_head=settings.d_sae_per_head, k=settings.k),
        training_tokens=settings.training_tokens,
        seed=settings.seed,
        **more,
    )
    return train_query_saes(model, [e.prompt + e.response for e in examples], sites, config)


def metrics_by_layer(saes: QuerySAEs) -> pd.DataFrame:
    """Return the metrics of trained SAEs, mean over the heads of each layer."""
    return pd.DataFrame(saes.metrics.groupby("layer").mean()).reset_index().drop(columns="head")


def chosen_layers(table: pd.DataFrame) -> tuple[int, ...]:
    """Return the layers to steer: those that `site_verdicts` recommends.

    If there is none, the one at which real queries move most, to show that steering fails there.
    """
    chosen = table["steer_here"]
    if not bool(chosen.any()):
        shift = table["moved"] - table["moved_control"]
        chosen = shift == shift.max()
    return tuple(int(layer) for layer in table.loc[chosen, "layer"])


def _methods(
    model: Any,
    settings: DemoSettings,
    solved: Sequence[LabelledExample],
    tokenized: Mapping[tuple[str, str], TokenizedExamples],
    encoders: Mapping[str, Mapping[str, QueryEncoder]],
    centroids: Mapping[tuple[str, str, str], CentroidTargets],
    layers: tuple[int, ...],
) -> list[Method]:
    """Return all methods that are compared at the chosen layers, and those of other layers."""

    def descents(rows: Any, at: Layers) -> list[Method]:
        made = []
        for name, (prompts, span), objectives in rows:
            kind = "SAE" if name == "SAE descent" else "dense"
            targets = {span: centroids[kind, prompts, span]}
            some = [descent for descent in DESCENTS if descent.name in objectives]
            made += descent_methods(
                name, encoders[kind], targets, some, layers=at, centroids=prompts
            )
        return made

    shots = (1, 2, 4) if settings.every_method else (2,)
    methods = prompt_methods(solved, shots=shots, seed=settings.seed, separator=SEPARATOR)
    methods += interchange_methods(model, [layers]) + descents(DESCENTS_OF_ALL, [layers])
    if not settings.every_method:
        return methods
    alone = [[site.layer] for site in query_sites(model)]
    methods += descents(DESCENTS_OF_FULL, [layers])
    for prompts, span in (MAIN, RESPONSE):
        named: dict[str, Any] = {"centroids": prompts, "span": span}
        targets = centroids["SAE", prompts, span]
        methods += decoder_rows_methods(encoders["SAE"], targets, layers=[layers], **named)
        means = class_means(model, tokenized[prompts, span], [layer for (layer,) in alone])
        methods += mean_difference_methods(means, layers=alone, **named)
    others = [at for at in alone if tuple(at) != layers]
    return methods + interchange_methods(model, others) + descents(DESCENTS_BY_LAYER, others)
