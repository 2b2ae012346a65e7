"""Checkpoints of a training run, from which a stopped run continues with the same numbers.

`<out>.unfinished` holds `run.json`, the settings of the run, and `step-N/`, the last two
checkpoints: a safetensors file for each site with weights, Adam's moments and firing statistics,
and an index with the size and hash of all files. Schedules are functions of the step, and the
stream needs no state. A checkpoint is written aside and renamed, so one is complete at any moment a
process is killed. Each rank writes and reads the files of its sites, so any number of ranks can
continue. SAELens's own trainer state is a pickle. No signal handler is installed.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_query_steer.models.fingerprint import default_tolerance, relative_difference
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.storage.checksums import ListedFile, check_files, list_files, listed
from sae_query_steer.storage.folders import new_folder, written_aside
from sae_query_steer.storage.records import Record, read_record, write_record
from sae_query_steer.storage.tensors import FLOATS, check_finite, read_tensors, write_tensors
from sae_query_steer.training.saelens import HeadwiseMultiTrainer

RUN, INDEX = "run.json", "checkpoint.json"
_STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")


class CheckpointIndex(Record):
    """What `checkpoint.json` holds."""

    format: Literal["sae_query_steer.checkpoint/2"]
    step: int
    """Steps that were done."""

    run: ListedFile
    """`run.json` beside the checkpoint."""

    files: dict[str, ListedFile]
    """The files of the sites in it."""


class Checkpoints:
    """The checkpoints of one run in a folder of its own.

    Args:
        folder: where they are written.
        settings: all that decides the weights, as JSON.
        queries: the model's queries on fixed tokens by hook name; they identify the model.
        every: steps between two checkpoints.
        resume: continue the run in the folder, if there is one.
        overwrite: replace the run in the folder.
        ranks: the processes of the run. The first one makes and removes folders.

    Raises:
        FileExistsError: the folder holds a run and neither `resume` nor `overwrite` is given, or it
            holds something else.
        ValueError: it holds a run with other settings, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        queries: Mapping[str, Tensor],
        *,
        every: int,
        resume: bool,
        overwrite: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.every, self.ranks = folder, every, ranks
        self._queries = queries
        self._tolerance = default_tolerance(settings["model_dtype"])
        self._saved = 0
        steps = self._steps()
        exists = bool(steps) or (folder / RUN).is_file()
        ranks.wait()  # all have looked before one writes
        if exists and resume:
            last = max(steps, default=0)
            with self._damage(last):
                if last:
                    self._check(last)
                stored = read_record(folder, RUN, dict[str, JsonValue])
            check_same_run(folder / RUN, stored, settings)
        elif exists and not overwrite:
            raise FileExistsError(
                f"{folder} holds a stopped run: continue it with resume=True, or replace it with "
                "overwrite=True"
            )
        elif ranks.rank == 0:
            with new_folder(folder, overwrite=True, holding=RUN) as new:
                write_record(new / RUN, settings)
        ranks.wait()

    def __call__(self, trainer: HeadwiseMultiTrainer) -> None:
        """Write a checkpoint if one is due, or if training is at its end.

        Raises:
            ValueError: training has diverged; the last checkpoint is kept.
        """
        step, total = trainer.n_training_steps, trainer.cfg.total_training_samples
        due = step % self.every == 0 or trainer.n_training_samples >= total
        if step == self._saved or not due:
            return
        check_not_diverged(trainer)
        first, path = self.ranks.rank == 0, self._path(step)
        if first:
            self._remove_all_but(self._saved)
        folder = new_folder(path, overwrite=True, holding=INDEX) if first else nullcontext()
        with folder:
            self.ranks.wait()
            new = written_aside(path)
            for site, one in trainer.trainers.items():
                write_tensors(new / f"{site}.safetensors", self._tensors(site, one))
            self.ranks.wait()
            if first:
                run, files = listed(self.folder / RUN), list_files(new)
                found = {"format": "sae_query_steer.checkpoint/2", "step": step}
                write_record(new / INDEX, CheckpointIndex(**found, run=run, files=files))
        self._saved = step

    def restore(self, trainer: HeadwiseMultiTrainer) -> None:
        """Set a new trainer to the last checkpoint, if there is one.

        Raises:
            ValueError: the checkpoint is of another model, or damaged.
        """
        if not (steps := self._steps()):
            return
        step = steps[-1]
        _set_step(trainer, step)
        for site, one in trainer.trainers.items():
            own, model = self._tensors(site, one), f"fingerprint/{site}"
            expected = {name: (FLOATS, tuple(tensor.shape)) for name, tensor in own.items()}
            stored = read_tensors(self._path(step), f"{site}.safetensors", expected)
            with self._damage(step):
                check_finite(stored)
            difference = relative_difference(own.pop(model), stored[model])
            if not difference <= self._tolerance:  # NaN too
                raise ValueError(
                    f"{self.folder} holds a run on another model: {model} differs by "
                    f"{difference:.3g} (relative); load that model, or remove the folder"
                )
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(stored[name])
            one.n_frac_active_samples = int(stored[f"{site}/n_frac_active_samples"])
        self._saved = step

    def remove(self) -> None:
        """Remove the folder, `run.json` last, by which what a killed process leaves is known."""
        self._remove_all_but(0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensors(self, site: str, trainer: SAETrainer[Any, Any]) -> dict[str, Tensor]:
        return {f"fingerprint/{site}": self._queries[site]} | _tensors(site, trainer)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _steps(self) -> list[int]:
        """Return the steps of the checkpoints in the folder, the last one last."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _check(self, step: int) -> None:
        """Raise unless the files of a checkpoint are those that its index lists."""
        index = read_record(self._path(step), INDEX, CheckpointIndex)
        if index.step != step:
            raise ValueError(f"{self._path(step) / INDEX} must be of step {step}, got {index.step}")
        files = {f"step-{step}/{name}": file for name, file in index.files.items()}
        check_files(self.folder, {RUN: index.run} | files)

    @contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        """Add what to do to errors about the files of a checkpoint."""
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            remedy = f"delete {self.folder} to train from the start"
            for before in (other for other in self._steps() if other < step):
                with suppress(FileNotFoundError, ValueError):
                    self._check(before)
                    remedy += f", or delete {self._path(step)} to continue from step {before}"
            raise ValueError(f"a checkpoint is damaged: {error}; {remedy}") from error

    def _remove_all_but(self, step: int) -> None:
        for path in self.folder.iterdir():
            # Also what a killed process was writing aside.
            if path.is_dir() and path.name != f"step-{step}":
                shutil.rmtree(path, ignore_errors=True)


def check_same_run(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise unless stored settings equal those of this run.

    Raises:
        ValueError: the message names the settings that differ, with both values.
    """
    differ = [
        f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted({*stored, *settings})
        if stored.get(name) != settings.get(name)
    ]
    if differ:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(differ)}. Give the same settings, "
            "or another folder"
        )


def check_not_diverged(trainer: HeadwiseMultiTrainer) -> None:
    """Raise unless weights and moments are finite.

    Raises:
        ValueError: the message names the site and the tensor.
    """
    try:
        for site, one in trainer.trainers.items():
            check_finite(_tensors(site, one))
    except ValueError as error:
        raise ValueError(
            f"training diverged before step {trainer.n_training_steps}: {error}; train with a "
            "lower lr, or lr_warm_up_steps above 0"
        ) from error


def _tensors(site: str, trainer: SAETrainer[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a trainer's state themselves, not copies, but for the counter."""
    sae, counter = trainer.sae, trainer.n_frac_active_samples
    found = {f"{site}/weight/{name}": value for name, value in sae.state_dict().items()}
    for name, parameter in sae.named_parameters():
        moments = trainer.optimizer.state[parameter]
        found |= {f"{site}/{moment}/{name}": value for moment, value in moments.items()}
    found |= {f"{site}/{name}": getattr(trainer, name) for name in _STATISTICS}
    found[f"{site}/n_frac_active_samples"] = torch.tensor(counter, dtype=torch.float64)
    if isinstance(scale := trainer.activation_scaler.scaling_factor, Tensor):
        found[f"{site}/scale"] = scale
    return found


def _set_step(trainer: HeadwiseMultiTrainer, steps: int) -> None:
    """Set counters and schedules to a step, and give optimisers and scalers tensors to fill."""
    for one in trainer.trainers.values():
        for parameter in one.sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        one.optimizer.step()
        one.optimizer.zero_grad()
        for _ in range(steps):
            one.lr_scheduler.step()
            for schedule in one.coefficient_schedulers.values():
                schedule.step()
        if one.sae.cfg.normalize_activations != "none":
            factors = torch.ones(one.sae.cfg.n_heads, dtype=torch.float64)
            one.activation_scaler.scaling_factor = factors  # pyright: ignore[reportAttributeAccessIssue]
    for one in (trainer, *trainer.trainers.values()):
        one.n_training_steps = steps
        one.n_training_samples = steps * trainer.cfg.train_batch_size_samples
