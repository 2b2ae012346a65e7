"""The state of a training run on disk: where a run that was stopped goes on.

`<out>.unfinished` holds `run.json`, the settings of the run, and the last state as `step-N/`:
weights, Adam's moments and the firing statistics as safetensors, counters and schedules as JSON.
A new state is written aside, renamed, and only then the one before is removed: whatever moment a
process is killed at, one state is whole. SAELens's own trainer state is a pickle, and its
checkpoints know neither mixing buffer nor random state; here the stream needs no state, see
`stream`. No signal handler is installed: an interrupt ends the run as it ends any other program.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.models.fingerprint import default_tolerance, relative_difference
from sae_query_steer.storage.folders import inside, new_folder
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.storage.tensors import read_tensors, write_tensors
from sae_query_steer.training.saelens import HeadwiseMultiTrainer, HeadwiseTrainer

FORMAT = "sae_query_steer.run/1"
RUN = "run.json"
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")
_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")


class Checkpoints:
    """The states of one run in a folder of its own.

    Args:
        folder: where they lie; made with the first.
        settings: what the run was told, as JSON; another run's state is refused by them.
        queries: the model's queries on fixed tokens, by hook name: another model is refused by
            them.
        dtype: number format of the model.
        every: steps between two states.
        resume: go on with the run that lies there, if one does.
        overwrite: replace the run that lies there.

    Raises:
        FileExistsError: the folder holds a run and neither `resume` nor `overwrite` is given, or
            something else.
        ValueError: it holds a run of other settings, or of another model.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        queries: Mapping[str, Tensor],
        *,
        dtype: str,
        every: int,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.folder, self.every = folder, every
        self._queries, self._dtype = queries, dtype
        self._saved: int | None = None
        run = {"format": FORMAT, "settings": dict(settings)}
        if (folder / RUN).is_file() and resume:
            check_same_run(folder / RUN, read_json(folder / RUN), settings)
        elif (folder / RUN).is_file() and not overwrite:
            raise FileExistsError(
                f"{folder} holds a run that was stopped: resume=True goes on with it; to begin "
                "anew, remove it or give overwrite=True"
            )
        else:
            with new_folder(folder, overwrite=True, holding=RUN) as new:
                write_json(new / RUN, run)

    def __call__(self, trainer: HeadwiseMultiTrainer) -> None:
        """Save the state if it is time, or if the training is at its end."""
        step = trainer.n_training_steps
        due = step % self.every == 0 or trainer.n_training_samples >= (
            trainer.cfg.total_training_samples
        )
        if step == 0 or not due or step == self._saved:
            return
        tensors = {f"fingerprint/{name}": value for name, value in self._queries.items()}
        facts: dict[str, Any] = {name: getattr(trainer, name) for name in _COUNTERS[:2]}
        for name, one in trainer.trainers.items():
            assert isinstance(one, HeadwiseTrainer)
            tensors |= {f"{name}/{key}": value for key, value in _tensors(one).items()}
            facts[name] = _facts(one)
        with new_folder(self.folder / f"step-{step}", overwrite=True, holding="state.json") as new:
            write_tensors(new / "state.safetensors", tensors)
            write_json(new / "state.json", facts)
        self._remove_all_but(step)
        self._saved = step

    def restore(self, trainer: HeadwiseMultiTrainer) -> None:
        """Put a trainer into the last state, if there is one.

        Raises:
            ValueError: the state is of another model, or damaged.
        """
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        steps = [int(name) for name in names if name.isdecimal()]
        if not steps:
            return
        folder = inside(self.folder, f"step-{max(steps)}")
        facts = read_json(inside(folder, "state.json"))
        tensors = read_tensors(folder, "state.safetensors")
        try:
            self._check_model({n: tensors[f"fingerprint/{n}"] for n in self._queries})
            for name, one in trainer.trainers.items():
                own = {
                    key.removeprefix(f"{name}/"): value
                    for key, value in tensors.items()
                    if key.startswith(f"{name}/")
                }
                _restore(one, own, facts[name])
            for name in _COUNTERS[:2]:
                setattr(trainer, name, int(facts[name]))
        except (AttributeError, KeyError, OverflowError, TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} is damaged: {error!r}; remove it") from error
        self._saved = trainer.n_training_steps
        self._remove_all_but(self._saved)

    def remove(self) -> None:
        """Remove the run: its work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_all_but(self, step: int) -> None:
        for path in self.folder.iterdir():
            # Also what a killed process was just writing aside.
            if path.is_dir() and path.name != f"step-{step}":
                shutil.rmtree(path, ignore_errors=True)

    def _check_model(self, stored: Mapping[str, Tensor]) -> None:
        for name, queries in self._queries.items():
            difference = relative_difference(queries, stored[name])
            if not difference <= default_tolerance(self._dtype):  # NaN too
                raise ValueError(
                    f"{self.folder} holds a run on another model: the queries at {name} differ by "
                    f"{difference:.3g} (relative); load that model, or remove the folder"
                )


def check_same_run(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise unless what is stored was made with these settings.

    Args:
        path: where it is stored, for the message.
        stored: an object with "settings".
        settings: those of now.

    Raises:
        ValueError: the message names the settings that differ, with both values.
    """
    theirs = stored.get("settings")
    if not isinstance(theirs, dict):
        raise ValueError(f"{path} does not say with which settings it was made: remove it")
    differ = [
        f"{name} was {theirs.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted({*theirs, *settings})
        if theirs.get(name) != settings.get(name)
    ]
    if differ:
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(differ)}. Give the same, or "
            "another folder"
        )


def _tensors(trainer: HeadwiseTrainer) -> dict[str, Tensor]:
    tensors = {f"weight/{key}": value for key, value in trainer.sae.state_dict().items()}
    for key, parameter in trainer.sae.named_parameters():
        state = trainer.optimizer.state[parameter]
        tensors |= {f"{moment}/{key}": state[moment] for moment in _ADAM}
    tensors |= {name: getattr(trainer, name) for name in _STATISTICS}
    scale = trainer.activation_scaler.scaling_factor
    return tensors if scale is None else tensors | {"scale": torch.as_tensor(scale)}


def _facts(trainer: HeadwiseTrainer) -> dict[str, Any]:
    return {
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {
            name: scheduler.state_dict()
            for name, scheduler in trainer.coefficient_schedulers.items()
        },
        **{name: getattr(trainer, name) for name in _COUNTERS},
    }


@torch.no_grad()
def _restore(trainer: Any, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    trainer.sae.load_state_dict(
        {key.removeprefix("weight/"): v for key, v in tensors.items() if key.startswith("weight/")}
    )
    for key, parameter in trainer.sae.named_parameters():
        moments = {moment: tensors[f"{moment}/{key}"].to(parameter.device) for moment in _ADAM}
        for moment, value in moments.items():
            if value.shape != (parameter.shape if moment != "step" else ()):
                raise TypeError(f"{moment}/{key} has shape {list(value.shape)}")
        trainer.optimizer.state[parameter] = moments
    for name in _STATISTICS:
        if tensors[name].shape != getattr(trainer, name).shape:
            raise TypeError(f"{name} has shape {list(tensors[name].shape)}")
        setattr(trainer, name, tensors[name].to(trainer.sae.device))
    trainer.activation_scaler.scaling_factor = tensors.get("scale")
    trainer.optimizer.param_groups[0]["lr"] = float(facts["lr"])
    _restore_schedule(trainer.lr_scheduler, facts["lr_scheduler"])
    for name, scheduler in trainer.coefficient_schedulers.items():
        _restore_schedule(scheduler, facts["coefficients"][name])
    for name in _COUNTERS:
        setattr(trainer, name, int(facts[name]))


def _restore_schedule(scheduler: Any, facts: Mapping[str, Any]) -> None:
    # torch makes an attribute of whatever the state names.
    if facts.keys() != (known := scheduler.state_dict()).keys():
        raise TypeError(f"a schedule has {sorted(facts)}, not {sorted(known)}")
    scheduler.load_state_dict(dict(facts))
