"""`LatentGradientSteerer`: move the latent of the current query towards a class, and decode."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sae_query_steer.descent.control import Bounds, Gate, LatentChoice, Schedule, opened
from sae_query_steer.descent.goals import Goal, Latents, Target, target_name, weights_of
from sae_query_steer.descent.loop import descend
from sae_query_steer.descent.objectives import (
    CentroidContrast,
    GaussianLogLikelihood,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
    squared_distances,
)
from sae_query_steer.descent.strength import (
    Queries,
    by_row,
    each,
    limited,
    scheduled,
    target_labels,
)
from sae_query_steer.sae.encoders import any_sites, decoded_difference, in_32_bits
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.descent_checks import check_descent
from sae_query_steer.steering.edit import LatentsEdit, most_moved
from sae_query_steer.steering.steerer import EncoderSteerer, FromCentroids
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_shapes

OVERSHOOT = 1.1
"""Mean distance to the target's centroid after the descent, in units of that before, above which
`SteeringWarning` is issued. Source: our choice."""

TOWARDS_CENTROIDS = (
    *(SquaredDistance, PrototypeLogLikelihood),
    *(CentroidContrast, GaussianLogLikelihood),
)
"""Objectives that lead to a centroid, so that a larger distance is an overshoot."""


class LatentMove(NamedTuple):
    """The latents of some tokens before and after a descent, and what it was after."""

    before: Latents
    after: Latents
    goal: Goal
    loss: Tensor | None = None
    """Loss before the first step and after each, [steps token head]; None unless recorded."""


@dataclass(frozen=True, eq=False)
class LatentDescent(LatentsEdit):
    """The edit of a `LatentGradientSteerer`: z0 = encode(q), descend to zK, add the difference."""

    targets: CentroidTargets
    """The centroids that were made with these encoders on this model."""

    _: KW_ONLY

    target: Target | Sequence[Target]
    """The class to steer towards, or weights of classes, negative to steer away:
    {"create": 1, "remember": -0.5}. A list has one for each row of the batch."""

    objective: Objective
    """What is minimised, such as `PrototypeLogLikelihood()` or `SquaredDistance()`."""

    n_steps: int | Sequence[int]
    """Gradient steps at each position, 0 or more; a list has a number for each row."""

    step_size: float | Sequence[float]
    """Size of a step, 0 or more, in units of the objective's gradient; a list likewise."""

    schedule: Schedule | None = None
    """Factor of the step size over generated tokens: `ExponentialDecay`, `LinearWarmUp`, or a
    function of their age; None means always 1."""

    latents: LatentChoice | None = None
    """Which latents may move: `ActiveLatents`, `TopLatents`, `GivenLatents`,
    `ExceptLatents`; None means all."""

    gate: Gate | None = None
    """Which tokens and heads are steered at all: `PosteriorBelow`, `LatentAbove`, or a function of
    latents and goal; None means all."""

    until: float | None = None
    """Stop at each token and head once the target's posterior reaches this; above 0, at most 1."""

    trust_radius: float | None = None
    """How far latents may go, ||z - z0|| of a head at most; None means any way."""

    max_relative_change: float | None = None
    """||change of q|| / ||q|| of a head at most; a longer change is shortened. None: any."""

    keep_norm: bool = False
    """Turn the query and leave its norm: attention then moves, and does not sharpen."""

    has_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_descent(self)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {
            "method": "latent gradient",
            "classes": self.targets.classes,
            **target_labels(self.target),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What a `LatentDescent` is made of."""
        return {f.name: getattr(self, f.name) for f in fields(LatentDescent) if f.init}

    def change(
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return what the descent adds to queries; Args as `Edit.change`."""
        move = self.descended(activations, at, tokens, record=record)
        delta = self.decoded(activations, at, move)
        return self._recorded(move, delta) if record else QueryChange(delta=delta)

    def progress(self, made: QueryChange, tokens: TokenPositions) -> tuple[bool, str]:
        """Return whether the descent ends farther from the target's centroid than it began."""
        before, after, loss = made.distance_before, made.distance_after, made.loss
        if before is None or after is None or loss is None:  # a move
            return False, ""
        names = [target_name(target) for target in each(self.target, "target")]
        if any(name not in self.targets.classes for name in names):  # a mixture has no centroid
            return False, ""
        by_row = torch.tensor([self.targets.classes.index(name) for name in names])
        column = by_row.expand(tokens.n_rows)[tokens.row.cpu()].to(before.device)
        start, end = (
            float(d.take_along_dim(column[:, None, None], -1).mean()) for d in (before, after)
        )
        text = f"; mean distance to the target's centroid {start:.3g} before, {end:.3g} after"
        if len(loss) > 1:
            text += f"; {(loss.diff(dim=0) < 0).float().mean():.0%} of the steps lowered the loss"
        return isinstance(self.objective, TOWARDS_CENTROIDS) and end > OVERSHOOT * start, text

    def descended(
        self, queries: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> LatentMove:
        """Return where the descent moves the latents of queries; Args as `change`."""
        encoder = self._encoder(at, queries.device)
        z0 = encoder.encode(in_32_bits(queries))
        goal = self._goal(at, tokens, z0)
        movable = None
        if self.latents is not None:
            movable = self.latents(z0, goal, at.hook_name, at.heads)
        if self.gate is not None:
            open_ = opened(self.gate, z0, goal)[..., None]
            movable = open_.expand_as(z0) if movable is None else movable & open_
        result = descend(
            z0,
            goal,
            self.objective,
            n_steps=self._n_steps(tokens, z0),
            step_size=self._step_size(tokens, z0),
            bounds=Bounds(
                lower=encoder.latent_min,
                movable=movable,
                radius=self.trust_radius,
                until=self.until,
                temperature=self._temperature,
            ),
            record_loss=record,
        )
        return LatentMove(z0, result.z, goal, result.loss)

    def decoded(self, queries: Tensor, at: SiteHeads, move: LatentMove) -> Tensor:
        """Return what a move of the latents adds to the queries, within the limits."""
        encoder = self._encoder(at, queries.device)
        return limited(
            in_32_bits(queries),
            decoded_difference(encoder, move.after, move.before),
            max_relative_change=self.max_relative_change,
            keep_norm=self.keep_norm,
        )

    def described(
        self, queries: Tensor, at: SiteHeads, tokens: TokenPositions, delta: Tensor
    ) -> QueryChange:
        """Return a change that another edit made, with its effect on latents, distances and loss.

        The latents afterwards are those of the changed query.
        """
        encoder = self._encoder(at, queries.device)
        before, after = (encoder.encode(q) for q in (queries, queries + delta.to(queries)))
        goal = self._goal(at, tokens, before)
        loss = torch.stack([self.objective.loss(z, goal) for z in (before, after)])
        return self._recorded(LatentMove(before, after, goal, loss), delta)

    @torch.no_grad()
    def _recorded(self, move: LatentMove, delta: Queries) -> QueryChange:
        """Return the change of the queries, with distances, loss and most moved latents."""
        change = QueryChange(delta=delta, **most_moved(move.before, move.after))
        if self.targets.are_moves:  # no points, so no distances
            return change
        before, after = (
            squared_distances(z, move.goal.centroids).sqrt() for z in (move.before, move.after)
        )
        return replace(
            change,
            distance_before=before,
            distance_after=after,
            loss=move.loss,
            temperature=self._temperature,
        )

    @property
    def _temperature(self) -> float:
        return getattr(self.objective, "temperature", 1.0)

    def _goal(self, at: SiteHeads, tokens: TokenPositions, z: Tensor) -> Goal:
        """Return the goal at a site; all that no token changes in it is made once."""
        key, classes = (at.hook_name, at.heads, z.device, z.dtype), self.targets.classes
        if key not in self._made:
            first = each(self.target, "target")[0]
            name, heads = at.hook_name, list(at.heads)
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = Goal(
                    centroids=self.targets.means[name][:, heads].to(z),
                    variances=self.targets.variances[name][:, heads].to(z),
                    weights=weights_of(first, classes).to(z),
                ).prepared()
        goal = self._made[key]
        if isinstance(self.target, str | Mapping):
            return goal
        by_rows = [weights_of(target, classes) for target in self.target]
        return goal.with_weights(torch.stack(by_row("target", by_rows, tokens)).to(z))

    def _n_steps(self, tokens: TokenPositions, z: Tensor) -> int | Tensor:
        if not isinstance(self.n_steps, Sequence):
            return int(self.n_steps)
        return torch.tensor(by_row("n_steps", self.n_steps, tokens), device=z.device)

    def _step_size(self, tokens: TokenPositions, z: Tensor) -> float | Tensor:
        size: Any = self.step_size
        if isinstance(size, Sequence):
            size = torch.tensor(by_row("step_size", size, tokens), device=z.device, dtype=z.dtype)
        if self.schedule is None:
            return size if isinstance(size, Tensor) else float(size)
        return scheduled(self.schedule, tokens.age()).to(z) * size


@dataclass(frozen=True, eq=False, repr=False)
class LatentGradientSteerer(LatentDescent, EncoderSteerer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Steers by gradient descent on sparse features of attention queries.

    At every scoped position, for every chosen head: z0 = encode(q), K projected gradient steps on
    the objective move it to zK, and the query becomes q + decode(zK) - decode(z0). The SAE's
    reconstruction error never enters the model: zero steps, or a step size of zero, is exactly
    the identity. Over `identity_encoders` the same value is dense query steering.

    It is its own edit: a `LatentDescent` with sites, heads and scope.

    Source: arXiv 2502.18644; adding the difference of two decodings, not the reconstruction, is
    our choice, so that steering is not confounded with the SAE's error.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._act_at(any_sites(self.saes))
        encoders = {name: self.saes[name] for name in self.where.chosen}
        check_shapes(self.targets, encoders)
        object.__setattr__(self, "origin", FromCentroids(encoders, self.targets))

    def __repr__(self) -> str:
        return (
            f"LatentGradientSteerer(target={self.target!r}, {self.objective!r}, "
            f"n_steps={self.n_steps}, step_size={self.step_size}, {self.where!r})"
        )
