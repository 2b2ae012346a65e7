"""What is asked of every method on the gridworld, who judges the walks, and how they went."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from experiments.gridworld.corpus import GridCorpus, GridPrompt
from experiments.gridworld.judge import walk_class, walked
from experiments.gridworld.words import Aim
from sae_query_steer.compare.judges import RuleJudge
from sae_query_steer.compare.methods import SteeringCase
from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.toy.corpus import Split

Task: TypeAlias = Literal["open", "redirect"]
TASKS: tuple[Task, ...] = ("open", "redirect")


@dataclass(frozen=True, kw_only=True)
class GridCase(SteeringCase):
    """A case of the gridworld: an open prompt, or one with a request for another aim."""

    asked: GridPrompt
    """The prompt in its parts."""


def grid_cases(task: Task, split: Split, n: int, *, seed: int) -> list[GridCase]:
    """Return n cases, one target in turn after the other.

    Args:
        task: "open" prompts leave the aim open, "redirect" prompts ask for another one, each in
            turn.
        split: whose grids and phrasings.
        n: how many.
        seed: of the prompts.
    """
    corpus, aims = GridCorpus(split, seed=f"{task} {seed}"), list(Aim)
    cases = []
    for i in range(n):
        target = aims[i % len(aims)]
        source = None if task == "open" else aims[other_than(i % len(aims), i, len(aims))]
        asked = corpus.prompt(source)
        requesting = asked.with_request(target, corpus.request(target))
        cases.append(
            GridCase(
                prompt=asked.text,
                target=target,
                source=source,
                requesting=requesting.text,
                asked=asked,
            )
        )
    return cases


def other_than(index: int, i: int, n: int) -> int:
    """Return the index of another of n classes, each in turn for i = 0, 1 and so on."""
    return (index + 1 + i // n % (n - 1)) % n


def walk_judge(cases: Sequence[GridCase]) -> RuleJudge:
    """Return the rule that tells the class of the walk that a text takes, by simulation."""
    asked = {case.prompt: case.asked for case in cases}
    return RuleJudge(lambda prompt, text: walk_class(asked[prompt], text), list(Aim))


def walk_scores(cases: Sequence[GridCase], texts: Sequence[str]) -> dict[str, int | float]:
    """Return how the walks of some cases went.

    Args:
        cases: the cases.
        texts: what was written on each.

    Returns:
        "n" cases; "success", the share of walks of the target's class, with its 95 % interval
        "low" and "high"; "reached", the share that ends at the goal; "by_wall" and "steps", means
        over all walks, those that get nowhere included.

    Raises:
        ValueError: no cases, or not one text for each.
    """
    if not cases or len(cases) != len(texts):
        raise ValueError(f"{len(texts)} texts do not fit {len(cases)} cases: give one for each")
    pairs = list(zip(cases, texts, strict=True))
    hits = sum(walk_class(case.asked, text) == case.target for case, text in pairs)
    low, high = wilson_interval(hits, len(pairs))
    walks = [walked(case.asked, text) for case, text in pairs]
    return {
        "n": len(pairs),
        "success": hits / len(pairs),
        "low": low,
        "high": high,
        "reached": sum(walk.reached for walk in walks) / len(pairs),
        "by_wall": sum(walk.n_by_wall for walk in walks) / len(pairs),
        "steps": sum(walk.n_steps for walk in walks) / len(pairs),
    }
