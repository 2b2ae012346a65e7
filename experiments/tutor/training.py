"""Train a tutor from random weights: python -m experiments.tutor.training --out DIR.

A run that was stopped continues when it is started again.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from experiments.tiny_llama import check_training, feedback_loss, new_llama
from experiments.tutor.batches import Kind, tutor_batch
from experiments.tutor.obedience import obedience
from experiments.tutor.tokenizer import tutor_tokenizer
from sae_query_steer.storage.checksums import ListedFile, check_files, listed
from sae_query_steer.storage.folders import check_replaceable, new_folder
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.storage.tensors import read_tensors, write_tensors

CARD = "tutor.json"
"""How a tutor was trained and how well it does."""

CHECKPOINT_EVERY = 100

STATE, WEIGHTS = "state.json", "state.safetensors"
"""By the first of these files the folder of an unfinished run is known."""

STAGES: tuple[tuple[str, tuple[Kind, ...], float | None], ...] = (
    ("Learning to copy", ("copies",), 1.0),
    ("Learning the levels", ("levels", "cues"), 1.2),
    ("Learning to choose", ("drills", "drills", "levels", "drills", "cues"), 0.5),
    ("Learning the texts", ("texts", "drills", "texts", "texts", "solved"), None),
)
"""What is learned one after the other: a name, the kinds of batches in turn, and the loss, in nats,
of the first of them at which the stage ends."""

NEEDS_NOTES = (1, 2)
"""The stages that a tutor without notes leaves out."""


@dataclass(frozen=True, kw_only=True)
class TutorTraining:
    """Settings of a tutor's training; the defaults are put together from trials."""

    seed: int = 0
    """Of weights and texts."""

    notes: bool = True
    """Whether prompts hold notes; without, it is the null: nothing for a query to choose."""

    n_steps: int = 700
    """Steps on whole texts, the last stage."""

    max_steps: int = 2000
    """Most steps of each stage before."""

    lr: float = 2e-3
    """Learning rate of AdamW after 100 steps of warm-up; it falls to a fiftieth at the end."""

    open_share: float = 0.35
    """Share of the texts whose prompt leaves the level open."""

    decision_weight: float = 8.0
    """Weight of the token that decides the feedback's level, beside 1 for the others."""

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 384

    def __post_init__(self) -> None:
        check_training(self)

    def lr_at(self, step: int, corpus_step: int) -> float:
        """Return the learning rate of a step, so many steps into the corpus."""
        decay = (self.n_steps - corpus_step) / (0.6 * self.n_steps)
        return self.lr * min(1.0, (step + 1) / 100, max(0.02, decay))


def train_tutor(
    out: str | Path, settings: TutorTraining | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train a tutor and write it as a Hugging Face folder; return its card.

    A run that is stopped goes on where it was when it is started again with the same settings: its
    state lies in `<out>.unfinished` until the folder is written, whole or not at all. The batch of
    a step depends on the seed and the step alone. The global random state is left as it was.

    Args:
        out: the folder: config, safetensors in 16 bits, tokenizer, and the card `tutor.json`.
        settings: None means the defaults.
        overwrite: replace a tutor that is there.

    Returns:
        The card, with settings, final loss, and on 600 prompts of the split "test" that request a
        level the shares `obeyed` (the feedback's verb is one of the level) and `right_note` (it
        restates the level's note word for word; null where there are no notes).

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else; or what
            lies at `<out>.unfinished` is no run.
        ValueError: an unfinished run of other settings lies beside it.
    """
    settings = TutorTraining() if settings is None else settings
    out = Path(out)
    with new_folder(out, overwrite=overwrite, holding=CARD) as new:
        unfinished = out.with_name(f"{out.name}.unfinished")
        check_replaceable(unfinished, overwrite=True, holding=STATE)
        run = _Run(settings, unfinished)
        loss = run.finish()
        # What is scored is what is shipped: the weights in 16 bits.
        model = run.model.half().float().eval()
        card: dict[str, Any] = {
            "format": "sae_query_steer.tutor/1",
            "settings": dataclasses.asdict(settings),
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "steps": run.steps,
            "loss": loss,
        }
        card |= obedience(model, run.tokenizer, notes=settings.notes)
        model.half().save_pretrained(new)
        run.tokenizer.save_pretrained(new)
        write_json(new / CARD, card)
    shutil.rmtree(unfinished, ignore_errors=True)
    return card


class _Run:
    """A training run with its state, on disk every so many steps.

    Each stage is a stepping stone: to follow a request the tutor has to read its level, to find the
    note whose verb is of that level, and to copy what follows, and none of the three is of use
    before the others are there. Learned all at once from whole texts, they did not form.
    """

    def __init__(self, settings: TutorTraining, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.tokenizer = tutor_tokenizer()
        self.model = new_llama(
            len(self.tokenizer),
            seed=settings.seed,
            d_model=settings.d_model,
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            d_mlp=settings.d_mlp,
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.05
        )
        self.stage, self.steps = 0, [0] * len(STAGES)
        self.losses: list[float] = []
        if (folder / STATE).is_file():
            self._resume()

    def finish(self) -> float:
        """Train to the last step and return the mean loss of the last hundred."""
        for stage, (name, mix, formed) in enumerate(STAGES):
            if stage < self.stage or (stage in NEEDS_NOTES and not self.settings.notes):
                continue
            if stage > self.stage:
                self.stage, self.losses = stage, []
            most = self.settings.max_steps if formed else self.settings.n_steps
            with tqdm(total=most, initial=self.steps[stage], desc=name, unit="step") as bar:
                while self.steps[stage] < most and not self._formed(formed):
                    self._train(mix)
                    bar.update(1)
                    bar.set_postfix(loss=f"{_mean(self.losses[-25:]):.3f}", refresh=False)
        return _mean(self.losses)

    def _formed(self, threshold: float | None) -> bool:
        recent = self.losses[-25:]
        return threshold is not None and len(recent) == 25 and _mean(recent) < threshold

    def _train(self, mix: Sequence[Kind]) -> None:
        settings, step = self.settings, sum(self.steps)
        if step and step % CHECKPOINT_EVERY == 0:
            self._save()
        kind = mix[self.steps[self.stage] % len(mix)]
        batch = tutor_batch(
            kind,
            self.tokenizer,
            seed=settings.seed,
            step=step,
            notes=settings.notes,
            open_share=settings.open_share,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr_at(step, self.steps[-1])
        loss = feedback_loss(self.model, batch, settings.decision_weight)
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # What has formed is told by the first kind of the stage.
        if kind == mix[0]:
            self.losses = [*self.losses[-99:], float(loss.detach())]
        self.steps[self.stage] += 1

    def _save(self) -> None:
        tensors = {f"weight.{name}": p for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        with new_folder(self.folder, overwrite=True, holding=STATE) as new:
            write_tensors(new / WEIGHTS, tensors)
            write_json(
                new / STATE,
                {
                    "settings": dataclasses.asdict(self.settings),
                    "stage": self.stage,
                    "steps": self.steps,
                    "losses": self.losses,
                    "file": listed(new / WEIGHTS).model_dump(),
                },
            )

    @torch.no_grad()
    def _resume(self) -> None:
        state = read_json(self.folder / STATE)
        if state["settings"] != dataclasses.asdict(self.settings):
            raise ValueError(
                f"{self.folder} holds an unfinished run of other settings: finish that one, or "
                "remove the folder"
            )
        check_files(self.folder, {WEIGHTS: ListedFile(**state["file"])})
        tensors = read_tensors(self.folder, WEIGHTS)
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"weight.{name}"])
            self.optimizer.state[p] = {
                key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.stage, self.steps = int(state["stage"]), [int(n) for n in state["steps"]]
        self.losses = list(state["losses"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Train one tutor from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--null", action="store_true", help="prompts without notes")
    parser.add_argument("--steps", type=int, default=TutorTraining().n_steps)
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args()
    settings = TutorTraining(seed=args.seed, notes=not args.null, n_steps=args.steps)
    print(train_tutor(args.out, settings, overwrite=args.overwrite))


if __name__ == "__main__":
    main()
