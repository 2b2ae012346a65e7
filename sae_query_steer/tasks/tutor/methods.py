"""The methods that the tutor's demo compares, each as a `Method` over the same cases."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.baselines import RandomDirectionSteerer, few_shot_prompt, mean_difference
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.centroids import CentroidTargets
from sae_query_steer.data import LabelledExample
from sae_query_steer.evaluation.comparison import Method
from sae_query_steer.evaluation.descents import Descent
from sae_query_steer.evaluation.rowwise import QueryPatch, RowwiseSteerer
from sae_query_steer.hosts.models import queries_at
from sae_query_steer.intervention import Steerer
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering import LatentGradientSteerer
from sae_query_steer.tasks.tutor.comparison import Case
from sae_query_steer.tasks.tutor.corpus import SEPARATOR

SCOPE = "last prompt token"
"""Where all methods act: the read-out, whose query chooses the note."""


def prompt_methods(solved: Sequence[LabelledExample], *, seed: int) -> list[Method[Case]]:
    """Return the methods that change the prompt: nothing, the request itself, two examples.

    Args:
        solved: open prompts with feedback, to show; of other lessons than the cases.
        seed: of which are shown.
    """

    def few_shot(cases: Sequence[Case]) -> list[str]:
        return [
            few_shot_prompt(
                case.prompt.text,
                solved,
                target=case.target,
                k=2,
                seed=seed + i,
                separator=SEPARATOR,
            )
            for i, case in enumerate(cases)
        ]

    return [
        Method(name="unsteered"),
        Method(name="instruction", prompts=lambda cases: [case.requesting.text for case in cases]),
        Method(name="few-shot (k=2)", prompts=few_shot),
    ]


def interchange_method(model: Any, sites: Sequence[QuerySite]) -> Method[Case]:
    """Return the reference: each case gets the queries of its own prompt with the request in it."""
    by_name = {site.hook_name: site for site in sites}

    def patch(cases: Sequence[Case], strength: float) -> Steerer:
        del strength
        rows = [model.to_tokens(case.requesting.text, prepend_bos=True)[0] for case in cases]
        queries = queries_at(model, pad_sequence(rows, batch_first=True), list(by_name))
        last = torch.tensor([len(row) - 1 for row in rows])
        each = torch.arange(len(rows))
        return QueryPatch(by_name, {name: found[each, last] for name, found in queries.items()})

    return Method(name="interchange", steerer=patch, scope=SCOPE)


def descent_method(
    name: str,
    encoders: Mapping[str, QueryEncoder],
    targets: CentroidTargets,
    descent: Descent,
    layers: Sequence[int],
    *,
    centroids: str,
    span: str,
) -> Method[Case]:
    """Return descent towards the centroid of each case's target, over some encoders."""

    def steerer(level: BloomLevel, step_size: float) -> LatentGradientSteerer:
        return LatentGradientSteerer(
            encoders,
            targets,
            target=level,
            objective=descent.objective,
            n_steps=descent.n_steps,
            step_size=step_size,
            layers=layers,
        )

    return Method(
        name=name,
        objective=descent.name,
        centroids=centroids,
        span=span,
        scope=SCOPE,
        n_steps=descent.n_steps,
        strengths=descent.step_sizes,
        steerer=lambda cases, step_size: _by_target(
            cases, {level: steerer(level, step_size) for level in BloomLevel}
        ),
    )


def mean_difference_method(
    sites: Sequence[QuerySite],
    targets: CentroidTargets,
    strengths: Sequence[float],
    *,
    centroids: str,
    span: str,
) -> Method[Case]:
    """Return the mean difference of the queries, which is dense descent on the contrast."""
    return Method(
        name="mean difference",
        centroids=centroids,
        span=span,
        scope=SCOPE,
        n_steps=1,
        strengths=strengths,
        steerer=lambda cases, strength: _by_target(
            cases,
            {
                level: mean_difference(sites, targets, target=level, strength=strength)
                for level in BloomLevel
            },
        ),
    )


def random_method(model_of: Method[Case], *, seed: int) -> Method[Case]:
    """Return random directions, as long at every token as the change of another method."""
    assert model_of.steerer is not None
    make = model_of.steerer

    def steerer(cases: Sequence[Case], strength: float) -> Steerer:
        told = make(cases, strength)
        assert isinstance(told, RowwiseSteerer)
        by_level = {}
        for case, own in zip(cases, told.steerers, strict=True):
            if case.target not in by_level:
                assert isinstance(own, LatentGradientSteerer)
                by_level[case.target] = RandomDirectionSteerer(
                    own, seed=100 * seed + case.target.order
                )
        return _by_target(cases, by_level)

    return Method(name="random direction", scope=SCOPE, steerer=steerer)


def _by_target(cases: Sequence[Case], steerers: Mapping[BloomLevel, Steerer]) -> RowwiseSteerer:
    return RowwiseSteerer([steerers[case.target] for case in cases])
