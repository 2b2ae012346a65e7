"""What a training run will take, from sizes alone: memory, disk, steps, operations, time."""

from collections.abc import Sequence
from dataclasses import dataclass

from sae_query_steer.models.shapes import ModelShape
from sae_query_steer.sae.core import QueryHeadTrainingSAEConfig
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.plan import (
    check_steps,
    disk_bytes,
    filled_in,
    training_bytes,
    weight_bytes,
)
from sae_query_steer.training.stream import chunk_bytes

FORWARD_RATIO = 1.37
"""Time of a run over that of the bare forward pass, where the run took 1 / 0.73 of it.

Source: `benchmarks/training.py`, of a small model on a CPU. `benchmarks/true_sizes.py` measures it
for the paper's models on your device.
"""


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What a run needs, at least: what is counted here is exact, what is not counted comes on top.

    Not counted are the activations of the model's own forward pass, the numbers of one training
    step, what the device's libraries take, and the biases of the SAEs.
    """

    n_steps: int
    """Training steps."""

    tokens: int
    """Tokens that are trained on."""

    model_bytes: int
    """Weights of the language model."""

    training_bytes: int
    """Weights of all SAEs, their gradients, and Adam's two moments."""

    buffer_bytes: int
    """Queries that wait to be shuffled."""

    saved_bytes: int
    """The SAEs on disk, at the end."""

    disk_bytes: int
    """Most that lies on disk while the run goes."""

    model_flops: int
    """Operations of the forward pass for each token: 2 for each weight up to the last layer."""

    sae_flops: int
    """Operations of all SAEs for each token: 6 for each weight, forwards and backwards."""

    def seconds(self, flops_per_second: float, *, ratio: float = FORWARD_RATIO) -> float:
        """Return ratio * tokens * 2 * weights up to the last layer / operations a second.

        Args:
            flops_per_second: what the forward pass achieves on the device, not its data sheet's.
            ratio: time of the run over that of the forward pass.

        Raises:
            ValueError: a speed that is not above 0.
        """
        if not flops_per_second > 0:
            raise ValueError(
                f"flops_per_second={flops_per_second} is not allowed: give a number above 0, such "
                "as 100e12"
            )
        return ratio * self.tokens * self.model_flops / flops_per_second


def estimate_training(
    shape: ModelShape,
    sites: Sequence[QuerySite],
    sae: QueryHeadTrainingSAEConfig,
    *,
    training_tokens: int,
    train_batch_size_tokens: int = 512,
    context_size: int | None = None,
    n_batches_in_buffer: int = 64,
    prefetch: bool = False,
    model_item: int = 4,
) -> TrainingEstimate:
    """Return what `train_query_saes` will take with these arguments.

    Args:
        shape: of the model.
        sites: where SAEs are trained.
        sae: the architecture; `n_heads` and `d_head` come from the site.
        training_tokens: as in `train_query_saes`.
        train_batch_size_tokens: as there.
        context_size: as there.
        n_batches_in_buffer: as there.
        prefetch: as there.
        model_item: bytes of a weight of the model, 2 in bfloat16.

    Raises:
        ValueError: fewer tokens than one step takes, or a context that the model has not.
    """
    check_steps(training_tokens, train_batch_size_tokens)
    row = min(128, shape.n_ctx) if context_size is None else context_size
    if not 2 <= row <= shape.n_ctx:
        raise ValueError(f"context_size={row} is not allowed: give 2 to n_ctx={shape.n_ctx}")
    configs = [filled_in(sae, site) for site in sites]
    weights = sum(map(weight_bytes, configs))
    buffer = chunk_bytes(n_batches_in_buffer, row, sum(site.d_in for site in sites), model_item)
    last = max(site.layer for site in sites)
    return TrainingEstimate(
        n_steps=training_tokens // train_batch_size_tokens,
        tokens=training_tokens,
        model_bytes=shape.n_parameters * model_item,
        training_bytes=training_bytes(configs),
        buffer_bytes=(2 if prefetch else 1) * buffer,
        saved_bytes=weights,
        disk_bytes=disk_bytes(configs),
        model_flops=2 * sum(shape.block_parameters[: last + 1]),
        sae_flops=sum(6 * 2 * c.n_heads * c.d_head * c.d_sae_per_head for c in configs),
    )
