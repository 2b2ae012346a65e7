"""Is this the model and the SAE that these files belong to?

A fingerprint holds the queries of a model at each site on a few fixed token rows, and what each
SAE makes of exactly those queries. It is compared within a tolerance, so it holds across hosts,
devices and number formats, and tells another model, or another SAE, at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_TOKENS = 1024
"""Tokens of a fingerprint at most: a model runs on all of them to tell whether it is the one.
Source: our choice; ours have 12."""

Queries = Float[Tensor, "row pos head d_head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """Queries on fixed token rows, and the encoder's reconstruction of them, by hook name."""

    tokens: Int[Tensor, "row pos"]
    """The token rows; see `fingerprint_tokens`."""

    queries: Mapping[str, Queries]
    """The model's queries at each site on these rows."""

    reconstructions: Mapping[str, Queries]
    """decode(encode(queries)) of the encoder at each site."""

    dtype: str = "float32"
    """Number format of the model that it was taken on."""


def fingerprint_tokens(d_vocab: int) -> Int[Tensor, "2 6"]:
    """Return the fixed token rows for a vocabulary: two rows of six, spread over its ids."""
    return ((2 * torch.arange(12) + 1) * d_vocab // 24).reshape(2, 6)


def dtype_name(model: Any) -> str:
    """Return the number format of a model's weights, such as "bfloat16"."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def check_whole(stored: Fingerprint) -> None:
    """Raise unless a fingerprint that was read from a file can be compared with a model.

    Raises:
        ValueError: more tokens than any fingerprint has, queries that are not those of its tokens,
            or values that are not finite.
    """
    tokens = stored.tokens
    if tokens.ndim != 2 or not 1 <= tokens.numel() <= MAX_TOKENS or int(tokens.min()) < 0:
        raise ValueError(
            f"the fingerprint has tokens of shape {list(tokens.shape)}: allowed are up to "
            f"{MAX_TOKENS} of them in rows, none negative"
        )
    for name, query in stored.queries.items():
        reconstruction = stored.reconstructions[name]
        if (
            query.shape[:2] != tokens.shape
            or query.ndim != 4
            or query.shape != reconstruction.shape
        ):
            raise ValueError(
                f"the fingerprint at {name} has queries {list(query.shape)} and reconstructions "
                f"{list(reconstruction.shape)} of tokens {list(tokens.shape)}"
            )
        if not bool(query.isfinite().all() & reconstruction.isfinite().all()):
            raise ValueError(f"the fingerprint at {name} holds values that are not finite")


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||, infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def default_tolerance(*dtypes: str) -> float:
    """Return how far fingerprints of models in these number formats may differ, relatively.

    1e-3 where all have 32 or 64 bits, 0.1 where one has fewer.

    Another model of the same shape differs by about 1.4 (two unrelated directions). Source: our
    choice.
    """
    return 1e-3 if set(dtypes) <= {"float32", "float64"} else 0.1


def check_queries(stored: Fingerprint, queries: Mapping[str, Queries], *, tolerance: float) -> None:
    """Raise unless a model gives the stored queries.

    Args:
        stored: the fingerprint that was saved.
        queries: what the model at hand gives on `stored.tokens`, for the sites to check.
        tolerance: largest relative difference that counts as equal.

    Raises:
        ValueError: another model; the message names the site and both sides' sizes or distance.
    """
    for hook_name, query in queries.items():
        expected = _stored(stored.queries, hook_name)
        difference = relative_difference(query, expected)
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"another model: at {hook_name} the queries differ from the fingerprint by "
                f"{difference:.3g} (relative), more than {tolerance:g}; shape here "
                f"{list(query.shape)}, in the fingerprint {list(expected.shape)}. Load the model "
                "that these centroids were made on, or make them anew with CentroidTargetBuilder"
            )


def check_reconstructions(
    stored: Fingerprint, reconstructions: Mapping[str, Queries], *, tolerance: float
) -> None:
    """Raise unless an encoder gives the stored reconstructions of the stored queries.

    Args:
        stored: the fingerprint that was saved.
        reconstructions: what the encoder at hand makes of `stored.queries`.
        tolerance: largest relative difference that counts as equal.

    Raises:
        ValueError: another SAE; the message names the site and the distance.
    """
    for hook_name, reconstruction in reconstructions.items():
        expected = _stored(stored.reconstructions, hook_name)
        difference = relative_difference(reconstruction, expected)
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"another SAE: at {hook_name} it reconstructs the fingerprint's queries "
                f"differently by {difference:.3g} (relative), more than {tolerance:g}. Load the "
                "SAEs that these centroids were made with, or make the centroids anew with "
                "CentroidTargetBuilder"
            )


def _stored(queries: Mapping[str, Queries], hook_name: str) -> Queries:
    if hook_name not in queries:
        raise ValueError(f"no fingerprint for {hook_name}: there is one for {sorted(queries)}")
    return queries[hook_name]
