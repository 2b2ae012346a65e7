"""The judge of a response: walk it, and see what it was."""

from experiments.gridworld.corpus import GridPrompt, moves_in
from experiments.gridworld.grid import Walk, shortest_route, simulate
from experiments.gridworld.words import Aim


def walked(prompt: GridPrompt, text: str) -> Walk:
    """Return the walk that a response takes: the moves up to its first full stop.

    The colour and the cells that it says are not asked; a wrong one changes no move.
    """
    return simulate(prompt.grid, moves_in(text.partition(".")[0].split()))


def walk_class(prompt: GridPrompt, text: str) -> Aim | None:
    """Return what the walk of a response is, by simulation and not by which route it repeats.

    Returns:
        "safe" if it ends at the goal without a hazard, "short" if it ends there in as few steps as
        can be, else None. It is never both: on the corpus's grids each shortest route meets a
        hazard.
    """
    walk = walked(prompt, text)
    if not walk.reached:
        return None
    if walk.n_hazards == 0:
        return Aim.SAFE
    return Aim.SHORT if walk.n_steps == len(shortest_route(prompt.grid)) else None
