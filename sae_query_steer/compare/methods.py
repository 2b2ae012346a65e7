"""Methods to compare, in one form: other prompts, descents, added directions, patched queries."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sae_query_steer.baselines.residual import residual_mean_difference
from sae_query_steer.baselines.rows import decoder_rows
from sae_query_steer.baselines.simple import few_shot_prompt, random_direction
from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.descents import Descent
from sae_query_steer.compare.query_patch import requested_queries
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.targets.centroids import CentroidTargets

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of added directions, in units of the difference of means. Source: our choice."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to get texts of a target class from cases: by another prompt, or by steering."""

    name: str
    objective: str | None = None
    centroids: str | None = None
    """From which prompts the centroids were taken, such as "requested" or "open"."""

    span: str | None = None
    scope: str | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    """None means all."""

    n_steps: int | None = None
    steerer: Callable[[Sequence[SteeringCase], float], Any] | None = None
    """From cases and a strength to a steerer with a row for each case, in this order; None for
    methods that change the prompt alone."""

    prompts: Callable[[Sequence[SteeringCase]], list[str]] | None = None
    """The prompts to continue; None means each case's own."""

    strengths: Sequence[float] = (0.0,)
    """Growing strengths to try, step sizes of the descents; one is enough where none is chosen."""


def prompt_methods(
    solved: Sequence[LabelledExample],
    *,
    shots: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    separator: str = "\n\n",
) -> list[Method]:
    """Return the methods that change the prompt: nothing, the request, and solved examples.

    Args:
        solved: labelled prompts with responses, to show; none of the cases.
        shots: how many are shown, a method for each.
        seed: of which are shown.
        separator: what stands between two examples, and before the prompt.
    """

    def few_shot(k: int) -> Method:
        def prompt(case: SteeringCase) -> str:
            # Seeded by the case, not by its place: the same examples in every batch.
            own = seed + zlib.crc32(f"{case.prompt}\0{case.target}".encode())
            return few_shot_prompt(
                case.prompt, solved, target=case.target, k=k, seed=own, separator=separator
            )

        return Method(name=f"few-shot (k={k})", prompts=lambda cases: list(map(prompt, cases)))

    return [
        Method(name="unsteered"),
        Method(name="instruction", prompts=lambda cases: [c.requesting or c.prompt for c in cases]),
        *map(few_shot, shots),
    ]


def descent_methods(
    name: str,
    encoders: Mapping[str, QueryEncoder],
    targets: Mapping[str, CentroidTargets],
    descents: Sequence[Descent],
    *,
    layers: Iterable[Sequence[int]],
    heads: Iterable[Sequence[int] | None] = (None,),
    scopes: Iterable[Scope] = (LastPromptToken(),),
    centroids: str | None = None,
) -> list[Method]:
    """Return descent over some encoders, a method for each combination of the choices.

    Args:
        name: of the methods, such as "SAE descent".
        encoders: by hook name; over `identity_encoders` it is dense steering.
        targets: centroids of these encoders, by the name of the span that they were taken over.
        descents: the objectives.
        layers: sets of layers that are steered together.
        heads: sets of heads; None means all.
        scopes: where to steer.
        centroids: of which prompts the centroids are, to tell the methods apart by.
    """

    def method(
        span: str, layers: Sequence[int], heads: Sequence[int] | None, at: Scope, descent: Descent
    ) -> Method:
        def steerer(cases: Sequence[SteeringCase], step_size: float) -> LatentGradientSteerer:
            return LatentGradientSteerer(
                encoders,
                targets[span],
                target=[case.target for case in cases],
                objective=descent.objective,
                n_steps=descent.n_steps,
                step_size=step_size,
                scope=at,
                layers=layers,
                heads=heads,
            )

        return Method(
            name=name,
            objective=descent.name,
            centroids=centroids,
            span=span,
            scope=scope_name(at),
            layers=tuple(layers),
            heads=None if heads is None else tuple(heads),
            n_steps=descent.n_steps,
            strengths=descent.step_sizes,
            steerer=steerer,
        )

    return [method(*chosen) for chosen in product(targets, layers, heads, scopes, descents)]


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

    def steerer(wanted: list[str], **where: Any) -> Steerer:
        return decoder_rows(encoders, targets, target=wanted, m=m, **where)

    return _added(f"decoder rows (m={m})", steerer, (centroids, span), layers, scope)


def residual_methods(
    means: CentroidTargets,
    *,
    span: str,
    layers: Iterable[Sequence[int]],
    scope: Scope | None = None,
    centroids: str | None = None,
) -> list[Method]:
    """Return contrastive activation addition after each set of layers, a method for each.

    The relative change of these methods is that of the residual stream.

    Args:
        means: of the classes, from `residual_means`.
        span: name of the span that they were taken over.
        layers: sets of layers after which the difference is added.
        scope: where to steer; None means the last prompt token.
        centroids: of which prompts the means are, to tell the methods apart by.
    """

    def steerer(wanted: list[str], **where: Any) -> Steerer:
        return residual_mean_difference(means, target=wanted, **where)

    return _added("residual mean difference", steerer, (centroids, span), layers, scope)


def _added(
    name: str,
    make: Callable[..., Any],
    which: tuple[str | None, str],
    layers: Iterable[Sequence[int]],
    scope: Scope | None,
) -> list[Method]:
    at = LastPromptToken() if scope is None else scope

    def method(some: Sequence[int]) -> Method:
        def steerer(cases: Sequence[SteeringCase], strength: float) -> Any:
            wanted = [case.target for case in cases]
            return make(wanted, strength=strength, scope=at, layers=some)

        return Method(
            name=name,
            centroids=which[0],
            span=which[1],
            scope=scope_name(at),
            layers=tuple(some),
            n_steps=1,
            strengths=STRENGTHS,
            steerer=steerer,
        )

    return [method(some) for some in layers]


def interchange_methods(
    model: Any, layers: Iterable[Sequence[int]], *, chat_template: bool = False
) -> list[Method]:
    """Return the reference, a method for each set of layers: queries of the requesting prompts.

    Each case gets, at its last prompt token, the queries that the model has there if its prompt
    requests the target. If the model obeys requests, this shows how far a query can lead.

    Args:
        model: the one that is steered.
        layers: sets of layers that are patched together, all heads of them.
        chat_template: read the requesting prompts in the tokenizer's chat template, as a
            `TextScorer` with it does.

    Raises:
        ValueError: when used, a case has no requesting prompt.
    """

    def method(some: Sequence[int]) -> Method:
        def patch(cases: Sequence[SteeringCase], strength: float) -> Steerer:
            del strength
            return requested_queries(model, cases, some, chat_template=chat_template)

        return Method(
            name="interchange",
            scope=scope_name(LastPromptToken()),
            layers=tuple(some),
            steerer=patch,
        )

    return [method(some) for some in layers]


def random_methods(model_of: Method, seeds: Sequence[int]) -> list[Method]:
    """Return the negative controls of a descent: random directions, as long as its changes.

    Raises:
        ValueError: the method does not steer.
    """
    make = model_of.steerer
    if make is None:
        raise ValueError(f"model_of must be a method that steers, got {model_of.name}")

    def control(seed: int) -> Method:
        return Method(
            name=f"random direction (seed {seed})",
            centroids=model_of.centroids,
            span=model_of.span,
            scope=model_of.scope,
            layers=model_of.layers,
            heads=model_of.heads,
            steerer=lambda cases, strength: random_direction(make(cases, strength), seed=seed),
        )

    return [control(seed) for seed in seeds]
