"""The demo: from the tutor to a table that says whether steering worked, and what a sceptic asks.

Split "train" trains the SAEs, the centroids and the judge; "validation" chooses the site and every
method's strength; "test" gives the table.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.baselines.residual_stream import residual_means
from sae_query_steer.compare import demo_cases as cases
from sae_query_steer.compare.classifier_judge import ClassifierJudge
from sae_query_steer.compare.demo_methods import MAIN, OTHERS, SPANS, main_methods, more_methods
from sae_query_steer.compare.demo_preparation import chosen_layers, site_table, training_examples
from sae_query_steer.compare.demo_results import DemoResult
from sae_query_steer.compare.demo_settings import DemoSettings
from sae_query_steer.compare.feedback_judge import level_judge
from sae_query_steer.compare.sweep import SweepResult, run_sweep
from sae_query_steer.compare.sweep_log import SweepLog, digest_of
from sae_query_steer.compare.text_scorer import TextScorer
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.sites import query_sites
from sae_query_steer.targets.builder import CentroidTargetBuilder
from sae_query_steer.toy.splits import Split
from sae_query_steer.training.train import train_query_saes

BATCH_SIZE = 120
"""Cases of one call of `generate`; more cost more each on small machines."""


def run_demo(
    model: Any,
    *,
    notes: bool = True,
    settings: DemoSettings | None = None,
    log: Path | None = None,
) -> DemoResult:
    """Return the comparison of steering methods on a tutor; nothing but a log is written.

    Args:
        model: a tutor on either host, trained by `train_tutor`.
        notes: whether its prompts hold notes, as it was trained.
        settings: sizes and seed; None means the defaults. Equal ones give equal numbers on one
            machine, times apart.
        log: a file for what the methods wrote, to go on from when the demo is run again on the
            same tutor; None keeps none.

    Raises:
        ValueError: settings that are too small, or a log of other settings or another tutor.

    Source: our choice; the methods compared are those of arXiv 2502.18644 and more.
    """
    settings = DemoSettings() if settings is None else settings
    seconds: dict[str, float] = {}
    sites = query_sites(model)
    with _timed("train the judge", seconds):
        classifier = level_judge()
        judge = dict(classifier.held_out)
    with _timed("read what the tutor writes on open prompts", seconds):
        requested, opened = training_examples(model, notes, settings)
    with _timed("train the SAEs", seconds):
        saes = train_query_saes(
            model,
            [e.prompt + e.response for e in requested + opened],
            sites,
            TrainingConfig(
                sae=TopK(d_sae_per_head=settings.d_sae_per_head, k=settings.k),
                training_tokens=settings.training_tokens,
                seed=settings.seed,
            ),
        )
    dense = identity_encoders(sites)
    with _timed("look at the sites", seconds):
        table = site_table(model, saes, sites, requested, notes, settings)
        layers = chosen_layers(table)
    examples = {"requested": requested, "open": opened}
    with _timed("find the centroids", seconds):
        kinds = {
            kind: (
                own,
                {
                    (prompts, span): CentroidTargetBuilder(model, own).fit(
                        tokenize_examples(model, examples[prompts], span=SPANS[span])
                    )
                    for prompts, span in (MAIN, *OTHERS)
                },
            )
            for kind, own in (("dense", dense), ("SAE", saes))
        }
        shots = (1, 2, 4) if settings.every_method else (2,)
        methods = main_methods(model, kinds, layers, opened, seed=settings.seed, shots=shots)
        if settings.every_method:
            every = [site.layer for site in sites]
            means = {
                span: residual_means(
                    model, tokenize_examples(model, requested, span=SPANS[span]), every
                )
                for prompts, span in (MAIN, *OTHERS)
                if prompts == "requested"
            }
            methods += more_methods(model, kinds, means, layers, every)
    with _timed("compare", seconds):
        made = [found for _, centroids in kinds.values() for found in centroids.values()]
        kept = None
        if log is not None:
            told = vars(settings) | {"notes": notes, "contents": digest_of(made)}
            kept = SweepLog(log, told)
        compared = run_sweep(
            _scorer(model, classifier, "validation", settings, notes, kept),
            _scorer(model, classifier, "test", settings, notes, kept),
            methods,
            control_seeds=range(3 if settings.every_method else 1),
        )
    if notes:
        judge |= agreement(compared)
    return DemoResult(
        settings=settings,
        notes=notes,
        compared=compared,
        sites=table,
        layers=layers,
        judge=judge,
        saes=pd.DataFrame(saes.metrics.groupby("layer").mean()).reset_index().drop(columns="head"),
        seconds=seconds,
    )


def _scorer(
    model: Any,
    classifier: ClassifierJudge,
    split: Split,
    settings: DemoSettings,
    notes: bool,
    log: SweepLog | None,
) -> TextScorer:
    validating = split == "validation"
    n = settings.n_validation if validating else settings.n_test
    seed = settings.seed + (1 if validating else 2)
    asked = {
        task: cases.tutor_cases(task, split, n, seed=seed, notes=notes) for task in cases.TASKS
    }
    return TextScorer(
        model,
        asked,
        classifier,
        max_new_tokens=cases.MAX_NEW_TOKENS,
        split=split,
        log=log,
        batch_size=BATCH_SIZE,
        measures_specificity=not validating,
        grounding=cases.note_judge([case for some in asked.values() for case in some]),
    )


def agreement(compared: SweepResult) -> dict[str, float]:
    """Return how often classifier and rule name the same level, unsteered and over all rows."""
    texts = compared.texts
    same = (texts["judged"].fillna("") == texts["taken_up"].fillna("")).to_numpy()
    return {
        "agrees_with_rule_unsteered": float(same[texts["method"] == "unsteered"].mean()),
        "agrees_with_rule_all_rows": float(same.mean()),
    }


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
