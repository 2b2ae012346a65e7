"""SAELens's scaling of activations to mean norm sqrt(d_in), for each head on its own."""

from collections.abc import Iterator

from jaxtyping import Float
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, float32, float64, no_grad, promote_types, stack, tensor
from typing_extensions import override

FlatQueries = Float[Tensor, "*batch d_in"]


class HeadwiseScaler(ActivationScaler):
    """Scales flat queries [token head*d_head], each head by its own factor."""

    scaling_factor: Float[Tensor, "head"] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """In float64 on the CPU; None until it is estimated, and again once it is folded."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    @override
    def estimate_scaling_factor(
        self,
        d_in: int,
        data_provider: Iterator[Tensor],
        n_batches_for_norm_estimate: int = 1000,
    ) -> None:
        """Estimate the factors from the next batches."""
        del d_in  # of all heads together
        norms = HeadNorms(self.n_heads)
        for _ in range(n_batches_for_norm_estimate):
            norms.update(next(data_provider))
        self.scaling_factor = norms.factors()  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def scale(self, acts: FlatQueries) -> FlatQueries:
        """Return the activations times the factors; unchanged if there are none."""
        if self.scaling_factor is None:
            return acts
        # SAELens's factor is a Python float, so not in half precision. And without waiting for the
        # copy, which would stop an accelerator at every step.
        kind = promote_types(acts.dtype, float32)
        factor = self.scaling_factor.to(acts.device, kind, non_blocking=True)[:, None]
        headed = acts.unflatten(-1, (len(factor), -1))
        return (headed * factor).to(acts.dtype).flatten(-2)


class HeadNorms:
    """Mean norm of the queries of each head, batch by batch.

    Args:
        n_heads: heads side by side in the queries.
    """

    def __init__(self, n_heads: int) -> None:
        self.n_heads = n_heads
        self.d_head = self.n_tokens = 0
        self._sums = [0.0] * n_heads

    @no_grad()
    def update(self, acts: FlatQueries) -> None:
        """Add a batch."""
        # Head by head: in another order the last bits of SAELens's sums change. They are in
        # float32, as there, so that half precision does not overflow.
        sums = [head.norm(dim=-1).float().sum() for head in acts.chunk(self.n_heads, dim=-1)]
        new = stack(sums).tolist()
        self._sums = [total + more for total, more in zip(self._sums, new, strict=True)]
        self.n_tokens += acts.shape[:-1].numel()
        self.d_head = acts.shape[-1] // self.n_heads

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
                    f"the mean norm of head {head} must be finite and above 0 to scale it, got "
                    f"{mean} over {self.n_tokens} tokens: train with normalize_activations='none'"
                )
        return tensor([self.d_head**0.5 / mean for mean in means], dtype=float64)
