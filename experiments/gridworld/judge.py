"""The judge of a response: walk it, and see what it was."""

from experiments.gridworld.corpus import GridPrompt, cells_in
from experiments.gridworld.grid import DETOUR, Walk, simulate
from experiments.gridworld.words import Aim


def walked(prompt: GridPrompt, text: str) -> Walk:
    """Return the walk that a response takes, by the cells up to its first full stop."""
    return simulate(prompt.grid, cells_in(text.partition(".")[0]))


def walk_class(prompt: GridPrompt, text: str) -> Aim | None:
    """Return what the walk of a response is, by simulation and not by which route it repeats.

    Returns:
        Of the walks that end at the goal, "safe" if no step is beside a wall, "short" if there are
        as few steps as can be, "long" if there are at least `DETOUR` more than on the safe route,
        no cell is visited twice and some step is beside a wall; else None. It is never two: on the
        corpus's grids each walk of fewest steps has one beside a wall.
    """
    walk = walked(prompt, text)
    if not walk.reached:
        return None
    if walk.n_by_wall == 0:
        return Aim.SAFE
    safe, short = (len(prompt.routes[aim].cells) for aim in (Aim.SAFE, Aim.SHORT))
    if walk.n_steps == short:
        return Aim.SHORT
    return Aim.LONG if walk.n_steps >= safe + DETOUR and not walk.revisits else None
