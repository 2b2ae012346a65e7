"""Rules that read the level of the tutor's feedback, and broken feedback to test judges."""

import random
from collections.abc import Sequence

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.toy.corpus import TutorPrompt


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
