"""Methods that add one direction, whatever the query is: of decoder rows, of the residual."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sae_query_steer.baselines.decoder_rows import decoder_rows
from sae_query_steer.baselines.residual import residual_mean_difference
from sae_query_steer.baselines.residual_stream import ResidualMeans
from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.comparison import Method
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.positions import LastPromptToken, Scope, scope_name
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.targets.centroids import CentroidTargets

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""In units of the difference of the means. Source: our choice."""


def decoder_rows_methods(
    encoders: Mapping[str, QueryEncoder],
    targets: CentroidTargets,
    *,
    span: str,
    layers: Iterable[Sequence[int]],
    scope: Scope | None = None,
    centroids: str | None = None,
    m: int = 4,
) -> list[Method]:
    """Return the decoder rows of each class's m top latents, a method for each set of layers.

    Args:
        encoders: SAEs by hook name.
        targets: their centroids.
        span: name of the span that the centroids were taken over.
        layers: sets of layers that are steered together.
        scope: where to steer; None means the last prompt token.
        centroids: of which prompts they are, to tell the methods apart by.
        m: latents of each head.
    """
    where = LastPromptToken() if scope is None else scope

    def method(some: Sequence[int]) -> Method:
        def steerer(cases: Sequence[SteeringCase], strength: float) -> Steerer:
            wanted = [case.target for case in cases]
            return decoder_rows(
                encoders, targets, target=wanted, strength=strength, m=m, scope=where, layers=some
            )

        return _added(f"decoder rows (m={m})", (centroids, span), where, some, steerer)

    return [method(some) for some in layers]


def residual_methods(
    means: ResidualMeans,
    *,
    span: str,
    layers: Iterable[Sequence[int]],
    scope: Scope | None = None,
    centroids: str | None = None,
) -> list[Method]:
    """Return contrastive activation addition after each set of layers, a method for each.

    Its relative change is that of the residual stream.

    Args:
        means: of the classes, from `residual_means`.
        span: name of the span that they were taken over.
        layers: sets of layers after which is added.
        scope: where to steer; None means the last prompt token.
        centroids: of which prompts the means are, to tell the methods apart by.
    """
    where = LastPromptToken() if scope is None else scope

    def method(some: Sequence[int]) -> Method:
        def steerer(cases: Sequence[SteeringCase], strength: float) -> Steerer:
            wanted = [case.target for case in cases]
            return residual_mean_difference(
                means, target=wanted, strength=strength, scope=where, layers=some
            )

        return _added("residual mean difference", (centroids, span), where, some, steerer)

    return [method(some) for some in layers]


def _added(
    name: str,
    which: tuple[str | None, str],
    scope: Scope,
    layers: Sequence[int],
    steerer: Callable[[Sequence[SteeringCase], float], Any],
) -> Method:
    return Method(
        name=name,
        centroids=which[0],
        span=which[1],
        scope=scope_name(scope),
        layers=tuple(layers),
        n_steps=1,
        strengths=STRENGTHS,
        steerer=steerer,
    )
