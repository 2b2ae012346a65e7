"""Small grids with walls: walks on them, the routes of the three aims, and their drawing."""

import random
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeAlias

from experiments.gridworld.words import Aim

Cell: TypeAlias = tuple[int, int]
"""Column and row, from 0; row 0 is the lowest."""

Cells: TypeAlias = tuple[Cell, ...]
"""A route: the cells that it enters, from the one after the start up to the goal."""

MIN_SIZE, MAX_SIZE = 3, 26
"""Smallest and largest width of a grid; a column is named by a letter."""

MAX_STEPS = 8
"""Most steps of a route of a drawn grid."""

DETOUR = 2
"""Steps that a long route has more than the safe one, at least."""


@cache
def neighbours(size: int) -> dict[Cell, list[Cell]]:
    """Return the cells that adjoin each cell of a grid by an edge."""
    cells = {(column, row): [] for column in range(size) for row in range(size)}
    for (column, row), found in cells.items():
        around = ((column, row + 1), (column, row - 1), (column - 1, row), (column + 1, row))
        found += [cell for cell in around if cell in cells]
    return cells


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A square grid with a start, a goal, and walls that can't be entered."""

    size: int
    """Columns, and rows."""

    start: Cell
    """Where every walk begins."""

    goal: Cell
    """Where it is to end; another cell than the start."""

    walls: frozenset[Cell]
    """Neither the start nor the goal is one."""

    def __post_init__(self) -> None:
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size={self.size} is not allowed: give {MIN_SIZE} to {MAX_SIZE}")
        for cell in (self.start, self.goal, *self.walls):
            if cell not in neighbours(self.size):
                raise ValueError(
                    f"cell {cell} is not on the grid: columns and rows go from 0 to {self.size - 1}"
                )
        if self.start == self.goal or {self.start, self.goal} & self.walls:
            raise ValueError(
                f"start {self.start} and goal {self.goal} have to be two cells, and no walls"
            )

    @cached_property
    def by_wall(self) -> frozenset[Cell]:
        """The cells that adjoin a wall by an edge."""
        return frozenset(cell for wall in self.walls for cell in neighbours(self.size)[wall])


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What came of an attempt to enter some cells one after the other."""

    reached: bool
    """Whether the walk ended at the goal."""

    n_by_wall: int
    """Steps that ended beside a wall."""

    n_steps: int
    """Attempts, those that led nowhere too."""

    revisits: bool
    """Whether some cell was visited twice; a step that leads nowhere visits its cell again."""


def simulate(grid: Grid, cells: Sequence[Cell]) -> Walk:
    """Walk from the start; the walk goes on when it passes the goal.

    A step into a wall, off the grid or to a cell that is not next to the last one leads nowhere.
    """
    visited = [grid.start]
    for cell in cells:
        entered = cell in neighbours(grid.size)[visited[-1]] and cell not in grid.walls
        visited.append(cell if entered else visited[-1])
    return Walk(
        reached=visited[-1] == grid.goal,
        n_by_wall=sum(cell in grid.by_wall for cell in visited[1:]),
        n_steps=len(cells),
        revisits=len(set(visited)) < len(visited),
    )


def routes(grid: Grid) -> dict[Aim, Cells] | None:
    """Return a route for each aim, or None if no three such routes are found.

    The safe route has no step beside a wall, the short one as few steps as can be, and the long one
    at least `DETOUR` more than the safe one. They share no cell but start and goal, so that any
    cell tells which one it is of; and the short and the long one have a step beside a wall, so that
    no route has two aims.
    """
    safe, fewest = _fewest_steps(grid, grid.by_wall), _fewest_steps(grid)
    if safe is None or fewest is None or len(fewest) == len(safe):
        return None
    inside = {*safe[:-1]}
    short = _fewest_steps(grid, inside)
    if short is None or len(short) > len(fewest):
        return None
    long = _fewest_steps(grid, inside | {*short[:-1]})
    if long is None or len(long) < len(safe) + DETOUR or not simulate(grid, long).n_by_wall:
        return None
    return {Aim.SAFE: safe, Aim.SHORT: short, Aim.LONG: long}


def _fewest_steps(grid: Grid, avoided: Set[Cell] = frozenset()) -> Cells | None:
    """Return a route of fewest steps that avoids some cells, or None without one.

    Source: breadth-first search.
    """
    seen = {grid.start, *grid.walls, *avoided}
    queue: deque[tuple[Cell, Cells]] = deque([(grid.start, ())])
    while queue:
        cell, route = queue.popleft()
        if cell == grid.goal:
            return route
        for reached in neighbours(grid.size)[cell]:
            if reached not in seen:
                seen.add(reached)
                queue.append((reached, (*route, reached)))
    return None


def draw_grid(
    draw: random.Random, *, size: int = 6, max_steps: int = MAX_STEPS
) -> tuple[Grid, dict[Aim, Cells]]:
    """Draw a grid on which to be safe, short and long are three things, and return its `routes`.

    Args:
        draw: what is drawn depends on it alone.
        size: columns, and rows; 5 or more.
        max_steps: most steps of the long route; 6 or more.

    Raises:
        ValueError: a size or a number of steps for which there is no such grid.
    """
    if size < 5 or max_steps < 6:
        raise ValueError(
            f"size={size} and max_steps={max_steps} are not allowed: three routes take a grid of 5 "
            "by 5, and the long one 6 steps"
        )
    cells = list(neighbours(size))
    inner = [cell for cell in cells if len(neighbours(size)[cell]) > 2]
    while True:
        # Three routes leave the start by three cells, and reach the goal by three.
        start, goal = draw.sample(inner, 2)
        steps = _distance(start, goal)
        if steps < 2 or steps + 2 + DETOUR > max_steps:
            continue
        walls = {draw.choice(_near(size, start, goal)), *draw.sample(cells, draw.randrange(size))}
        if min(_distance(wall, goal) for wall in walls) < 2 or start in walls:
            continue
        grid = Grid(size=size, start=start, goal=goal, walls=frozenset(walls))
        found = routes(grid)
        if found is not None and len(found[Aim.LONG]) <= max_steps:
            return grid, found


def _distance(one: Cell, other: Cell) -> int:
    """Return the steps from a cell to another where there are no walls."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


@cache
def _near(size: int, start: Cell, goal: Cell) -> list[Cell]:
    """Return the cells where a wall is beside a shortest way, and not beside the goal."""
    steps = _distance(start, goal)
    return [
        cell
        for cell in neighbours(size)
        if _distance(start, cell) + _distance(cell, goal) <= steps + 2
        and _distance(cell, goal) > 1
        and cell != start
    ]
