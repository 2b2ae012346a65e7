"""Choices of latents, gates, schedules and limits, without a model."""

import pytest
import torch

from sae_query_steer.arguments import check_number
from sae_query_steer.descent.control import (
    ActiveLatents,
    ExceptLatents,
    ExponentialDecay,
    GivenLatents,
    LatentAbove,
    LinearWarmUp,
    PosteriorBelow,
    TopLatents,
    opened,
)
from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.objectives import posterior_of_target
from sae_query_steer.descent.strength import by_row, each, limited, scheduled
from sae_query_steer.scopes.positions import TokenPositions

NAME = "blocks.2.attn.hook_q"


def randn(*shape, seed=2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem():
    """Latents [token=5 head=3 d_latent=7] and the second of four classes as target."""
    centroids = randn(4, 3, 7, seed=1).relu()
    variances = randn(4, 3, 7, seed=3).square()
    centroids[..., 6], variances[..., 6] = 0, 0
    return randn(5, 3, 7).relu(), Goal.towards(centroids, 1, variances)


def test_top_latents_are_those_whose_variance_the_class_explains_best():
    z, goal = problem()
    chosen = TopLatents(2)(z, goal, NAME, [0, 1, 2])
    assert chosen.sum(-1).tolist() == [2, 2, 2]
    for head in range(3):
        shares = []
        for latent in range(7):
            between = float(goal.centroids[:, head, latent].var(correction=0))
            within = float(goal.variances[:, head, latent].mean())
            shares.append(between / (between + within) if between + within else 0.0)
        best = sorted(range(7), key=shares.__getitem__)[-2:]
        assert chosen[head].nonzero().flatten().tolist() == sorted(best)
    assert TopLatents(99)(z, goal, NAME, [0, 1, 2]).all()
    with pytest.raises(ValueError, match="variances"):
        TopLatents(2)(z, Goal.towards(goal.centroids, 1), NAME, [0])


def test_given_latents_are_chosen_by_hook_name_and_head():
    z, goal = problem()
    latents = {NAME: {2: [3, 5], 0: [1]}, "blocks.0.attn.hook_q": {1: [0]}}
    chosen = GivenLatents(latents)(z[:, :2], goal, NAME, [1, 2])
    assert chosen.nonzero().tolist() == [[1, 3], [1, 5]]
    assert torch.equal(ExceptLatents(latents)(z[:, :2], goal, NAME, [1, 2]), ~chosen)
    assert ExceptLatents({})(z, goal, NAME, [0, 1, 2]).all()
    assert torch.equal(ActiveLatents()(z, goal, NAME, [0, 1, 2]), z > 0)
    with pytest.raises(ValueError, match=f"latent at {NAME} head 0 must .* <= 6, got 7"):
        GivenLatents({NAME: {0: [7]}})(z, goal, NAME, [0, 1, 2])


def test_gates_are_open_where_their_condition_holds():
    z, goal = problem()
    posterior = posterior_of_target(z, goal, 0.5)
    value = float(posterior.median())
    below = opened(PosteriorBelow(value, temperature=0.5), z, goal)
    assert torch.equal(below, posterior < value)
    assert below.any() and not below.all()
    assert torch.equal(opened(LatentAbove(3, 0.2), z, goal), z[..., 3] > 0.2)
    with pytest.raises(ValueError, match=r"\[5, 3\], got torch.bool \[5, 3, 7\]"):
        opened(lambda z, goal: z > 0, z, goal)
    with pytest.raises(ValueError, match=r"shape \[5, 3\], got torch.float32"):
        opened(lambda z, goal: z[..., 0], z, goal)


def test_schedules_give_factors_by_age():
    assert ExponentialDecay(2.0)(torch.tensor([0.0, 2.0])).tolist() == [1, 0.5]
    assert LinearWarmUp(4)(torch.tensor([0.0, 1.0, 4.0, 9.0])).tolist() == [0, 0.25, 1, 1]
    age = torch.arange(5.0)
    assert torch.equal(scheduled(lambda age: 3 * age, age), 3 * age)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (lambda age: -age - 1, "0 or more, got -5 to -1"),
        (lambda age: age / 0, "finite"),
        (lambda age: 3, r"\[5\], got 3"),
        (lambda age: age[:1], r"\[5\], got torch.float32 \[1\]"),
    ],
)
def test_a_schedule_that_gives_no_factors_is_refused(schedule, text, untyped):
    with pytest.raises(ValueError, match=text):
        scheduled(schedule, torch.arange(5.0))


def test_values_by_row_are_repeated_for_the_tokens_of_a_row():
    places = TokenPositions(
        row=torch.tensor([0, 2, 2, 1]), position=torch.tensor([3, 0, 1, 0]), n_rows=3
    )
    assert by_row("target", ["a", "b", "c"], places) == ["a", "c", "c", "b"]
    assert each("abc", "target") == ["abc"]
    assert each([3, 4], "n_steps") == [3, 4]
    with pytest.raises(ValueError, match="target is for 2 rows, the batch has 3"):
        by_row("target", ["a", "b"], places)
    with pytest.raises(ValueError, match=r"target .*got \[\]"):
        each([], "target")


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("most", [0.1, 1.9, 5.0, None])
def test_limits_hold_and_leave_unchanged_what_is_not_changed(most, keep_norm):
    queries, delta = randn(40, 4, 8), randn(40, 4, 8, seed=4)
    delta[0] = 0
    delta[1] = -3 * queries[1]
    delta[2] *= 1e-3
    out = limited(queries, delta, max_relative_change=most, keep_norm=keep_norm)
    change = out.norm(dim=-1) / queries.norm(dim=-1)
    assert torch.equal(out[0], delta[0])
    assert out.isfinite().all()
    if most is not None:
        assert (change <= most + 1e-5).all()
    if keep_norm:
        norm = (queries + out).norm(dim=-1)
        torch.testing.assert_close(norm, queries.norm(dim=-1), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(out[2], delta[2])  # short changes are not shortened
        lengthened = out * delta.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(lengthened, delta * out.norm(dim=-1, keepdim=True))
    if most == 0.1:
        torch.testing.assert_close(change[3:], torch.full_like(change[3:], 0.1))


def test_a_query_of_constant_norm_turns_towards_the_changed_query():
    queries, delta = randn(40, 4, 8), randn(40, 4, 8, seed=4)
    turned = limited(queries, delta, max_relative_change=None, keep_norm=True)
    cosine = torch.cosine_similarity(queries + delta, queries + turned, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TopLatents(0), ValueError, "m .*whole number >= 1, got 0"),
        (lambda: GivenLatents({NAME: {}}), ValueError, "latents .*at least one"),
        (lambda: GivenLatents({NAME: {0: ["x"]}}), TypeError, "latents .*'x'"),
        (lambda: PosteriorBelow(0.0), ValueError, "value .*> 0 and <= 1, got 0.0"),
        (lambda: ExponentialDecay(half_life=0.0), ValueError, "half_life .*> 0, got 0.0"),
        (lambda: LinearWarmUp(-2), ValueError, "n .*> 0, got -2"),
    ],
)
def test_invalid_controls_are_refused(untyped, make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("value", "settings", "error"),
    [
        (True, {}, TypeError),
        ("3", {}, TypeError),
        (2.5, {"whole": True}, TypeError),
        (float("nan"), {}, ValueError),
        (-float("inf"), {"most": 3}, ValueError),
        (2, {"least": 3}, ValueError),
        (3, {"above": 3}, ValueError),
        (3.5, {"most": 3}, ValueError),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(value, settings, error):
    check_number("n", 3, whole=True, least=3, above=2, most=3)
    range_ = "".join(f".* {v}" for v in settings.values() if v is not True)
    with pytest.raises(error, match=f"^n must be .*{range_}, got {value!r}$"):
        check_number("n", value, **settings)
