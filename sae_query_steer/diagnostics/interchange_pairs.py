"""Who gives queries to whom: pairs of examples, and the error of a mean over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An example that gets queries, and two that give them, by their indices."""

    receiver: int
    other: int
    """Of another class: whose next token is the aim."""

    control: int
    """Of the receiver's own class."""


def draw_pairs(
    labels: Sequence[str], n_pairs: int, seed: int, *, counterparts: bool = False
) -> list[Pair]:
    """Draw receivers evenly from the classes, each with a donor of another and of its own class.

    Args:
        labels: the class of each example.
        n_pairs: how many; every example is a receiver once before one is so twice.
        seed: of all that is drawn.
        counterparts: the donor of another class is not drawn; it is the receiver's counterpart,
            whose index is the receiver's plus the number of labels.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: Sequence[int]) -> int:
        return pool[int(torch.randint(len(pool), (1,), generator=generator))]

    classes = sorted(set(labels))
    members = {k: [i for i, label in enumerate(labels) if label == k] for k in classes}
    orders = {k: torch.randperm(len(members[k]), generator=generator).tolist() for k in classes}
    pairs = []
    for n in range(n_pairs):
        k = classes[n % len(classes)]
        receiver = members[k][orders[k][n // len(classes) % len(members[k])]]
        other_class = draw([i for i, name in enumerate(classes) if name != k])
        other = draw(members[classes[other_class]])
        pairs.append(
            Pair(
                receiver=receiver,
                other=len(labels) + receiver if counterparts else other,
                control=draw([i for i in members[k] if i != receiver]),
            )
        )
    return pairs


def paired_error(values: Tensor, pairs: Sequence[Pair]) -> float:
    """Return the standard error of a mean over pairs, which share receivers and donors.

    It is the larger of two, that count receivers, or donors, and not pairs as independent; NaN
    with fewer than two of either.
    """
    return max(
        clustered_error(values, [pair.receiver for pair in pairs]),
        clustered_error(values, [pair.other for pair in pairs]),
    )


def clustered_error(values: Tensor, clusters: Sequence[int]) -> float:
    """Return the standard error of a mean whose values are dependent within clusters."""
    index = torch.tensor(clusters).unique(return_inverse=True)[1]
    n_clusters = int(index.max()) + 1
    if n_clusters < 2:
        return float("nan")
    sums = torch.zeros(n_clusters, dtype=values.dtype).index_add(0, index, values - values.mean())
    correction = n_clusters / (n_clusters - 1)
    return float((sums.square().sum() * correction).sqrt()) / len(values)
