"""The comparison on a model and labelled texts of the user's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.model_selection import train_test_split

from sae_query_steer.baselines.directions import class_means
from sae_query_steer.baselines.probes import probe_heads
from sae_query_steer.compare.comparison import Comparison, compare_methods
from sae_query_steer.compare.judges import ClassifierJudge, Judge
from sae_query_steer.compare.log import ComparisonLog, digest_of
from sae_query_steer.compare.methods import (
    DESCENTS,
    Descent,
    cases_of,
    decoder_rows_methods,
    descent_methods,
    intervention_methods,
    mean_difference_methods,
    prompt_methods,
)
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.data.examples import LabelledExample, check_classes
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.data.tokenized import TokenizedExamples, tokenize_examples
from sae_query_steer.diagnostics.class_separability import separability
from sae_query_steer.diagnostics.interchange import interchange_effect
from sae_query_steer.diagnostics.verdicts import site_verdicts
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.sae.encoders import QueryEncoder, identity_encoders
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope, Span
from sae_query_steer.sites import ALL_HEADS, QuerySite, query_sites
from sae_query_steer.targets.builder import CentroidTargetBuilder


def compare_on_texts(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    examples: Sequence[LabelledExample],
    *,
    layers: Sequence[int] | None = None,
    span: Span | None = None,
    scope: Scope | None = None,
    descents: Sequence[Descent] = DESCENTS,
    n_cases: int = 60,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    chat_template: ChatTemplate = False,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    log: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Return how well each method makes a model continue prompts in another class than their own.

    The examples are split by class: 2/5 make the centroids, 1/5 trains the judge, 1/5 chooses each
    method's strength, and 1/5 is for the table. Compared are few-shot prompts, dense and SAE
    descent, decoder rows and mean differences (of the residual stream, of values, of queries and
    values), each layer alone, inference-time intervention over all of them, and random directions.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: by hook name, such as `QuerySAEs`.
        examples: labelled prompts with responses, 20 or more of each class.
        layers: which layers; None means all of the model.
        span: of the centroids; None means the last prompt token.
        scope: which tokens are steered; None means the last prompt token.
        descents: objectives with their steps and step sizes.
        n_cases: cases of validation and of test each.
        max_new_tokens: most tokens of a text.
        temperature: of sampling, seeded row by row; None decodes greedily.
        chat_template: as for `tokenize_examples`.
        seed: of splits, pairs, shown examples and sampling.
        settings: what else the log and the report should hold, such as names of files.
        log: a file for what the methods wrote, from which a stopped run continues; None keeps none.
        ranks: the processes of a launch; see `compare_methods`.

    Raises:
        ValueError: too few examples of a class or too many cases, a layer without SAEs, a length or
            temperature that is not allowed, or a log of other settings or texts.
    """
    span = LastPromptToken() if span is None else span
    scope = LastPromptToken() if scope is None else scope
    sites = query_sites(model, layers)
    if missing := [site.layer for site in sites if site.hook_name not in saes]:
        raise ValueError(f"saes must hold all layers, got none for {missing}: train them")
    steering, judging, validation, test = four_parts(examples, seed)
    judge = ClassifierJudge.fit(judging, seed=seed)
    told = {
        **(settings or {}),
        "layers": [site.layer for site in sites],
        "span": scope_name(span),
        "scope": scope_name(scope),
        "descents": [descent.name for descent in descents],
        "n_cases": n_cases,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "chat_template": chat_template,
        "seed": seed,
    }
    scorers = other_class_scorers(
        model,
        validation,
        test,
        judge,
        n_cases=n_cases,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat_template=chat_template,
        seed=seed,
    )
    chosen = {site.hook_name: saes[site.hook_name] for site in sites}
    read: dict[str, Any] = {"span": span, "chat_template": chat_template}
    held_out = tokenize_examples(model, validation, **read)
    table = layer_verdicts(model, chosen, sites, held_out, seed=seed)
    tokenized = tokenize_examples(model, steering, **read)
    alone = [[site.layer] for site in sites]
    added: dict[str, Any] = {"span": scope_name(span), "scope": scope, "layers": alone}
    # There is no prompt that requests a class.
    methods = [m for m in prompt_methods(steering, seed=seed) if m.name != "instruction"]
    made = []
    for kind, own in (("dense descent", identity_encoders(sites)), ("SAE descent", chosen)):
        made.append(CentroidTargetBuilder(model, own).fit(tokenized))
        targets = {scope_name(span): made[-1]}
        methods += descent_methods(kind, own, targets, descents, layers=alone, scopes=[scope])
    methods += decoder_rows_methods(chosen, made[1], **added)
    values = class_means(model, tokenized, told["layers"], at="attn.hook_v")
    residual = class_means(model, tokenized, told["layers"])
    for means in ([residual], [values], [made[0], values]):
        methods += mean_difference_methods(*means, **added)
    probed = probe_heads(model, tokenized, told["layers"], seed=seed)
    methods += intervention_methods(probed, span=scope_name(span), scope=scope)
    if log is not None:
        contents = told | {"contents": digest_of(made, examples)}
        kept = ComparisonLog(log, contents, rank=ranks.rank)
        scorers = [replace(scorer, log=kept) for scorer in scorers]
    found = compare_methods(scorers[0], scorers[1], methods, ranks=ranks)
    return replace(found, sites=table, settings=told)


def other_class_scorers(
    model: Any,
    validation: Sequence[LabelledExample],
    test: Sequence[LabelledExample],
    judge: Judge,
    *,
    n_cases: int,
    seed: int,
    **reading: Any,
) -> list[TextScorer]:
    """Return the scorers of two parts, whose prompts are to go on in another class than theirs.

    Args:
        model: writes the texts.
        validation: examples of the first.
        test: examples of the second.
        judge: of both.
        n_cases: cases of each.
        seed: of sampling.
        reading: of `TextScorer`.
    """
    return [
        TextScorer(
            model,
            {"other class": cases_of(some, n_cases)},
            judge,
            split=split,
            seed=seed + (split == "test"),
            **reading,
        )
        for split, some in (("validation", validation), ("test", test))
    ]


def layer_verdicts(
    model: Any,
    encoders: Mapping[str, QueryEncoder],
    sites: Sequence[QuerySite],
    examples: TokenizedExamples,
    *,
    n_pairs: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Return interchange effect, separability and verdict of each layer, all heads together."""
    moved = interchange_effect(model, sites, examples, n_pairs=n_pairs, per_head=False, seed=seed)
    apart = separability(model, encoders, examples, seed=seed)
    table = moved.merge(apart[apart["head"] == ALL_HEADS], on=["layer", "head"])
    return site_verdicts(table.drop(columns="head"))


def four_parts(examples: Sequence[LabelledExample], seed: int) -> tuple[list[LabelledExample], ...]:
    """Return examples for centroids, judge, validation and test, each class in all of them."""
    check_classes((example.label for example in examples), at_least=20)

    parts: list[Any] = [list(examples)]
    for share in (0.6, 2 / 3, 0.5):  # of what is left, for the parts after this one
        rest = parts.pop()
        labels = [str(example.label) for example in rest]
        parts += train_test_split(rest, test_size=share, random_state=seed, stratify=labels)
    return tuple(parts)
