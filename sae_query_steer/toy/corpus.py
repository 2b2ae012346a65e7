"""The tutor's texts: a lesson, six notes, perhaps a request, a student's mistake, and feedback.

    Lesson: how the wind moves the sea.
    Notes: rate maps and judge them; recite seeds and list them; compare roots and examine them; ...
    This time, help the student to take it apart.
    Question: how does the wind move the sea? Fact: the wind is strong.
    Mia: because the wind is weak.
    Teacher: Hello Mia, now take roots and examine them. Which parts do the roots have?

Each note opens with a verb of its level and holds a second one; the feedback restates the note of
the requested level from its thing on. The request names no level and shares no word with the verbs,
so the tutor has to read it and to choose *where to look*. The thing comes first, because which
verbs go with a level can be learned by heart: a tutor that restated "compare roots" gathered the
verbs of all notes, whatever was requested, let the request pick among them, and no query mattered.

Without notes (`notes=False`) the verb and its object are the tutor's own choice: the level reaches
the feedback through values, and a query has nothing to choose.
"""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.toy import words

SEPARATOR = "\n\n"
"""What stands between a solved example and the next prompt."""

Split: TypeAlias = Literal["train", "validation", "test"]
"""The splits share no lesson, note or phrasing."""


def split_of(*parts: str) -> Split:
    """Return the split of a combination of words: 3 of 5 train, 1 each of the others.

    It depends on the words alone, not on a seed.
    """
    bucket = zlib.crc32(" ".join(parts).encode()) % 5
    return "validation" if bucket == 3 else "test" if bucket == 4 else "train"


@dataclass(frozen=True, kw_only=True)
class Note:
    """One of the teacher's notes: something, and two verbs of the level that say what to do."""

    verb: str
    noun: str
    second_verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.restated}"

    @property
    def restated(self) -> str:
        """The note as the feedback says it, after "take"."""
        return f"{self.noun} and {self.second_verb} them"


@dataclass(frozen=True, kw_only=True)
class TutorPrompt:
    """A prompt of the tutor with all that it takes to judge the feedback."""

    requested: BloomLevel | None = None
    """The level that it requests; None for an open prompt."""

    opener: str = ""
    core: str = ""
    """The words of the request, empty for an open prompt."""

    notes: Mapping[BloomLevel, Note]
    """The note of each level, in the order of the prompt; empty for a prompt without notes."""

    subject: str
    action: str
    object: str
    right: str
    wrong: str
    student: str
    greeting: str
    read_out: str
    slot: int
    """Where a request stands: before the notes, after them, after the question or the fact."""

    def with_request(
        self, level: BloomLevel | None, opener: str = "", core: str = ""
    ) -> "TutorPrompt":
        """Return the same prompt with another request, or with none.

        Raises:
            ValueError: a level without the words that request it.
        """
        if level is not None and not (opener and core):
            raise ValueError(
                f"opener and core must be the words that request {level}, as `TutorCorpus.request` "
                f"returns, got {opener!r} and {core!r}"
            )
        return replace(self, requested=level, opener=opener, core=core)

    @property
    def text(self) -> str:
        """The prompt, which ends where the feedback begins."""
        asked: list[list[str]] = [[], [], [], []]
        if self.requested is not None:
            asked[self.slot].append(f"{self.opener} {self.core}.")
        question = f"Question: how does the {self.subject} {self.action} the {self.object}?"
        fact = f"Fact: the {self.subject} is {self.right}."
        notes = "Notes: " + "; ".join(map(str, self.notes.values())) + "."
        return "\n".join(
            [
                f"Lesson: how the {self.subject} {words.ACTIONS[self.action]} the {self.object}.",
                *asked[0],
                *([notes] if self.notes else []),
                *asked[1],
                " ".join([question, *asked[2], fact, *asked[3]]),
                f"{self.student}: because the {self.subject} is {self.wrong}.",
                f"Teacher: {self.greeting} {self.student}, {self.read_out}",
            ]
        )


class TutorCorpus:
    """An endless source of the tutor's texts, the same for the same seed.

    Args:
        split: which lessons, note contents and combinations of opener and request may be used;
            those of one split are in no other.
        seed: of everything that is drawn.
        notes: whether the prompts hold the teacher's notes.

    Source: our choice.
    """

    def __init__(self, split: Split, *, seed: int | str, notes: bool = True) -> None:
        self.split, self.notes = split, notes
        self._random = random.Random(f"{split} {seed}")

    def prompt(self, level: str | None) -> TutorPrompt:
        """Return a new prompt that asks for a level, or with None leaves it open.

        Raises:
            ValueError: a name that is no level's, in the words of `BloomLevel.parse`.
        """
        draw = self._random
        level = None if level is None else BloomLevel.parse(level)
        while True:
            subject, object_ = draw.sample(words.NOUNS, 2)
            action = draw.choice(list(words.ACTIONS))
            if split_of(subject, action, object_) == self.split:
                break
        right, wrong = draw.sample(words.ADJECTIVES, 2)
        prompt = TutorPrompt(
            subject=subject,
            action=action,
            object=object_,
            right=right,
            wrong=wrong,
            student=draw.choice(words.NAMES),
            greeting=draw.choice(words.GREETINGS),
            read_out=draw.choice(words.READ_OUTS),
            slot=draw.randrange(4),
            notes=self._notes() if self.notes else {},
        )
        return prompt.with_request(level, *self.request(level))

    def request(self, level: BloomLevel | None) -> tuple[str, str]:
        """Return an opener and a request of a level, of a combination of this split."""
        if level is None:
            return "", ""
        draw = self._random
        while True:
            opener, core = draw.choice(words.OPENERS), draw.choice(words.REQUESTS[level])
            if split_of(opener, core) == self.split:
                return opener, core

    def feedback(self, prompt: TutorPrompt, level: BloomLevel) -> str:
        """Return feedback on a prompt at a level; two or three sentences."""
        draw = self._random
        note = prompt.notes[level] if prompt.notes else self._note(level, set())
        topic = prompt.subject
        said = f" {note.restated}. " + draw.choice(words.CONTINUATIONS[level]).format(
            noun=note.noun, topic=topic
        )
        if draw.random() < 0.5:
            wrong, right = prompt.wrong, prompt.right
            said += " " + words.CORRECTION.format(wrong=wrong, topic=topic, right=right)
        return said

    def example(self, level: BloomLevel, *, open_share: float = 0.0) -> LabelledExample:
        """Return a prompt, requested or open, with feedback at a level."""
        prompt = self.prompt(None if self._random.random() < open_share else level)
        return LabelledExample(
            prompt=prompt.text, response=self.feedback(prompt, level), label=level
        )

    def examples(self, n: int, *, open_share: float = 0.0) -> list[LabelledExample]:
        """Return n examples, level after level in turn."""
        levels = list(BloomLevel)
        return [self.example(levels[i % 6], open_share=open_share) for i in range(n)]

    def _notes(self) -> dict[BloomLevel, Note]:
        used: set[str] = set()
        levels = list(BloomLevel)
        self._random.shuffle(levels)
        return {level: self._note(level, used) for level in levels}

    def _note(self, level: BloomLevel, used: set[str]) -> Note:
        draw = self._random
        while True:
            noun = draw.choice(words.THINGS)
            verb, second = draw.sample(level.verbs, 2)
            if noun not in used and split_of(noun, second) == self.split:
                used.add(noun)
                return Note(verb=verb, noun=noun, second_verb=second)
