"""Checkpoints of a training run, from which a stopped run continues with the same numbers.

`<out>.unfinished` holds `run.json`, the settings of the run, and the last checkpoint `step-N/`:
weights, Adam's moments and firing statistics as safetensors. Schedules are functions of the step,
and the stream needs no state. A checkpoint is written aside and renamed before the previous one is
removed, so one is complete at any moment a process is killed. SAELens's own trainer state is a
pickle. No signal handler is installed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from sae_query_steer.models.fingerprint import default_tolerance, relative_difference
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import read_record, write_record
from sae_query_steer.storage.tensors import FLOATS, read_tensors, write_tensors
from sae_query_steer.training.saelens import HeadwiseMultiTrainer

RUN, STATE = "run.json", "state.safetensors"
_STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")


class Checkpoints:
    """The checkpoints of one run in a folder of its own.

    Args:
        folder: where they are written.
        settings: all that decides the weights, as JSON.
        queries: the model's queries on fixed tokens by hook name; they identify the model.
        every: steps between two checkpoints.
        resume: continue the run in the folder, if there is one.
        overwrite: replace the run in the folder.

    Raises:
        FileExistsError: the folder holds a run and neither `resume` nor `overwrite` is given, or it
            holds something else.
        ValueError: it holds a run with other settings.
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
    ) -> None:
        self.folder, self.every = folder, every
        self._queries = {f"fingerprint/{name}": value for name, value in queries.items()}
        self._tolerance = default_tolerance(settings["model_dtype"])
        self._saved = 0
        exists = (folder / RUN).is_file()
        if exists and resume:
            stored = read_record(folder, RUN, dict[str, JsonValue])
            check_same_run(folder / RUN, stored, settings)
        elif exists and not overwrite:
            raise FileExistsError(
                f"{folder} holds a stopped run: continue it with resume=True, or replace it with "
                "overwrite=True"
            )
        else:
            with new_folder(folder, overwrite=True, holding=RUN) as new:
                write_record(new / RUN, settings)

    def __call__(self, trainer: HeadwiseMultiTrainer) -> None:
        """Write a checkpoint if one is due, or if training is at its end."""
        step, total = trainer.n_training_steps, trainer.cfg.total_training_samples
        due = step % self.every == 0 or trainer.n_training_samples >= total
        if step == self._saved or not due:
            return
        with new_folder(self.folder / f"step-{step}", overwrite=True, holding=STATE) as new:
            write_tensors(new / STATE, self._queries | _tensors(trainer))
        self._remove_all_but(step)
        self._saved = step

    def restore(self, trainer: HeadwiseMultiTrainer) -> None:
        """Set a new trainer to the last checkpoint, if there is one.

        Raises:
            ValueError: the checkpoint is of another model, or damaged.
        """
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        step = max((int(name) for name in names if name.isdecimal()), default=0)
        if step == 0:
            return
        _set_step(trainer, step)
        own = self._queries | _tensors(trainer)
        expected = {name: (FLOATS, tuple(tensor.shape)) for name, tensor in own.items()}
        stored = read_tensors(self.folder, f"step-{step}/{STATE}", expected)
        for name, queries in self._queries.items():
            difference = relative_difference(queries, stored[name])
            if not difference <= self._tolerance:  # NaN too
                raise ValueError(
                    f"{self.folder} holds a run on another model: {name} differs by "
                    f"{difference:.3g} (relative); load that model, or remove the folder"
                )
        with torch.no_grad():
            for name in own.keys() - self._queries.keys():
                own[name].copy_(stored[name])
        for site, one in trainer.trainers.items():
            one.n_frac_active_samples = int(stored[f"{site}/n_frac_active_samples"])
        self._saved = step
        self._remove_all_but(step)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

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


def _tensors(trainer: HeadwiseMultiTrainer) -> dict[str, Tensor]:
    """Return the tensors of a trainer's state themselves, not copies, but for the counter."""
    found: dict[str, Tensor] = {}
    for site, one in trainer.trainers.items():
        found |= {f"{site}/weight/{name}": value for name, value in one.sae.state_dict().items()}
        for name, parameter in one.sae.named_parameters():
            moments = one.optimizer.state[parameter]
            found |= {f"{site}/{moment}/{name}": value for moment, value in moments.items()}
        found |= {f"{site}/{name}": getattr(one, name) for name in _STATISTICS}
        counter = torch.tensor(one.n_frac_active_samples, dtype=torch.float64)
        found[f"{site}/n_frac_active_samples"] = counter
        if isinstance(scale := one.activation_scaler.scaling_factor, Tensor):
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
