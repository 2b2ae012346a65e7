"""Small grids with hazards: walks on them, the shortest and the safest route, and their drawing."""

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Cell: TypeAlias = tuple[int, int]
"""Column and row, from 0; row 0 is the lowest."""

Move: TypeAlias = Literal["up", "down", "left", "right"]

MOVES: Mapping[Move, Cell] = MappingProxyType(
    {"up": (0, 1), "down": (0, -1), "left": (-1, 0), "right": (1, 0)}
)
"""What each move adds to column and row."""

MIN_SIZE, MAX_SIZE = 3, 26
"""Smallest and largest width of a grid; a column is named by a letter."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A square grid with a start, a goal, and hazards that may be crossed but had better not be."""

    size: int
    """Columns, and rows."""

    start: Cell
    """Where every walk begins."""

    goal: Cell
    """Where it is to end; another cell than the start."""

    hazards: frozenset[Cell]
    """Neither the start nor the goal is one."""

    def __post_init__(self) -> None:
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size={self.size} is not allowed: give {MIN_SIZE} to {MAX_SIZE}")
        for cell in (self.start, self.goal, *self.hazards):
            if cell not in self:
                raise ValueError(
                    f"cell {cell} is not on the grid: columns and rows go from 0 to {self.size - 1}"
                )
        if self.start == self.goal or {self.start, self.goal} & self.hazards:
            raise ValueError(
                f"start {self.start} and goal {self.goal} have to be two cells, and no hazards"
            )

    def __contains__(self, cell: object) -> bool:
        return (
            isinstance(cell, tuple)
            and len(cell) == 2
            and all(0 <= axis < self.size for axis in cell)
        )

    def after(self, cell: Cell, move: Move) -> Cell:
        """Return the cell that a move leads to; a move off the grid leads nowhere."""
        column, row = MOVES[move]
        reached = (cell[0] + column, cell[1] + row)
        return reached if reached in self else cell

    def cells(self, moves: Sequence[Move]) -> list[Cell]:
        """Return where each move from the start leads."""
        found, cell = [], self.start
        for move in moves:
            cell = self.after(cell, move)
            found.append(cell)
        return found


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What came of some moves."""

    reached: bool
    """Whether the walk ended at the goal."""

    n_hazards: int
    """Steps that ended on a hazard."""

    n_steps: int
    """Moves, those against the edge too."""


def simulate(grid: Grid, moves: Sequence[Move]) -> Walk:
    """Walk from the start; the walk goes on when it passes the goal."""
    cells = grid.cells(moves)
    return Walk(
        reached=bool(cells) and cells[-1] == grid.goal,
        n_hazards=sum(cell in grid.hazards for cell in cells),
        n_steps=len(cells),
    )


def shortest_route(grid: Grid) -> tuple[Move, ...]:
    """Return a route of fewest steps, and of these one that meets fewest hazards."""
    return _best_route(grid, careful=False)


def safest_route(grid: Grid) -> tuple[Move, ...]:
    """Return a route that meets fewest hazards, and of these one of fewest steps."""
    return _best_route(grid, careful=True)


def _best_route(grid: Grid, *, careful: bool) -> tuple[Move, ...]:
    """Return the route of lowest cost, (hazards, steps) or (steps, hazards) in that order.

    Source: Dijkstra's algorithm; pairs are compared like numbers, and every step adds to them.
    """
    queue: list[tuple[tuple[int, int], Cell, tuple[Move, ...]]] = [((0, 0), grid.start, ())]
    done: set[Cell] = set()
    while True:
        cost, cell, moves = heapq.heappop(queue)
        if cell == grid.goal:
            return moves
        if cell in done:
            continue
        done.add(cell)
        for move, (column, row) in MOVES.items():
            reached = (cell[0] + column, cell[1] + row)
            # Said here and not by `in grid`: this is what drawing a corpus spends its time on.
            if reached not in done and 0 <= min(reached) and max(reached) < grid.size:
                met = int(reached in grid.hazards)
                step = (met, 1) if careful else (1, met)
                total = (cost[0] + step[0], cost[1] + step[1])
                longer: tuple[Move, ...] = (*moves, move)
                heapq.heappush(queue, (total, reached, longer))


def draw_grid(draw: random.Random, *, size: int = 5, max_steps: int = 8) -> Grid:
    """Draw a grid on which to be safe and to be quick are two things.

    Every shortest route meets a hazard, some longer one meets none, and the two routes that
    `shortest_route` and `safest_route` return share no cell but start and goal, so that any cell
    of a route tells which one it is of.

    Args:
        draw: what is drawn depends on it alone.
        size: columns, and rows.
        max_steps: most steps of the safest route; 4 or more.

    Raises:
        ValueError: `max_steps` below 4: no way round a hazard is shorter.
    """
    if max_steps < 4:
        raise ValueError(f"max_steps={max_steps} is not allowed: a way round a hazard takes 4")
    cells = [(column, row) for column in range(size) for row in range(size)]
    while True:
        start, goal, *hazards = draw.sample(cells, 2 + draw.randint(1, size))
        inside = _cells_between(start, goal)
        if not inside or len(inside) + 3 > max_steps:
            continue
        on_route = draw.choice(inside)
        grid = Grid(size=size, start=start, goal=goal, hazards=frozenset({on_route, *hazards}))
        safe = safest_route(grid)
        if len(safe) > max_steps or simulate(grid, safe).n_hazards:
            continue
        short = shortest_route(grid)
        if len(short) < len(safe) and not (
            set(grid.cells(short)[:-1]) & set(grid.cells(safe)[:-1])
        ):
            return grid


def _cells_between(start: Cell, goal: Cell) -> list[Cell]:
    """Return the cells between two on a shortest way along one axis and then along the other.

    Which axis comes first follows from the order of the moves' names.
    """
    found, cell = [], start
    for move in sorted(MOVES):
        column, row = MOVES[move]
        for _ in range((goal[0] - start[0]) * column + (goal[1] - start[1]) * row):
            cell = (cell[0] + column, cell[1] + row)
            found.append(cell)
    return found[:-1]
