"""What is compared: cases, and methods that lead from a case's prompt to its target class."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from sae_query_steer.arguments import check_number
from sae_query_steer.baselines.directions import decoder_rows, kind_of, mean_difference
from sae_query_steer.baselines.probes import ProbedHeads, inference_time_intervention
from sae_query_steer.baselines.simple import few_shot_prompt, random_direction
from sae_query_steer.data.examples import LabelledExample, check_classes
from sae_query_steer.descent.objectives import (
    CentroidContrast,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
)
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.steering.steerer import JoinedSteerers, Steerer
from sae_query_steer.targets.centroids import CentroidTargets

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of added directions, in units of the difference of means. Source: our choice."""

Layers = Iterable[Sequence[int]]
"""Sets of layers that are steered together."""


@dataclass(frozen=True, kw_only=True)
class SteeringCase:
    """A prompt, and the class that the text written after it should have."""

    prompt: str
    target: str
    source: str | None = None
    """The class that the prompt leads to by itself, if known."""

    requesting: str | None = None
    """The same prompt with a request for the target, if the task has such prompts."""


def cases_of(examples: Sequence[LabelledExample], n: int) -> list[SteeringCase]:
    """Return n cases from labelled prompts, each with another class than its own as the target.

    Pairs of source and target are balanced; a prompt is reused, for another target, only after all
    prompts of its class were used.

    Raises:
        ValueError: fewer than two classes, or more cases than prompts and other classes give.
    """
    classes = sorted(check_classes((e.label for e in examples), at_least=1))
    pools = {name: [e.prompt for e in examples if str(e.label) == name] for name in classes}
    others = len(classes) - 1
    cases = []
    for lap in range(max(map(len, pools.values())) * others):
        for index, (source, prompts) in enumerate(pools.items()):
            round_, place = divmod(lap, len(prompts))
            if round_ < others:
                target = classes[(index + 1 + (place + round_) % others) % len(classes)]
                cases.append(SteeringCase(prompt=prompts[place], target=target, source=source))
    check_number("n cases", n, whole=True, least=1, most=len(cases))
    return cases[:n]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to get texts of a target class from cases: another prompt, or steering."""

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
    """From cases and a strength to a steerer with one target for each case, in order; None for
    methods that only change the prompt."""

    prompts: Callable[[Sequence[SteeringCase]], list[str]] | None = None
    """The prompts to continue; None means each case's own."""

    strengths: Sequence[float] = (0.0,)
    """Increasing strengths to try; the step sizes of descents."""

    def columns(self) -> dict[str, Any]:
        """Return the columns that identify the method in a table."""
        return {
            "method": self.name,
            "objective": self.objective,
            "centroids": self.centroids,
            "span": self.span,
            "scope": self.scope,
            "layers": ",".join(map(str, self.layers or ())),
            "heads": "all" if self.heads is None else ",".join(map(str, self.heads)),
        }


@dataclass(frozen=True, kw_only=True)
class Descent:
    """An objective with its number of steps and the step sizes to try."""

    name: str
    objective: Objective
    n_steps: int
    step_sizes: tuple[float, ...]


# Distance and contrast are linear in z, so one step equals twenty smaller ones. The prototype's
# step shrinks as the target's posterior grows, so more steps are safe. The largest step sizes break
# the text, so that the texts end the search, not the grid.
DESCENTS = tuple(
    Descent(name=name, objective=objective, n_steps=n_steps, step_sizes=step_sizes)
    for name, objective, n_steps, step_sizes in (
        ("prototype", PrototypeLogLikelihood(), 20, (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)),
        ("squared distance", SquaredDistance(), 1, (0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)),
        ("contrast", CentroidContrast(), 1, (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0)),
    )
)


def prompt_methods(
    solved: Sequence[LabelledExample],
    *,
    shots: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    separator: str = "\n\n",
) -> list[Method]:
    """Return the methods that change the prompt: none, the request, and few-shot examples.

    Args:
        solved: labelled prompts with responses to show; none of the cases.
        shots: numbers of examples, a method for each.
        seed: of the choice of examples.
        separator: text between two examples and before the prompt.
    """

    def shown(case: SteeringCase, k: int) -> str:
        # Seeded by the case, not by its place: the same examples in every batch.
        own = seed + zlib.crc32(f"{case.prompt}\0{case.target}".encode())
        return few_shot_prompt(
            case.prompt, solved, target=case.target, k=k, seed=own, separator=separator
        )

    def few_shot(k: int) -> Method:
        return Method(name=f"few-shot (k={k})", prompts=lambda cases: [shown(c, k) for c in cases])

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
    layers: Layers,
    heads: Iterable[Sequence[int] | None] = (None,),
    scopes: Iterable[Scope] = (LastPromptToken(),),
    centroids: str | None = None,
    max_relative_change: float | None = None,
) -> list[Method]:
    """Return descent over some encoders, a method for each combination of the choices.

    Args:
        name: of the methods, such as "SAE descent".
        encoders: by hook name; `identity_encoders` gives dense steering.
        targets: centroids of these encoders, by the name of their span.
        descents: the objectives.
        layers: sets of layers that are steered together.
        heads: sets of heads; None means all.
        scopes: which tokens are steered.
        centroids: label of the prompts that gave the centroids.
        max_relative_change: as of `LatentGradientSteerer`.
    """

    def method(
        span: str, layers: Sequence[int], heads: Sequence[int] | None, at: Scope, descent: Descent
    ) -> Method:
        make = partial(
            LatentGradientSteerer,
            encoders,
            targets[span],
            objective=descent.objective,
            n_steps=descent.n_steps,
            scope=at,
            layers=layers,
            heads=heads,
            max_relative_change=max_relative_change,
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
            steerer=lambda cases, step_size: make(target=_targets(cases), step_size=step_size),
        )

    return [method(*chosen) for chosen in product(targets, layers, heads, scopes, descents)]


def _targets(cases: Sequence[SteeringCase]) -> list[str]:
    return [case.target for case in cases]


def decoder_rows_methods(
    encoders: Mapping[str, QueryEncoder], targets: CentroidTargets, **choices: Any
) -> list[Method]:
    """Return the decoder rows of each class's 4 top latents, a method for each set of layers.

    Args:
        encoders: SAEs by hook name.
        targets: their centroids.
        choices: span, layers, scope and centroids; see `mean_difference_methods`.
    """
    return _added("decoder rows (m=4)", partial(decoder_rows, encoders, targets, m=4), **choices)


def mean_difference_methods(*means: CentroidTargets, **choices: Any) -> list[Method]:
    """Return the mean difference of classes, a method for each set of layers.

    Of the residual stream it is contrastive activation addition. Means of several kinds, such as
    queries and values, are added together at one strength. The relative change of these methods is
    that of the activations that change.

    Args:
        means: of the classes, from `class_means`; one or more kinds of activations.
        choices: span, the name of the span of the means; layers, sets of layers in which the
            difference is added; scope, which tokens are steered (default: the last prompt token);
            centroids, label of the prompts that gave the means.
    """

    def make(**settings: Any) -> Steerer | JoinedSteerers:
        made = [mean_difference(one, **settings) for one in means]
        return made[0] if len(made) == 1 else JoinedSteerers(*made)

    return _added(f"{' and '.join(map(kind_of, means))} mean difference", make, **choices)


def intervention_methods(probed: ProbedHeads, **choices: Any) -> list[Method]:
    """Return inference-time intervention in one of 20 probed heads, over all layers.

    Args:
        probed: from `probe_heads`.
        choices: span, scope and centroids; see `mean_difference_methods`.
    """
    layers = [int(name.split(".")[1]) for name in probed.accuracies]
    n_heads = max(1, sum(map(len, probed.accuracies.values())) // 20)  # ITI's code: 48 of 1,024

    def make(*, layers: Any, **settings: Any) -> Steerer:
        del layers  # the heads tell
        return inference_time_intervention(probed, n_heads=n_heads, **settings)

    return _added("inference-time intervention", make, layers=[layers], **choices)


def _added(
    name: str,
    make: Callable[..., Any],
    *,
    span: str,
    layers: Layers,
    scope: Scope | None = None,
    centroids: str | None = None,
) -> list[Method]:
    at = LastPromptToken() if scope is None else scope

    def method(some: Sequence[int]) -> Method:
        return Method(
            name=name,
            centroids=centroids,
            span=span,
            scope=scope_name(at),
            layers=tuple(some),
            n_steps=1,
            strengths=STRENGTHS,
            steerer=lambda cases, strength: make(
                target=_targets(cases), strength=strength, scope=at, layers=some
            ),
        )

    return list(map(method, layers))


def random_methods(model_of: Method, seeds: Sequence[int]) -> list[Method]:
    """Return the negative controls of a descent: random directions of the same length.

    Raises:
        ValueError: the method does not steer.
    """
    make = model_of.steerer
    if make is None:
        raise ValueError(f"model_of must be a method that steers, got {model_of.name}")

    def control(seed: int) -> Method:
        return replace(
            model_of,
            name=f"random direction (seed {seed})",
            objective=None,
            n_steps=None,
            strengths=(0.0,),
            steerer=lambda cases, strength: random_direction(make(cases, strength), seed=seed),
        )

    return list(map(control, seeds))
