"""Fingerprints identify a model and the encoders of its activations.

A fingerprint holds the activations of a model on fixed token rows and each encoder's
reconstruction of them. It is compared within a tolerance, so that it holds across backends, devices
and number formats.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.activations import read_activations, without_hooks
from sae_query_steer.storage.tensors import FLOATS, INTEGERS, Spec

_PARTS = ("query", "reconstruction")
MAX_TOKENS = 1024
"""Largest number of tokens of a fingerprint that is read from a file; ours have 12."""

Queries = Float[Tensor, "row pos head d_head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """Activations on fixed token rows and the encoders' reconstructions, by hook name."""

    tokens: Int[Tensor, "row pos"]
    """The token rows; see `fingerprint_tokens`."""

    queries: Mapping[str, Queries]
    """The model's activations at each site on these rows."""

    reconstructions: Mapping[str, Queries]
    """decode(encode(queries)) of the encoder at each site."""

    dtype: str = "float32"
    """Number format of the model."""

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens.ndim != 2 or not 1 <= tokens.numel() <= MAX_TOKENS or int(tokens.min()) < 0:
            raise ValueError(
                f"the fingerprint's tokens must be 1 to {MAX_TOKENS} in rows, none negative, got "
                f"shape {list(tokens.shape)}"
            )
        if missing := sorted({*self.queries} - {*self.reconstructions}):
            raise ValueError(f"the fingerprint lacks the reconstructions at {missing}")
        for name, query in self.queries.items():
            made = self.reconstructions[name]
            if query.shape[:2] != tokens.shape or query.ndim != 4 or query.shape != made.shape:
                raise ValueError(
                    f"the fingerprint at {name} has queries {list(query.shape)} and "
                    f"reconstructions {list(made.shape)} of tokens {list(tokens.shape)}"
                )
            if not bool(query.isfinite().all() & made.isfinite().all()):
                raise ValueError(f"the fingerprint at {name} holds values that are not finite")

    @staticmethod
    def expected_tensors(hook_names: Iterable[str]) -> dict[str, Spec]:
        """Return the names and number formats of `to_tensors`."""
        names = [f"{part}.{name}" for name in hook_names for part in _PARTS]
        return {**dict.fromkeys(names, (FLOATS, None)), "fingerprint.tokens": (INTEGERS, None)}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for a safetensors file."""
        groups = zip(_PARTS, (self.queries, self.reconstructions), strict=True)
        tensors = {f"{part}.{name}": t for part, group in groups for name, t in group.items()}
        return tensors | {"fingerprint.tokens": self.tokens}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], hook_names: Iterable[str], dtype: str
    ) -> "Fingerprint":
        """Return the fingerprint whose `to_tensors` are among these.

        Raises:
            ValueError: the tensors do not fit each other.
        """
        names = tuple(hook_names)
        queries, made = ({n: tensors[f"{part}.{n}"] for n in names} for part in _PARTS)
        tokens = tensors["fingerprint.tokens"]
        return cls(tokens=tokens, queries=queries, reconstructions=made, dtype=dtype)


def fingerprint_tokens(d_vocab: int) -> Int[Tensor, "2 6"]:
    """Return the fixed token rows for a vocabulary: two rows of six, spread over its ids."""
    return ((2 * torch.arange(12) + 1) * d_vocab // 24).reshape(2, 6)


def read_fingerprint(
    model: Any, hook_names: Iterable[str], tokens: Int[Tensor, "row pos"] | None = None
) -> dict[str, Queries]:
    """Return a model's activations on the rows of a fingerprint, read without any hooks.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        hook_names: the sites.
        tokens: the rows of a stored fingerprint; None means `fingerprint_tokens`.

    Raises:
        ValueError: the tokens are outside the model's vocabulary.
    """
    d_vocab = int(model.cfg.d_vocab)
    tokens = fingerprint_tokens(d_vocab) if tokens is None else tokens
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        raise ValueError(
            f"another model: the fingerprint's tokens go up to {int(tokens.max())}, the model's "
            f"vocabulary has {d_vocab}"
        )
    with without_hooks(model):
        return read_activations(model, tokens, hook_names)


def dtype_name(model: Any) -> str:
    """Return the number format of a model's weights, such as "bfloat16"."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||, infinite if the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def default_tolerance(*dtypes: str) -> float:
    """Return the relative difference up to which fingerprints in these number formats are equal.

    1e-3 for 32 and 64 bits, 0.1 if one has fewer. Another model of the same shape differs by about
    1.4 (two unrelated directions).
    """
    return 1e-3 if set(dtypes) <= {"float32", "float64"} else 0.1


def check_queries(stored: Fingerprint, queries: Mapping[str, Queries], *, tolerance: float) -> None:
    """Raise unless a model gives the stored queries.

    Args:
        stored: the fingerprint that was saved.
        queries: the model's activations on `stored.tokens`, at the sites to check.
        tolerance: largest relative difference that counts as equal.

    Raises:
        ValueError: another model; the message names the site, the difference and both shapes.
    """
    _check(stored.queries, queries, tolerance, "model", "the activations")


def check_reconstructions(
    stored: Fingerprint, reconstructions: Mapping[str, Queries], *, tolerance: float
) -> None:
    """Raise unless an encoder gives the stored reconstructions of the stored queries.

    Args:
        stored: the fingerprint that was saved.
        reconstructions: the encoder's reconstructions of `stored.queries`.
        tolerance: largest relative difference that counts as equal.

    Raises:
        ValueError: another SAE; the message names the site and the difference.
    """
    _check(stored.reconstructions, reconstructions, tolerance, "SAE", "its reconstructions")


def _check(
    stored: Mapping[str, Queries],
    found: Mapping[str, Queries],
    tolerance: float,
    what: str,
    numbers: str,
) -> None:
    for name, values in found.items():
        if name not in stored:
            raise ValueError(f"no fingerprint for {name}: there is one for {sorted(stored)}")
        difference = relative_difference(values, stored[name])
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"another {what}: at {name} {numbers} differ from the fingerprint by "
                f"{difference:.3g} (relative), more than {tolerance:g}; shape here "
                f"{list(values.shape)}, in the fingerprint {list(stored[name].shape)}. Load the "
                f"{what} that these centroids were made with, or make them anew with "
                "CentroidTargetBuilder"
            )
