"""Labelled examples: a prompt, the response to it, and the class they belong to."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from sae_query_steer.arguments import check_kind, check_number, check_texts
from sae_query_steer.bloom import BloomLevel

Long = Literal["refuse", "drop", "cut-start", "cut-end"]
"""What to do with examples that are longer than the model's context."""


@dataclass(frozen=True, kw_only=True)
class LabelledExample:
    """A prompt, the response to it where there is one, and the class they belong to."""

    prompt: str
    """Text before the response; not blank. Kept to the letter, white space included."""

    response: str = ""
    """Text right after the prompt, with any space between the two; may be empty."""

    label: str
    """Name of the class; not blank."""

    place: str = field(default="", compare=False, repr=False)
    """Where it was read, such as "row 3"; for messages."""

    def __post_init__(self) -> None:
        for name in ("prompt", "response", "label"):
            check_kind(f"the {name} of an example", getattr(self, name), str, "give text")
        for name in ("prompt", "label"):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is blank in an example: every example needs "
                    f"a {name} with some text in it"
                )


def place_of(example: LabelledExample, index: int) -> str:
    """Return where an example was read, or else its index."""
    return example.place or f"example {index}"


def split_after_words(examples: Iterable[LabelledExample], n_words: int) -> list[LabelledExample]:
    """Return examples whose prompt is the first words of a text, and whose response is the rest.

    Args:
        examples: the whole text is the prompt, and there is no response.
        n_words: words of the prompt, 1 or more; of a text with fewer than twice as many the half.

    Raises:
        ValueError: a text of one word, or an example with a response.
    """
    check_number("n_words", n_words, whole=True, least=1)
    made, wrong = [], []
    for index, example in enumerate(examples):
        words = list(re.finditer(r"\S+", example.prompt))
        if example.response or len(words) < 2:
            wrong.append(place_of(example, index))
            continue
        end = words[min(n_words, len(words) // 2) - 1].end()
        prompt, response = example.prompt[:end], example.prompt[end:].rstrip()
        made.append(replace(example, prompt=prompt, response=response))
    if wrong:
        raise ValueError(
            f"texts to split must have two words or more and no response, got {len(wrong)} others "
            f"(the first: {', '.join(wrong[:3])})"
        )
    return made


def check_classes(labels: Iterable[str], *, at_least: int = 2) -> dict[str, int]:
    """Return the number of examples of each class, Bloom's levels in their order, else by name.

    Args:
        labels: the class of each example.
        at_least: fewest examples of a class.

    Raises:
        ValueError: fewer than two classes, or a class with too few examples.

    Source: our choice.
    """
    counts = Counter(str(label) for label in labels)
    names = ordered_classes(counts)
    if 2 < len(names) > counts.total() / 2:
        raise ValueError(
            f"the labels name {len(names)} classes in {counts.total()} examples, such as "
            f"{list(names[:3])}: most have one example; give the column of the class, not of an id"
        )
    if len(names) < 2:
        raise ValueError(
            f"the labels name {len(names)} class(es), {list(names)}: a target needs at least "
            "two to tell apart; add examples of another class"
        )
    for name in names:
        if counts[name] < at_least:
            raise ValueError(
                f"class {name!r} has {counts[name]} example(s), fewer than at_least={at_least}: "
                f"add examples of it, or leave it out with min_class_size={at_least} "
                "(--min-class-size)"
            )
    return {name: counts[name] for name in names}


def ordered_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """Return the names of classes in order: Bloom's levels in theirs, others by name."""
    check_texts("classes", classes)
    names = {str(name) for name in classes}
    bloom = [level.value for level in BloomLevel]
    return tuple(sorted(names, key=bloom.index if names <= set(bloom) else None))
