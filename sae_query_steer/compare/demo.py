"""The demo: every method on the tutor, from training its SAEs to the table.

Split "train" trains the SAEs, the centroids and the judge; "validation" chooses the site and every
method's strength; "test" gives the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.arguments import check_number
from sae_query_steer.baselines.residual import residual_means
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
    prompt_methods,
    residual_methods,
)
from sae_query_steer.compare.own_texts import layer_verdicts
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.data.tokenized import TokenizedExamples, tokenize_examples
from sae_query_steer.sae.encoders import QueryEncoder, identity_encoders
from sae_query_steer.scopes.named import LastPromptToken, ResponseTokens
from sae_query_steer.sites import query_sites
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
            check_number(name, getattr(self, name), whole=True, least=least)


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
        ValueError: a log of other settings or another tutor.

    Source: our choice; the methods compared are those of arXiv 2502.18644 and more.
    """
    settings = DemoSettings() if settings is None else settings
    sites, seed, every_method = query_sites(model), settings.seed, settings.every_method
    judge = tutor_task.level_judge()
    requested, opened = tutor_task.training_examples(
        model, settings.n_train, seed=seed, notes=notes
    )
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
    examples = {"requested": requested, "open": opened}
    tokenized = {
        (prompts, span): tokenize_examples(model, examples[prompts], span=SPANS[span])
        for prompts, span in (MAIN, OPEN, RESPONSE)
    }
    kinds = {
        kind: _Fitted(
            own, {which: CentroidTargetBuilder(model, own).fit(t) for which, t in tokenized.items()}
        )
        for kind, own in (("dense", identity_encoders(sites)), ("SAE", saes))
    }
    queries = kinds["dense"].centroids[MAIN]
    shares = {site.layer: queries.class_share_of_variance(site.hook_name) for site in sites}
    table = table.assign(label_share=table["layer"].map(shares))
    layers = chosen_layers(table)
    shots = (1, 2, 4) if every_method else (2,)
    methods = prompt_methods(opened, shots=shots, seed=seed, separator=SEPARATOR)
    methods += interchange_methods(model, [layers]) + _descents(kinds, DESCENTS_OF_ALL, [layers])
    if every_method:
        every = [site.layer for site in sites]
        methods += _descents(kinds, DESCENTS_OF_FULL, [layers])
        methods += _added(model, kinds["SAE"], tokenized, layers, every)
        others = [[layer] for layer in every if (layer,) != layers]
        methods += interchange_methods(model, others) + _descents(kinds, DESCENTS_BY_LAYER, others)
    made = [found for kind in kinds.values() for found in kind.centroids.values()]
    told = vars(settings) | {"notes": notes}
    kept = None
    if log is not None:
        kept = ComparisonLog(log, told | {"contents": digest_of(made, requested + opened)})

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
        control_seeds=range(3 if every_method else 1),
    )
    metrics = pd.DataFrame(saes.metrics.groupby("layer").mean()).reset_index().drop(columns="head")
    return replace(
        compared,
        sites=table,
        saes=metrics,
        judge={**compared.judge, **(_agreement(compared.texts) if notes else {})},
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


@dataclass(frozen=True)
class _Fitted:
    """Encoders with their centroids, by prompts and span."""

    encoders: Mapping[str, QueryEncoder]
    centroids: Mapping[tuple[str, str], CentroidTargets]


def _descents(kinds: Mapping[str, _Fitted], rows: Any, layers: Layers) -> list[Method]:
    methods = []
    for name, (prompts, span), objectives in rows:
        kind = kinds["SAE" if name == "SAE descent" else "dense"]
        chosen = [descent for descent in DESCENTS if descent.name in objectives]
        targets = {span: kind.centroids[prompts, span]}
        methods += descent_methods(
            name, kind.encoders, targets, chosen, layers=layers, centroids=prompts
        )
    return methods


def _added(
    model: Any,
    kind: _Fitted,
    tokenized: Mapping[tuple[str, str], TokenizedExamples],
    layers: tuple[int, ...],
    every: list[int],
) -> list[Method]:
    """Return decoder rows, and contrastive activation addition after each layer alone."""
    methods = []
    for which in (MAIN, RESPONSE):
        named: dict[str, Any] = {"centroids": which[0], "span": which[1]}
        methods += decoder_rows_methods(
            kind.encoders, kind.centroids[which], layers=[layers], **named
        )
        means = residual_means(model, tokenized[which], every)
        methods += residual_methods(means, layers=[[layer] for layer in every], **named)
    return methods


def _agreement(texts: pd.DataFrame) -> dict[str, float]:
    """Return how often classifier and rule find the same level, unsteered and over all rows."""
    same = (texts["judged"].fillna("") == texts["taken_up"].fillna("")).to_numpy()
    return {
        "agrees_with_rule_unsteered": float(same[texts["method"] == "unsteered"].mean()),
        "agrees_with_rule_all_rows": float(same.mean()),
    }
