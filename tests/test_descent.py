"""The descent equals a plain loop over autograd; the faster methods equal the plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_query_steer.descent.control import Bounds
from sae_query_steer.descent.goals import Goal, weights_of
from sae_query_steer.descent.loop import descend, fast_descent, plain_descent
from sae_query_steer.descent.objectives import (
    AutogradObjective,
    CentroidContrast,
    CosineSimilarity,
    GaussianLogLikelihood,
    LinearProbe,
    PrototypeLogLikelihood,
    SquaredDistance,
    posterior_of_target,
)

KINDS = ("distance", "prototype", "contrast", "probe", "cosine", "gaussian")
every_kind = pytest.mark.parametrize("kind", KINDS)


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
def descents(draw, dtype=torch.float64, controlled=True):
    """A descent with drawn weights, steps and sizes over latents as a sparse encoder gives them."""
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
    n_steps, step_size = draw(st.integers(0, 20)), draw(st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0]))
    if by_row:
        n_steps = torch.randint(0, 20, batch, generator=generator)
        step_size = torch.rand(batch, generator=generator, dtype=dtype) / 2
    movable = draw(st.sampled_from(["all", "some of each", "some of all"]))
    shape = (*batch, n_heads, d_latent) if movable == "some of each" else (n_heads, d_latent)
    mask = None if movable == "all" else torch.rand(shape, generator=generator) < 0.6
    kind = draw(st.sampled_from(KINDS))
    if kind in ("prototype", "cosine", "gaussian"):
        # Steps far beyond 1 / curvature are chaotic and amplify rounding.
        step_size = step_size / 50
    radius = draw(st.sampled_from([None, 0.1, 1.0])) if controlled else None
    until = draw(st.sampled_from([None, 0.3, 0.6, 0.9])) if controlled else None
    return {
        "z": z,
        "goal": Goal(centroids=centroids, weights=weights, variances=randn(*centroids.shape) ** 2),
        "objective": objective_of(kind, n_heads, d_latent, generator, dtype),
        "n_steps": n_steps,
        "step_size": step_size,
        "bounds": Bounds(lower=lower, movable=mask, radius=radius, until=until, temperature=0.8),
    }


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


def assert_close(actual, expected, tolerance: float) -> None:
    scale = expected.abs().amax().clamp(min=1.0)
    assert (actual - expected).abs().amax() <= tolerance * scale


def by_autograd(z, goal, objective, n_steps, step_size, bounds):
    """The reference: a loop over the gradient of autograd."""
    n_steps = torch.as_tensor(n_steps)[..., None, None]
    step_size = torch.as_tensor(step_size, dtype=z.dtype)[..., None, None]
    movable = torch.ones_like(z) if bounds.movable is None else bounds.movable.expand_as(z)
    for step in range(int(n_steps.max())):
        z = z.detach().requires_grad_()
        objective.loss(z, goal).sum().backward()
        moved = z.detach() - step_size * z.grad
        if bounds.lower is not None:
            moved = torch.maximum(moved, torch.full_like(moved, bounds.lower))
        z = torch.where((movable > 0) & (step < n_steps), moved, z.detach())
    return z


@settings(deadline=None, max_examples=60)
@given(case=descents(controlled=False))
def test_the_plain_loop_equals_a_loop_over_autograd(case):
    assert_close(plain_descent(**case).z, by_autograd(**case), 1e-10)


@settings(deadline=None, max_examples=300)
@given(case=descents())
def test_a_descent_equals_the_plain_loop(case):
    assert_close(descend(**case).z, plain_descent(**case).z, 1e-10)


@settings(deadline=None, max_examples=60)
@given(case=descents(dtype=torch.float32))
def test_a_descent_in_32_bits_equals_the_plain_loop(case):
    assert_close(descend(**case).z, plain_descent(**case).z, 1e-5)


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
def test_which_objectives_have_a_faster_method(kind, lower, fast):
    given = case(kind, lower)
    assert (fast_descent(**given) is not None) == fast
    bent = lower is not None and kind in ("contrast", "probe")
    for bounds in ({"radius": 0.5}, {"until": 0.6}, {"radius": 0.5, "until": 0.6}):
        given["bounds"] = Bounds(lower=lower, temperature=0.8, **bounds)
        still_fast = fast and not (bent and "radius" in bounds)
        assert (fast_descent(**given) is not None) == still_fast


@pytest.mark.parametrize("lower", [0.0, None])
@pytest.mark.parametrize("kind", ["distance", "contrast", "probe", "prototype"])
def test_a_row_stops_at_the_first_step_that_reaches_the_posterior(kind, lower):
    given = case(kind) | {"n_steps": 70, "step_size": 0.04, "bounds": Bounds(lower=lower)}
    given["goal"] = Goal(
        centroids=3 * given["goal"].centroids,
        weights=torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1]],  # a target for each row
    )
    path = torch.stack([plain_descent(**given | {"n_steps": n}).z for n in range(71)])
    assert lower is None or kind == "distance" or (path == 0).any(), "the range must matter"
    posterior = posterior_of_target(path, given["goal"], temperature=0.8)
    seen = set()
    for until in posterior[[0, 1, 30]].flatten().tolist():
        bounds = Bounds(lower=lower, until=until - 1e-9, temperature=0.8)
        met = posterior >= bounds.until
        stop = torch.where(met.any(0), met.long().argmax(0), 70)
        expected = path.take_along_dim(stop[None, ..., None], 0)[0]
        assert_close(fast_descent(**given | {"bounds": bounds}), expected, 1e-10)
        seen |= {*stop.flatten().tolist()}
    assert {0, 1, 30, 70} <= seen
    assert len(seen) > 5


@every_kind
@pytest.mark.parametrize(("n_steps", "step_size"), [(0, 0.5), (6, 0.0), (0, 0.0)])
def test_no_steps_or_a_step_size_of_zero_return_the_latents_bitwise(kind, n_steps, step_size):
    given = case(kind) | {"n_steps": n_steps, "step_size": step_size}
    given["z"] = given["z"] - 0.5  # negative latents too: the identity does not project
    for value in (lambda x: x, torch.tensor):
        given |= {"n_steps": value(n_steps), "step_size": value(step_size)}
        assert torch.equal(descend(**given).z, given["z"])


@every_kind
@pytest.mark.parametrize("step_size", [0.25, 0.0])
def test_the_recorded_loss_runs_from_the_first_latents_to_the_last(kind, step_size):
    given = case(kind) | {"n_steps": 4, "step_size": step_size}
    result, loss = descend(**given, record_loss=True), given["objective"].loss
    assert result.loss.shape == (5, 4, 2)
    assert torch.equal(result.loss[0], loss(given["z"], given["goal"]))
    assert torch.equal(result.loss[-1], loss(result.z, given["goal"]))
    unrecorded = descend(**given)
    assert unrecorded.loss is None
    assert torch.equal(unrecorded.z, result.z)


@every_kind
def test_small_steps_lower_the_loss_at_every_step(kind):
    given = case(kind) | {"n_steps": 8, "step_size": 0.01}
    assert (descend(**given, record_loss=True).loss.diff(dim=0) < 0).all()


@pytest.mark.parametrize("lower", [None, 0.0])
@pytest.mark.parametrize(("n_steps", "step_size"), [(1, 1.0), (3, 0.2), (9, 0.85)])
def test_squared_distance_ends_at_its_closed_form(lower, n_steps, step_size):
    given = case("distance", lower) | {"n_steps": n_steps, "step_size": step_size}
    z, c = given["z"], given["goal"].centroids[1]
    expected = c + (1 - step_size) ** n_steps * (z - c)
    torch.testing.assert_close(descend(**given).z, expected, rtol=0, atol=1e-12)


def test_projected_steps_of_the_contrast_are_one_step():
    given = case("contrast") | {"n_steps": 7}
    z, centroids = given["z"], given["goal"].centroids
    once = (z + 7 * 0.3 * (centroids[1] - centroids.mean(0))).clamp(min=0)
    torch.testing.assert_close(descend(**given).z, once, rtol=0, atol=1e-12)
    assert (once == 0).any(), "the projection must matter"
    assert descend(**given | {"bounds": Bounds(lower=None)}).z.min() < 0


def test_the_gradient_of_a_subclass_is_used():
    class Slower(SquaredDistance):
        def gradient(self, z, goal):
            return super().gradient(z, goal) / 10

    given = case("distance")
    slower = descend(**{**given, "objective": Slower()}).z
    assert_close(slower, descend(**{**given, "step_size": 0.03}).z, 1e-12)


@pytest.mark.parametrize("step_size", [1.9, 3.0])
def test_steps_beyond_the_centroid_equal_the_plain_loop(step_size):
    for lower in (0.0, None):
        given = case("distance", lower) | {"step_size": step_size}
        assert_close(descend(**given).z, plain_descent(**given).z, 1e-12)
        assert lower is None or (descend(**given).z >= 0).all()
    diverging = case("distance", None) | {"step_size": 1e6, "n_steps": 60}
    assert not descend(**diverging).z.isfinite().any()


@every_kind
@pytest.mark.parametrize("n_rows", [1, 4])
def test_the_initial_latents_are_not_written_to(kind, n_rows):
    given = case(kind)
    given["z"] = given["z"][:n_rows]
    before = given["z"].clone()
    assert not torch.equal(descend(**given).z, before)
    assert torch.equal(given["z"], before)


@every_kind
def test_changing_one_head_leaves_the_other_bitwise_unchanged(kind):
    given = case(kind)
    before = descend(**given).z
    given["z"] = given["z"] + torch.tensor([[0.0], [1.0]])
    after = descend(**given).z
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


@every_kind
def test_gradients_flow_through_a_descent(kind):
    given = case(kind)
    leaf = given["z"].clone().requires_grad_()
    (found,) = torch.autograd.grad(descend(**{**given, "z": leaf}).z.square().sum(), leaf)
    (expected,) = torch.autograd.grad(plain_descent(**{**given, "z": leaf}).z.square().sum(), leaf)
    torch.testing.assert_close(found, expected)


@every_kind
def test_the_trust_region_holds_and_is_reached(kind):
    given = case(kind, radius=0.2)
    way = (descend(**given).z - given["z"]).norm(dim=-1)
    assert (way <= 0.2 + 1e-9).all()
    assert (way > 0.19).any()
    assert (descend(**given).z >= 0).all()


def test_a_row_stops_once_the_posterior_is_reached():
    given = case("prototype", until=0.6, temperature=0.8) | {"n_steps": 400}
    objective = given["objective"]
    before = (-objective.loss(given["z"], given["goal"])).exp()
    after = (-objective.loss(descend(**given).z, given["goal"])).exp()
    assert (after >= 0.6).all()
    assert (after[before < 0.6] < 0.7).all(), "it must not go on"
    there = before >= 0.6
    assert torch.equal(descend(**given).z[there], given["z"][there])
    given["bounds"] = Bounds(until=0.0)
    assert torch.equal(descend(**given).z, given["z"])


@every_kind
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


def test_a_negative_weight_lowers_the_posterior_of_a_class():
    given = case("prototype")
    objective, goal = given["objective"], given["goal"]
    away = Goal(centroids=goal.centroids, weights=-goal.weights)
    end = descend(**{**given, "goal": away}).z
    assert (objective.loss(end, goal) > objective.loss(given["z"], goal)).all()


def test_a_prepared_goal_with_other_weights_is_a_new_goal():
    goal = case("prototype")["goal"].prepared()
    weights = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    other = goal.with_weights(weights)
    expected = Goal(centroids=goal.centroids, weights=weights)
    for name in ("total", "pull", "wanted", "by_head", "half_squares"):
        assert torch.equal(getattr(other, name), getattr(expected, name))


def test_weights_are_read_from_a_class_or_a_mapping():
    classes = ("a", "b", "c")
    assert weights_of("b", classes).tolist() == [0, 1, 0]
    assert weights_of({"a": 0.5, "c": -1}, classes).tolist() == [0.5, 0, -1]
    with pytest.raises(ValueError, match=r"'d'.*\['a', 'b', 'c'\]"):
        weights_of({"d": 1.0}, classes)
    with pytest.raises(ValueError, match=r"target.*\{'a': 0.0\}"):
        weights_of({"a": 0.0}, classes)
    with pytest.raises(ValueError, match="'a'.*nan"):
        weights_of({"a": float("nan")}, classes)


@pytest.mark.parametrize("kind", [*KINDS, "autograd"])
def test_the_descent_runs_in_inference_mode(kind):
    given = case("distance" if kind == "autograd" else kind)
    if kind == "autograd":
        slow = AutogradObjective(lambda z, goal: (z - goal.pull).square().sum(-1) / 2)
        given["objective"] = slow
    expected = descend(**given).z
    with torch.inference_mode():
        assert torch.equal(descend(**given).z, expected)
    if kind == "autograd":
        assert_close(expected, descend(**case("distance")).z, 1e-12)


def test_a_loss_or_gradient_of_another_shape_is_refused():
    given = case("distance")
    for name, value in (("loss", lambda z, goal: z), ("gradient", lambda z, goal: z[..., :1])):
        bad = type("Bad", (CosineSimilarity,), {name: lambda self, z, goal, f=value: f(z, goal)})()
        with pytest.raises(ValueError, match=rf"{name} of .*\[4, 2.*got .*\[4, 2, "):
            descend(**{**given, "objective": bad}, record_loss=True)


def test_the_gaussian_needs_variances():
    given = case("gaussian")
    given["goal"] = Goal.towards(given["goal"].centroids, 1)
    with pytest.raises(ValueError, match="variances"):
        descend(**given)


def test_a_latent_of_zero_moves_straight_towards_the_target():
    given = case("cosine")
    given["z"] = torch.zeros_like(given["z"])
    goal = given["goal"]
    expected = goal.pull / goal.pull.norm(dim=-1, keepdim=True)
    end = descend(**given).z
    torch.testing.assert_close(end / end.norm(dim=-1, keepdim=True), expected.expand_as(end))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"step_size": -0.1}, ValueError, "step_size .*>= 0.* -0.1"),
        ({"step_size": float("nan")}, ValueError, "step_size .*>= 0.* nan"),
        ({"step_size": float("inf")}, ValueError, "step_size .*>= 0.* inf"),
        ({"n_steps": -1}, ValueError, "n_steps .*>= 0.* -1"),
        ({"n_steps": True}, TypeError, "n_steps .*whole.* True"),
    ],
)
def test_an_invalid_number_of_steps_or_step_size_is_refused(untyped, changes, error, text):
    with pytest.raises(error, match=text):
        descend(**case("distance") | changes)
