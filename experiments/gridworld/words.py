"""The words of the gridworld's texts.

No request shares a word with what is observed along a route, or names an aim, so that following a
request takes reading it.
"""

from enum import StrEnum


class Aim(StrEnum):
    """What a traveller may want of a route."""

    SAFE = "safe"
    SHORT = "short"


COLOURS = (
    *("red", "blue", "green", "white", "black", "brown", "pink", "grey", "gold", "silver"),
    *("orange", "purple", "amber", "ivory", "violet", "scarlet"),
)
"""What routes are called; a colour says nothing of the route."""

GREETINGS = ("Hello", "Hi", "Dear", "Thanks")

NAMES = ("Mia", "Leo", "Ana", "Tom", "Eva", "Max", "Ida", "Ben", "Zoe", "Sam", "Lea", "Jon")

READ_OUTS = ("now take", "please take", "just take", "simply take")
"""The prompt's last words: they say nothing of the aim."""

OPENERS = (
    "This time, I want you to",
    "On this trip, try to",
    "Tell the traveller to",
    "The plan for today is to",
    "It would be good to",
    "Help the traveller to",
    "My advice is to",
    "Everyone has to",
)

REQUESTS = {
    Aim.SAFE: (
        "keep clear of danger",
        "stay out of harm",
        "take no risk at all",
        "come home in one piece",
        "mind every trap",
        "get hurt by nothing",
        "be very careful",
        "look out for trouble",
    ),
    Aim.SHORT: (
        "be quick",
        "lose no time",
        "hurry a bit",
        "arrive very early",
        "go straight there",
        "get it over with soon",
        "make it fast",
        "be there before noon",
    ),
}
