"""Memory, disk, operations and time of a training run, computed from sizes alone."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sae_query_steer.arguments import check_number
from sae_query_steer.config import TrainingConfig
from sae_query_steer.models.shapes import ModelShape
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.stream import QueryStream

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

    tokens: int
    """Tokens to train on."""

    model_bytes: int
    """Weights of the language model."""

    buffer_bytes: int
    """Queries that wait to be shuffled."""

    saved_bytes: int
    """The SAEs on disk at the end."""

    model_flops: int
    """Operations of the forward pass for each token: 2 for each weight up to the last layer."""

    sae_flops: int
    """Operations of all SAEs for each token: 6 for each weight, forward and backward."""

    @property
    def training_bytes(self) -> int:
        """Weights of all SAEs, their gradients, and Adam's two moments."""
        return 4 * self.saved_bytes

    @property
    def disk_bytes(self) -> int:
        """Largest use of the disk: two checkpoints of weights and two moments, and the SAEs."""
        return 7 * self.saved_bytes

    def seconds(self, flops_per_second: float) -> float:
        """Return FORWARD_RATIO * tokens * model_flops / flops_per_second.

        Args:
            flops_per_second: measured speed of the forward pass on the device.
        """
        check_number("flops_per_second", flops_per_second, above=0)
        return FORWARD_RATIO * self.tokens * self.model_flops / flops_per_second


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
    row = config.context_size or min(128, shape.n_ctx)
    if row > shape.n_ctx:
        raise ValueError(f"context_size must be at most n_ctx={shape.n_ctx}, got {row}")
    last_layer = max(site.layer for site in sites)
    return TrainingEstimate(
        tokens=config.training_tokens,
        model_bytes=shape.n_parameters * model_item,
        buffer_bytes=_buffer_bytes(config, sites, row, model_item),
        saved_bytes=_weight_bytes(config, sites),
        model_flops=2 * sum(shape.block_parameters[: last_layer + 1]),
        sae_flops=12 * config.sae.d_sae_per_head * sum(site.d_in for site in sites),
    )


def check_resources(stream: QueryStream, out: Path | None) -> None:
    """Raise if a run does not fit into the free memory or onto the disk.

    Raises:
        ValueError: the message names what is needed, what is free, and the remedy.
    """
    model, config = stream.model, stream.config
    item = next(model.parameters()).element_size()
    activations = _buffer_bytes(config, stream.own, stream.rows.shape[1], item)
    needed = {str(model.cfg.device): 4 * _weight_bytes(config, stream.own)}
    needed[stream.device] = needed.get(stream.device, 0) + activations
    for device, n_bytes in needed.items():
        remedy = (
            "train fewer layers at a time, or lower d_sae_per_head or n_batches_in_buffer; "
            "act_store_device='cpu' keeps the queries off a GPU"
        )
        _check_free(n_bytes, _free_memory(device), f"memory on {device}", remedy)
    if out is not None:
        here = next(folder for folder in out.absolute().parents if folder.exists())
        remedy = "give another folder, or train fewer layers at a time"
        unfinished = out.with_name(f"{out.name}.unfinished").rglob("*")
        free = shutil.disk_usage(here).free + sum(file.stat().st_size for file in unfinished)
        _check_free(7 * _weight_bytes(config, stream.sites), free, f"disk at {out}", remedy)


def _check_free(needed: int, free: int | None, what: str, remedy: str) -> None:
    if free is not None and needed > free:
        raise ValueError(
            f"training needs at least {needed / 2**30:.3g} GiB of {what}, where "
            f"{free / 2**30:.3g} GiB are free: {remedy}"
        )


def _weight_bytes(config: TrainingConfig, sites: Sequence[QuerySite]) -> int:
    """Return the size of the weights of all SAEs, without biases and thresholds."""
    item = {"float32": 4, "float64": 8}[config.sae.dtype]
    return 2 * config.sae.d_sae_per_head * sum(site.d_in for site in sites) * item


def _buffer_bytes(
    config: TrainingConfig, sites: Sequence[QuerySite], row_tokens: int, item: int
) -> int:
    """Return the memory of the queries that wait to be shuffled, `item` bytes a number."""
    return config.n_batches_in_buffer * row_tokens * sum(site.d_in for site in sites) * item


def _free_memory(device: str) -> int | None:
    """Return the free bytes of a device, None if unknown."""
    match torch.device(device).type:
        case "cpu":
            return psutil.virtual_memory().available
        case "cuda":
            return torch.cuda.mem_get_info(torch.device(device))[0]
        case _:
            return None
