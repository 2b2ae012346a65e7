"""TopK's step without autograd gives the loss, gradients and firing counts of the one with it."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

import sae_query_steer as sqs
from sae_query_steer.sae import fused_topk as module
from sae_query_steer.sae.fused_topk import fused_topk

H, D, S = 3, 8, 24


def make_sae(dtype="float64", **changes) -> sqs.sae.QueryHeadTopKTrainingSAE:
    config = sqs.sae.QueryHeadTopKTrainingSAEConfig(
        **{"n_heads": H, "d_head": D, "d_sae_per_head": S, "k": 4, "dtype": dtype, **changes}
    )
    generator = torch.Generator().manual_seed(0)
    sae = sqs.sae.QueryHeadTopKTrainingSAE(config)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return sae


def step_of(x: torch.Tensor, dead: torch.Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )


def by_autograd(sae, step) -> tuple:
    """Loss, counts and gradients, as the base class finds them."""
    sae.zero_grad()
    loss, fired = super(sqs.sae.QueryHeadTopKTrainingSAE, sae).backward(step)
    return loss, fired, {name: p.grad.clone() for name, p in sae.named_parameters()}


def fused(sae, step) -> tuple:
    sae.zero_grad()
    loss, fired = sae.backward(step)
    return loss, fired, {name: p.grad.clone() for name, p in sae.named_parameters()}


def assert_equal(sae, step, rtol=1e-12):
    torch.testing.assert_close(fused(sae, step), by_autograd(sae, step), rtol=rtol, atol=rtol)


def queries(n: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, H * D, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("k", [1, 4, S])
def test_a_step_is_that_of_autograd(subtract, rescale, k):
    sae = make_sae(k=k, apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale)
    assert_equal(sae, step_of(queries(50)))


def test_a_step_in_32_bits_is_that_of_autograd():
    assert_equal(make_sae("float32"), step_of(queries(50, torch.float32)), rtol=2e-5)


def test_bfloat16_takes_the_same_latents_and_counts_them_exactly():
    sae, step = make_sae("bfloat16"), step_of(queries(300, torch.bfloat16))
    (_, fired, grads), (_, expected, _) = fused(sae, step), by_autograd(sae, step)
    assert fired.dtype == torch.float32
    assert (fired - expected).abs().sum() <= 0.02 * expected.sum()
    assert all(grad.dtype == torch.bfloat16 for grad in grads.values())


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 24])
def test_tiles_make_up_the_whole(n_tokens, monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE_TOKENS", 8)
    assert_equal(make_sae(), step_of(queries(n_tokens)))


@pytest.mark.parametrize("n_dead", [1, 3, 12])
def test_the_auxiliary_loss_of_dead_latents_is_added(n_dead):
    dead = torch.zeros(H, S, dtype=torch.bool)
    dead[0, :n_dead] = dead[2, 5] = True
    sae, step = make_sae(), step_of(queries(50), dead.flatten())
    assert_equal(sae, step)
    assert fused(sae, step)[0] > fused(sae, step_of(queries(50)))[0]


def test_of_equal_latents_no_more_than_k_fire():
    sae = make_sae()
    with torch.no_grad():  # every latent of a head is one of two
        sae.W_enc.copy_(sae.W_enc[..., :1].expand(sae.W_enc.shape))
        sae.b_enc.copy_(torch.tensor([2.0, 1.0]).repeat(S // 2).expand(sae.b_enc.shape))
        sae.W_dec.copy_(torch.eye(D).repeat(S // D, 1))  # norms of 1 without rounding
    step = step_of(queries(50))
    counts = fused(sae, step)[1].reshape(H, S)
    assert_equal(sae, step)
    assert (counts.sum(-1) <= 4 * 50).all()
    assert (counts.sum(-1) > 0).all()


def test_where_nothing_is_positive_nothing_fires():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    loss, fired, grads = fused(sae, step_of(queries(5)))
    assert not fired.any()
    assert not grads["W_enc"].any()
    assert_equal(sae, step_of(queries(5)))


def test_the_residual_is_query_minus_reconstruction():
    sae = make_sae()
    x = queries(9)
    headed = x.unflatten(-1, (H, D)).transpose(0, 1).contiguous()
    _, residual, _, _ = fused_topk(
        headed,
        *(p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)),
        k=4,
        apply_b_dec_to_input=True,
        rescale_by_decoder_norm=True,
    )
    expected = (x - sae(x)).unflatten(-1, (H, D)).transpose(0, 1)
    torch.testing.assert_close(residual, expected.detach())
