"""What is asked of every method on the tutor, and who says whether the right note was taken up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.judges import RuleJudge
from sae_query_steer.toy.corpus import TutorCorpus, TutorPrompt
from sae_query_steer.toy.judges import restated_level
from sae_query_steer.toy.splits import Split

MAX_NEW_TOKENS = 32
"""Longer than any feedback of the corpus."""

Task: TypeAlias = Literal["open", "redirect"]
TASKS: tuple[Task, ...] = ("open", "redirect")


@dataclass(frozen=True, kw_only=True)
class TutorCase(SteeringCase):
    """A case of the tutor: an open prompt, or one with a request for another level."""

    asked: TutorPrompt
    """The prompt in its parts."""


def tutor_cases(
    task: Task, split: Split, n: int, *, seed: int, notes: bool = True
) -> list[TutorCase]:
    """Return n cases that go through the targets, and the other levels as sources, in turn.

    Args:
        task: "open" prompts leave the level open, "redirect" prompts ask for another one.
        split: whose lessons, notes and phrasings.
        n: how many.
        seed: of the prompts.
        notes: whether the prompts hold notes.
    """
    corpus = TutorCorpus(split, seed=seed, notes=notes)
    levels = list(BloomLevel)
    cases = []
    for i in range(n):
        target = levels[i % 6]
        source = None if task == "open" else levels[(i + 1 + i // 6 % 5) % 6]
        asked = corpus.prompt(source)
        requesting = asked.with_request(target, *corpus.request(target))
        cases.append(
            TutorCase(
                prompt=asked.text,
                target=target,
                source=source,
                requesting=requesting.text,
                asked=asked,
            )
        )
    return cases


def note_judge(cases: Sequence[TutorCase]) -> RuleJudge | None:
    """Return the rule that tells whose note a text takes up; None where prompts hold no notes."""
    asked = {case.prompt: case.asked for case in cases}
    if not all(prompt.notes for prompt in asked.values()):
        return None

    def rule(prompt: str, text: str) -> str | None:
        return restated_level(text, asked[prompt])

    return RuleJudge(rule, list(BloomLevel))
