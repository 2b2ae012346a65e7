"""Judges find the class of texts, and know their own accuracy.

Train and measure a judge on other texts than those that made the centroids.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Protocol, runtime_checkable

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline

from sae_query_steer.compare.endpoint import NoAnswerError
from sae_query_steer.compare.held_out import held_out_scores
from sae_query_steer.data.examples import LabelledExample, check_classes

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
        """Return the class of each text, which answers the prompt of the same index, or None."""
        ...


class _Measured:
    """Judges by a function, of which users measure the accuracy."""

    def measured(self: Any, examples: Sequence[LabelledExample]) -> Any:
        """Return this judge with its accuracy on the responses of labelled examples.

        Raises:
            ValueError: an example without a response, or whose label is not a class.
        """
        _check_responses(examples)
        if others := sorted({e.label for e in examples} - set(self.classes)):
            raise ValueError(
                f"labels must be among classes={list(self.classes)}, got {others}: leave such "
                "examples out"
            )
        found = self([e.prompt for e in examples], [e.response for e in examples])
        return replace(
            self, held_out=held_out_scores(found, [e.label for e in examples], self.classes)
        )


@dataclass(frozen=True, eq=False)
class RuleJudge(_Measured):
    """A judge by a user's function."""

    rule: Callable[[str, str], str | None]
    """From prompt and text to the class, or None."""

    classes: Sequence[str]
    """The classes the rule may return."""

    held_out: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """See `Judge`; set by `measured`."""

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the rule's class of each text.

        Raises:
            ValueError: not one prompt for each text, or a class that is not among the classes.
        """
        found = [self.rule(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        if others := {name for name in found if name is not None} - set(self.classes):
            raise ValueError(
                f"the rule must return None or one of {list(self.classes)}, got {sorted(others)}"
            )
        return found


@dataclass(frozen=True, eq=False)
class LanguageModelJudge(_Measured):
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
    """The question, with {text}, and if wanted {prompt} and {classes}."""

    held_out: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    """See `Judge`; set by `measured`."""

    def __post_init__(self) -> None:
        if len({name.casefold() for name in self.classes}) < len(self.classes):
            raise ValueError(
                f"classes must differ in more than case, got {list(self.classes)}: no answer tells "
                "them apart"
            )
        names = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        if "text" not in names or not names <= {"prompt", "text", "classes"}:
            raise ValueError(
                "the template must have {text}, and may have {prompt} and {classes}, got "
                f"{sorted(names)}: write other braces twice"
            )

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the class that the model names for each text; None if it names none or several.

        Texts to which `ask` raised `NoAnswerError` have no class either, with a warning.

        Raises:
            ValueError: not one prompt for each text.
            NoAnswerError: there is no answer to any text.
        """
        names = ", ".join(self.classes)
        found: list[str | None] = []
        errors: list[NoAnswerError] = []
        for prompt, text in zip(prompts, texts, strict=True):
            question = self.template.format(prompt=prompt, text=text, classes=names)
            try:
                found.append(self.parsed(self.ask(question)))
            except NoAnswerError as error:
                errors.append(error)
                found.append(None)
        if errors and len(errors) == len(found):
            raise errors[0]
        if errors:
            warnings.warn(
                f"{len(errors)} of {len(found)} texts have no class: {errors[0]}", stacklevel=2
            )
        return found

    def parsed(self, answer: str) -> str | None:
        """Return the one class that an answer names, or None."""
        names = {" ".join(name.split()).casefold(): name for name in self.classes}
        longest_first = sorted(names, key=len, reverse=True)
        any_name = "|".join(map(re.escape, longest_first))
        # A hyphen belongs to the word: "non-toxic" does not name toxic.
        said = " ".join(answer.split()).casefold()
        found = set(re.findall(rf"(?<![\w-])(?:{any_name})(?![\w-])", said))
        return names[found.pop()] if len(found) == 1 else None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierJudge(_Measured):
    """A linear classifier of word and character n-grams; made by `fit`.

    Source: scikit-learn's logistic regression over TF-IDF; the features are our choice.
    """

    pipeline: Pipeline = field(repr=False)
    """Features and classifier."""

    classes: tuple[str, ...]
    """Those of the examples."""

    held_out: Mapping[str, float]
    """See `Judge`; of a classifier that was trained without the held-out texts."""

    @classmethod
    def fit(cls, examples: Sequence[LabelledExample], *, seed: int = 0) -> "ClassifierJudge":
        """Return a judge trained on the responses of labelled examples.

        A quarter of each class is held out and scored; then the judge is trained on all. A response
        that occurs twice in a class counts once, so that none is on both sides.

        Args:
            examples: four or more different responses of each class.
            seed: of which texts are held out.

        Raises:
            ValueError: an example without a response, fewer than two classes, or a class with fewer
                than four different responses.
        """
        _check_responses(examples)
        different = list({(e.response.strip(), e.label): e for e in examples}.values())
        classes = tuple(check_classes((e.label for e in different), at_least=4))
        train: list[LabelledExample] = []
        test: list[LabelledExample] = []
        for name in classes:
            own = [example for example in different if example.label == name]
            parts = train_test_split(own, test_size=round(len(own) * 0.25), random_state=seed)
            train += parts[0]
            test += parts[1]
        judge = cls(pipeline=_fitted(train), classes=classes, held_out={}).measured(test)
        return replace(judge, pipeline=_fitted(different))

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the class of each text; None if it has no n-gram of the training texts."""
        del prompts
        if not texts:
            return []
        features = self.pipeline[:-1].transform(list(texts))
        guesses = self.pipeline[-1].predict(features)
        known = np.asarray((features != 0).sum(axis=1)).ravel() > 0
        return [
            str(guess) if any_ and guess in self.classes else None
            for guess, any_ in zip(guesses, known, strict=True)
        ]


def _fitted(examples: Sequence[LabelledExample]) -> Pipeline:
    # Punctuation counts as words, so that no text is without any.
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]+", sublinear_tf=True)
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    pipeline = make_pipeline(
        FeatureUnion([("words", words), ("pieces", pieces)]),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000),
    )
    texts = [example.response.strip() for example in examples]
    return pipeline.fit(texts, [example.label for example in examples])


def _check_responses(examples: Sequence[LabelledExample]) -> None:
    missing = [i for i, example in enumerate(examples) if not example.response.strip()]
    if missing or not examples:
        raise ValueError(
            f"examples for a judge must be one or more with a response each, got {len(examples)}, "
            f"of which {len(missing)} without a response (the first: {missing[:3]})"
        )
