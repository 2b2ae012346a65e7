"""The descents that comparisons try: objectives, with steps and growing step sizes."""

from dataclasses import dataclass

from sae_query_steer.descent.objectives import (
    CentroidContrast,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """An objective with its number of steps and the step sizes to try."""

    name: str
    objective: Objective
    n_steps: int
    step_sizes: tuple[float, ...]


# Distance and contrast are linear in z, so one step does what twenty smaller ones would; the
# prototype's step shrinks as the target's posterior grows, so more do no harm and small ones add up
# until then. The last strengths
# are absurd: a grid should end by what the text does, not because it is used up.
DESCENTS = (
    Descent(
        name="prototype",
        objective=PrototypeLogLikelihood(),
        n_steps=20,
        step_sizes=(0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    ),
    Descent(
        name="squared distance",
        objective=SquaredDistance(),
        n_steps=1,
        step_sizes=(0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0),
    ),
    Descent(
        name="contrast",
        objective=CentroidContrast(),
        n_steps=1,
        step_sizes=(1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0),
    ),
)
