"""A judge that is trained on labelled responses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline

from sae_query_steer.compare.judges import check_pairs, check_responses, judged_scores
from sae_query_steer.data.examples import LabelledExample, ordered_classes

FEWEST = 4
"""Fewest different responses of a class that it learns from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierJudge:
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
    def fit(
        cls, examples: Sequence[LabelledExample], *, held_out_share: float = 0.25, seed: int = 0
    ) -> "ClassifierJudge":
        """Return a judge trained on the responses of labelled examples.

        A share of each class is held out and scored; then the judge is trained on all. A response
        that occurs twice in a class counts once, so that none is on both sides.

        Args:
            examples: four or more different responses of each class.
            held_out_share: share of each class that is held out, at least one text.
            seed: of which texts.

        Raises:
            ValueError: an example without a response, fewer than two classes, a class with fewer
                than four different responses, or a share that is not between 0 and 1.
        """
        if not 0 < held_out_share < 1:
            raise ValueError(
                f"held_out_share={held_out_share} is not allowed: give a share between 0 and 1"
            )
        check_responses(examples)
        pairs = list(dict.fromkeys((e.response.strip(), e.label) for e in examples))
        classes = ordered_classes(label for _, label in pairs)
        if len(classes) < 2:
            raise ValueError(
                f"the labels name {len(classes)} class(es), {list(classes)}: a judge needs at "
                "least two to tell apart; add examples of another class"
            )
        train: list[tuple[str, str]] = []
        test: list[tuple[str, str]] = []
        for name in classes:
            own = [pair for pair in pairs if pair[1] == name]
            if len(own) < FEWEST:
                raise ValueError(
                    f"class {name!r} has {len(own)} different response(s), fewer than {FEWEST}: "
                    "add examples of it or leave the class out"
                )
            n_test = min(max(round(len(own) * held_out_share), 1), len(own) - 1)
            kept, out = train_test_split(range(len(own)), test_size=n_test, random_state=seed)
            train += [own[i] for i in kept]
            test += [own[i] for i in out]
        judge = cls(pipeline=_fitted(train), classes=classes, held_out={})
        texts, labels = [text for text, _ in test], [label for _, label in test]
        scores = judged_scores(judge(texts, texts), labels, classes)
        return replace(judge, pipeline=_fitted(pairs), held_out=scores)

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return the class of each text; None where it has no n-gram of the training texts.

        Raises:
            ValueError: not one prompt for each text.
        """
        check_pairs(prompts, texts)
        if not texts:
            return []
        features = self.pipeline[:-1].transform(list(texts))
        guesses = self.pipeline[-1].predict(features)
        known = np.asarray((features != 0).sum(axis=1)).ravel() > 0
        return [
            str(guess) if any_ and guess in self.classes else None
            for guess, any_ in zip(guesses, known, strict=True)
        ]


def _fitted(pairs: Sequence[tuple[str, str]]) -> Pipeline:
    # Punctuation counts as words, so that no text is without any.
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]+", sublinear_tf=True)
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    pipeline = make_pipeline(
        FeatureUnion([("words", words), ("pieces", pieces)]),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000),
    )
    return pipeline.fit([text for text, _ in pairs], [label for _, label in pairs])
