"""Training a tiny Llama to take the route that is requested, in about ten minutes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.gridworld.batches import Kind, grid_batch
from experiments.gridworld.corpus import GridCorpus
from experiments.gridworld.grid import MAX_STEPS
from experiments.gridworld.judge import walk_class
from experiments.gridworld.tokenizer import grid_tokenizer
from experiments.gridworld.words import Aim
from experiments.tiny_llama import check_training, feedback_loss, greedy_texts, new_llama
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import write_json
from sae_query_steer.toy.corpus import Split

CARD = "gridworld.json"
"""How a model was trained and how well it does."""

MAX_NEW_TOKENS = MAX_STEPS + 3
"""A colour, the cells, a full stop, and the end."""

STAGES: tuple[tuple[str, tuple[Kind, ...], float | None], ...] = (
    ("Learning to copy", ("copies",), 1.0),
    ("Learning to find", ("cues", "cues", "copies"), 0.35),
    ("Learning to choose", ("drills", "drills", "cues"), 0.3),
    ("Learning the texts", ("texts", "drills", "texts"), None),
)
"""What is learned one after the other: a name, the kinds of batches in turn, and the loss, in nats,
of the first of them at which the stage ends."""


@dataclass(frozen=True, kw_only=True)
class GridTraining:
    """Settings of a training; the defaults are put together from trials."""

    seed: int = 0
    """Of weights and texts."""

    n_steps: int = 400
    """Steps on whole texts, the last stage."""

    max_steps: int = 1000
    """Most steps of each stage before."""

    lr: float = 2e-3
    """Learning rate of AdamW after 100 steps of warm-up; it falls to a fiftieth at the end."""

    open_share: float = 0.35
    """Share of the texts whose prompt leaves the aim open."""

    decision_weight: float = 8.0
    """Weight of the token that decides which route is taken, beside 1 for the others."""

    look_layer: int | None = 2
    """Whose query is made to choose the route, see `row_batches.one_look`; None leaves open by
    which layers, and by what, it is chosen."""

    d_model: int = 96
    n_layers: int = 4
    n_heads: int = 1
    """One, so that there is no head for each aim."""

    d_mlp: int = 288

    def __post_init__(self) -> None:
        check_training(self)
        if self.look_layer is not None and not 1 <= self.look_layer < self.n_layers:
            raise ValueError(
                f"look_layer={self.look_layer} is not allowed: give 1 to {self.n_layers - 1}, so "
                "that a layer before it can read the request, or None"
            )

    def lr_at(self, step: int, text_step: int) -> float:
        """Return the learning rate of a step, so many steps into the last stage."""
        decay = (self.n_steps - text_step) / (0.6 * self.n_steps)
        return self.lr * min(1.0, (step + 1) / 100, max(0.02, decay))


def train_gridworld(
    out: str | Path, settings: GridTraining | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train a model and write it as a Hugging Face folder; return its card.

    The batch of a step depends on the seed and the step alone. The global random state is left as
    it was. A run that is stopped starts anew: it takes minutes.

    Args:
        out: the folder: config, safetensors in 16 bits, tokenizer, and the card `gridworld.json`.
        settings: None means the defaults.
        overwrite: replace a model that is there.

    Returns:
        The card, with settings, steps and last loss of each stage, and what `obedience` finds on
        the split "test".

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else.
    """
    settings = GridTraining() if settings is None else settings
    with new_folder(out, overwrite=overwrite, holding=CARD) as new:
        tokenizer = grid_tokenizer()
        model, stages = _trained(settings, tokenizer)
        # What is scored is what is shipped: the weights in 16 bits.
        model = model.half().float().eval()
        card: dict[str, Any] = {
            "format": "sae_query_steer.gridworld/1",
            "settings": dataclasses.asdict(settings),
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "stages": stages,
        }
        card |= obedience(model, tokenizer)
        model.half().save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / CARD, card)
    return card


def obedience(model: Any, tokenizer: Any, *, split: Split = "test", n: int = 400) -> dict[str, Any]:
    """Return how often a model does what is requested, by simulation.

    Args:
        model: a LlamaForCausalLM.
        tokenizer: the gridworld's.
        split: whose grids and phrasings.
        n: prompts, each of which requests an aim, one in turn after the other; and as many open.

    Returns:
        "n"; "obeyed", the share of requests whose walk is of the aim; and "walks", the shares of
        walks of each aim, by the aim that is requested, and "open".
    """
    corpus, aims = GridCorpus(split, seed=0), list(Aim)
    asked: list[Aim | None] = [aims[i % len(aims)] for i in range(n)]
    prompts = [corpus.prompt(aim) for aim in [*asked, *[None] * n]]
    texts = greedy_texts(model, tokenizer, [p.text for p in prompts], max_new_tokens=MAX_NEW_TOKENS)
    found = [(p.requested, walk_class(p, t)) for p, t in zip(prompts, texts, strict=True)]

    def shares(requested: Aim | None) -> Mapping[str, float]:
        own = [took for asked, took in found if asked == requested]
        return {str(aim): own.count(aim) / len(own) for aim in aims}

    return {
        "n": n,
        "obeyed": sum(asked is not None and asked == took for asked, took in found) / n,
        "walks": {str(aim or "open"): shares(aim) for aim in [*aims, None]},
    }


def _trained(
    settings: GridTraining, tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, list[dict[str, Any]]]:
    """Return a trained model, and the steps and last mean loss of each stage."""
    model = new_llama(
        len(tokenizer),
        seed=settings.seed,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        d_mlp=settings.d_mlp,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    stages: list[dict[str, Any]] = []
    step = 0
    for name, mix, formed in STAGES:
        most = settings.max_steps if formed else settings.n_steps
        losses: list[float] = []
        done = 0
        with tqdm(range(most), desc=name, unit="step") as bar:
            for here in bar:
                kind = mix[here % len(mix)]
                batch = grid_batch(
                    kind,
                    tokenizer,
                    seed=settings.seed,
                    step=step,
                    open_share=settings.open_share,
                    look_layer=settings.look_layer,
                )
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr_at(step, 0 if formed else here)
                loss = feedback_loss(model, batch, settings.decision_weight)
                optimizer.zero_grad()
                loss.backward()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step, done = step + 1, here + 1
                # What has formed is told by the first kind of the stage.
                if kind == mix[0]:
                    losses.append(float(loss.detach()))
                    recent = sum(losses[-25:]) / len(losses[-25:])
                    bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
                    if formed is not None and len(losses) >= 25 and recent < formed:
                        break
        recent = losses[-25:]
        stages.append({"name": name, "steps": done, "loss": sum(recent) / len(recent)})
    return model, stages
