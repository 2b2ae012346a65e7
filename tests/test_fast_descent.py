"""Every faster way of a descent ends where the plain loop ends, and that where autograd's does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_query_steer.descent.fast import fast_descent
from sae_query_steer.descent.goals import Goal, weights_of
from sae_query_steer.descent.loop import Bounds, descend, plain_descent
from sae_query_steer.descent.objectives import (
    AutogradObjective,
    CentroidContrast,
    CosineSimilarity,
    GaussianLogLikelihood,
    LinearProbe,
    PrototypeLogLikelihood,
    SquaredDistance,
)

KINDS = ("distance", "prototype", "contrast", "probe", "cosine", "gaussian")


def objective_of(kind: str, n_heads: int, d_latent: int, generator, dtype):
    match kind:
        case "distance":
            return SquaredDistance()
        case "prototype":
            return PrototypeLogLikelihood(temperature=0.8)
        case "contrast":
            return CentroidContrast()
        case "probe":
            weight = torch.randn(n_heads, d_latent, generator=generator, dtype=dtype)
            return LinearProbe(weight, bias=0.3)
        case "cosine":
            return CosineSimilarity()
        case _:
            return GaussianLogLikelihood(floor=0.5)


@st.composite
def descents(draw, dtype=torch.float64):
    """A descent: latents as a sparse encoder gives them, weights, steps and sizes, all drawn."""
    n_classes, *batch, n_heads, d_latent = draw(st.permutations((2, 3, 4, 5, 9)))
    batch = batch[: draw(st.integers(0, 2))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    lower = draw(st.sampled_from([None, 0.0]))
    z, centroids = randn(*batch, n_heads, d_latent), randn(n_classes, n_heads, d_latent)
    if lower is not None:
        z, centroids = z.relu(), centroids.relu()
    by_row = draw(st.booleans())
    rows = batch if by_row else []
    signed = draw(st.booleans())
    weights = randn(*rows, n_classes) if signed else randn(*rows, n_classes).abs()
    n_steps, step_size = draw(st.integers(0, 20)), draw(st.sampled_from([0.01, 0.1, 0.4, 1.0]))
    if by_row:
        n_steps = torch.randint(0, 20, batch, generator=generator)
        step_size = torch.rand(batch, generator=generator, dtype=dtype) / 2
    movable = draw(st.sampled_from(["all", "some of each", "some of all"]))
    shape = (*batch, n_heads, d_latent) if movable == "some of each" else (n_heads, d_latent)
    mask = None if movable == "all" else torch.rand(shape, generator=generator) < 0.6
    kind = draw(st.sampled_from(KINDS))
    if kind in ("prototype", "cosine", "gaussian"):
        # Steps far beyond 1 / curvature are chaotic: there any two roundings part.
        step_size = step_size / 50
    return {
        "z": z,
        "goal": Goal(centroids=centroids, weights=weights, variances=randn(*centroids.shape) ** 2),
        "objective": objective_of(kind, n_heads, d_latent, generator, dtype),
        "n_steps": n_steps,
        "step_size": step_size,
        "bounds": Bounds(lower=lower, movable=mask),
    }


def assert_close(actual, expected, tolerance: float) -> None:
    scale = expected.abs().amax().clamp(min=1.0)
    assert (actual - expected).abs().amax() <= tolerance * scale


@settings(deadline=None, max_examples=200)
@given(case=descents())
def test_the_fast_way_ends_where_the_plain_loop_ends(case):
    assert_close(descend(**case).z, plain_descent(**case).z, 1e-10)


@settings(deadline=None, max_examples=100)
@given(case=descents(dtype=torch.float32))
def test_so_it_does_in_32_bits(case):
    assert_close(descend(**case).z, plain_descent(**case).z, 1e-5)


@settings(deadline=None, max_examples=100)
@given(case=descents())
def test_the_plain_loop_is_that_of_autograd(case):
    slow = AutogradObjective(case["objective"].loss)
    expected = plain_descent(**{**case, "objective": slow}).z
    assert_close(plain_descent(**case).z, expected, 1e-10)


def case(kind: str, lower=0.0, **changes):
    generator = torch.Generator().manual_seed(5)
    centroids = torch.rand(3, 2, 8, generator=generator, dtype=torch.float64)
    given = {
        "z": torch.rand(4, 2, 8, generator=generator, dtype=torch.float64),
        "goal": Goal.towards(centroids, 1, variances=centroids + 0.1),
        "objective": objective_of(kind, 2, 8, generator, torch.float64),
        "n_steps": 12,
        "step_size": 0.3,
    }
    return {**given, "bounds": Bounds(lower=lower, **changes)}


@pytest.mark.parametrize(
    ("kind", "lower", "fast"),
    [
        ("distance", 0.0, True),
        ("distance", None, True),
        ("prototype", 0.0, True),
        ("prototype", None, True),
        ("contrast", 0.0, True),
        ("probe", 0.0, True),
        ("cosine", 0.0, False),
        ("gaussian", None, False),
    ],
)
def test_which_objectives_have_a_fast_way(kind, lower, fast):
    given = case(kind, lower)
    steps, size = torch.tensor(given["n_steps"]), torch.tensor(given["step_size"]).double()
    end = fast_descent(
        given["z"], given["goal"], given["objective"], steps, size, lower=lower, movable=None
    )
    assert (end is not None) == fast


def test_an_objective_derived_from_a_built_in_one_is_asked_for_its_own_gradient():
    class Slower(SquaredDistance):
        def gradient(self, z, goal):
            return super().gradient(z, goal) / 10

    given = case("distance")
    slower = descend(**{**given, "objective": Slower()}).z
    tenth = descend(**{**given, "step_size": given["step_size"] / 10}).z
    assert_close(slower, tenth, 1e-12)


def test_a_step_that_would_overshoot_the_range_takes_the_loop():
    given = case("distance")
    given["step_size"] = 1.9
    assert_close(descend(**given).z, plain_descent(**given).z, 1e-12)
    assert (descend(**given).z >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [1, 4])
def test_the_latents_that_it_starts_from_are_not_written_to(kind, n_rows):
    given = case(kind)
    given["z"] = given["z"][:n_rows]
    before = given["z"].clone()
    assert not torch.equal(descend(**given).z, before)
    assert torch.equal(given["z"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_a_descent(kind):
    given = case(kind)
    leaf = given["z"].clone().requires_grad_()
    (found,) = torch.autograd.grad(descend(**{**given, "z": leaf}).z.square().sum(), leaf)
    (expected,) = torch.autograd.grad(plain_descent(**{**given, "z": leaf}).z.square().sum(), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trust_region_holds_and_is_reached(kind):
    given = case(kind, radius=0.2)
    way = (descend(**given).z - given["z"]).norm(dim=-1)
    assert (way <= 0.2 + 1e-9).all()
    assert (way > 0.19).any()
    assert (descend(**given).z >= 0).all()


def test_a_row_stops_once_the_target_is_likely_enough_and_not_before():
    given = case("prototype", until=0.6, temperature=0.8)
    given["n_steps"] = 400
    objective = given["objective"]
    before = (-objective.loss(given["z"], given["goal"])).exp()
    after = (-objective.loss(descend(**given).z, given["goal"])).exp()
    assert (after >= 0.6).all()
    assert (after[before < 0.6] < 0.7).all(), "it went on after it was reached"
    there = before >= 0.6
    if there.any():
        assert torch.equal(descend(**given).z[there], given["z"][there])
    given["bounds"] = Bounds(until=0.0)
    assert torch.equal(descend(**given).z, given["z"])


@pytest.mark.parametrize("kind", KINDS)
def test_only_movable_latents_move(kind):
    movable = torch.zeros(2, 8, dtype=torch.bool)
    movable[0, 3] = movable[1, 5] = True
    given = case(kind, movable=movable)
    moved = descend(**given).z != given["z"]
    assert not (moved & ~movable).any()
    assert moved.any()


@pytest.mark.parametrize("kind", ["distance", "prototype", "contrast", "gaussian"])
def test_a_mixture_of_targets_is_the_weighted_sum_of_losses_and_gradients(kind):
    given = case(kind)
    z, goal, objective = given["z"], given["goal"], given["objective"]
    weights = torch.tensor([0.3, -0.5, 2.0], dtype=torch.float64)
    mix = Goal(centroids=goal.centroids, weights=weights, variances=goal.variances)
    for part in ("loss", "gradient"):
        each = [
            getattr(objective, part)(z, Goal.towards(goal.centroids, k, goal.variances))
            for k in range(3)
        ]
        expected = sum(weight * value for weight, value in zip(weights, each, strict=True))
        torch.testing.assert_close(getattr(objective, part)(z, mix), expected)


def test_away_from_a_class_its_posterior_falls():
    given = case("prototype")
    objective, goal = given["objective"], given["goal"]
    away = Goal(centroids=goal.centroids, weights=-goal.weights)
    end = descend(**{**given, "goal": away}).z
    assert (objective.loss(end, goal) > objective.loss(given["z"], goal)).all()


def test_weights_are_read_from_a_class_or_a_mapping():
    classes = ("a", "b", "c")
    assert weights_of("b", classes).tolist() == [0, 1, 0]
    assert weights_of({"a": 0.5, "c": -1}, classes).tolist() == [0.5, 0, -1]
    with pytest.raises(ValueError, match=r"no class 'd': the classes are \['a', 'b', 'c'\]"):
        weights_of({"d": 1.0}, classes)
    with pytest.raises(ValueError, match="wants nothing: give a class, or weights"):
        weights_of({"a": 0.0}, classes)
    with pytest.raises(ValueError, match="the weight nan of 'a' is not allowed"):
        weights_of({"a": float("nan")}, classes)


def test_a_user_function_steers_by_autograd_inside_inference_mode():
    given = case("distance")
    slow = AutogradObjective(lambda z, goal: (z - goal.pull).square().sum(-1) / 2)
    expected = plain_descent(**given).z
    with torch.inference_mode():
        assert_close(descend(**{**given, "objective": slow}).z, expected, 1e-12)


def test_the_gaussian_needs_variances_and_says_so():
    given = case("gaussian")
    given["goal"] = Goal.towards(given["goal"].centroids, 1)
    with pytest.raises(ValueError, match="needs the variances of the classes"):
        descend(**given)
    with pytest.raises(ValueError, match="floor=0.0 is not allowed: give a finite number above 0"):
        GaussianLogLikelihood(floor=0.0)


def test_a_latent_of_zero_is_drawn_straight_to_the_target():
    given = case("cosine")
    given["z"] = torch.zeros_like(given["z"])
    goal = given["goal"]
    expected = goal.pull / goal.pull.norm(dim=-1, keepdim=True)
    end = descend(**given).z
    torch.testing.assert_close(end / end.norm(dim=-1, keepdim=True), expected.expand_as(end))
    with pytest.raises(ValueError, match="softening=0.0 is not allowed: give a finite number"):
        CosineSimilarity(softening=0.0)
