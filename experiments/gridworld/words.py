"""The words of the gridworld's texts.

No request shares a word with what is observed along a route, or names an aim, so that following a
request takes reading it.
"""

from enum import StrEnum


class Aim(StrEnum):
    """What a traveller may want of a route."""

    SAFE = "safe"
    SHORT = "short"
    LONG = "long"


COLOURS = (
    *("red", "blue", "green", "white", "black", "brown", "pink", "grey", "gold", "silver"),
    *("orange", "purple", "amber", "ivory", "violet", "scarlet"),
)
"""What routes are called; a colour says nothing of the route."""

GREETINGS = ("Hello", "Hi", "Dear", "Thanks")

NAMES = ("Mia", "Leo", "Ana", "Tom", "Eva", "Max", "Ida", "Ben", "Zoe", "Sam", "Lea", "Jon")

READ_OUTS = ("now go along", "please go along", "just go along", "simply go along")
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
        "bring everyone home in one piece",
        "bump into nothing",
        "get hurt nowhere",
        "be very careful",
        "look out for trouble",
    ),
    Aim.SHORT: (
        "be quick",
        "lose no time",
        "be in haste",
        "arrive very early",
        "go straight there",
        "get it over with soon",
        "make it fast",
        "be there before noon",
    ),
    Aim.LONG: (
        "stroll for hours",
        "see as much as there is",
        "make the trip last",
        "spend the whole day outdoors",
        "get plenty of exercise",
        "wander around at leisure",
        "enjoy the scenic way",
        "come back tired",
    ),
}
