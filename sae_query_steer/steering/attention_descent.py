"""`AttentionSteerer`: gradient steps on latents that turn heads to chosen tokens of the prompt."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.attention import AttentionGoal
from sae_query_steer.descent.strength import Queries, limited
from sae_query_steer.models.token_scores import TokenScores
from sae_query_steer.sae.encoders import (
    Product,
    QueryEncoder,
    decoded_difference,
    encoder_sites,
    linear_decoder,
)
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.edit import LatentsEdit, most_moved
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.look_at import LooksEdit, looks_of_rows
from sae_query_steer.steering.steerer import EncoderSteerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, eq=False)
class AttentionDescent(LooksEdit, LatentsEdit):
    """The edit of an `AttentionSteerer`.

    Raises:
        TypeError: `look_at` holds something else than `LookAt`.
        ValueError: a number is out of range, or `until` is given with several sources or a negative
            weight.
    """

    _: KW_ONLY

    n_steps: int = 10
    """Gradient steps at each position, 0 or more."""

    step_size: float = 0.05
    """||decoded step|| / ||q||, 0 or more."""

    until: float | None = None
    """Stop at each token and head once the attention on the source reaches this; above 0, at most
    1. For one source with a positive weight."""

    max_relative_change: float | None = 0.25
    """||change of q|| / ||q|| of a head at most. None: any. Source: our choice; a quarter was the
    best measured on SmolLM2, and half broke the text."""

    n_latents: int | None = None
    """Number of latents of each head that may move: those with the largest gradient before the
    first step. None: all."""

    def __post_init__(self) -> None:
        looks = looks_of_rows(self.look_at)
        check_number("n_steps", self.n_steps, whole=True, least=0)
        check_number("step_size", self.step_size, least=0)
        if self.n_latents is not None:
            check_number("n_latents", self.n_latents, whole=True, least=1)
        for name, most in (("until", 1), ("max_relative_change", None)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, most=most)
        several = any(len(row) > 1 or any(look.weight < 0 for look in row) for row in looks)
        if self.until is not None and several:
            raise ValueError(
                f"until must be None with several sources or a negative weight, got {self.until}"
            )

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": "attention descent", **self._targets()}

    def change(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        activations: Queries,
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
        keys: AttentionKeys,
    ) -> QueryChange:
        """Return what the descent adds to queries, as a constant; Args as `Edit.change`."""
        del tokens  # those of the keys
        goal, encoder = self._goal(keys), self._encoder(at, activations.device)
        decoder = linear_decoder(encoder)
        if keys.linear is not None and decoder is not None:
            with torch.no_grad():
                z0 = encoder.encode(activations)
                surface = _linear_surface(keys.linear, decoder, goal)
                return self._change(activations, encoder, z0, surface, goal, record=record)
        # `generate` is in inference mode, whose tensors autograd refuses: all that it needs is
        # copied or computed here.
        with torch.inference_mode(False), torch.no_grad():
            queries = activations.clone()
            z0 = encoder.encode(queries)
            surface = _surface(keys.scores, queries, encoder, z0, goal)
            return self._change(queries, encoder, z0, surface, goal, record=record)

    def _change(
        self,
        queries: Tensor,
        encoder: QueryEncoder,
        z0: Tensor,
        surface: "_Surface",
        goal: AttentionGoal,
        *,
        record: bool,
    ) -> QueryChange:
        moved, losses = self._descended(queries, encoder, z0, surface, goal, record=record)
        whole = surface.added(0.0, moved)
        delta = limited(queries, whole, max_relative_change=self.max_relative_change)
        if not record:
            return QueryChange(delta=delta)
        after = surface.scores(whole)
        return QueryChange(
            delta=delta,
            loss=torch.stack([*losses, goal.loss(after)]),
            mass_before=goal.masses(surface.scores(torch.zeros_like(whole))),
            mass_after=goal.masses(after),
            **most_moved(z0, z0 + moved),
        )

    def _descended(
        self,
        queries: Tensor,
        encoder: QueryEncoder,
        z0: Tensor,
        surface: "_Surface",
        goal: AttentionGoal,
        *,
        record: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return by how much latents move in all steps, and if recorded the loss before each."""
        moved, delta, losses = torch.zeros_like(z0), torch.zeros_like(queries), []
        lower = None if encoder.latent_min is None else encoder.latent_min - z0
        norm, movable = queries.norm(dim=-1, keepdim=True), None
        length, tiny = self.step_size * norm, torch.finfo(z0.dtype).tiny
        most = None if self.max_relative_change is None else self.max_relative_change * norm
        for _ in range(self.n_steps):
            scores, slope = surface.slope(moved, delta)
            if record:
                losses.append(goal.loss(scores))
            if lower is not None:  # what the bound stops has no part in the step
                slope = torch.where(moved > lower, slope, slope.clamp(max=0))
            if movable is None and self.n_latents is not None:
                steep = slope.abs().topk(min(self.n_latents, slope.shape[-1]), dim=-1).indices
                movable = torch.zeros_like(slope, dtype=torch.bool).scatter(-1, steep, True)
            if movable is not None:
                slope = slope.where(movable, 0)
            if self.until is not None:
                slope = slope.where(goal.masses(scores) < self.until, 0)
            slope = slope / slope.abs().amax(-1, keepdim=True).clamp(min=tiny)
            size = torch.linalg.vector_norm(surface.added(moved, slope), dim=-1, keepdim=True)
            step = (length / size).masked_fill(size == 0, 0)
            moved = torch.addcmul(moved, slope, step, value=-1)
            if lower is not None:
                moved = torch.maximum(moved, lower)
            delta = surface.added(0.0, moved)
            if most is not None:
                reached = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
                share = torch.where(reached > most, most / reached, 1)
                moved, delta = moved * share, delta * share
        return moved, losses


class _Surface(NamedTuple):
    """The loss of one call of `change` and its slope, over the ways of latents from their start."""

    scores: Callable[[Tensor], Tensor]
    """From a change of the queries to the scores."""

    added: Callable[[Tensor | float, Tensor], Tensor]
    """From where latents have moved and a further way to what this adds to the queries."""

    slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """From where latents have moved, and what this adds if decoding is linear, to the scores and
    the gradient in the latents."""


def _linear_surface(
    linear: TokenScores, decoder: tuple[Product, Product], goal: AttentionGoal
) -> _Surface:
    """Return the surface where scores and decoding are linear, without autograd."""
    decode, transposed = decoder

    def scores(delta: Tensor) -> Tensor:
        return linear.now + linear.change(delta)

    def slope(moved: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        found = scores(delta)
        pull = goal.visible_gradient(found)
        return found, transposed(linear.slope(pull).to(moved.dtype))

    return _Surface(scores, lambda _moved, way: decode(way), slope)


def _surface(
    scores_of: Callable[[Tensor], Tensor],
    queries: Tensor,
    encoder: QueryEncoder,
    z0: Tensor,
    goal: AttentionGoal,
) -> _Surface:
    """Return the surface of any encoder and attention, with one product of autograd a step."""

    def scores(delta: Tensor) -> Tensor:
        return scores_of(queries + delta)

    def added(moved: Tensor | float, way: Tensor) -> Tensor:
        return decoded_difference(encoder, z0 + moved + way, z0 + moved)

    def slope(moved: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        del delta  # of latents that autograd has not seen
        with torch.enable_grad():
            leaf = moved.detach().requires_grad_()
            found = scores(added(0.0, leaf))
            pull = goal.gradient(found.detach()).to(found.dtype)
            (gradient,) = torch.autograd.grad(found, leaf, pull)
        return found.detach(), gradient

    return _Surface(scores, added, slope)


@dataclass(frozen=True, eq=False, repr=False)
class AttentionSteerer(AttentionDescent, EncoderSteerer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Turns heads to chosen tokens by gradient steps on latents that raise the attention there.

    At every scoped position, for every chosen head: z0 = encode(q); each step lowers
    -sum_i w_i log m_i, where m_i is the attention of the query q + decode(z) - decode(z0) on source
    i, or with a negative weight on all other tokens. Attention is the head's own: with its keys,
    mask, sliding window, rotary embedding, norms and soft cap. The gradient of the scores is in
    closed form. A source that a token cannot see, as it comes later, leaves its query as it is.

    It is its own edit: an `AttentionDescent` with sites, heads and scope.

    >>> AttentionSteerer(saes, LookAt("compare two things"), layers=range(15, 30))

    Source: our choice.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._act_at(encoder_sites(self.saes))

    def __repr__(self) -> str:
        return f"AttentionSteerer({self.look_at!r}, n_steps={self.n_steps}, {self.where!r})"
