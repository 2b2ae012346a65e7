"""SAELens's scaling of activations to norm sqrt(d_in) on average, for each head on its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from tqdm.auto import trange
from typing_extensions import override

from sae_query_steer.storage.records import read_json

FlatQueries = Float[Tensor, "*batch d_in"]


class HeadwiseScaler(ActivationScaler):
    """Scales flat queries [token head*d_head], each head by its own factor.

        factor = sqrt(d_head) / mean norm

    in the arithmetic of SAELens, so that a head is scaled as in a solo run of that head.

    Args:
        n_heads: heads side by side in the activations.
    """

    scaling_factor: Float[Tensor, "head"] | None
    """In float64 on the CPU; None until it is estimated, and again once it is folded."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    @override
    def scale(self, acts: FlatQueries) -> FlatQueries:
        """Return the activations times the factors; as they are where there are none."""
        if self.scaling_factor is None:
            return acts
        factor = self._factor_for(acts)
        return (self._headed(acts) * factor).to(acts.dtype).flatten(-2)

    @override
    def unscale(self, acts: FlatQueries) -> FlatQueries:
        """Return the activations divided by the factors: the inverse of `scale`."""
        if self.scaling_factor is None:
            return acts
        factor = self._factor_for(acts)
        return (self._headed(acts) / factor).to(acts.dtype).flatten(-2)

    @override
    @torch.no_grad()
    def estimate_scaling_factor(
        self,
        d_in: int,
        data_provider: Iterator[Tensor],
        n_batches_for_norm_estimate: int = int(1e3),
    ) -> None:
        """Set the factors from the next batches, none of which is kept.

        Args:
            d_in: size of a flat activation: all heads together.
            data_provider: flat activations [token head*d_head].
            n_batches_for_norm_estimate: batches to take.

        Raises:
            ValueError: there is nothing to estimate from, a batch is of another size, or a head
                has no finite norm above 0.
        """
        if n_batches_for_norm_estimate < 1:
            raise ValueError(
                f"n_batches_for_norm_estimate={n_batches_for_norm_estimate} is not allowed: give "
                "1 or more"
            )
        norms = HeadNorms(self.n_heads, d_in)
        for _ in trange(
            n_batches_for_norm_estimate, desc="Estimating norm scaling factors", leave=False
        ):
            norms.update(next(data_provider))
        self.scaling_factor = norms.factors()

    @override
    def estimate_whitening(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "whitening would mix the heads of a layer: use "
            "normalize_activations='expected_average_only_in'"
        )

    @override
    def save(self, file_path: str) -> None:
        """Write the factors to a JSON file, a list or null."""
        factors = None if self.scaling_factor is None else self.scaling_factor.tolist()
        Path(file_path).write_text(json.dumps({"scaling_factor": factors}), encoding="utf-8")

    @override
    def load(self, file_path: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no factors, or those of another number of heads.
        """
        factors = read_json(Path(file_path)).get("scaling_factor", "nothing")
        listed = factors if isinstance(factors, list) else []
        numbers = [factor for factor in listed if isinstance(factor, int | float)]
        if factors is not None and not len(numbers) == len(listed) == self.n_heads:
            raise ValueError(
                f"{file_path} holds scaling_factor={factors}: allowed is null or a list of one "
                f"factor for each of {self.n_heads} heads"
            )
        factors = None if factors is None else torch.tensor(factors, dtype=torch.float64)
        self.scaling_factor = factors  # pyright: ignore[reportIncompatibleVariableOverride]

    def _headed(self, acts: Tensor) -> Tensor:
        return acts.unflatten(-1, (self.n_heads, -1))

    def _factor_for(self, acts: Tensor) -> Float[Tensor, "head 1"]:
        assert self.scaling_factor is not None
        # Not in half precision: SAELens's factor is a Python float. And no waiting for the copy,
        # which would stop an accelerator at every step.
        kind = torch.promote_types(acts.dtype, torch.float32)
        return self.scaling_factor.to(acts.device, kind, non_blocking=True)[:, None]


class HeadNorms:
    """Mean norm of the activations of each head, batch by batch.

    Args:
        n_heads: heads side by side in the activations.
        d_in: size of a flat activation: all heads together.
    """

    def __init__(self, n_heads: int, d_in: int) -> None:
        if d_in % n_heads:
            raise ValueError(
                f"d_in={d_in} is not a multiple of {n_heads} heads: give the size of a flat "
                "activation, n_heads * d_head"
            )
        self.n_heads = n_heads
        self.d_in = d_in
        self.n_tokens = 0
        self._sums = [0.0] * n_heads

    @torch.no_grad()
    def update(self, acts: FlatQueries) -> None:
        """Count a batch in.

        Raises:
            ValueError: it is not of size `d_in`.
        """
        if acts.shape[-1] != self.d_in:
            raise ValueError(
                f"activations of shape {list(acts.shape)} do not fit d_in={self.d_in}: give them "
                "flat, [..., n_heads * d_head]"
            )
        # Head by head, not all at once: in another order the last bits of SAELens's sums change.
        # They are in float32, as there, so that half precision does not overflow.
        sums = [head.norm(dim=-1).float().sum() for head in acts.chunk(self.n_heads, dim=-1)]
        new = torch.stack(sums).tolist()
        self._sums = [total + more for total, more in zip(self._sums, new, strict=True)]
        self.n_tokens += acts.shape[:-1].numel()

    def factors(self) -> Float[Tensor, "head"]:
        """Return sqrt(d_head) / mean norm of each head, in float64 on the CPU.

        Raises:
            ValueError: a head has no finite mean norm above 0.
        """
        # In Python's floats, as SAELens: torch would take a reciprocal, which rounds once more.
        means = [total / max(self.n_tokens, 1) for total in self._sums]
        for head, mean in enumerate(means):
            if not 0 < mean < float("inf"):
                raise ValueError(
                    f"head {head} has mean norm {mean} over {self.n_tokens} tokens, and no factor "
                    "scales that: train with normalize_activations='none'"
                )
        root = (self.d_in // self.n_heads) ** 0.5
        return torch.tensor([root / mean for mean in means], dtype=torch.float64)
