"""Which cases a scope must be tried on to know that it can never hold.

A scope such as "the prompt" or "positions 3 to 5" is constant between a few numbers, so a handful
of positions and prompt lengths stand for all that there are.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """The numbers between which a scope does not change."""

    absolute: frozenset[int] = frozenset()
    """Positions in the row at which the scope may begin or end."""

    from_prompt_end: frozenset[int] = frozenset()
    """The same, counted from the prompt's end: 0 is the first token after it."""

    def __or__(self, other: "Cuts") -> "Cuts":
        return Cuts(
            absolute=self.absolute | other.absolute,
            from_prompt_end=self.from_prompt_end | other.from_prompt_end,
        )


def all_cases(cuts: Cuts) -> list[tuple[int, int]]:
    """Return a pair (position, prompt length) for every way in which a token can lie to the cuts.

    Between two neighbouring cuts all positions are alike, so the row falls into stretches, and so
    does the way from the prompt's end. Every pair of stretches in which some token of some row
    with a prompt of at least one token can lie is represented by one such token.

    Args:
        cuts: those of all parts of a scope.

    Returns:
        Pairs of a position, 0 or more, and a prompt length, 1 or more.

    Source: our choice.
    """
    starts = sorted({0} | {cut for cut in cuts.absolute if cut > 0})
    ends: list[int | None] = [*starts[1:], None]
    offsets = sorted(cuts.from_prompt_end)
    before_all = offsets[0] - 1 if offsets else -1
    cases = []
    for start, end in zip(starts, ends, strict=True):
        cases.append((start, start - min(before_all, start - 1)))
        for offset in offsets:
            position = max(start, offset + 1)
            if end is None or position < end:
                cases.append((position, position - offset))
    return cases
