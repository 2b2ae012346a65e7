"""The methods that are compared on the tutor."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_query_steer.baselines.residual_stream import ResidualMeans
from sae_query_steer.compare.added_methods import decoder_rows_methods, residual_methods
from sae_query_steer.compare.comparison import Method
from sae_query_steer.compare.descents import DESCENTS
from sae_query_steer.compare.query_patch import interchange_methods
from sae_query_steer.compare.sweep import descent_methods, prompt_methods
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.positions import LastPromptToken, ResponseTokens, Span
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.toy.corpus import SEPARATOR

SPANS: Mapping[str, Span] = {
    "last prompt token": LastPromptToken(),
    "response tokens": ResponseTokens(),
}

MAIN = ("requested", "last prompt token")
"""The centroids with which every objective is tried: of which prompts, over which span."""

OTHERS = (("open", "last prompt token"), ("requested", "response tokens"))
"""Other centroids, each different from the main ones in one thing."""

Centroids = Mapping[tuple[str, str], CentroidTargets]
"""By prompts and span."""

_CONTRAST = [descent for descent in DESCENTS if descent.name == "contrast"]
_PROTOTYPE = [descent for descent in DESCENTS if descent.name == "prototype"]
_DISTANCE = [descent for descent in DESCENTS if descent.name == "squared distance"]


def main_methods(
    model: Any,
    kinds: Mapping[str, tuple[Mapping[str, QueryEncoder], Centroids]],
    layers: Sequence[int],
    solved: Sequence[LabelledExample],
    *,
    seed: int,
    shots: Sequence[int] = (2,),
) -> list[Method]:
    """Return the methods that answer the main question, in the order of the table.

    The mean difference of the queries is dense descent on the contrast.

    Args:
        model: the tutor.
        kinds: "dense" and "SAE" encoders, each with its centroids.
        layers: the layers to steer, together.
        solved: open prompts with feedback, to show; of other lessons than the cases.
        seed: of which are shown.
        shots: how many are shown, a method for each.
    """
    methods = prompt_methods(solved, shots=shots, seed=seed, separator=SEPARATOR)
    methods += interchange_methods(model, [layers])
    dense, means = kinds["dense"]
    methods += _descents("mean difference", dense, means, MAIN, _CONTRAST, [layers])
    for kind, (encoders, found) in kinds.items():
        tried = DESCENTS if kind == "SAE" else [*_PROTOTYPE, *_DISTANCE]
        methods += _descents(f"{kind} descent", encoders, found, MAIN, tried, [layers])
        for other in OTHERS:
            methods += _descents(f"{kind} descent", encoders, found, other, _PROTOTYPE, [layers])
    return methods


def more_methods(
    model: Any,
    kinds: Mapping[str, tuple[Mapping[str, QueryEncoder], Centroids]],
    means: Mapping[str, ResidualMeans],
    layers: Sequence[int],
    all_layers: Sequence[int],
) -> list[Method]:
    """Return what the full comparison adds to the main methods.

    Every objective with centroids over the response tokens; decoder rows, and contrastive
    activation addition after each layer of the residual stream, with both spans; and each other
    layer alone, by real queries, mean difference and squared distance.

    Args:
        model: the tutor.
        kinds: "dense" and "SAE" encoders, each with its centroids.
        means: of the residual stream, by span.
        layers: the layers to steer, together.
        all_layers: those to steer one by one.
    """
    response = ("requested", "response tokens")
    rest = [d for d in DESCENTS if d.name != "prototype"]
    dense, dense_centroids = kinds["dense"]
    methods = _descents("mean difference", dense, dense_centroids, response, _CONTRAST, [layers])
    for kind, (encoders, found) in kinds.items():
        tried = rest if kind == "SAE" else _DISTANCE
        methods += _descents(f"{kind} descent", encoders, found, response, tried, [layers])
    encoders, found = kinds["SAE"]
    alone = [[layer] for layer in all_layers]
    for prompts, span in (MAIN, response):
        targets = found[prompts, span]
        methods += decoder_rows_methods(
            encoders, targets, span=span, centroids=prompts, layers=[layers]
        )
        methods += residual_methods(means[span], span=span, centroids=prompts, layers=alone)
    others = [layer for layer in alone if layer != list(layers)]
    methods += interchange_methods(model, others)
    methods += _descents("mean difference", dense, dense_centroids, MAIN, _CONTRAST, others)
    methods += _descents("dense descent", dense, dense_centroids, MAIN, _DISTANCE, others)
    methods += _descents("SAE descent", encoders, found, MAIN, _DISTANCE, others)
    return methods


def _descents(
    name: str,
    encoders: Mapping[str, QueryEncoder],
    found: Centroids,
    which: tuple[str, str],
    descents: Sequence[Any],
    layers: Sequence[Sequence[int]],
) -> list[Method]:
    prompts, span = which
    return descent_methods(
        name, encoders, {span: found[which]}, descents, layers=layers, centroids=prompts
    )
