"""Classes of the stories of a small model: rules that tell them, and prompts that lead to them.

Three kinds of candidates:

- open: the model's own stories, cut at the end of a sentence; a rule reads the sentence after it
- two names: which of two characters of the story comes next, cut where the model chose
- paired: made prompts in twos that differ in what decides, the class is theirs by construction
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sae_query_steer import LabelledExample

Rule = Callable[[str, str], str | None]
"""From prompt and text to the class of the text, or None."""

PRONOUNS = frozenset("he she they it his her their its him them we i you my".split())
TROUBLE = frozenset(
    "but not no never sad scared afraid angry mad cry cried crying lost hurt broke broken fell "
    "worried upset sorry couldn't didn't can't wasn't don't wouldn't couldnt stuck alone".split()
)
_SENTENCE = re.compile(r'[^.!?]*[.!?]+"?')


def first_sentence(text: str) -> str:
    """Return the first sentence of a text; all of it where none ends."""
    text = text.strip()
    found = _SENTENCE.match(text)
    return found[0] if found else text


def cuts(story: str) -> list[int]:
    """Return where a story can be cut: ends of sentences outside quoted speech."""
    ends = [found.end() for found in _SENTENCE.finditer(story)]
    return [end for end in ends if story[:end].count('"') % 2 == 0]


def words_of(text: str) -> list[str]:
    """Return the words of a text, lower case."""
    return re.findall(r"[a-z']+", text.lower())


def names_in(text: str) -> set[str]:
    """Return words that are capitalised where no sentence begins: names, as a rule."""
    return {name for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text) if name != "I"}


def dialogue(prompt: str, text: str) -> str | None:
    """Return whether the next sentence has quoted speech."""
    del prompt
    sentence = first_sentence(text)
    return ("dialogue" if '"' in sentence else "narration") if sentence else None


def opener(prompt: str, text: str) -> str | None:
    """Return with what the next sentence opens: a name of the story, a pronoun, something else."""
    found = re.match(r"\W*([A-Za-z]+)", text)
    if found is None:
        return None
    if found[1] in names_in(prompt):
        return "name"
    return "pronoun" if found[1].lower() in PRONOUNS else "other"


def trouble(prompt: str, text: str) -> str | None:
    """Return whether the next sentence has a word of negation or trouble."""
    del prompt
    found = words_of(first_sentence(text))
    return ("trouble" if TROUBLE & set(found) else "none") if found else None


def gender(prompt: str, text: str) -> str | None:
    """Return whether the next sentence speaks of him or of her, by its first such pronoun."""
    del prompt
    kinds = {"he": "he", "him": "he", "his": "he", "she": "she", "her": "she", "hers": "she"}
    return next((kinds[w] for w in words_of(first_sentence(text)) if w in kinds), None)


def which_first(first: str, second: str) -> Rule:
    """Return the rule that says which of two words comes first in the text."""

    def rule(prompt: str, text: str) -> str | None:
        del prompt
        found = re.search(rf"\b({first}|{second})\b", text)
        return found[1] if found else None

    return rule


def completes(first: str, second: str, n_begun: int) -> Rule:
    """Return the rule that says which of two words, begun by n letters, the text completes."""

    def rule(prompt: str, text: str) -> str | None:
        del prompt
        for word in (first, second):
            if re.match(rf"{word[n_begun:]}(?![a-z])", text):
                return word
        return None

    return rule


def goes_on(first: str, second: str) -> Rule:
    """Return the rule that says which of two begun words the text goes on with, by one letter.

    For a steer of one token: the letters after it follow from that letter as much as from the name.
    """

    def rule(prompt: str, text: str) -> str | None:
        del prompt
        return next((word for word in (first, second) if text[:1] == word[1]), None)

    return rule


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A labelling of prompts by what follows them."""

    name: str
    kind: str
    """open, two names or paired."""

    classes: tuple[str, ...]
    rule: Rule
    max_new_tokens: int
    target: str | None = None
    """The class to steer to; None means that each prompt goes to another class than its own."""

    parts: dict[str, list[LabelledExample]] = field(default_factory=dict)
    """Examples by the name of the part: none of one part is in another."""

    partners: dict[str, str] = field(default_factory=dict)
    """Of a paired prompt the one that asks for the other class."""


OPEN: dict[str, tuple[tuple[str, ...], Rule]] = {
    "dialogue follows": (("dialogue", "narration"), dialogue),
    "opens with": (("name", "pronoun", "other"), opener),
    "trouble": (("trouble", "none"), trouble),
    "he or she": (("he", "she"), gender),
}
"""Classes and rule of the open candidates."""

GIRLS, BOYS = ("Lily", "Sue", "Mia", "Daisy", "Amy"), ("Tim", "Ben", "Max", "Tom", "Sam")
KINDS = ("dog", "cat", "bear", "bird", "bunny", "fish", "frog", "duck", "mouse", "fox", "pig")
PLACES = ("park", "store", "forest", "garden", "beach", "farm", "lake", "zoo", "big house")
WHEN = ("One day,", "The next day,", "In the morning,", "Then,", "After that,", "Every day,")
MIDDLES = (
    "They were friends.",
    "They lived near the {place}.",
    "They went to the {place}.",
    "They liked to play in the {place}.",
    "It was a sunny day.",
    "They wanted to go to the {place}.",
)


def two_characters(draw: random.Random, first: str, second: str) -> str:
    """Return a beginning with two animals of these names, and a sentence about them."""
    one, other = draw.sample(KINDS, 2)
    middle = draw.choice(MIDDLES).format(place=draw.choice(PLACES))
    start = f"Once upon a time, there was a {one} named {first} and a {other} named {second}."
    return f"{start} {middle}"


def girl_and_boy(draw: random.Random, first: str, second: str) -> str:
    """Return a beginning with two friends of these names."""
    middle = draw.choice(MIDDLES).format(place=draw.choice(PLACES))
    start = draw.choice(("Once upon a time, {} and {} were friends.", "{} and {} were friends."))
    return f"{start.format(first, second)} {middle}"


def begun_names(draw: random.Random) -> dict[str, str]:
    """Return two prompts, by class: the first letter of one of two names in the story."""
    both = draw.sample(["Max", "Sue"], 2)
    start = f"{two_characters(draw, *both)} {draw.choice(WHEN)}"
    return {name: f"{start} {name[0]}" for name in both}


def begun_things(draw: random.Random) -> dict[str, str]:
    """Return two prompts, by class: the first letter of one of two things in the story."""
    both = draw.sample(["hat", "kite"], 2)
    who, she = draw.choice([(g, "She") for g in GIRLS] + [(b, "He") for b in BOYS])
    verb = draw.choice(("loved", "liked", "lost", "saw", "wanted", "took", "found"))
    start = (
        f"Once upon a time, {who} went to the {draw.choice(PLACES)}. "
        f"{she} had a {both[0]} and a {both[1]}. {draw.choice(WHEN)} {who} {verb} the"
    )
    return {thing: f"{start} {thing[0]}" for thing in both}


def lost_things(draw: random.Random) -> dict[str, str]:
    """Return two prompts, by class: which of two things was lost, and is looked for."""
    both = draw.sample(["ball", "car"], 2)
    who, she = draw.choice([(g, "She") for g in GIRLS] + [(b, "He") for b in BOYS])
    verb = draw.choice(("lost", "broke", "forgot", "dropped"))
    where, mood = draw.choice(PLACES), draw.choice(("sad", "upset", "worried"))
    return {
        thing: f"{who} had a {both[0]} and a {both[1]}. {she} {verb} the {thing} at the {where}. "
        f"{she} was {mood}. {she} wanted to find the"
        for thing in both
    }


def boy_or_girl(draw: random.Random) -> dict[str, str]:
    """Return two prompts, by class: the same words after a girl's name and after a boy's."""
    place, when = draw.choice(PLACES), draw.choice(WHEN)
    like = draw.choice(("loved to play in", "lived near", "liked to run in", "often went to"))
    size = draw.choice(("little ", "small ", ""))
    people = {"she": ("girl", draw.choice(GIRLS)), "he": ("boy", draw.choice(BOYS))}
    return {
        label: f"Once upon a time, there was a {size}{kind} named {name}. "
        f"{name} {like} the {place}. {when}"
        for label, (kind, name) in people.items()
    }


PAIRED: dict[str, tuple[Callable[[random.Random], dict[str, str]], Rule]] = {
    "begun name": (begun_names, goes_on("Max", "Sue")),
    "begun thing": (begun_things, goes_on("hat", "kite")),
    "lost thing": (lost_things, which_first("ball", "car")),
    "he or she, name swapped": (boy_or_girl, gender),
}
"""Maker of two prompts, and rule, of the paired candidates."""


def paired(name: str, n: int, seed: int) -> list[dict[str, str]]:
    """Return n different pairs of prompts of a paired candidate."""
    draw = random.Random(f"{name} {seed}")
    found: dict[str, dict[str, str]] = {}
    while len(found) < n:
        pair = PAIRED[name][0](draw)
        found.setdefault("\n".join(sorted(pair.values())), pair)
    return list(found.values())


def before_names(
    stories: Sequence[str], first: str, second: str, seed: int
) -> list[tuple[str, str]]:
    """Return for each story a prompt and the name after it, cut before one that comes again."""
    draw, pairs = random.Random(seed), []
    for story in stories:
        found = list(re.finditer(rf" ({first}|{second})\b", story))
        again = [one for i, one in enumerate(found) if {o[1] for o in found[:i]} == {first, second}]
        if again:
            one = draw.choice(again)
            pairs.append((story[: one.start()], one[0]))
    return pairs


def cut(
    stories: Sequence[str], seed: int, *, skip: int = 2, longest: int = 260
) -> list[tuple[str, str]]:
    """Return for each story a prompt and the sentence after it, cut at random.

    Args:
        stories: their texts; of those without a place to cut there is no pair.
        seed: of the cuts.
        skip: sentences that every prompt has at least.
        longest: characters of a prompt, at most.
    """
    draw, pairs = random.Random(seed), []
    for story in stories:
        ends = cuts(story)
        inner = [end for end in ends[skip - 1 : -1] if end <= longest]
        if inner:
            end = draw.choice(inner)
            rest = story[end:]
            space = rest[: len(rest) - len(rest.lstrip())]
            pairs.append((story[:end], space + first_sentence(rest)))
    return pairs
