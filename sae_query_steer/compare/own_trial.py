"""A first trial on labelled texts of the user's own: can this model be steered to their classes?"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_query_steer.compare.comparison import (
    MAX_PERPLEXITY_RATIO,
    Comparison,
    compare_methods,
)
from sae_query_steer.compare.demo import metrics_by_layer, trained_saes
from sae_query_steer.compare.exercise_demo import CENTROID
from sae_query_steer.compare.judges import ClassifierJudge
from sae_query_steer.compare.learned import MOVE, SCOPE, Learning, kept
from sae_query_steer.compare.log import ComparisonLog, digest_of
from sae_query_steer.compare.methods import (
    Method,
    SteeringCase,
    descent_methods,
    prompt_methods,
)
from sae_query_steer.compare.own_texts import four_parts, other_class_scorers
from sae_query_steer.config import TrialSettings
from sae_query_steer.data.batches import example_batches
from sae_query_steer.data.examples import LabelledExample, ordered_classes
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Span
from sae_query_steer.sites import query_sites
from sae_query_steer.steering.files import save_steerer
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.targets.builder import CentroidTargetBuilder


def try_on_texts(
    model: Any,
    examples: Sequence[LabelledExample],
    *,
    layers: Sequence[int] | None = None,
    span: Span | None = None,
    settings: TrialSettings | None = None,
    chat_template: ChatTemplate = False,
    told: Mapping[str, Any] | None = None,
    log: str | Path | None = None,
) -> Comparison:
    """Return whether a model can be steered to the classes of labelled texts, from SAEs to a table.

    The examples are split as for `compare_on_texts`. The first part trains the SAEs and gives
    few-shot examples; centroids and targets learned through the frozen model are of some of it.
    `compare_on_texts` compares more methods, layer by layer.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: labelled prompts with responses, 20 or more of each class.
        layers: those that are steered together; None means those from 27 to 77 % of the depth.
        span: of the centroids; None means the last prompt token.
        settings: sizes and seed; None means the defaults.
        chat_template: as for `tokenize_examples`.
        told: what else the log and the report should hold, such as names of files.
        log: a file for what the methods wrote, beside which SAEs and learned targets are kept, so
            that a stopped run continues, and in the end the steerer that did best on validation,
            for `load_steerer`; None keeps none.

    Raises:
        ValueError: too few examples of a class, or too many cases for them; or a log of other
            settings or texts.

    Source: our choice.
    """
    settings = TrialSettings() if settings is None else settings
    span = LastPromptToken() if span is None else span
    n_layers, seed = int(model.cfg.n_layers), settings.seed
    middle = range(round(0.27 * n_layers), max(1, round(0.77 * n_layers)))
    sites = query_sites(model, middle if layers is None else layers)
    chosen = [site.layer for site in sites]
    told = {**(told or {}), **vars(settings), "layers": chosen, "span": scope_name(span)}
    folder, outcomes = None, None
    if log is not None:
        folder = Path(log).parent
        outcomes = ComparisonLog(log, told | {"contents": digest_of([], examples)})
    steering, judging, validation, test = four_parts(examples, seed)
    judge = ClassifierJudge.fit(judging, seed=seed)
    given: dict[str, Any] = {"n_cases": settings.n_cases, "chat_template": chat_template}
    given |= {"max_new_tokens": settings.max_new_tokens, "seed": seed, "log": outcomes}
    scorers = other_class_scorers(model, validation, test, judge, **given)
    saes = kept(
        folder,
        "saes",
        QuerySAEs.load,
        lambda: trained_saes(model, steering, sites, settings, metric_tokens=2048),
    )
    of_class = {k: [e for e in steering if e.label == k] for k in ordered_classes(judge.classes)}
    some = [example for own in of_class.values() for example in own[: settings.n_learned]]
    read = tokenize_examples(model, some, span=span, chat_template=chat_template)
    centroids = CentroidTargetBuilder(model, saes).fit(read)
    learned = Learning(
        model,
        read.with_responses_of(settings.max_new_tokens),
        None,
        held_out=None,
        n_updates=settings.n_updates,
        max_relative_change=settings.max_relative_change,
        seed=seed,
        folder=folder,
    )
    dense = identity_encoders(sites)
    methods = prompt_methods(steering, shots=(1,), seed=seed)
    methods = [m for m in methods if m.name != "instruction"]  # no prompt requests a class
    descents = partial(
        descent_methods, layers=[chosen], max_relative_change=settings.max_relative_change
    )
    of_span = {scope_name(span): centroids}
    methods += descents("SAE centroids", saes, of_span, [CENTROID], scopes=[SCOPE])
    for kind, encoders, l1 in (("SAE", saes, settings.l1), ("dense", dense, 0.0)):
        moves = {"learned": learned(f"{kind}-moves", encoders, l1=l1)}
        methods += descents(f"learned moves, {kind}", encoders, moves, [MOVE], scopes=[SCOPE])
    found = compare_methods(scorers[0], scorers[1], methods, control_seeds=(0,))
    if folder is not None:
        save_steerer(
            _best(methods, found.curves, judge.classes[0]), folder / "steerer", overwrite=True
        )
    return replace(found, saes=metrics_by_layer(saes), settings=told)


def trial_seconds(
    model: Any,
    examples: Sequence[LabelledExample],
    settings: TrialSettings,
    chat_template: ChatTemplate = False,
) -> float:
    """Return about how long `try_on_texts` takes here, from the time of one forward pass.

    Args:
        model: as for `try_on_texts`.
        examples: as for `try_on_texts`.
        settings: sizes.
        chat_template: as for `tokenize_examples`.

    Returns:
        Seconds, roughly; every token of the work is taken to cost as much as any other.
    """
    classes = len({example.label for example in examples})
    some = tokenize_examples(model, examples[:_ROWS], chat_template=chat_template)
    cut = some.with_responses_of(settings.max_new_tokens)
    batch = next(example_batches(cut, _ROWS))
    with torch.no_grad():
        model(batch.tokens)  # the first pass is slower
        begun = time.perf_counter()
        model(batch.tokens)
        forward = (time.perf_counter() - begun) / batch.tokens.numel()
    prompt, new = float(batch.prompt_lengths.float().mean()), settings.max_new_tokens
    learned = settings.n_learned * classes
    # Updates run the response behind a cached prompt, forwards and backwards. Prompts run once for
    # validation, test and perplexities, and once with an example of each class before them; 14
    # strengths and rows are generated, a token of which costs about ten of a batch.
    updates = 2 * settings.n_updates * _ROWS * 3 * new + 2 * learned * (prompt + new)
    texts = settings.n_cases * ((3 + classes) * (prompt + new) + 14 * 10 * new)
    return forward * (2 * settings.training_tokens + updates + texts)


_ROWS = 24
"""Rows of an update."""


def _best(methods: Sequence[Method], curves: pd.DataFrame, target: str) -> LatentGradientSteerer:
    """Return the steerer of most success on validation, of fluent ones if there are some."""
    fluent = curves[curves["perplexity_ratio"] <= MAX_PERPLEXITY_RATIO]
    rows = (fluent if len(fluent) else curves).to_dict("records")
    row = max(rows, key=lambda row: row["success"])
    (method,) = [m for m in methods if (m.name, m.scope) == (row["method"], row["scope"])]
    assert method.steerer is not None  # only steering has strengths
    case = SteeringCase(prompt="", target=target)
    return replace(method.steerer([case], row["step_size"]), target=target)
