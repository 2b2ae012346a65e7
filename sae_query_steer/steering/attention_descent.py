"""`AttentionSteerer`: gradient steps on latents that turn heads to chosen tokens of the prompt."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.attention import AttentionGoal
from sae_query_steer.descent.strength import Queries, limited
from sae_query_steer.sae.encoders import QueryEncoder, decoded_difference, encoder_sites
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
        # `generate` is in inference mode, whose tensors autograd refuses: all that it needs is
        # copied or computed here.
        with torch.inference_mode(False), torch.no_grad():
            goal = self._goal(keys)
            queries, encoder = activations.clone(), self._encoder(at, activations.device)
            z0 = encoder.encode(queries)
            scores_of = keys.scores_of()

            def scores(z: Tensor) -> Tensor:
                return scores_of(queries + decoded_difference(encoder, z, z0))

            z, losses = self._descended(queries, encoder, z0, scores, goal, record=record)
            delta = decoded_difference(encoder, z, z0)
            delta = limited(queries, delta, max_relative_change=self.max_relative_change)
            if not record:
                return QueryChange(delta=delta)
            after = scores(z)
            return QueryChange(
                delta=delta,
                loss=torch.stack([*losses, goal.loss(after)]),
                mass_before=goal.masses(scores(z0)),
                mass_after=goal.masses(after),
                **most_moved(z0, z),
            )

    def _descended(
        self,
        queries: Tensor,
        encoder: QueryEncoder,
        z0: Tensor,
        scores: Callable[[Tensor], Tensor],
        goal: AttentionGoal,
        *,
        record: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the latents after all steps, and if recorded the loss before each."""
        z, movable, losses = z0, None, []
        for _ in range(self.n_steps):
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                found = scores(leaf)
                pull = goal.gradient(found.detach()).to(found.dtype)
                (gradient,) = torch.autograd.grad(found, leaf, pull)
            if record:
                losses.append(goal.loss(found.detach()))
            way = -gradient
            if encoder.latent_min is not None:  # what the bound stops has no part in the step
                way = way.masked_fill((z <= encoder.latent_min) & (way < 0), 0)
            if movable is None and self.n_latents is not None:
                most = way.abs().topk(min(self.n_latents, way.shape[-1]), dim=-1).indices
                movable = torch.zeros_like(way, dtype=torch.bool).scatter(-1, most, True)
            if movable is not None:
                way = way.where(movable, 0)
            if self.until is not None:
                way = way.where(goal.masses(found.detach()) < self.until, 0)
            z = self._stepped(queries, encoder, z0, z, way)
        return z, losses

    def _stepped(
        self, queries: Tensor, encoder: QueryEncoder, z0: Tensor, z: Tensor, way: Tensor
    ) -> Tensor:
        """Return the latents after a step on a way, exactly as they were where it is 0."""
        tiny, norm = torch.finfo(z.dtype).tiny, queries.norm(dim=-1, keepdim=True)
        way = way / way.abs().amax(-1, keepdim=True).clamp(min=tiny)
        size = decoded_difference(encoder, z + way, z).norm(dim=-1, keepdim=True)
        moves = (size > 0) & (norm > 0)
        moved = z + way * (self.step_size * norm / size.clamp(min=tiny))
        if encoder.latent_min is not None:
            moved = moved.clamp(min=encoder.latent_min)
        if self.max_relative_change is not None:
            reached = decoded_difference(encoder, moved, z0).norm(dim=-1, keepdim=True)
            share = self.max_relative_change * norm / reached.clamp(min=tiny)
            moved = torch.where(share < 1, z0 + (moved - z0) * share, moved)
        return torch.where(moves, moved, z)


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
