"""Memory, disk, operations and time of a training run, computed from sizes alone."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sae_query_steer.config import TrainingConfig
from sae_query_steer.models.shapes import ModelShape
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.stream import QueryStream, buffer_bytes

FORWARD_RATIO = 1.37
"""Time of a run over that of the bare forward pass.

Source: `benchmarks/training.py` on a small model on a CPU. `benchmarks/true_sizes.py` measures it
for the paper's models on your device.
"""


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What a run needs at least, in bytes and floating-point operations.

    Not counted are the activations of the model's own forward pass, the intermediate tensors of a
    training step, the libraries of the device, and the biases of the SAEs.
    """

    n_steps: int
    """Training steps."""

    tokens: int
    """Tokens to train on."""

    model_bytes: int
    """Weights of the language model."""

    training_bytes: int
    """Weights of all SAEs, their gradients, and Adam's two moments."""

    buffer_bytes: int
    """Queries that wait to be shuffled."""

    saved_bytes: int
    """The SAEs on disk at the end."""

    disk_bytes: int
    """Largest use of the disk during the run."""

    model_flops: int
    """Operations of the forward pass for each token: 2 for each weight up to the last layer."""

    sae_flops: int
    """Operations of all SAEs for each token: 6 for each weight, forward and backward."""

    def seconds(self, flops_per_second: float, *, ratio: float = FORWARD_RATIO) -> float:
        """Return ratio * tokens * model_flops / flops_per_second.

        Args:
            flops_per_second: measured speed of the forward pass on the device.
            ratio: time of the run over that of the forward pass.

        Raises:
            ValueError: a speed that is not above 0.
        """
        if not flops_per_second > 0:
            raise ValueError(
                f"flops_per_second must be above 0, such as 100e12, got {flops_per_second}"
            )
        return ratio * self.tokens * self.model_flops / flops_per_second


def estimate_training(
    shape: ModelShape, sites: Sequence[QuerySite], config: TrainingConfig, *, model_item: int = 4
) -> TrainingEstimate:
    """Return what `train_query_saes` will need.

    Args:
        shape: sizes of the model.
        sites: where SAEs are trained.
        config: of the run.
        model_item: bytes of a weight of the model, 2 in bfloat16.

    Raises:
        ValueError: `context_size` is longer than the context of the model.
    """
    row = min(128, shape.n_ctx) if config.context_size is None else config.context_size
    if row > shape.n_ctx:
        raise ValueError(f"context_size must be at most n_ctx={shape.n_ctx}, got {row}")
    weights = weight_bytes(config, sites)
    return TrainingEstimate(
        n_steps=config.n_steps,
        tokens=config.training_tokens,
        model_bytes=shape.n_parameters * model_item,
        training_bytes=training_bytes(config, sites),
        buffer_bytes=buffer_bytes(config, sites, row, model_item),
        saved_bytes=weights,
        disk_bytes=disk_bytes(config, sites),
        model_flops=2 * sum(shape.block_parameters[: max(site.layer for site in sites) + 1]),
        sae_flops=6 * sum(2 * site.d_in * config.sae.d_sae_per_head for site in sites),
    )


def check_resources(stream: QueryStream, out: Path | None) -> None:
    """Raise if a run does not fit into the free memory or onto the disk.

    Raises:
        ValueError: the message names what is needed, what is free, and the remedy.
    """
    config, sites = stream.config, stream.sites
    item = next(stream.model.parameters()).element_size()
    needed = {str(stream.model.cfg.device): training_bytes(config, sites)}
    activations = buffer_bytes(config, sites, stream.rows.shape[1], item)
    needed[stream.device] = needed.get(stream.device, 0) + activations
    for device, n_bytes in needed.items():
        free = free_memory(device)
        if free is not None and n_bytes > free:
            raise ValueError(
                f"training needs at least {_gib(n_bytes)} of memory on {device}, where "
                f"{_gib(free)} are free ({_gib(activations)} of it for activations on "
                f"{stream.device}): train fewer layers at a time, or lower d_sae_per_head or "
                "n_batches_in_buffer; act_store_device='cpu' keeps the activations off a GPU"
            )
    if out is not None:
        here = next(folder for folder in out.absolute().parents if folder.exists())
        n_bytes, free = disk_bytes(config, sites), shutil.disk_usage(here).free
        if n_bytes > free:
            raise ValueError(
                f"checkpoints and SAEs need {_gib(n_bytes)} of disk at {out}, where {_gib(free)} "
                "are free: free some, give another folder, or train fewer layers at a time"
            )


def weight_bytes(config: TrainingConfig, sites: Sequence[QuerySite]) -> int:
    """Return the size of the weights of all SAEs, without biases and thresholds."""
    item = {"float32": 4, "float64": 8}[config.sae.dtype]
    return sum(2 * site.d_in * config.sae.d_sae_per_head * item for site in sites)


def training_bytes(config: TrainingConfig, sites: Sequence[QuerySite]) -> int:
    """Return the memory of the SAEs in training: weights, gradients, and Adam's two moments."""
    return 4 * weight_bytes(config, sites)


def disk_bytes(config: TrainingConfig, sites: Sequence[QuerySite]) -> int:
    """Return the largest use of the disk: two checkpoints of weights and two moments, and SAEs."""
    return (2 * 3 + 1) * weight_bytes(config, sites)


def free_memory(device: str) -> int | None:
    """Return the free bytes of a device, None if unknown."""
    match torch.device(device).type:
        case "cpu":
            return psutil.virtual_memory().available
        case "cuda":
            return torch.cuda.mem_get_info(torch.device(device))[0]
        case _:
            return None


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"
