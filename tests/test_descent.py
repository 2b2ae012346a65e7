import inspect
import re

import pytest
import torch

from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.loop import Bounds, check_strength, descend
from sae_query_steer.descent.objectives import (
    CentroidContrast,
    PrototypeLogLikelihood,
    SquaredDistance,
)

OBJECTIVES = (SquaredDistance(), PrototypeLogLikelihood(temperature=0.7), CentroidContrast())
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
TARGET = 2


def problem(dtype=torch.float64):
    """Latents [2 5 head=3 d_latent=7] and four centroids, as ReLU leaves them: not negative."""
    generator = torch.Generator().manual_seed(23)
    z = torch.randn(2, 5, 3, 7, generator=generator, dtype=dtype).relu()
    return z, torch.randn(4, 3, 7, generator=generator, dtype=dtype).relu()


@every_objective
@pytest.mark.parametrize(("n_steps", "step_size"), [(0, 0.5), (6, 0.0), (0, 0.0)])
def test_no_steps_or_a_step_size_of_zero_return_the_latents_bit_for_bit(
    objective, n_steps, step_size
):
    z, centroids = problem(torch.float32)
    z = z - 0.5  # Negative latents too: the identity does not project.
    start = z.clone()
    result = descend(
        z, Goal.towards(centroids, TARGET), objective, n_steps=n_steps, step_size=step_size
    )
    assert torch.equal(result.z, start)
    assert torch.equal(z, start)


@every_objective
@pytest.mark.parametrize("lower", [None, 0.0, 0.3])
def test_the_descent_is_the_plain_loop_over_autograd(objective, lower):
    z, centroids = problem()
    result = descend(
        z,
        Goal.towards(centroids, TARGET),
        objective,
        n_steps=6,
        step_size=0.4,
        bounds=Bounds(lower=lower),
    )

    expected = z.clone()
    for _ in range(6):
        expected = expected.detach().requires_grad_()
        objective.loss(expected, Goal.towards(centroids, TARGET)).sum().backward()
        expected = expected.detach() - 0.4 * expected.grad
        if lower is not None:
            expected = torch.maximum(expected, torch.full_like(expected, lower))
    torch.testing.assert_close(result.z, expected, rtol=0, atol=1e-10)
    assert result.z.min() >= (lower if lower is not None else -torch.inf)


@every_objective
@pytest.mark.parametrize("step_size", [0.25, 0.0])
def test_the_recorded_loss_runs_from_the_first_latents_to_the_last(objective, step_size):
    z, centroids = problem()
    given = dict(n_steps=4, step_size=step_size)
    result = descend(z, Goal.towards(centroids, TARGET), objective, **given, record_loss=True)
    assert result.loss is not None
    assert result.loss.shape == (5, 2, 5, 3)
    assert torch.equal(result.loss[0], objective.loss(z, Goal.towards(centroids, TARGET)))
    assert torch.equal(result.loss[-1], objective.loss(result.z, Goal.towards(centroids, TARGET)))
    unrecorded = descend(z, Goal.towards(centroids, TARGET), objective, **given)
    assert unrecorded.loss is None
    assert torch.equal(unrecorded.z, result.z)


@every_objective
def test_small_steps_bring_the_loss_down_at_every_step(objective):
    z, centroids = problem()
    loss = descend(
        z, Goal.towards(centroids, TARGET), objective, n_steps=8, step_size=0.05, record_loss=True
    ).loss
    assert loss is not None
    assert (loss.diff(dim=0) < 0).all()


@pytest.mark.parametrize("lower", [None, 0.0])
@pytest.mark.parametrize(("n_steps", "step_size"), [(1, 1.0), (3, 0.2), (9, 0.85)])
def test_squared_distance_ends_at_the_closed_form(lower, n_steps, step_size):
    z, centroids = problem()
    result = descend(
        z,
        Goal.towards(centroids, TARGET),
        SquaredDistance(),
        n_steps=n_steps,
        step_size=step_size,
        bounds=Bounds(lower=lower),
    )
    c = centroids[TARGET]
    torch.testing.assert_close(
        result.z, c + (1 - step_size) ** n_steps * (z - c), rtol=0, atol=1e-12
    )


def test_projected_steps_of_the_contrast_are_one_step():
    z, centroids = problem()
    result = descend(
        z, Goal.towards(centroids, TARGET), CentroidContrast(), n_steps=7, step_size=0.3
    )
    direction = centroids[TARGET] - centroids.mean(0)
    once = (z + 7 * 0.3 * direction).clamp(min=0)
    torch.testing.assert_close(result.z, once, rtol=0, atol=1e-12)
    assert ((once == 0) & (z > 0)).any(), "the projection must matter for this to say anything"


def test_latents_go_below_zero_only_without_a_lower_bound():
    z, centroids = problem()
    given = dict(n_steps=3, step_size=2.0)
    bounded = descend(z, Goal.towards(centroids, TARGET), CentroidContrast(), **given)
    free = descend(
        z, Goal.towards(centroids, TARGET), CentroidContrast(), **given, bounds=Bounds(lower=None)
    )
    assert bounded.z.min() == 0
    assert free.z.min() < 0


@every_objective
def test_changing_one_head_leaves_the_others_bitwise_unchanged(objective):
    z, centroids = problem(torch.float32)
    given = dict(n_steps=5, step_size=0.3)
    before = descend(z, Goal.towards(centroids, TARGET), objective, **given).z
    z[..., 1, :] += 1
    centroids[:, 1] *= 3
    after = descend(z, Goal.towards(centroids, TARGET), objective, **given).z
    assert torch.equal(before[..., [0, 2], :], after[..., [0, 2], :])
    assert not torch.equal(before[..., 1, :], after[..., 1, :])


@every_objective
def test_the_descent_runs_in_inference_mode(objective):
    z, centroids = problem()
    given = dict(n_steps=3, step_size=0.4)
    expected = descend(z, Goal.towards(centroids, TARGET), objective, **given).z
    with torch.inference_mode():
        assert torch.equal(
            descend(z, Goal.towards(centroids, TARGET), objective, **given).z, expected
        )


@pytest.mark.parametrize("step_size", [-0.1, float("nan"), float("inf")])
def test_a_step_size_that_is_negative_or_not_finite_is_refused(step_size):
    text = (
        f"step_size={step_size} is not allowed: give a finite number, 0 or more (0 changes nothing)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        check_strength(3, step_size)


def test_a_negative_number_of_steps_is_refused():
    text = "n_steps=-1 is not allowed: give 0 or more (0 changes nothing)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        check_strength(-1, 0.5)


@pytest.mark.parametrize("n_steps", [2.5, True, "3", None])
def test_a_number_of_steps_that_is_not_whole_is_refused(n_steps):
    # Unwrapped, as users run it: under the tests' type checker most of these never get there.
    text = f"n_steps={n_steps!r} is not allowed: give a whole number, 0 or more"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        inspect.unwrap(check_strength)(n_steps, 0.5)


@pytest.mark.parametrize(("n_steps", "step_size"), [(-1, 0.5), (3, -0.5)])
def test_the_descent_checks_its_strength(n_steps, step_size):
    z, centroids = problem()
    with pytest.raises(ValueError, match="is not allowed"):
        descend(
            z,
            Goal.towards(centroids, TARGET),
            SquaredDistance(),
            n_steps=n_steps,
            step_size=step_size,
        )
