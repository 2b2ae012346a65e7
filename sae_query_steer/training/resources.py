"""Is there enough memory and disk for a run? Told before it starts, from what it needs at least."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch


def check_memory(needed: Mapping[str, Mapping[str, int]]) -> None:
    """Raise if a device has less free memory than is needed.

    Args:
        needed: by device, and there by what it is for, bytes.

    Raises:
        ValueError: the message names the device, the parts and the remedy.
    """
    for device, parts in needed.items():
        free, total = free_memory(device), sum(parts.values())
        if free is not None and total > free:
            listed = ", ".join(f"{what} {_gib(n)}" for what, n in parts.items())
            raise ValueError(
                f"training needs at least {_gib(total)} of memory on {device} ({listed}), where "
                f"{_gib(free)} are free: train fewer layers at a time, or lower d_sae_per_head, "
                "n_batches_in_buffer or train_batch_size_tokens; act_store_device='cpu' keeps the "
                "activations off a GPU"
            )


def check_disk(folder: Path, n_bytes: int) -> None:
    """Raise if the disk of a folder, which need not exist yet, has less free than is needed.

    Raises:
        ValueError: the message names both sizes and the remedy.
    """
    here = folder.absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    if n_bytes > free:
        raise ValueError(
            f"the states of the run and its SAEs need {_gib(n_bytes)} at {folder}, where "
            f"{_gib(free)} are free: make room, give another folder, or train fewer layers at a "
            "time"
        )


def free_memory(device: str) -> int | None:
    """Return the bytes that are free on a device, None where nothing tells."""
    match torch.device(device).type:
        case "cpu":
            return psutil.virtual_memory().available
        case "cuda":
            return torch.cuda.mem_get_info(torch.device(device))[0]
        case _:
            return None


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"
