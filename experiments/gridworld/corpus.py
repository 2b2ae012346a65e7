"""The gridworld's texts: a grid, three routes with what was seen along them, perhaps a request.

    Grid: 6 by 6, from b3 to d3, walls at c2, e5.
    Routes: 4 steps and 0 by a wall along red b4 c4 d4 d3; 2 steps and 1 by a wall along blue c3 d3;
    6 steps and 3 by a wall along pink b2 b1 c1 d1 d2 d3.
    This time, I want you to keep clear of danger.
    Guide: Hello Mia, now go along red b4 c4 d4 d3.

(the routes stand on one line, in any order). No route is called by an aim: the request tells the
aim in words of its own, and the guide has to choose *where to look*. The response opens with the
route's colour, which is drawn at random, so that the choice falls at one token; and no other route
passes a cell of it.

In the spirit of arXiv 2605.23040, which steers the planning on described grids towards "short",
"safe" (far from walls) and "long"; we have not read its full text, and the form of the texts is our
choice.
"""

import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace

from experiments.gridworld.grid import (
    Cell,
    Cells,
    Grid,
    draw_grid,
    simulate,
)
from experiments.gridworld.words import (
    COLOURS,
    GREETINGS,
    NAMES,
    OPENERS,
    READ_OUTS,
    REQUESTS,
    Aim,
)
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.toy.corpus import Split, split_of

SIZE = 6
"""Columns and rows of the corpus's grids."""

N_SLOTS = 3
"""Places where a request may stand: before the grid, before the routes, after them."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One of the routes of a prompt."""

    colour: str
    """What it is called."""

    cells: Cells

    def restated(self) -> str:
        """Return the route as the response says it."""
        return " ".join([self.colour, *map(cell_name, self.cells)])

    def observed(self, grid: Grid) -> str:
        """Return what was seen along the route."""
        walk = simulate(grid, self.cells)
        return f"{counted(walk.n_steps, 'step')} and {walk.n_by_wall} by a wall along"


@dataclass(frozen=True, kw_only=True)
class GridPrompt:
    """A prompt of the gridworld with all that it takes to judge the response."""

    grid: Grid
    routes: Mapping[Aim, Route]
    """The route of each aim, in the order of the prompt."""

    requested: Aim | None
    """The aim that it asks for; None where it is left open."""

    request: str
    """The sentence that asks for it; empty where it is left open."""

    slot: int
    """Where a request stands."""

    address: str
    """What the guide says before the route."""

    described: bool = True
    """Whether the grid is described; without, it is a drill."""

    @property
    def text(self) -> str:
        """The prompt, which ends where the response begins."""
        shown = "; ".join(
            f"{route.observed(self.grid)} {route.restated()}" for route in self.routes.values()
        )
        lines = [describe(self.grid)] if self.described else [""]
        lines.append(f"Routes: {shown}.")
        if self.request:
            lines.insert(self.slot, self.request)
        return "\n".join([*filter(None, lines), f"Guide: {self.address}"])

    def response(self, aim: Aim) -> str:
        """Return the response that takes the route of an aim."""
        return f" {self.routes[aim].restated()}."

    def with_request(self, aim: Aim | None, request: str = "") -> "GridPrompt":
        """Return the same prompt with another request, or with none.

        Raises:
            ValueError: an aim without the words that ask for it, or words without an aim.
        """
        if (aim is None) != (not request):
            raise ValueError(
                f"aim {aim} and request {request!r} do not go together: give both, as "
                "`GridCorpus.request` does, or neither"
            )
        return replace(self, requested=aim, request=request)


class GridCorpus:
    """An endless source of the gridworld's texts, the same for the same seed.

    Args:
        split: which grids and combinations of opener and request may be used; those of one split
            are in no other.
        seed: of everything that is drawn.

    Source: our choice.
    """

    def __init__(self, split: Split, *, seed: int | str) -> None:
        self.split = split
        self._random = random.Random(f"gridworld {split} {seed}")

    def prompt(self, aim: str | None) -> GridPrompt:
        """Return a new prompt that asks for an aim, or with None leaves it open.

        Raises:
            ValueError: a name that is no aim's.
        """
        draw = self._random
        if aim is not None and aim not in list(Aim):
            raise ValueError(f"aim={aim!r} is not allowed: give one of {', '.join(Aim)}, or None")
        aim = None if aim is None else Aim(aim)
        grid, cells = draw_grid(draw, size=SIZE)
        while split_of(describe(grid)) != self.split:
            grid, cells = draw_grid(draw, size=SIZE)
        aims = draw.sample(list(Aim), len(Aim))
        colours = draw.sample(COLOURS, len(Aim))
        return GridPrompt(
            grid=grid,
            routes={
                aim: Route(colour=colour, cells=cells[aim])
                for aim, colour in zip(aims, colours, strict=True)
            },
            requested=aim,
            request="" if aim is None else self.request(aim),
            slot=draw.randrange(N_SLOTS),
            address=f"{draw.choice(GREETINGS)} {draw.choice(NAMES)}, {draw.choice(READ_OUTS)}",
        )

    def request(self, aim: Aim) -> str:
        """Return a sentence that asks for an aim, a combination of this split."""
        while True:
            opener, core = self._random.choice(OPENERS), self._random.choice(REQUESTS[aim])
            if split_of(opener, core) == self.split:
                return f"{opener} {core}."

    def example(self, aim: str, *, open_share: float = 0.0) -> LabelledExample:
        """Return a prompt, requested or open, with the route of an aim."""
        prompt = self.prompt(None if self._random.random() < open_share else aim)
        return LabelledExample(prompt=prompt.text, response=prompt.response(Aim(aim)), label=aim)

    def examples(self, n: int, *, open_share: float = 0.0) -> list[LabelledExample]:
        """Return n examples, aim after aim in turn."""
        aims = list(Aim)
        return [self.example(aims[i % len(aims)], open_share=open_share) for i in range(n)]

    def drill(self, aim: Aim, *, cued: bool = False) -> LabelledExample:
        """Return the heart of an example, for training: routes, a request, and the route taken.

        A cued one has no request, and ends in what was seen along the route.
        """
        prompt = self.prompt(None if cued else aim)
        text = replace(prompt, described=False).text
        if cued:
            text += f" {prompt.routes[aim].observed(prompt.grid)}"
        return LabelledExample(prompt=text, response=prompt.response(aim), label=aim)


def describe(grid: Grid) -> str:
    """Return a line that tells all of a grid."""
    walls = ", ".join(map(cell_name, sorted(grid.walls)))
    return (
        f"Grid: {grid.size} by {grid.size}, from {cell_name(grid.start)} to "
        f"{cell_name(grid.goal)}, walls at {walls}."
    )


def cell_name(cell: Cell) -> str:
    """Return the name of a cell: a letter for its column and a number, from 1, for its row."""
    return f"{string.ascii_lowercase[cell[0]]}{cell[1] + 1}"


def counted(n: int, noun: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def cells_in(text: str) -> list[Cell]:
    """Return the cells that a text names, in their order."""
    return [
        (string.ascii_lowercase.index(name[0]), int(name[1:]) - 1)
        for name in re.findall(r"\b[a-z][0-9]+\b", text)
    ]
