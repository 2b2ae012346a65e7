"""Checkpoints of a learner's run: how far it is as JSON, its tensors as safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import Record, read_record, write_record
from sae_query_steer.storage.tensors import FLOATS, check_finite, read_tensors, write_tensors

_PROGRESS, _STATE = "learning.json", "learning.safetensors"


class Progress(Record):
    """How far a run is."""

    format: Literal["sae_query_steer.learning/1"]
    settings: str
    """What tells runs of other settings or examples apart."""

    step: int
    idle: int
    lowest: dict[str, float | None]
    history: tuple[dict[str, float | str | None], ...]


def save_checkpoint(folder: Path, progress: Progress, state: dict[str, Tensor]) -> None:
    """Write a checkpoint, whole or not at all; one that is there is replaced."""
    with new_folder(folder, overwrite=True, holding=_PROGRESS) as new:
        write_tensors(new / _STATE, state)
        write_record(new / _PROGRESS, progress)


@torch.no_grad()
def load_checkpoint(folder: Path, settings: str, state: Mapping[str, Tensor]) -> Progress:
    """Return how far a run was, and copy its tensors into those of `state`.

    Raises:
        ValueError: it is of a run with other settings or examples, or damaged.
    """
    progress = read_record(folder, _PROGRESS, Progress)
    if progress.settings != settings:
        raise ValueError(
            f"checkpoint must be of the same settings and examples: {folder} is of another run; "
            "give another folder, or delete it"
        )
    shapes = {name: (FLOATS, tuple(tensor.shape)) for name, tensor in state.items()}
    stored = read_tensors(folder, _STATE, shapes)
    check_finite(stored)
    for name, tensor in state.items():
        tensor.copy_(stored[name])
    return progress
