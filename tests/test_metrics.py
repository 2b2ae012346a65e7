import math
import re

import pytest
import torch
from scipy.stats import norm

from sae_query_steer.diagnostics.metrics import (
    kl_divergence,
    total_variation,
    wilson_interval,
)
from sae_query_steer.training.reconstruction import ReconstructionMoments

N_TOKENS, N_HEADS, D_HEAD, D_SAE = 23, 3, 5, 7


def measured():
    """Queries, their reconstructions and latents; heads and latents differ in every score."""
    generator = torch.Generator().manual_seed(31)
    x = 2 + torch.randn(N_TOKENS, N_HEADS, D_HEAD, generator=generator)
    noise = torch.randn(N_TOKENS, N_HEADS, D_HEAD, generator=generator)
    reconstruction = x + noise * torch.tensor([0.1, 0.5, 1.5])[:, None]
    latents = torch.randn(N_TOKENS, N_HEADS, D_SAE, generator=generator)
    latents = (latents - torch.tensor([0.0, 0.5, 1.0])[:, None]).relu()
    latents[:, 1, 4] = 0
    latents[:, 1, 5] = torch.arange(N_TOKENS) == 0  # Fires in the first batch only.
    latents[:, 2, :3] = 0
    return x, reconstruction, latents


def moments(x, reconstruction, latents, *, splits=(N_TOKENS,)) -> ReconstructionMoments:
    made = ReconstructionMoments()
    for batch in zip(
        x.split(splits), reconstruction.split(splits), latents.split(splits), strict=True
    ):
        made.update(*batch)
    return made


@pytest.mark.parametrize("splits", [(23,), (1, 22), (9, 3, 11)])
def test_scores_streamed_in_batches_are_those_of_all_tokens_at_once(splits):
    x, reconstruction, latents = measured()
    made = moments(x, reconstruction, latents, splits=splits)
    assert made.n_tokens == N_TOKENS
    for head in range(N_HEADS):
        q, r, z = x[:, head].double(), reconstruction[:, head].double(), latents[:, head]
        variance = ((q - q.mean(0)) ** 2).sum(-1).mean()
        explained = 1 - ((q - r) ** 2).sum(-1).mean() / variance
        torch.testing.assert_close(made.explained_variance()[head], explained)
        fired = [[bool(value > 0) for value in token] for token in z]
        n_fired = sum(map(sum, fired)) / N_TOKENS
        assert made.l0()[head].item() == pytest.approx(n_fired, rel=1e-6)
        n_dead = sum(not any(latent) for latent in zip(*fired, strict=True))
        assert made.dead_share()[head].item() == pytest.approx(n_dead / D_SAE)
    assert made.dead_share().tolist() == pytest.approx([0, 1 / 7, 3 / 7])


def test_a_perfect_reconstruction_explains_all_and_the_mean_explains_nothing():
    x, _, latents = measured()
    assert torch.equal(moments(x, x, latents).explained_variance(), torch.ones(3).double())
    mean = moments(x.double(), x.double().mean(0).expand(x.shape), latents)
    torch.testing.assert_close(
        mean.explained_variance(), torch.zeros(3).double(), rtol=0, atol=1e-12
    )


def test_half_precision_queries_are_summed_in_64_bits():
    x, reconstruction, latents = (t.bfloat16() for t in measured())
    low = moments(x, reconstruction, latents).explained_variance()
    high = moments(x.double(), reconstruction.double(), latents).explained_variance()
    assert torch.equal(low, high)


def test_kl_divergence_is_its_formula_in_nats():
    generator = torch.Generator().manual_seed(4)
    log_p = torch.randn(2, 3, 5, generator=generator).double().log_softmax(-1)
    log_q = torch.randn(2, 3, 5, generator=generator).double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    expected = sum(p[..., i] * (p[..., i] / q[..., i]).log() for i in range(5))
    torch.testing.assert_close(kl_divergence(log_p, log_q), expected, rtol=0, atol=1e-12)
    assert kl_divergence(log_p, log_p).eq(0).all()


def test_a_token_of_probability_zero_adds_nothing_to_the_divergence():
    log_p = torch.tensor([0.25, 0.75, 0.0]).log()
    log_q = torch.tensor([0.5, 0.25, 0.25]).log()
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(3)
    assert float(kl_divergence(log_p, log_q)) == pytest.approx(expected)
    assert float(kl_divergence(log_p, log_p)) == 0


def test_total_variation_is_the_probability_that_changes_hands():
    log_p = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]).log()
    log_q = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]).log()
    assert total_variation(log_p, log_q).tolist() == pytest.approx([0.5, 1.0])
    assert torch.equal(total_variation(log_p, log_q), total_variation(log_q, log_p))
    assert total_variation(log_p, log_p).eq(0).all()


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (1, 1), (7, 23), (60, 61), (300, 300)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_ends_of_the_interval_are_the_shares_at_which_the_score_test_turns(hits, n, confidence):
    z = norm.isf((1 - confidence) / 2)
    share = hits / n
    low, high = wilson_interval(hits, n, confidence=confidence)
    assert low < high
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, abs=1e-12)


def test_the_interval_is_that_of_the_textbook():
    # Wilson's formula by hand: 15 of 20, z = 1.959964.
    z, n, share = 1.959964, 20, 0.75
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert wilson_interval(15, 20) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert wilson_interval(15, 20) == pytest.approx((0.531, 0.888), abs=1e-3)


def test_the_interval_holds_the_share_and_mirrors_with_the_misses():
    for hits in range(14):
        low, high = wilson_interval(hits, 13)
        assert 0 <= low <= hits / 13 <= high <= 1
        assert wilson_interval(13 - hits, 13) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson_interval(0, 13)[0] == 0
    assert wilson_interval(13, 13)[1] == 1


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_hits_that_are_not_among_those_counted_are_refused(hits, n):
    text = f"n must be 1 or more and hits 0 to n, got n={n} and hits={hits}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        wilson_interval(hits, n)
