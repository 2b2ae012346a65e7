"""The words that the tutor's texts are made of, from words.json.

Requests, notes and continuations of the six levels share no telling word with the levels' names,
and requests none with the verbs that open the notes, so that following a request takes reading it.
"""

import json
from importlib.resources import files

_WORDS = json.loads(files("sae_query_steer.toy").joinpath("words.json").read_text("utf-8"))

NAMES: list[str] = _WORDS["names"]
NOUNS: list[str] = _WORDS["nouns"]
THINGS: list[str] = _WORDS["things"]
"""What the notes are about."""

ADJECTIVES: list[str] = _WORDS["adjectives"]
ACTIONS: dict[str, str] = _WORDS["actions"]
"""What one thing of a lesson does to the other, and how it is said of one."""

GREETINGS: list[str] = _WORDS["greetings"]
READ_OUTS: list[str] = _WORDS["read_outs"]
"""The prompt's last words: they say nothing of the level."""

OPENERS: list[str] = _WORDS["openers"]
REQUESTS: dict[str, list[str]] = _WORDS["requests"]
"""What may follow an opener, by level."""

CONTINUATIONS: dict[str, list[str]] = _WORDS["continuations"]
"""What may follow the restated note, by level."""

CORRECTION: str = _WORDS["correction"]
