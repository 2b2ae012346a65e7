"""Checks of the settings of a descent, before any work starts."""

from collections.abc import Mapping
from typing import Any

import torch

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.control import PosteriorBelow, TopLatents
from sae_query_steer.descent.goals import weights_of
from sae_query_steer.descent.objectives import FixedMove, Objective
from sae_query_steer.descent.strength import each, scheduled
from sae_query_steer.targets.centroids import CentroidTargets


def check_descent(descent: Any) -> None:
    """Raise unless the settings of a `LatentDescent` are allowed.

    Raises:
        TypeError: a setting of another type.
        ValueError: a number out of range, an unknown class, or a setting that targets of this kind
            do not have.
    """
    if not isinstance(descent.targets, CentroidTargets) or not isinstance(descent.saes, Mapping):
        raise TypeError(
            "saes must be SAEs by hook name and targets CentroidTargets, such as "
            "CentroidTargetBuilder(model, saes).fit(examples), in this order, got "
            f"{type(descent.saes).__name__} and {type(descent.targets).__name__}"
        )
    for n_steps in each(descent.n_steps, "n_steps"):
        check_number("n_steps", n_steps, whole=True, least=0)
    for step_size in each(descent.step_size, "step_size"):
        check_number("step_size", step_size, least=0)
    if isinstance(descent.objective, type) or not isinstance(descent.objective, Objective):
        raise TypeError(
            "objective must be SquaredDistance(), PrototypeLogLikelihood(), "
            f"CentroidContrast(), or a value with loss and gradient, got {descent.objective!r}"
        )
    for target in each(descent.target, "target"):
        weights_of(target, descent.targets.classes)
    moves = descent.targets.are_moves
    if moves != isinstance(descent.objective, FixedMove):
        raise ValueError(
            "objective must be FixedMove() for targets that are moves, and another one for "
            f"points, got {descent.objective!r} and {'moves' if moves else 'points'}"
        )
    of_points = {
        "until": descent.until,
        "gate": descent.gate if isinstance(descent.gate, PosteriorBelow) else None,
        "latents": descent.latents if isinstance(descent.latents, TopLatents) else None,
    }
    for name, value in of_points.items():
        if moves and value is not None:
            raise ValueError(
                f"{name} must not be {value!r} for moves, which have no distance to a class: "
                "leave it out, or learn points"
            )
    for name, such_as in (
        ("schedule", "ExponentialDecay(8)"),
        ("latents", "GivenLatents({hook name: {head: [3, 5]}})"),
        ("gate", "PosteriorBelow(0.9)"),
    ):
        value = getattr(descent, name)
        if isinstance(value, type) or not (value is None or callable(value)):
            raise TypeError(f"{name} must be such as {such_as}, or a function, got {value!r}")
    if descent.schedule is not None:
        scheduled(descent.schedule, torch.zeros(1))
    for name, most in (("trust_radius", None), ("max_relative_change", None), ("until", 1)):
        if getattr(descent, name) is not None:
            check_number(name, getattr(descent, name), above=0, most=most)
