import pytest
import torch
from einops import rearrange, reduce
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.objectives import (
    CentroidContrast,
    CosineSimilarity,
    GaussianLogLikelihood,
    Objective,
    PrototypeLogLikelihood,
    SquaredDistance,
    class_scores,
    posterior_of_target,
    squared_distances,
)

TEMPERATURES = (0.3, 1.0, 5.0)
OBJECTIVES = (
    SquaredDistance(),
    *(PrototypeLogLikelihood(temperature=t) for t in TEMPERATURES),
    CentroidContrast(),
)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


@st.composite
def problems(draw):
    """Latents, centroids and a target in float64; no two axes have the same size."""
    n_class, *batch, head, d_latent = draw(st.permutations((2, 3, 4, 5, 7)))
    batch = batch[: draw(st.integers(0, 2))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(*batch, head, d_latent, generator=generator, dtype=torch.float64)
    centroids = torch.randn(n_class, head, d_latent, generator=generator, dtype=torch.float64)
    return z, centroids, draw(st.integers(0, n_class - 1))


def problem(dtype=torch.float64):
    """Latents [2 5 head=3 d_latent=7], four centroids, and the third class as target."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(2, 5, 3, 7, generator=generator, dtype=dtype)
    return z, torch.randn(4, 3, 7, generator=generator, dtype=dtype), 2


def naive_posterior(z, centroids, temperature: float):
    half = [((z - centroid) ** 2).sum(-1) / 2 for centroid in centroids]
    weights = [(-distance / temperature).exp() for distance in half]
    return torch.stack([weight / sum(weights) for weight in weights], -1)


@every_objective
@settings(deadline=None, max_examples=40)
@given(case=problems())
def test_the_gradient_in_closed_form_is_that_of_autograd(objective, case):
    z, centroids, target = case
    z = z.requires_grad_()
    loss = objective.loss(z, Goal.towards(centroids, target))
    assert loss.shape == z.shape[:-1]
    (expected,) = torch.autograd.grad(loss.sum(), z)
    actual = objective.gradient(z, Goal.towards(centroids, target))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(case=problems(), temperature=st.sampled_from(TEMPERATURES))
def test_class_scores_give_the_posterior_over_half_squared_distances(case, temperature):
    z, centroids, target = case
    expected = naive_posterior(z, centroids, temperature)
    actual = class_scores(z, centroids, temperature).softmax(-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    loss = PrototypeLogLikelihood(temperature=temperature).loss(z, Goal.towards(centroids, target))
    torch.testing.assert_close(loss, -expected[..., target].log(), rtol=0, atol=1e-10)


def test_a_temperature_of_one_half_is_the_softmax_over_full_squared_distances():
    z, centroids, target = problem()
    expected = -squared_distances(z, centroids).neg().log_softmax(-1)[..., target]
    actual = PrototypeLogLikelihood(temperature=0.5).loss(z, Goal.towards(centroids, target))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_the_squared_distance_is_half_of_it_and_a_step_of_one_reaches_the_centroid():
    z, centroids, target = problem()
    expected = sum((z[..., i] - centroids[target, :, i]) ** 2 for i in range(7)) / 2
    actual = SquaredDistance().loss(z, Goal.towards(centroids, target))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    arrived = z - SquaredDistance().gradient(z, Goal.towards(centroids, target))
    torch.testing.assert_close(arrived, centroids[target].expand_as(z), rtol=0, atol=1e-12)


def test_the_contrast_is_minus_the_projection_on_target_minus_mean_and_linear():
    z, centroids, target = problem()
    contrast = CentroidContrast()
    direction = centroids[target] - reduce(centroids, "k head d -> head d", "mean")
    expected = -torch.einsum("bphd,hd->bph", z, direction)
    torch.testing.assert_close(
        contrast.loss(z, Goal.towards(centroids, target)), expected, rtol=0, atol=1e-12
    )
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    together = contrast.loss(3 * z - 0.5 * other, Goal.towards(centroids, target))
    apart = 3 * expected - 0.5 * contrast.loss(other, Goal.towards(centroids, target))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    same = contrast.gradient(other, Goal.towards(centroids, target))
    assert torch.equal(same, contrast.gradient(z, Goal.towards(centroids, target)))


def test_squared_distances_are_those_of_cdist():
    z, centroids, _ = problem()
    expected = torch.cdist(
        rearrange(z, "b p head d -> head (b p) d"), rearrange(centroids, "k head d -> head k d")
    )
    actual = rearrange(squared_distances(z, centroids), "b p head k -> head (b p) k")
    torch.testing.assert_close(actual, expected**2, rtol=1e-10, atol=0)


def test_squared_distances_keep_their_digits_near_a_far_centroid():
    _, centroids, target = problem(torch.float32)
    centroids = 100 * centroids
    z = centroids[target] + 1 / 64
    exact = (z.double() - centroids[target].double()).square().sum(-1)
    near = squared_distances(z, centroids)[..., target]
    torch.testing.assert_close(near.double(), exact, rtol=1e-6, atol=0)


@every_objective
def test_changing_one_head_leaves_the_others_bitwise_unchanged(objective):
    z, centroids, target = problem(torch.float32)
    others = [0, 2]
    other_z, other_centroids = z.clone(), centroids.clone()
    other_z[..., 1, :] *= -3
    other_centroids[:, 1] += 2
    before = objective.loss(z, Goal.towards(centroids, target))
    after = objective.loss(other_z, Goal.towards(other_centroids, target))
    assert torch.equal(before[..., others], after[..., others])
    assert not torch.equal(before[..., 1], after[..., 1])
    before = objective.gradient(z, Goal.towards(centroids, target))
    after = objective.gradient(other_z, Goal.towards(other_centroids, target))
    assert torch.equal(before[..., others, :], after[..., others, :])
    assert not torch.equal(before[..., 1, :], after[..., 1, :])


@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PrototypeLogLikelihood, "temperature"),
        (CosineSimilarity, "softening"),
        (GaussianLogLikelihood, "floor"),
    ],
)
def test_a_parameter_that_is_not_finite_and_positive_is_refused(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} .*> 0, got {value}"):
        kind(**{name: value})


def test_an_object_without_a_gradient_does_not_follow_the_protocol():
    class OnlyLoss:
        loss = SquaredDistance.loss

    assert not isinstance(OnlyLoss(), Objective)
    assert all(isinstance(objective, Objective) for objective in OBJECTIVES)


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ([0.0, 0.0, 1.0, 0.0], [2]),
        ([0.2, 0.0, 0.7, 0.0], [0, 2]),
        ([2.0, -1.0, 0.0, 0.0], [0]),
        ([0.0, -1.0, 0.0, 0.0], [0, 2, 3]),
        ([-1.0, -0.5, 0.0, 0.0], [2, 3]),
    ],
)
def test_the_posterior_of_a_target_is_that_of_its_classes_whatever_their_weights(weights, wanted):
    z, centroids, _ = problem()
    goal = Goal(centroids=centroids, weights=torch.tensor(weights).double())
    expected = naive_posterior(z, centroids, 0.7)[..., wanted].sum(-1)
    torch.testing.assert_close(posterior_of_target(z, goal, 0.7), expected)


def test_rows_with_targets_of_their_own_have_posteriors_of_their_own():
    z, centroids, _ = problem()
    weights = torch.tensor([[1.0, 0, 0, 0], [0, -1.0, 0, 0]]).double()
    goal = Goal(centroids=centroids, weights=weights[:, None].expand(2, 5, 4))
    found = posterior_of_target(z, goal)
    for row in range(2):
        alone = Goal(centroids=centroids, weights=weights[row])
        torch.testing.assert_close(found[row], posterior_of_target(z[row], alone))
