"""The demo: every method on the tutor, from training its SAEs to the table.

Split "train" trains the SAEs, the centroids and the judge; "validation" chooses the site and every
method's strength; "test" gives the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.baselines.residual import residual_means
from sae_query_steer.compare import tutor_task
from sae_query_steer.compare.comparison import Comparison, compare_methods
from sae_query_steer.compare.descents import DESCENTS
from sae_query_steer.compare.judges import Judge
from sae_query_steer.compare.log import ComparisonLog, digest_of
from sae_query_steer.compare.methods import (
    Method,
    decoder_rows_methods,
    descent_methods,
    interchange_methods,
    prompt_methods,
    residual_methods,
)
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.compare.sites import layer_verdicts
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.sae.encoders import QueryEncoder, identity_encoders
from sae_query_steer.scopes.named import LastPromptToken, ResponseTokens
from sae_query_steer.sites import query_sites
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.toy.corpus import SEPARATOR, TutorCorpus
from sae_query_steer.toy.splits import Split
from sae_query_steer.training.train import train_query_saes

BATCH_SIZE = 120
"""Cases of one call of `generate`."""

SPANS = {"last prompt token": LastPromptToken(), "response tokens": ResponseTokens()}

MAIN = ("requested", "last prompt token")
"""The centroids with which every objective is tried: of which prompts, over which span."""

OPEN, RESPONSE = ("open", "last prompt token"), ("requested", "response tokens")
"""Other centroids, each different from the main ones in one thing."""

Kinds = Mapping[str, tuple[Mapping[str, QueryEncoder], Mapping[tuple[str, str], CentroidTargets]]]
"""Encoders and their centroids, by "dense" and "SAE"."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo; `QUICK` holds smaller ones, `FULL` larger."""

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
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")


QUICK = DemoSettings(n_train=120, n_validation=12, n_test=36, n_pairs=60, training_tokens=60_000)
"""Sizes for a first look; too small to tell methods apart."""

FULL = DemoSettings(n_validation=60, n_test=300, every_method=True)
"""The full comparison, in about half an hour."""


def run_demo(
    model: Any,
    *,
    notes: bool = True,
    settings: DemoSettings | None = None,
    log: str | Path | None = None,
) -> Comparison:
    """Return the comparison of steering methods on a tutor.

    Args:
        model: a tutor on either backend, such as `load_tutor` returns.
        notes: whether its prompts hold notes, as it was trained.
        settings: sizes and seed; None means the defaults. Equal ones give equal numbers on one
            machine.
        log: a file for what the methods wrote, from which a stopped run continues; None keeps none.

    Raises:
        ValueError: settings that are too small, or a log of other settings or another tutor.

    Source: our choice; the methods compared are those of arXiv 2502.18644 and more.
    """
    settings = DemoSettings() if settings is None else settings
    sites, seed = query_sites(model), settings.seed
    judge = tutor_task.level_judge()
    requested, opened = tutor_task.training_examples(
        model, settings.n_train, seed=seed, notes=notes
    )
    examples = {"requested": requested, "open": opened}
    saes = train_query_saes(
        model,
        [e.prompt + e.response for e in requested + opened],
        sites,
        TrainingConfig(
            sae=TopK(d_sae_per_head=settings.d_sae_per_head, k=settings.k),
            training_tokens=settings.training_tokens,
            seed=seed,
        ),
    )
    held_out = TutorCorpus("validation", seed=seed, notes=notes).examples(240)
    validation = tokenize_examples(model, held_out)
    table = layer_verdicts(model, saes, sites, validation, n_pairs=settings.n_pairs, seed=seed)
    dense = identity_encoders(sites)
    kinds: Kinds = {
        kind: (
            own,
            {
                (prompts, span): CentroidTargetBuilder(model, own).fit(
                    tokenize_examples(model, examples[prompts], span=SPANS[span])
                )
                for prompts, span in (MAIN, OPEN, RESPONSE)
            },
        )
        for kind, own in (("dense", dense), ("SAE", saes))
    }
    queries = kinds["dense"][1][MAIN]
    shares = {site.layer: queries.class_share_of_variance(site.hook_name) for site in sites}
    table = table.assign(label_share=table["layer"].map(shares))
    layers = chosen_layers(table)
    shots = (1, 2, 4) if settings.every_method else (2,)
    methods = prompt_methods(opened, shots=shots, seed=seed, separator=SEPARATOR)
    methods += _main_methods(model, kinds, layers)
    if settings.every_method:
        methods += _more_methods(model, kinds, layers, requested)
    made = [found for _, centroids in kinds.values() for found in centroids.values()]
    told = vars(settings) | {"notes": notes}
    kept = None
    if log is not None:
        kept = ComparisonLog(log, told | {"contents": digest_of(made, requested + opened)})
    compared = compare_methods(
        _scorer(model, judge, "validation", settings, notes, kept),
        _scorer(model, judge, "test", settings, notes, kept),
        methods,
        control_seeds=range(3 if settings.every_method else 1),
    )
    metrics = pd.DataFrame(saes.metrics.groupby("layer").mean()).reset_index().drop(columns="head")
    agrees = _agreement(compared.texts) if notes else {}
    return replace(
        compared,
        sites=table,
        saes=metrics,
        judge={**judge.held_out, **agrees},
        settings=told | {"layers": list(layers)},
    )


def chosen_layers(table: pd.DataFrame) -> tuple[int, ...]:
    """Return the layers to steer: those that `site_verdicts` recommends.

    If there is none, the one at which real queries move most, to show that steering fails there.
    """
    chosen = table["steer_here"]
    if not bool(chosen.any()):
        shift = table["moved"] - table["moved_control"]
        chosen = shift == shift.max()
    return tuple(int(layer) for layer in table.loc[chosen, "layer"])


def _main_methods(model: Any, kinds: Kinds, layers: Sequence[int]) -> list[Method]:
    """Return the methods that answer the main question, in the order of the table.

    The mean difference of the queries is dense descent on the contrast.
    """
    methods = interchange_methods(model, [layers])
    methods += _descents("mean difference", kinds, MAIN, "contrast", [layers])
    for name, tried in (
        ("dense descent", "prototype, squared distance"),
        ("SAE descent", "prototype, squared distance, contrast"),
    ):
        methods += _descents(name, kinds, MAIN, tried, [layers])
        for other in (OPEN, RESPONSE):
            methods += _descents(name, kinds, other, "prototype", [layers])
    return methods


def _more_methods(
    model: Any, kinds: Kinds, layers: Sequence[int], requested: Sequence[LabelledExample]
) -> list[Method]:
    """Return what `every_method` adds."""
    every = [site.layer for site in query_sites(model)]
    methods = _descents("mean difference", kinds, RESPONSE, "contrast", [layers])
    methods += _descents("dense descent", kinds, RESPONSE, "squared distance", [layers])
    methods += _descents("SAE descent", kinds, RESPONSE, "squared distance, contrast", [layers])
    encoders, centroids = kinds["SAE"]
    alone = [[layer] for layer in every]
    for prompts, span in (MAIN, RESPONSE):
        named: dict[str, Any] = {"span": span, "centroids": prompts}
        targets = centroids[prompts, span]
        methods += decoder_rows_methods(encoders, targets, layers=[layers], **named)
        tokenized = tokenize_examples(model, requested, span=SPANS[span])
        means = residual_means(model, tokenized, every)
        methods += residual_methods(means, layers=alone, **named)
    others = [layer for layer in alone if layer != list(layers)]
    methods += interchange_methods(model, others)
    methods += _descents("mean difference", kinds, MAIN, "contrast", others)
    methods += _descents("dense descent", kinds, MAIN, "squared distance", others)
    methods += _descents("SAE descent", kinds, MAIN, "squared distance", others)
    return methods


def _descents(
    name: str, kinds: Kinds, which: tuple[str, str], tried: str, layers: Sequence[Sequence[int]]
) -> list[Method]:
    encoders, found = kinds["SAE" if name == "SAE descent" else "dense"]
    prompts, span = which
    chosen = [descent for descent in DESCENTS if descent.name in tried.split(", ")]
    return descent_methods(
        name, encoders, {span: found[which]}, chosen, layers=layers, centroids=prompts
    )


def _scorer(
    model: Any,
    judge: Judge,
    split: Split,
    settings: DemoSettings,
    notes: bool,
    log: ComparisonLog | None,
) -> TextScorer:
    testing = split == "test"
    n = settings.n_test if testing else settings.n_validation
    seed = settings.seed + (2 if testing else 1)
    cases = {
        task: tutor_task.tutor_cases(task, split, n, seed=seed, notes=notes)
        for task in tutor_task.TASKS
    }
    return TextScorer(
        model,
        cases,
        judge,
        max_new_tokens=tutor_task.MAX_NEW_TOKENS,
        split=split,
        log=log,
        batch_size=BATCH_SIZE,
        measures_specificity=testing,
        grounding=tutor_task.note_judge([case for some in cases.values() for case in some]),
    )


def _agreement(texts: pd.DataFrame) -> dict[str, float]:
    """Return how often classifier and rule find the same level, unsteered and over all rows."""
    same = (texts["judged"].fillna("") == texts["taken_up"].fillna("")).to_numpy()
    return {
        "agrees_with_rule_unsteered": float(same[texts["method"] == "unsteered"].mean()),
        "agrees_with_rule_all_rows": float(same.mean()),
    }
