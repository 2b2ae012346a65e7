"""Judges find the class of texts, and know their own accuracy.

Train and measure a judge on other texts than those that made the centroids.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Protocol, cast, runtime_checkable

from sklearn.metrics import recall_score

from sae_query_steer.data.examples import LabelledExample

TEMPLATE = """Which of these classes does the response belong to: {classes}?

Prompt: {prompt}

Response: {text}

Answer with the name of one class and nothing else."""
"""The default question to a language model."""


@runtime_checkable
class Judge(Protocol):
    """Anything that finds the class of texts."""

    @property
    def classes(self) -> Sequence[str]:
        """The classes it can find."""
        ...

    @property
    def held_out(self) -> Mapping[str, float]:
        """Its scores on texts it was not trained on; empty if unknown.

        "accuracy" (no class counts as wrong) and "balanced_accuracy"; "answered": share of texts
        given a class; "n": texts; "chance": 1 / classes, the balanced accuracy of guessing;
        "majority": accuracy of always naming the most frequent class.
        """
        ...

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the class of each text, which answers the prompt of the same index; None for none.

        Raises:
            ValueError: not one prompt for each text.
        """
        ...


@dataclass(frozen=True, eq=False)
class RuleJudge:
    """A judge by a function of the user's."""

    rule: Callable[[str, str], str | None]
    """From prompt and text to the class, or None."""

    classes: Sequence[str]
    """The classes the rule may return."""

    held_out: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """See `Judge`; set by `measured`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _checked_classes(self.classes))

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the rule's class of each text.

        Raises:
            ValueError: not one prompt for each text, or a class that is not among the classes.
        """
        check_pairs(prompts, texts)
        found = [self.rule(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        for index, name in enumerate(found):
            if name is not None and name not in self.classes:
                raise ValueError(
                    f"the rule says {name!r} of text {index}, which is not among classes="
                    f"{list(self.classes)}: name it there, or return None"
                )
        return found

    def measured(self, examples: Sequence[LabelledExample]) -> "RuleJudge":
        """Return this judge with its accuracy on the responses of labelled examples.

        Raises:
            ValueError: no examples, one without a response, or a label that is not a class.
        """
        return replace(self, held_out=_measure(self, examples))


@dataclass(frozen=True, eq=False)
class LanguageModelJudge:
    """A judge that asks a language model, one question for each text.

    The answer must name exactly one class as a whole word, in any case; of names that contain each
    other the longest counts. Negations are not understood: ask for the name alone, and measure it.

    Source: our choice.
    """

    ask: Callable[[str], str]
    """From question to answer; a `ChatEndpoint` is such a function."""

    classes: Sequence[str]
    """What it may answer; names that differ in more than case."""

    template: str = TEMPLATE
    """The question, with {text}, and where wanted {prompt} and {classes}."""

    held_out: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """See `Judge`; set by `measured`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _checked_classes(self.classes))
        if len({name.casefold() for name in self.classes}) < len(self.classes):
            raise ValueError(
                f"classes={list(self.classes)} differ in case alone: no answer tells them apart"
            )
        try:
            names = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise ValueError(f"the template can't be read ({error}): write {{{{ for {{") from None
        if "text" not in names or not names <= {"prompt", "text", "classes"}:
            raise ValueError(
                f"the template has {sorted(names)} to fill in: it needs {{text}}, may have "
                "{prompt} and {classes}, and writes other braces twice"
            )

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the class that the model names for each text; None where it names none or several.

        Raises:
            ValueError: not one prompt for each text.
        """
        check_pairs(prompts, texts)
        names = ", ".join(self.classes)
        return [
            self.parsed(self.ask(self.template.format(prompt=prompt, text=text, classes=names)))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def parsed(self, answer: str) -> str | None:
        """Return the one class that an answer names, or None."""
        longest_first = sorted(self.classes, key=len, reverse=True)
        # A hyphen belongs to the word: "non-toxic" does not name toxic.
        any_name = "|".join(
            "(" + r"\s+".join(map(re.escape, name.split())) + ")" for name in longest_first
        )
        matches = re.finditer(rf"(?<![\w-])(?:{any_name})(?![\w-])", answer, re.IGNORECASE)
        found = {longest_first[cast(int, match.lastindex) - 1] for match in matches}
        return found.pop() if len(found) == 1 else None

    def measured(self, examples: Sequence[LabelledExample]) -> "LanguageModelJudge":
        """Return this judge with its accuracy on the responses of labelled examples.

        Raises:
            ValueError: no examples, one without a response, or a label that is not a class.
        """
        return replace(self, held_out=_measure(self, examples))


def _measure(judge: Judge, examples: Sequence[LabelledExample]) -> dict[str, float]:
    if not examples:
        raise ValueError("there are no examples to measure the judge on: give at least one")
    check_responses(examples)
    for index, example in enumerate(examples):
        if example.label not in judge.classes:
            raise ValueError(
                f"label {example.label!r} of example {index} is not among classes="
                f"{list(judge.classes)}: leave such examples out"
            )
    found = judge([e.prompt for e in examples], [e.response for e in examples])
    return judged_scores(found, [e.label for e in examples], judge.classes)


def judged_scores(
    found: Sequence[str | None], labels: Sequence[str], classes: Sequence[str]
) -> dict[str, float]:
    """Return the scores of classes that were found; see `Judge.held_out`.

    Args:
        found: a judge's class of each text.
        labels: the true class of each.
        classes: all that the judge knows.
    """
    right = [guess == label for guess, label in zip(found, labels, strict=True)]
    present = sorted(set(labels))
    guesses = ["" if guess is None else guess for guess in found]
    balanced = recall_score(labels, guesses, labels=present, average="macro")
    return {
        "accuracy": sum(right) / len(right),
        "balanced_accuracy": float(balanced),
        "answered": sum(guess is not None for guess in found) / len(found),
        "n": float(len(found)),
        "chance": 1 / len(classes),
        "majority": max(labels.count(name) for name in present) / len(labels),
    }


def check_responses(examples: Sequence[LabelledExample]) -> None:
    """Raise unless every example has a response.

    Raises:
        ValueError: one has none; the message gives its index.
    """
    for index, example in enumerate(examples):
        if not example.response.strip():
            raise ValueError(
                f"example {index} has no response, only the prompt {example.prompt[:30]!r}: a "
                "judge is for responses; put the text to be judged there"
            )


def check_pairs(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Raise unless there is one prompt for each text.

    Raises:
        ValueError: the message gives both numbers.
    """
    if isinstance(prompts, str) or isinstance(texts, str) or len(prompts) != len(texts):
        raise ValueError(
            f"{len(prompts)} prompts do not fit {len(texts)} texts: give two lists, one prompt for "
            "each text"
        )


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(classes)
    blank = isinstance(classes, str) or not all(name.strip() for name in names)
    if blank or not names or len(set(names)) < len(names):
        raise ValueError(
            f"classes={classes!r} are not allowed: give a list of names, none blank and each once"
        )
    return names
