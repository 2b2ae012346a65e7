"""Edits that add one direction for each class, whatever the activation is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_name, check_number
from sae_query_steer.descent.strength import by_row, each
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.latent_descent import LatentDescent, target_labels
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedDirection(Edit):
    """Adds strength times the direction of the target class.

    Raises:
        ValueError: no such class, or a strength that is negative or not finite.
    """

    directions: Mapping[str, Float[Tensor, "class head d_head"]]
    """One for each class, by hook name, for all heads of the site."""

    classes: Sequence[str]
    """Names of the classes."""

    target: str | Sequence[str]
    """The class to steer towards; a list has one for each row of the batch."""

    strength: float | Sequence[float]
    """Factor of the direction, 0 or more; a list likewise."""

    method: str
    """Name in a trace."""

    described_by: LatentDescent | None = None
    """What gives a trace latents, distances and loss; None leaves them out."""

    def __post_init__(self) -> None:
        check_added(self.strength)
        for target in each(self.target, "target"):
            check_name("class", target, self.classes)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        names = target_labels([str(target) for target in each(self.target, "target")])
        return {"method": self.method, "classes": self.classes, **names}

    def to(self, device: str | torch.device) -> "AddedDirection":
        """Return it with its weights on a device; directions follow the activations."""
        other = self.described_by
        return replace(self, described_by=None if other is None else other.to(device))

    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
    ) -> QueryChange:
        """Return what is added; Args as `Edit.change`."""
        directions = self.directions[at.hook_name][:, list(at.heads)].to(activations)
        delta = added(directions, self.classes, self.target, self.strength, tokens)
        if not record or self.described_by is None:
            return QueryChange(delta=delta)
        return self.described_by.described(activations, at, tokens, delta)


def check_added(strength: float | Sequence[float]) -> None:
    """Raise unless a strength, or that of each row, can be used.

    Raises:
        ValueError: one is negative or not finite, or there are none.
    """
    for value in each(strength, "strength"):
        check_number("strength", value, least=0)


def above_others(means: Float[Tensor, "class *shape"]) -> Float[Tensor, "class *shape"]:
    """Return each class's mean minus the mean of the other classes' means."""
    return (means - means.mean(0)) * (len(means) / (len(means) - 1))


def added(
    directions: Float[Tensor, "class *shape"],
    classes: Sequence[str],
    target: str | Sequence[str],
    strength: float | Sequence[float],
    tokens: TokenPositions,
) -> Float[Tensor, "token *shape"]:
    """Return strength times the direction of the target class, for each token of some rows.

    Args:
        directions: one for each class.
        classes: their names.
        target: the class of all rows, or that of each.
        strength: of all rows, or of each.
        tokens: row and position of each token.

    Raises:
        ValueError: there are not as many targets or strengths as rows.
    """
    n_tokens = len(tokens.row)
    targets = [target] * n_tokens if isinstance(target, str) else by_row("target", target, tokens)
    one = not isinstance(strength, Sequence)
    strengths = [strength] * n_tokens if one else by_row("strength", strength, tokens)
    chosen = directions[[list(classes).index(name) for name in targets]]
    factors = torch.tensor(strengths, dtype=chosen.dtype, device=chosen.device)
    return factors.reshape(-1, *[1] * (chosen.ndim - 1)) * chosen
