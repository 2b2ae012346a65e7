"""`LatentGradientSteerer`: move the latent of the current query towards a class, and decode."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.control import Bounds, Gate, LatentChoice, Schedule, opened
from sae_query_steer.descent.goals import Goal, Target, target_name, weights_of
from sae_query_steer.descent.loop import descend
from sae_query_steer.descent.objectives import Objective
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.descent.strength import by_row, each, limited, scheduled
from sae_query_steer.sae.encoders import (
    QueryEncoder,
    at_heads,
    decoded_difference,
    encoder_sites,
    in_32_bits,
    on_device,
)
from sae_query_steer.scopes.positions import LastPromptToken, Scope, check_scope
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.intervention import Steerer, chosen_heads
from sae_query_steer.steering.latent_moves import LatentMove
from sae_query_steer.steering.trace import QueryChange, SteeringTrace
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_belongs, check_shapes


@dataclass(frozen=True, eq=False)
class LatentGradientSteerer(Steerer):
    """Steers by gradient descent on sparse features of attention queries.

    At every scoped position, for every chosen head: z0 = encode(q), K projected gradient steps on
    the objective lead to zK, and the query becomes q + decode(zK) - decode(z0). The SAE's
    reconstruction error never enters the model: zero steps, or a step size of zero, is exactly
    the identity. Over `identity_encoders` the same value is dense query steering.

    Source: arXiv 2502.18644; writing the difference of two decodings, not the reconstruction, is
    our choice, so that steering is not confounded with the SAE's error.
    """

    saes: Mapping[str, QueryEncoder]
    """Encoders by hook name; those of the layers that are steered."""

    targets: CentroidTargets
    """The centroids that were made with these encoders on this model."""

    _: KW_ONLY

    target: Target | Sequence[Target]
    """The class to steer towards, or weights of classes, of which negative ones lead away:
    {"create": 1, "remember": -0.5}. A list has one for each row of the batch."""

    objective: Objective
    """What is minimised, such as `PrototypeLogLikelihood()` or `SquaredDistance()`."""

    n_steps: int | Sequence[int]
    """Gradient steps at each position, 0 or more; a list has a number for each row."""

    step_size: float | Sequence[float]
    """Size of a step, 0 or more, in units of the objective's gradient; a list likewise."""

    scope: Scope = field(default_factory=LastPromptToken)
    """Where to steer. A steer that is clean at the last prompt token breaks the text elsewhere."""

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

    layers: Sequence[int] | None = None
    """Which layers; None means all that have an SAE."""

    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    """Which heads: the same in every layer, or by layer; None means all."""

    sites: Mapping[str, QuerySite] = field(init=False, repr=False)
    """The site of every encoder, by hook name."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """The heads that are steered, by hook name."""

    _verified: WeakSet[Any] = field(init=False, repr=False, default_factory=WeakSet)
    _made: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for n_steps in each(self.n_steps, "n_steps"):
            check_number("n_steps", n_steps, whole=True, least=0)
        for step_size in each(self.step_size, "step_size"):
            check_number("step_size", step_size, least=0)
        check_scope(self.scope, name="scope", generating=True)
        if isinstance(self.objective, type) or not isinstance(self.objective, Objective):
            raise TypeError(
                f"objective={self.objective!r} is no objective; allowed: SquaredDistance(), "
                "PrototypeLogLikelihood(), CentroidContrast(), or a value with loss and gradient"
            )
        for target in each(self.target, "target"):
            weights_of(target, self.targets.classes)
        for name in ("schedule", "latents", "gate"):
            value = getattr(self, name)
            if isinstance(value, type) or not (value is None or callable(value)):
                raise TypeError(f"{name}={value!r} can't be called: give a value, or a function")
        for name, most in (("trust_radius", None), ("max_relative_change", None), ("until", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, most=most)
        sites = encoder_sites(self.saes)
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "site_heads", chosen_heads(sites, self.layers, self.heads))
        check_shapes(self.targets, {name: self.saes[name] for name in self.site_heads})

    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model; a yes is remembered.

        A model whose weights are changed in place afterwards is not looked at again.

        Raises:
            ValueError: the model has no such site, other queries than the fingerprint's, or lies
                on another device than the SAEs.
        """
        if model in self._verified:
            return
        for name in self.site_heads:
            self.sites[name].check(model)
        steered = {name: self.saes[name] for name in self.site_heads}
        check_belongs(model, steered, self.targets)
        self._verified.add(model)

    def to(self, device: str | torch.device) -> "LatentGradientSteerer":
        """Return this steerer with its SAEs on a device; what is not there already is copied.

        Centroids need no moving: they follow the activations, layer by layer.
        """
        saes = {name: on_device(encoder, device) for name, encoder in self.saes.items()}
        return replace(self, saes=saes)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace that knows classes, target and tokenizer."""
        by_row = [target_name(target) for target in each(self.target, "target")]
        targets = set(by_row)
        return SteeringTrace(
            recording=recording,
            classes=self.targets.classes,
            target=by_row[0] if len(targets) == 1 else "",
            row_targets=tuple(by_row) if len(targets) > 1 else (),
            tokenizer=model.tokenizer,
        )

    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return what the descent adds to the queries of the steered heads of a site."""
        move = self.descended(hook_name, queries, places, record=record)
        delta = self.decoded(hook_name, queries, move)
        return move.described(delta) if record else QueryChange(delta=delta)

    def descended(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool = False,
    ) -> LatentMove:
        """Return where the descent leads the latents of queries; Args as `change`."""
        encoder = self._encoder(hook_name, queries.device)
        z0 = encoder.encode(in_32_bits(queries))
        goal = self._goal(hook_name, places, z0)
        movable = None
        if self.latents is not None:
            movable = self.latents(z0, goal, hook_name, self.site_heads[hook_name])
        if self.gate is not None:
            open_ = opened(self.gate, z0, goal)[..., None]
            movable = open_.expand_as(z0) if movable is None else movable & open_
        result = descend(
            z0,
            goal,
            self.objective,
            n_steps=self._n_steps(places, z0),
            step_size=self._step_size(places, z0),
            bounds=Bounds(
                lower=encoder.latent_min,
                movable=movable,
                radius=self.trust_radius,
                until=self.until,
                temperature=self._temperature,
            ),
            record_loss=record,
        )
        return self._move(z0, result.z, goal, result.loss)

    def decoded(self, hook_name: str, queries: Tensor, move: LatentMove) -> Tensor:
        """Return what a move of the latents adds to the queries, within this steerer's limits."""
        encoder = self._encoder(hook_name, queries.device)
        return limited(
            in_32_bits(queries),
            decoded_difference(encoder, move.after, move.before),
            max_relative_change=self.max_relative_change,
            keep_norm=self.keep_norm,
        )

    def described(
        self, hook_name: str, queries: Tensor, delta: Tensor, places: TokenPlaces
    ) -> QueryChange:
        """Return a change that something else made, with what it does in this steerer's terms.

        The latents afterwards are those of the changed query.
        """
        encoder = self._encoder(hook_name, queries.device)
        before, after = (encoder.encode(q) for q in (queries, queries + delta.to(queries)))
        goal = self._goal(hook_name, places, before)
        loss = torch.stack([self.objective.loss(z, goal) for z in (before, after)])
        return self._move(before, after, goal, loss).described(delta)

    @property
    def _temperature(self) -> float:
        return getattr(self.objective, "temperature", 1.0)

    def _encoder(self, hook_name: str, device: torch.device) -> QueryEncoder:
        """Return the encoder of the steered heads alone, made once for each device."""
        key = (hook_name, device)
        if key not in self._made:
            # It outlives the call of `generate` in which it is made, which is in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = at_heads(self.saes[hook_name], self.site_heads[hook_name], device)
        return self._made[key]

    def _goal(self, hook_name: str, places: TokenPlaces, z: Tensor) -> Goal:
        """Return the goal at a site; all that no token changes in it is made once."""
        key, classes = (hook_name, z.device, z.dtype), self.targets.classes
        if key not in self._made:
            first = each(self.target, "target")[0]
            heads = list(self.site_heads[hook_name])
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = Goal(
                    centroids=self.targets.means[hook_name][:, heads].to(z),
                    variances=self.targets.variances[hook_name][:, heads].to(z),
                    weights=weights_of(first, classes).to(z),
                ).prepared()
        goal = self._made[key]
        if isinstance(self.target, str | Mapping):
            return goal
        by_rows = [weights_of(target, classes) for target in self.target]
        return goal.with_weights(torch.stack(by_row("target", by_rows, places)).to(z))

    def _n_steps(self, places: TokenPlaces, z: Tensor) -> int | Tensor:
        if not isinstance(self.n_steps, Sequence):
            return int(self.n_steps)
        return torch.tensor(by_row("n_steps", self.n_steps, places), device=z.device)

    def _step_size(self, places: TokenPlaces, z: Tensor) -> float | Tensor:
        size: Any = self.step_size
        if isinstance(size, Sequence):
            size = torch.tensor(by_row("step_size", size, places), device=z.device, dtype=z.dtype)
        if self.schedule is None:
            return size if isinstance(size, Tensor) else float(size)
        return scheduled(self.schedule, places.age()).to(z) * size

    def _move(self, before: Tensor, after: Tensor, goal: Goal, loss: Tensor | None) -> LatentMove:
        return LatentMove(
            before=before, after=after, goal=goal, loss=loss, temperature=self._temperature
        )
