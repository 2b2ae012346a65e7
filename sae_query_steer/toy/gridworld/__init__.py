"""The gridworld: a tiny model that takes one of two routes, the safe one or the short one."""

from sae_query_steer.toy.gridworld.cases import GridCase, grid_cases, walk_judge, walk_scores
from sae_query_steer.toy.gridworld.corpus import GridCorpus, GridPrompt
from sae_query_steer.toy.gridworld.grid import (
    Grid,
    Walk,
    draw_grid,
    safest_route,
    shortest_route,
    simulate,
)
from sae_query_steer.toy.gridworld.judge import walk_class, walked
from sae_query_steer.toy.gridworld.training import GridTraining, train_gridworld
from sae_query_steer.toy.gridworld.words import Aim

__all__ = [
    "Aim",
    "Grid",
    "GridCase",
    "GridCorpus",
    "GridPrompt",
    "GridTraining",
    "Walk",
    "draw_grid",
    "grid_cases",
    "safest_route",
    "shortest_route",
    "simulate",
    "train_gridworld",
    "walk_class",
    "walk_judge",
    "walk_scores",
    "walked",
]
