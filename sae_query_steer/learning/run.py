"""One run of a learner: updates, and evaluations on held-out examples."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.strength import Queries
from sae_query_steer.learning.checkpoints import Progress, load_checkpoint, save_checkpoint
from sae_query_steer.learning.rows import LearningRows
from sae_query_steer.models.launch import Ranks
from sae_query_steer.progress import OnMetrics, progress_bar
from sae_query_steer.scopes.positions import TokenPositions, select
from sae_query_steer.steering.engine import AppliedEdit, by_head, tokens_once
from sae_query_steer.steering.latent_descent import LatentDescent
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads

PRUNED_BY = 0.6
"""Share of the updates after which no further latents are removed. Source: our choice."""


@dataclass(eq=False)
class LearningRun:
    """One run of a `TargetLearner`."""

    learner: Any
    """The learner: its steerer and its settings."""

    batches: Sequence[LearningRows | None]
    """The rows to learn from, this process's share of each update; None where it has none."""

    kept: Sequence[LearningRows]
    """The rows that are held out, this process's share."""

    checkpoint: Path | None = None
    """A folder for a checkpoint; None writes none."""

    on_metrics: OnMetrics | None = None
    """Called at each evaluation."""

    digest: str = ""
    """What tells runs of other settings or examples apart."""

    best: dict[str, Tensor] = field(init=False, default_factory=dict)
    lowest: dict[str, float] = field(init=False, default_factory=dict)
    unsteered: dict[str, float] = field(init=False, default_factory=dict)
    history: list[dict[str, float | str | None]] = field(init=False, default_factory=list)
    held_out: list[tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]] = field(init=False)
    """Loss and relative change of each row of `kept`, at the last evaluation."""

    def __post_init__(self) -> None:
        learner, steerer = self.learner, self.learner.steerer
        self._classes, self._chosen = steerer.targets.classes, steerer.where.chosen
        self._first_layer = min(at.site.layer for at in self._chosen.values())
        self._edit = LearnedDescent(**steerer.settings)
        self._values: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._shares: list[list[float]] = []
        """Of the rows and of the steered tokens of each batch, what this process has."""
        self._seen = ByClass()
        self._optimiser: Any = None
        self._step, self._idle = 0, 0
        prunes = learner.n_latents is not None or learner.n_latents_total is not None
        self._pruned_by = PRUNED_BY * learner.n_updates if prunes else 0.0

    def run(self) -> None:
        """Learn; afterwards `best`, `unsteered`, `history` and `held_out` are set."""
        learner = self.learner
        self._begin()
        self._optimiser = torch.optim.Adam(list(self._values.values()), lr=learner.learning_rate)
        if not self._restored():
            self.lowest = self._evaluated(0)
        with progress_bar(
            total=learner.n_updates,
            initial=self._step,
            desc="Learning targets",
            unit="update",
            leave=None,  # not below another bar
            disable=learner.ranks.rank > 0,
        ) as bar:
            while self._step < learner.n_updates and self._idle < learner.patience:
                batch = self.batches[self._step % len(self.batches)]
                self._step += 1
                bar.set_postfix(loss=f"{float(self._update(batch)):.3f}", refresh=False)
                bar.update()
                if self._step % learner.every == 0 or self._step == learner.n_updates:
                    found = self._evaluated(self._step, self.lowest)
                    better = {k: loss for k, loss in found.items() if loss < self.lowest[k]}
                    self.lowest |= better
                    waits = better or self._step < self._pruned_by
                    self._seen, self._idle = ByClass(), 0 if waits else self._idle + 1
                    self._save()
        if self.checkpoint is not None and learner.ranks.rank == 0:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        learner.ranks.wait()

    def score_outputs(self) -> None:
        """Move latents by how much the loss falls with them at first order; sets what `run` does.

        Latents that may be active at most move in proportion to minus the gradient; of each class
        the moves have length 1 in units of the query, in the root mean square over heads.
        """
        self._begin()
        self._pruned_by = 0.0
        values = list(self._values.values())
        for batch in filter(None, self.batches):
            self.losses(batch)[0].sum().backward()
        gradients = self.learner.ranks.summed([value.grad for value in values])
        with torch.no_grad():
            for value, gradient in zip(values, gradients, strict=True):
                value.copy_(-gradient)
            self._project(0)
            lengths = torch.cat([value.square().sum(-1) for value in values], dim=1)
            size = lengths.mean(1).sqrt().clamp(min=1e-30)[:, None, None]
            for value in values:
                value.div_(size)
        self.lowest = self._evaluated(0)

    def _update(self, batch: LearningRows | None) -> Tensor:
        """Take one step on a batch, and return the mean loss of all its rows before it."""
        learner, values = self.learner, self._values.values()
        self._optimiser.zero_grad(set_to_none=False)
        loss = torch.zeros(1)
        if batch is not None:
            of_rows, of_tokens = self._shares[(self._step - 1) % len(self.batches)]
            losses, edit = self.losses(batch)
            self._seen.add(batch.labels, losses.detach())
            loss = losses.mean()[None] * of_rows
            (loss + learner.l1 * of_tokens * torch.stack(edit.moved).mean()).backward()
        loss, *gradients = learner.ranks.summed([loss.detach(), *(v.grad for v in values)])
        if not bool(loss.isfinite()):
            raise ValueError(
                f"learning diverged at update {self._step}: the loss is not finite; use a "
                f"learning_rate below {learner.learning_rate}"
            )
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        self._optimiser.step()
        self._project(self._step)
        return loss

    def _state(self) -> dict[str, Tensor]:
        """Return all tensors of the run: the present targets, the best, and Adam's moments."""
        state = {f"best/{name}": value for name, value in self.best.items()}
        for name, value in self._values.items():
            moments = self._optimiser.state[value]
            state |= {f"value/{name}": value.detach()}
            state |= {f"{key}/{name}": moment for key, moment in moments.items()}
        return state

    def _save(self) -> None:
        if self.checkpoint is not None and self.learner.ranks.rank == 0:
            progress = Progress(
                format="sae_query_steer.learning/1",
                settings=self.digest,
                step=self._step,
                idle=self._idle,
                lowest={k: v if math.isfinite(v) else None for k, v in self.lowest.items()},
                history=tuple(self.history),
            )
            save_checkpoint(self.checkpoint, progress, self._state())

    def _restored(self) -> bool:
        """Continue the run of the checkpoint, if there is one; return whether there was."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        self._optimiser.step()  # the moments exist after a step
        found = load_checkpoint(self.checkpoint, self.digest, self._state())
        self._step, self._idle, self.history = found.step, found.idle, list(found.history)
        self.lowest = {k: math.inf if v is None else v for k, v in found.lowest.items()}
        return True

    @torch.no_grad()
    def _begin(self) -> None:
        """Measure the loss without steering and the size of queries, and set the start.

        Each update runs the layers from the first steered one on, where the model can start there.
        """
        scope, ranks = self.learner.steerer.scope, self.learner.ranks
        for batch in filter(None, (*self.batches, *self.kept)):
            batch.begin_at([self._first_layer])
        sizes = torch.zeros(len(self.batches), 2, dtype=torch.float64)
        for size, batch in zip(sizes, self.batches, strict=True):
            if batch is not None:
                size[0], size[1] = len(batch.labels), select(scope, batch.prefixed.positions).sum()
        self._shares = (sizes / ranks.summed([sizes])[0]).tolist()
        squares: dict[str, list[Tensor]] = {name: [] for name in self._chosen}
        losses = ByClass()
        for batch in self.kept:
            scoped = select(scope, batch.prefixed.positions)

            def keep(values: Tensor, hook: Any, at: SiteHeads, scoped: Tensor = scoped) -> None:
                del hook  # its name differs between the backends
                queries = by_head(values, at)[:, :, list(at.heads)][scoped.to(values.device)]
                squares[at.hook_name].append(queries.float().square().mean(-1))

            hooks = [(name, partial(keep, at=at)) for name, at in self._chosen.items()]
            losses.add(batch.labels, batch.losses(hooks))
        self.unsteered = losses.of_all(ranks).means(self._classes)
        for name, at in self._chosen.items():
            start = self.learner.steerer.targets.means[name][:, list(at.heads)]
            rows = torch.cat(squares[name] or [start.new_zeros(0, len(at.heads)).float()])
            total, n = ranks.summed([rows.sum(0), torch.tensor([float(len(rows))])])
            size = (total / n.to(total)).sqrt()
            self._scales[name] = size[:, None].clamp(min=1e-6)
            self.best[name] = start.clone()
            scaled = start.to(self._scales[name]) / self._scales[name]
            self._values[name] = value = scaled.clone().requires_grad_()
            value.grad = torch.zeros_like(value)

    def _targets(self) -> dict[str, Tensor]:
        return {name: value * self._scales[name] for name, value in self._values.items()}

    def losses(self, batch: LearningRows) -> "tuple[Tensor, LearnedDescent]":
        """Return the loss of each row with the present targets, and the edit that was applied."""
        edit = replace(
            self._edit, target=list(batch.labels), values=self._targets(), moved=[], changes=[]
        )
        positions, find = batch.prefixed.positions, tokens_once(self.learner.steerer.scope)
        hooks = [
            (name, AppliedEdit(edit, at, find, checked=False).hook(lambda _: positions))
            for name, at in self._chosen.items()
        ]
        return batch.losses(hooks, first_layer=self._first_layer), edit

    @torch.no_grad()
    def _evaluated(self, step: int, lowest: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return the held-out loss of each class, and keep targets that are the best so far."""
        losses, changes, self.held_out = ByClass(), ByClass(), []
        for batch in self.kept:
            found, edit = self.losses(batch)
            changed = torch.stack(edit.changes).mean(0)
            losses.add(batch.labels, found)
            changes.add(batch.labels, changed)
            self.held_out.append((found, changed))
        of_class, sizes, seen = (
            one.of_all(self.learner.ranks).means(self._classes)
            for one in (losses, changes, self._seen)
        )
        targets = self._targets()
        n_heads = sum(len(at.heads) for at in self._chosen.values())
        for index, label in enumerate(self._classes):
            if step >= self._pruned_by and (lowest is None or of_class[label] < lowest[label]):
                for name, value in targets.items():
                    self.best[name][index] = value[index].to(self.best[name])
            active = sum(int((value[index] != 0).sum()) for value in targets.values())
            self.history.append(
                {
                    "step": float(step),
                    "label": label,
                    "loss": seen[label] if step else None,
                    "held_out_loss": of_class[label],
                    "relative_change": sizes[label],
                    "n_latents": active / n_heads,
                }
            )
        if self.on_metrics is not None:
            told: dict[str, float] = {"step": step}
            for row in self.history[-len(self._classes) :]:
                label, own = row["label"], {k: v for k, v in row.items() if k != "step"}
                told |= {f"{k}/{label}": v for k, v in own.items() if isinstance(v, float)}
            self.on_metrics(told)
        if step < self._pruned_by:  # more latents than are allowed
            return dict.fromkeys(of_class, math.inf)
        return of_class

    @torch.no_grad()
    def _project(self, step: int) -> None:
        """Bring targets back into the latent range, and remove latents that are too many."""
        learner = self.learner
        for name, value in self._values.items():
            least = learner.steerer.saes[name].latent_min
            if least is not None:
                value.clamp_(min=least)
        done = min(1.0, step / self._pruned_by) if self._pruned_by else 1.0
        if learner.n_latents is not None:
            for value in self._values.values():
                _prune(value, learner.n_latents, done)
        if learner.n_latents_total is not None:
            joined = torch.cat([value.flatten(1) for value in self._values.values()], dim=1)
            _prune(joined, learner.n_latents_total, done)
            sizes = [value[0].numel() for value in self._values.values()]
            for value, own in zip(self._values.values(), joined.split(sizes, 1), strict=True):
                value.copy_(own.view_as(value))


def _prune(values: Float[Tensor, "*any d"], wanted: int, done: float) -> None:
    """Set all but the largest values to 0: as many as when a share of the removal is done."""
    n = values.shape[-1]
    keep = max(wanted, round(n * (min(wanted, n) / n) ** done))
    if keep < n:
        kept = values.abs().topk(keep, dim=-1).indices  # of equal values no more than that
        values.masked_fill_(torch.ones_like(values, dtype=torch.bool).scatter(-1, kept, False), 0)


@dataclass(frozen=True, eq=False)
class LearnedDescent(LatentDescent):
    """The descent with targets that have gradients; keeps how much latents moved."""

    values: Mapping[str, Float[Tensor, "class head d_latent"]] = field(default_factory=dict)
    moved: list[Tensor] = field(default_factory=list)
    """Sum of the moves of latents in units of the query's norm, averaged, of each site."""
    changes: list[Float[Tensor, " batch"]] = field(default_factory=list)
    """||change of q|| / ||q|| of each row, averaged over tokens and heads, of each site."""

    def change(
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return what the descent adds; Args as `LatentDescent.change`."""
        del record
        move = self.descended(activations, at, tokens)
        delta = self.decoded(activations, at, move)
        norms = activations.detach().norm(dim=-1).clamp(min=1e-6)
        self.moved.append(((move.after - move.before).abs().sum(-1) / norms).mean())
        ratios = (delta.detach().norm(dim=-1) / norms).mean(-1)
        rows = tokens.row.to(ratios.device)
        n_tokens = torch.bincount(rows, minlength=tokens.n_rows)
        sums = ratios.new_zeros(tokens.n_rows).index_add(0, rows, ratios)
        self.changes.append(sums / n_tokens)
        return QueryChange(delta=delta)

    def _goal(self, at: SiteHeads, tokens: TokenPositions, z: Tensor) -> Goal:
        return replace(super()._goal(at, tokens, z), centroids=self.values[at.hook_name].to(z))


class ByClass(dict[str, list[float]]):
    """Numbers of examples by class."""

    def add(self, labels: Sequence[str], values: Tensor) -> None:
        """Add a number of each example."""
        for label, value in zip(labels, values.tolist(), strict=True):
            self.setdefault(label, []).append(value)

    def of_all(self, ranks: Ranks) -> "ByClass":
        """Return the numbers of all processes, in the same order in each."""
        found = ByClass()
        for part in ranks.gathered(dict(self)):
            for label, values in part.items():
                found.setdefault(label, []).extend(values)
        return found

    def means(self, classes: Sequence[str]) -> dict[str, float]:
        """Return the mean of each class; NaN of those without examples."""
        found = {name: self.get(name, ()) for name in classes}
        return {k: sum(some) / len(some) if some else math.nan for k, some in found.items()}
