"""`BloomLevel`: the six cognitive levels of Bloom's revised taxonomy, in order."""

import enum


class BloomLevel(enum.StrEnum):
    """A level of the revised taxonomy; the class iterates from the lowest to the highest level.

    A level is a str, its lower-case verb, and so a valid class label. Comparison is alphabetical,
    as for any str: compare `order` for the order of the levels.

    Source: the six levels are those of Anderson & Krathwohl 2001, a revision of Bloom 1956. The
    choice of verbs is ours.
    """

    verbs: tuple[str, ...]
    """Typical verbs of tasks at this level; each verb belongs to one level."""

    _names: tuple[str, ...]

    def __new__(cls, value: str, verbs: str, names: str) -> "BloomLevel":
        """Make a member; `names` are those that `parse` takes beside the value."""
        level = str.__new__(cls, value)
        level._value_, level._names = value, (value, *names.split())
        level.verbs = tuple(verbs.split())
        return level

    REMEMBER = (
        "remember",
        "define identify label list match name recall recite repeat",
        "remembering remembrance knowledge",
    )
    UNDERSTAND = (
        "understand",
        "classify describe discuss explain illustrate interpret paraphrase summarize translate",
        "understanding comprehension",
    )
    APPLY = (
        "apply",
        "calculate demonstrate execute implement operate perform sketch solve use",
        "applying application",
    )
    ANALYZE = (
        "analyze",
        "attribute categorize compare contrast deconstruct differentiate distinguish examine "
        "organize",
        "analyse analyzing analysing analysis",
    )
    EVALUATE = (
        "evaluate",
        "appraise argue assess critique defend judge justify rate recommend",
        "evaluating evaluation",
    )
    CREATE = (
        "create",
        "compose construct design develop devise formulate generate invent plan produce",
        "creating creation synthesis",
    )

    @property
    def order(self) -> int:
        """Rank of the level: 1 for remember to 6 for create."""
        return list(BloomLevel).index(self) + 1

    @classmethod
    def parse(cls, text: str) -> "BloomLevel":
        """Return the level with this name; case and surrounding space are ignored.

        Args:
            text: a revised name as verb ("analyze"), gerund ("analyzing") or noun ("analysis"),
                in American or British spelling, or a name of 1956, where Knowledge becomes
                remember, Comprehension understand, and Synthesis create.

        Raises:
            ValueError: no level has this name.

        Source: Bloom 1956 for the old names; Anderson & Krathwohl 2001 for what became of them.
        """
        name = text.strip().casefold()
        for level in cls:
            if name in level._names:
                return level
        raise ValueError(
            f"no Bloom level {text!r}: the names are {', '.join(cls)}, their gerunds and nouns, "
            "and the names of 1956 (Knowledge, Comprehension, Application, Analysis, Synthesis, "
            "Evaluation)"
        )
