"""Steering towards classes of stories: the methods, the patched reference, and the tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import sae_query_steer as sqs
from experiments.stories.classes import Candidate
from sae_query_steer.compare import (
    ComparisonLog,
    Descent,
    Method,
    RuleJudge,
    SteeringCase,
    TextScorer,
    cases_of,
    compare_methods,
    descent_methods,
    mean_difference_methods,
)
from sae_query_steer.compare.comparison import outcome_row
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.positions import Span, TokenPositions
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads, Where

PATCH = "real queries, all layers"
LAST, ALL = sqs.LastPromptToken(), sqs.LastPromptToken() | sqs.scopes.ResponseTokens()
CONTRAST = Descent(
    name="contrast",
    objective=sqs.objectives.CentroidContrast(),
    n_steps=1,
    step_sizes=(1.0, 4.0, 16.0, 64.0),
)
DESCENTS = (
    Descent(
        name="prototype",
        objective=sqs.PrototypeLogLikelihood(),
        n_steps=20,
        step_sizes=(0.3, 3.0, 30.0),
    ),
    CONTRAST,
)


@dataclass(frozen=True, eq=False)
class DonorQueries(Edit):
    """Real queries of a donor for each row: from its last prompt token on, token by token.

    After the donor's last token a row is left alone.
    """

    queries: Mapping[str, Sequence[Tensor]]
    """By hook name, for each row [token head d_head]; the first is of the last prompt token."""

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": PATCH}

    def change(
        self, activations: Tensor, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return what is to be added to become the donor's query at the same distance."""
        del record
        delta = torch.zeros_like(activations)
        ages = tokens.age().long().tolist()
        for i, (row, age) in enumerate(zip(tokens.row.tolist(), ages, strict=True)):
            donor = self.queries[at.hook_name][row]
            if age < len(donor):
                delta[i] = donor[age].to(activations) - activations[i]
        return QueryChange(delta=delta)


def patch_method(model: Any, candidate: Candidate, scope: Any) -> Method:
    """Return the reference: at all layers, the queries of an example of the target class.

    The donor is the paired prompt where there is one, else an example drawn from the class.
    """
    sites = {site.hook_name: site for site in sqs.query_sites(model)}
    pools: dict[str, list[sqs.LabelledExample]] = {}
    for example in candidate.parts["sites"]:
        pools.setdefault(example.label, []).append(example)

    def steerer(cases: Sequence[SteeringCase], strength: float) -> Steerer:
        del strength
        donors = []
        for i, case in enumerate(cases):
            partner = candidate.partners.get(case.prompt)
            if partner is None:
                donors.append(pools[case.target][(7 * i + 1) % len(pools[case.target])])
            else:
                donors.append(sqs.LabelledExample(prompt=partner, label=case.target))
        tokenized = sqs.tokenize_examples(model, donors, span=ALL, batch_size=64)
        found: dict[str, dict[int, Tensor]] = {name: {} for name in sites}
        for batch in read_at_span(model, tokenized, list(sites)):
            for row in batch.row.unique().tolist():
                for name, queries in batch.activations.items():
                    found[name][row] = queries[batch.row == row]
        by_row = {name: [rows[i] for i in range(len(cases))] for name, rows in found.items()}
        return Steerer(DonorQueries(by_row), Where(sites.values(), scope=scope))

    return Method(name=PATCH, scope=scope_name(scope), layers=None, steerer=steerer)


def cases(candidate: Candidate, part: str, n: int) -> list[SteeringCase]:
    """Return the cases of a part: to the candidate's target, or each to another class."""
    examples = candidate.parts[part]
    if candidate.target is not None:
        return [SteeringCase(prompt=e.prompt, target=candidate.target) for e in examples[:n]]
    # The partner is not named as the prompt that requests the target: after it, a text that goes
    # on as before is so unlikely that every weak strength would look broken.
    return cases_of(examples, min(n, len(examples)))


def scorer(
    model: Any, candidate: Candidate, part: str, n: int, log: ComparisonLog, seed: int
) -> TextScorer:
    """Return what scores methods on a part of a candidate's prompts, by its rule."""
    return TextScorer(
        model,
        {candidate.name: cases(candidate, part, n)},
        RuleJudge(candidate.rule, candidate.classes),
        max_new_tokens=candidate.max_new_tokens,
        split=part,
        log=log,
        temperature=0.8,
        seed=seed + (part == "test"),
        batch_size=n,
    )


def patched(model: Any, candidate: Candidate, test: TextScorer) -> pd.DataFrame:
    """Return target rates without a steer, and with real queries of the target class patched in."""
    methods: list[Method] = [Method(name="unsteered")]
    methods += [patch_method(model, candidate, scope) for scope in scopes_of(candidate)]
    if candidate.partners:
        methods.append(asked(candidate))
    return pd.DataFrame(
        outcome_row(task, method, outcome)
        for method in methods
        for task, outcome in test.score(method, 0.0, [candidate.name]).items()
    )


def asked(candidate: Candidate) -> Method:
    """Return the method that gives the paired prompt, which leads to the target by itself."""
    return Method(
        name="the paired prompt",
        prompts=lambda cases: [candidate.partners[c.prompt] for c in cases],
    )


def steered(
    model: Any,
    saes: sqs.QuerySAEs,
    candidate: Candidate,
    layer: int,
    scorers: Mapping[str, TextScorer],
    scope: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of all methods on the test prompts, and the curves on the validation.

    All layers are steered together; of candidates with a site that matters, that layer alone too.
    Centroids are of the last prompt token where that is the scope, else of the response tokens.
    The random controls are of the descent that did best.
    """
    sites = sqs.query_sites(model)
    examples = candidate.parts["sites"] + candidate.parts["confirm"]
    layers = [[site.layer for site in sites]]
    if candidate.kind != "open":
        layers.insert(0, [layer])
    span: Span = LAST if scope == LAST else sqs.scopes.ResponseTokens()
    name_of_span = scope_name(span)
    tokenized = sqs.tokenize_examples(model, examples, span=span)
    methods: list[Method] = []
    for name, encoders in (("SAE descent", saes), ("dense", sqs.sae.identity_encoders(sites))):
        targets = {name_of_span: sqs.CentroidTargetBuilder(model, encoders).fit(tokenized)}
        methods += descent_methods(name, encoders, targets, DESCENTS, layers=layers, scopes=[scope])
    means = sqs.baselines.class_means(model, tokenized, [2])
    methods += mean_difference_methods(means, span=name_of_span, scope=scope, layers=[[2]])
    found = compare_methods(
        scorers["validation"], scorers["test"], methods, control_seeds=(0, 1, 2)
    )
    return found.rows, found.curves


def scopes_of(candidate: Candidate) -> list[Any]:
    """Return where a candidate is steered: of the paired ones, the last prompt token decides."""
    return [LAST] if candidate.kind == "paired" else [LAST, ALL]
