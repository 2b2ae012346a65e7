"""Judges of the tutor's feedback: a rule, and a classifier that saw none of the test's texts."""

import random
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.judges import check_pairs
from sae_query_steer.toy.tutor.corpus import TutorCorpus, TutorPrompt

NO_LEVEL = "none"
"""What the classifier says of text that is no feedback."""


def restated_level(feedback: str, prompt: TutorPrompt) -> BloomLevel | None:
    """Return the level of the note that the feedback's first sentence restates, word for word.

    None where it restates none, and always where the prompt holds no notes.
    """
    sentence = first_sentence(feedback)
    return next((level for level, note in prompt.notes.items() if note.restated == sentence), None)


def verb_level(feedback: str) -> BloomLevel | None:
    """Return the level of the verb in the feedback's first "... and VERB them", or None."""
    words = first_sentence(feedback).split()
    verb = words[-2] if len(words) > 2 and words[-1] == "them" else ""
    return next((level for level in BloomLevel if verb in level.verbs), None)


def first_sentence(feedback: str) -> str:
    """Return the text up to its first full stop."""
    return feedback.partition(".")[0].strip()


class LevelClassifier:
    """Tells the level of a feedback, or that it is none, from its pairs and triples of words.

    It is trained on the generator's output of the split "train": lessons, notes and seeds of the
    evaluation are others. Half of what it learns from is no feedback: shuffled words and verbs
    said over and over, so that a text that merely holds a level's words does not pass.

    Args:
        n_per_level: feedbacks of each level to learn from.
        seed: of the texts.

    Source: scikit-learn's logistic regression; the features are our choice.
    """

    def __init__(self, *, n_per_level: int = 400, seed: int = 7) -> None:
        texts, labels = _labelled(TutorCorpus("train", seed=seed), n_per_level)
        for kind in (shuffled, verb_repeating):
            broken = kind(texts[: n_per_level * 6], labels[: n_per_level * 6], seed)
            texts, labels = texts + broken, labels + [NO_LEVEL] * len(broken)
        self._pipeline: Pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(2, 3), token_pattern=r"[A-Za-z]+|[^\sA-Za-z]"),
            LogisticRegression(C=10.0, max_iter=500),
        )
        self._pipeline.fit(texts, labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """The levels."""
        return tuple(BloomLevel)

    @property
    def held_out(self) -> dict[str, float]:
        """See `held_out_accuracy`."""
        return self.held_out_accuracy()

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[str | None]:
        """Return what `levels` does, as a `Judge`: the prompts are not looked at.

        Raises:
            ValueError: not one prompt for each text.
        """
        check_pairs(prompts, texts)
        return [None if level is None else str(level) for level in self.levels(texts)]

    def levels(self, feedbacks: Sequence[str]) -> list[BloomLevel | None]:
        """Return the level of each feedback, or None where it is no feedback."""
        if not feedbacks:
            return []
        guesses = self._pipeline.predict([text or " " for text in feedbacks])
        return [None if guess == NO_LEVEL else BloomLevel(str(guess)) for guess in guesses]

    def held_out_accuracy(self, *, n_per_level: int = 100, seed: int = 0) -> dict[str, float]:
        """Return the share that is judged rightly on texts of the split "validation".

        Returns:
            As "feedback" the share of feedbacks whose level is told, as "shuffled" and
            "verb_repeating" the share of such texts that are told to be no feedback.
        """
        texts, labels = _labelled(TutorCorpus("validation", seed=seed), n_per_level)
        right = [a == b for a, b in zip(self.levels(texts), labels, strict=True)]
        found = {"feedback": sum(right) / len(right)}
        for name, kind in (("shuffled", shuffled), ("verb_repeating", verb_repeating)):
            judged = self.levels(kind(texts, labels, seed))
            found[name] = judged.count(None) / len(judged)
        return found


def _labelled(corpus: TutorCorpus, n_per_level: int) -> tuple[list[str], list[str]]:
    examples = corpus.examples(6 * n_per_level, open_share=1.0)
    return [e.response.strip() for e in examples], [e.label for e in examples]


def shuffled(texts: Sequence[str], labels: Sequence[str], seed: int) -> list[str]:
    """Return the texts with their words in random order."""
    del labels
    draw = random.Random(seed)
    return [" ".join(draw.sample(words, len(words))) for words in map(str.split, texts)]


def verb_repeating(texts: Sequence[str], labels: Sequence[str], seed: int) -> list[str]:
    """Return texts as long that say verbs of the level over and over."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(BloomLevel(label).verbs) for _ in text.split()) + "."
        for text, label in zip(texts, labels, strict=True)
    ]
