"""Short training texts: some notes, a request, and the note restated."""

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.toy.corpus import TutorCorpus
from sae_query_steer.toy.words import GREETINGS, NAMES, READ_OUTS


class DrillCorpus(TutorCorpus):
    """The tutor's texts, and drills beside them."""

    def drill(
        self, level: BloomLevel, *, open_share: float = 0.0, cued: bool = False
    ) -> LabelledExample:
        """Return the heart of an example, for training: some notes, a request, the note restated.

        It is half as long, so that a training step holds more choices of a note. A cued one has no
        request, and ends in a verb of the level, every other time the note's own.
        """
        draw = self._random
        notes = self._notes() if self.notes else {}
        others = [other for other in notes if other != level]
        kept = {level, *draw.sample(others, draw.randrange(1, 6))} if notes else set()
        said = "; ".join(str(note) for other, note in notes.items() if other in kept)
        is_open = cued or draw.random() < open_share
        opener, core = self.request(None if is_open else level)
        lines = [f"Notes: {said}."] if notes else []
        if core:
            lines.insert(draw.randrange(len(lines) + 1), f"{opener} {core}.")
        note = notes[level] if notes else self._note(level, set())
        end = draw.choice(READ_OUTS)
        if cued:
            end = note.verb if draw.random() < 0.5 else draw.choice(level.verbs)
        lines.append(f"Teacher: {draw.choice(GREETINGS)} {draw.choice(NAMES)}, {end}")
        return LabelledExample(
            prompt="\n".join(lines),
            response=f" {note.restated}.",
            label=level,
        )
