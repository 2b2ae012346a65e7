"""Controls of a descent in pairs, against a reference that knows one latent at a time."""

import itertools
import math
import random

import pytest
import torch

from sae_query_steer.descent.control import Bounds
from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.loop import descend
from sae_query_steer.descent.objectives import PrototypeLogLikelihood, SquaredDistance

CONTROLS = ("movable", "radius", "until", "lower")


def posterior(z, centroids):
    exponents = [-0.5 * sum((a - b) ** 2 for a, b in zip(z, c, strict=True)) for c in centroids]
    weights = [math.exp(e - max(exponents)) for e in exponents]
    return [weight / sum(weights) for weight in weights]


def reference(z0, centroids, target, objective, n_steps, size, bounds):
    """Move one row and head, latent by latent."""
    z = list(z0)
    free = [True] * len(z) if bounds.movable is None else bounds.movable.flatten().tolist()
    for _ in range(n_steps):
        shares = posterior(z, centroids)
        if bounds.until is not None and shares[target] >= bounds.until:
            break
        if isinstance(objective, SquaredDistance):
            gradient = [a - b for a, b in zip(z, centroids[target], strict=True)]
        else:
            means = [
                sum(s * x for s, x in zip(shares, column, strict=True))
                for column in zip(*centroids, strict=True)
            ]
            gradient = [m - c for m, c in zip(means, centroids[target], strict=True)]
        new = [a - size * g if f else a for a, g, f in zip(z, gradient, free, strict=True)]
        length = math.dist(new, z0)
        if bounds.radius is not None and length > bounds.radius:
            new = [b + bounds.radius / length * (a - b) for a, b in zip(new, z0, strict=True)]
        if bounds.lower is not None:
            new = [max(a, bounds.lower) if f else a for a, f in zip(new, free, strict=True)]
        z = new
    return z


@pytest.mark.parametrize("pair", list(itertools.combinations(CONTROLS, 2)), ids="-".join)
@pytest.mark.parametrize("objective", [SquaredDistance(), PrototypeLogLikelihood()], ids=repr)
def test_a_pair_of_controls_does_what_the_reference_does(pair, objective):
    draw = random.Random(repr((pair, objective)))
    for case in range(42):
        generator = torch.Generator().manual_seed(case)
        z0 = torch.rand(1, 4, generator=generator, dtype=torch.float64)
        centroids = 3 * torch.rand(3, 1, 4, generator=generator, dtype=torch.float64)
        free = [[True, draw.random() < 0.5, draw.random() < 0.5, False]]
        given = {"movable": torch.tensor(free), "lower": 0.0}
        given |= {"radius": draw.uniform(0.1, 2), "until": draw.uniform(0.3, 1)}
        bounds = Bounds(**{"lower": None, **{name: given[name] for name in pair}})
        n_steps, size = draw.randrange(1, 6), draw.uniform(0.1, 1.5)
        weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        goal = Goal(centroids=centroids, weights=weights).prepared()
        found = descend(z0, goal, objective, n_steps=n_steps, step_size=size, bounds=bounds).z
        rows = (z0[0].tolist(), centroids[:, 0].tolist())
        wanted = reference(*rows, 1, objective, n_steps, size, bounds)
        assert found[0].tolist() == pytest.approx(wanted, abs=1e-9), (case, bounds)


def test_latents_that_may_not_move_take_nothing_of_the_trust_radius():
    centroids = torch.tensor([[[0.2, 10.0, 10.0]], [[0.0, 0.0, 0.0]]])
    goal = Goal(centroids=centroids, weights=torch.tensor([1.0, 0.0])).prepared()
    bounds = Bounds(movable=torch.tensor([[True, False, False]]), radius=1.0)
    z = torch.zeros(1, 3)
    found = descend(z, goal, SquaredDistance(), n_steps=1, step_size=1.0, bounds=bounds).z
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.0, 0.0]]))
