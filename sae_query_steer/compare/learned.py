"""Learned targets as methods of a comparison: learned once, and kept while it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from sae_query_steer.compare.methods import Descent
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.descent.objectives import FixedMove, SquaredDistance
from sae_query_steer.learning.learner import TargetLearner, no_moves
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.named import LastPromptToken, ResponseTokens
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.targets.centroids import CentroidTargets, LearnedTargets

SCOPE = LastPromptToken() | ResponseTokens()
"""Where learned targets are learned and applied."""

MOVE = Descent(name="fixed move", objective=FixedMove(), n_steps=1, step_sizes=(1.0, 1.3))
POINT = Descent(name="squared distance", objective=SquaredDistance(), n_steps=3, step_sizes=(0.3,))


@dataclass(frozen=True)
class Learning:
    """Learns the targets of a comparison, or reads those of a stopped run."""

    model: Any
    examples: TokenizedExamples
    counterparts: TokenizedExamples | None
    _: KW_ONLY
    held_out: Sequence[int] | None
    """Examples that choose the update; None takes a quarter of each class."""

    n_updates: int
    max_relative_change: float
    seed: int
    folder: Path | None
    """Where targets are kept."""

    scope: Scope = SCOPE
    ranks: Ranks = ALONE
    rows: list[Any] = field(default_factory=list)
    """What all targets are learned from, whose prompts run once."""

    def __call__(
        self,
        name: str,
        encoders: Mapping[str, QueryEncoder],
        *,
        l1: float = 0.0,
        start: CentroidTargets | None = None,
    ) -> CentroidTargets:
        """Return learned moves, or with centroids to start from, learned points."""
        descent = MOVE if start is None else POINT
        first = no_moves(self.model, encoders, self.examples.labels) if start is None else start
        recipe = LatentGradientSteerer(
            encoders,
            first,
            target=first.classes[0],
            objective=descent.objective,
            n_steps=descent.n_steps,
            step_size=descent.step_sizes[0],
            max_relative_change=self.max_relative_change,
            scope=self.scope,
        )
        given: Any = {"counterparts": self.counterparts, "held_out": self.held_out}
        checkpoint = None if self.folder is None else self.folder / f"{name}.learning"

        def fitted() -> LearnedTargets:
            own: Any = {"l1": l1, "n_updates": self.n_updates, "seed": self.seed}
            learner = TargetLearner(self.model, recipe, **own, ranks=self.ranks)
            if not self.rows:
                self.rows.append(learner.rows(self.examples, **given))
            return learner.fit(self.examples, **given, checkpoint=checkpoint, rows=self.rows[0])

        return kept(self.folder, name, LearnedTargets.load, fitted, self.ranks)


def kept(
    folder: Path | None, name: str, load: Any, make: Callable[[], Any], ranks: Ranks = ALONE
) -> Any:
    """Return what a stopped run wrote in a folder, or make it; all ranks have that of the first."""
    if folder is None:
        return make()
    there = (folder / name).exists()
    ranks.wait()  # until all have looked
    made = None if there else make()
    if made is not None and ranks.rank == 0:
        made.save(folder / name)
    ranks.wait()
    return made if made is not None and ranks.rank == 0 else load(folder / name)
