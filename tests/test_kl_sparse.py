"""KL-sparse SAEs: bounded latents whose means training brings to rho."""

import dataclasses

import pytest
import torch
from sae_cases import SIZES, new, randn, trained_like
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.util import temporary_seed

import sae_query_steer as sqs
from sae_query_steer.sae import QueryHeadKLSparseTrainingSAEConfig
from sae_query_steer.sae.penalised import bernoulli_kl
from sae_query_steer.training.saelens import HeadwiseTrainer

CONFIG = QueryHeadKLSparseTrainingSAEConfig(**SIZES, rho=0.2, kl_coefficient=0.7)


def step(x, weight: float = 0.7) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"kl": weight},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )


def literal_loss(sae, x, rho: float, weight: float) -> torch.Tensor:
    """The formula, latent by latent of head by head."""
    total = torch.tensor(0.0, dtype=x.dtype)
    for head in range(3):
        x_h = x[:, head]
        latents = 1 / (
            1 + torch.exp(-((x_h - sae.b_dec[head]) @ sae.W_enc[head] + sae.b_enc[head]))
        )
        error = latents @ sae.W_dec[head] + sae.b_dec[head] - x_h
        total = total + (error**2).sum(1).mean()
        for j in range(11):
            mean = sum(latents[:, j]) / len(x)
            total = total + weight * (
                rho * torch.log(rho / mean) + (1 - rho) * torch.log((1 - rho) / (1 - mean))
            )
    return total


def test_loss_and_gradient_are_those_of_the_literal_formula():
    sae = trained_like(dataclasses.replace(CONFIG, dtype="float64"))
    x = randn(20, 3, 6, dtype=torch.float64)
    loss, _ = sae.backward(step(x.flatten(-2)))
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    literal = literal_loss(sae, x, 0.2, 0.7)
    literal.backward()
    torch.testing.assert_close(loss, literal.detach(), rtol=1e-12, atol=0)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_divergence_is_zero_at_rho_alone_and_finite_at_the_ends():
    means = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.0])
    kl = bernoulli_kl(0.2, means)
    assert kl.isfinite().all()
    assert kl[2].abs() < 1e-6
    assert (kl[[0, 1, 3, 4]] > 0.03).all()


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.05, 0.3])
def test_training_brings_the_mean_of_every_latent_near_rho(rho):
    n_steps, batch = 600, 64
    batches = randn(n_steps, batch, 18)
    with temporary_seed(0):
        sae = new(dataclasses.replace(CONFIG, rho=rho, kl_coefficient=300.0, kl_warm_up_steps=50))
    assert (sae.encode(batches).mean((0, 1)) - 0.5).abs().max() < 0.05  # where they start
    settings = SAETrainerConfig(
        total_training_samples=n_steps * batch,
        train_batch_size_samples=batch,
        lr=1e-2,
        lr_end=1e-3,
        lr_decay_steps=200,
    )
    HeadwiseTrainer(cfg=settings, sae=sae, data_provider=iter(batches)).fit()
    assert (sae.encode(batches).mean((0, 1)) - rho).abs().max() < 0.1 * rho


def test_latents_are_bounded_and_inference_loads_back_exactly(tmp_path):
    sae, x = trained_like(CONFIG), randn(5, 3, 6)
    inference = sqs.sae.to_inference(sae)
    latents = inference.encode(x)
    assert latents.min() > 0
    assert latents.max() < 1
    assert torch.equal(inference(x), sae(x))
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(inference)
    assert torch.equal(loaded(x), sae(x))


def test_decoder_norms_can_not_be_folded():
    with pytest.raises(NotImplementedError, match="can't be folded into an encoder with sigmoid"):
        sqs.sae.to_inference(trained_like(CONFIG)).fold_W_dec_norm()
