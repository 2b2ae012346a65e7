"""What is asked of every method: a prompt, and the class that is to come of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sae_query_steer.data.examples import LabelledExample


@dataclass(frozen=True, kw_only=True)
class SteeringCase:
    """A prompt, and the class that what is written after it is to have."""

    prompt: str
    """The text to continue."""

    target: str
    """The class."""

    source: str | None = None
    """The class that the prompt leads to by itself, where that is known."""

    requesting: str | None = None
    """The same prompt with a request for the target, where the task has such."""


def cases_of(examples: Sequence[LabelledExample], n: int) -> list[SteeringCase]:
    """Return n cases from labelled prompts: each is to become another class than its own.

    Sources and targets come in turn, so that each pair is about as frequent as any other; a prompt
    is used again, for another target, only after all of its class were used.

    Args:
        examples: labelled prompts of at least two classes.
        n: how many cases.

    Raises:
        ValueError: fewer than two classes, or more cases than prompts and other classes give.
    """
    pools: dict[str, list[str]] = {}
    for example in examples:
        pools.setdefault(str(example.label), []).append(example.prompt)
    classes = sorted(pools)
    others = len(classes) - 1
    if others < 1:
        raise ValueError(f"the labels are {classes}: steering needs two classes or more")
    cases = []
    for lap in range(max(map(len, pools.values())) * others):
        for index, source in enumerate(classes):
            round_, place = divmod(lap, len(pools[source]))
            if round_ < others:
                target = classes[(index + 1 + (place + round_) % others) % len(classes)]
                prompt = pools[source][place]
                cases.append(SteeringCase(prompt=prompt, target=target, source=source))
    if not 1 <= n <= len(cases):
        raise ValueError(
            f"n={n} cases are not allowed: {len(examples)} prompts of {len(classes)} classes give "
            f"1 to {len(cases)}"
        )
    return cases[:n]
