"""The gridworld: a tiny model that takes one of three routes: safe, short or long."""

from experiments.gridworld.cases import GridCase, grid_cases, walk_judge, walk_scores
from experiments.gridworld.corpus import GridCorpus, GridPrompt
from experiments.gridworld.grid import (
    Grid,
    Walk,
    draw_grid,
    routes,
    simulate,
)
from experiments.gridworld.judge import walk_class, walked
from experiments.gridworld.training import GridTraining, train_gridworld
from experiments.gridworld.words import Aim

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
    "routes",
    "simulate",
    "train_gridworld",
    "walk_class",
    "walk_judge",
    "walk_scores",
    "walked",
]
