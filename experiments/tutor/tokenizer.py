"""The tutor's tokenizer: one token for each word, punctuation mark and line break."""

from transformers import PreTrainedTokenizerFast

from experiments.word_tokens import word_tokenizer
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.toy import words


def tutor_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; a word with the space before it is one token, so decoding is exact."""
    return word_tokenizer(_texts())


def _texts() -> list[str]:
    """Return texts that hold every word of the corpus in every place where it may stand."""
    inside = [
        *words.NOUNS,
        *words.THINGS,
        *words.ADJECTIVES,
        *words.READ_OUTS,
        *words.GREETINGS,
        *words.NAMES,
    ]
    inside += [form for forms in words.ACTIONS.items() for form in forms]
    inside += [verb for level in BloomLevel for verb in level.verbs]
    inside += [core for level in BloomLevel for core in words.REQUESTS[level]]
    filled = [text for level in BloomLevel for text in words.CONTINUATIONS[level]]
    filled.append(words.CORRECTION)
    inside += [text.format(**dict.fromkeys(_SLOTS, "river")) for text in filled]
    # A request stands at the start of a line or within one; a student's name opens one.
    openers = [*words.OPENERS, *words.NAMES]
    frame = (
        "Lesson: how the river moves the sea.\n"
        "Notes: list maps and name them; name laws and list them.\n"
        "Question: how does the river move the sea? Fact: the river is old.\n"
        "Mia: because the river is old.\n"
        "Teacher: Hello Mia, now take maps and name them.\n\n"
    )
    return [frame, *(f" {text}" for text in [*inside, *openers]), *openers]


_SLOTS = ("noun", "topic", "wrong", "right")
