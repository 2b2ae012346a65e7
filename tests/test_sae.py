"""Query-head SAEs: block-diagonal, in both layouts, and SAELens's own."""

import dataclasses

import pytest
import torch
from sae_lens import (
    SAE,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput

import sae_query_steer as sqs

SIZES = {"n_heads": 3, "d_head": 6, "d_sae_per_head": 11}
CONFIGS = [
    sqs.QueryHeadTopKTrainingSAEConfig(**SIZES, k=4),
    sqs.QueryHeadTopKTrainingSAEConfig(**SIZES, k=4, rescale_acts_by_decoder_norm=False),
    sqs.QueryHeadStandardTrainingSAEConfig(**SIZES, l1_coefficient=0.3),
]
CLASSES = {
    sqs.QueryHeadTopKTrainingSAEConfig: sqs.QueryHeadTopKTrainingSAE,
    sqs.QueryHeadStandardTrainingSAEConfig: sqs.QueryHeadStandardTrainingSAE,
}


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained_like(config, seed: int = 1):
    """An SAE with weights that no initialisation gives: decoder rows of unequal norm, biases."""
    sae = CLASSES[type(config)](dataclasses.replace(config))
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + i, dtype=parameter.dtype) / 2)
    return sae


def solo(sae, head: int) -> TrainingSAE:
    """SAELens's own SAE with the weights of one head."""
    cfg = sae.cfg
    sizes = {"d_in": cfg.d_head, "d_sae": cfg.d_sae_per_head, "dtype": cfg.dtype}
    if isinstance(cfg, sqs.QueryHeadTopKTrainingSAEConfig):
        other = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                **sizes,
                k=cfg.k,
                rescale_acts_by_decoder_norm=cfg.rescale_acts_by_decoder_norm,
                aux_loss_coefficient=cfg.aux_loss_coefficient,
            )
        )
    else:
        other = StandardTrainingSAE(
            StandardTrainingSAEConfig(**sizes, l1_coefficient=cfg.l1_coefficient)
        )
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(getattr(sae, name)[head])
    return other


def step(x, dead=None, l1: float = 0.3) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"l1": l1},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture())
def test_each_head_encodes_and_decodes_as_saelens_does_alone(config):
    sae, x = trained_like(config), randn(5, 7, 3, 6)
    latents = sae.encode(x)
    for head in range(3):
        alone = solo(sae, head)
        torch.testing.assert_close(latents[..., head, :], alone.encode(x[..., head, :]))
        torch.testing.assert_close(
            sae.decode(latents)[..., head, :], alone.decode(latents[..., head, :])
        )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture())
def test_losses_and_gradients_are_the_sums_of_saelens_losses_head_by_head(config):
    config = dataclasses.replace(config, dtype="float64")
    sae, x = trained_like(config), randn(40, 18, dtype=torch.float64)
    # Heads with more dead latents than k_aux = 3, with fewer, and with none.
    dead = torch.zeros(3, 11, dtype=torch.bool)
    dead[0, :5] = dead[1, 2:4] = True
    ours = sae.training_forward_pass(step(x, dead.flatten()))
    ours.loss.backward()
    total: dict[str, torch.Tensor] = {}
    for head in range(3):
        alone = solo(sae, head)
        theirs = alone.training_forward_pass(step(x.unflatten(-1, (3, 6))[:, head], dead[head]))
        theirs.loss.backward()
        for name, value in theirs.losses.items():
            total[name] = total.get(name, torch.tensor(0.0)) + value
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(
                getattr(sae, name).grad[head], parameter.grad, rtol=1e-10, atol=1e-12
            )
    assert set(total) == set(ours.losses)
    for name, value in total.items():
        torch.testing.assert_close(ours.losses[name].double(), value.double())


def test_the_auxiliary_loss_is_not_zero_in_the_comparison_above():
    sae, x = trained_like(CONFIGS[0]), randn(40, 18)
    dead = torch.zeros(33, dtype=torch.bool)
    dead[:5] = True
    assert sae.training_forward_pass(step(x, dead)).losses["auxiliary_reconstruction_loss"] > 0.1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture())
def test_flat_in_gives_flat_and_headed_in_gives_headed(config):
    sae, x = trained_like(config), randn(2, 5, 3, 6)
    headed, flat = sae.encode(x), sae.encode(x.flatten(-2))
    assert headed.shape == (2, 5, 3, 11)
    assert flat.shape == (2, 5, 33)
    assert torch.equal(headed.flatten(-2), flat)
    assert torch.equal(sae.decode(headed).flatten(-2), sae.decode(flat))
    assert sae(x).shape == x.shape


def test_with_one_head_flat_and_headed_are_the_same_numbers_in_the_same_shape():
    sae = trained_like(
        sqs.QueryHeadTopKTrainingSAEConfig(n_heads=1, d_head=6, d_sae_per_head=11, k=2)
    )
    x = randn(4, 1, 6)
    assert torch.equal(sae.encode(x), sae.encode(x[:, 0])[:, None])


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5), (4, 17), (3,)])
def test_a_shape_that_is_neither_layout_raises(shape):
    with pytest.raises(
        ValueError, match=r"fit neither layout of this SAE: allowed are \[\.\.\., 3"
    ):
        trained_like(CONFIGS[0]).encode(randn(*shape))


def test_heads_are_independent():
    sae, x = trained_like(CONFIGS[0]), randn(9, 3, 6)
    before = sae.encode(x)
    x[:, 1] += 1
    after = sae.encode(x)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture())
def test_inference_gives_what_training_gave_and_loads_back_exactly(config, tmp_path):
    sae, x = trained_like(config), randn(5, 3, 6)
    inference = sqs.to_inference(sae)
    torch.testing.assert_close(inference(x), sae(x))
    assert not any(parameter.requires_grad for parameter in inference.parameters())
    sae.save_inference_model(tmp_path / "by saelens")
    inference.save_model(tmp_path / "by us")
    for folder in ("by saelens", "by us"):
        loaded = SAE.load_from_disk(tmp_path / folder)
        assert type(loaded) is type(inference)
        assert loaded.cfg == inference.cfg
        assert torch.equal(loaded(x), inference(x))


def test_a_training_checkpoint_loads_back_for_training(tmp_path):
    sae = trained_like(CONFIGS[0])
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_folding_the_decoder_norms_keeps_the_outputs():
    sae, x = trained_like(CONFIGS[0]), randn(5, 3, 6)
    before = sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(3, 11))
    torch.testing.assert_close(sae(x), before)


def test_decoder_rows_start_with_the_norm_that_was_asked_for():
    sae = sqs.QueryHeadTopKTrainingSAE(
        sqs.QueryHeadTopKTrainingSAEConfig(**SIZES, k=4, decoder_init_norm=0.25)
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((3, 11), 0.25))
    assert torch.equal(sae.W_enc, sae.W_dec.mT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 12}, "k=12 is not allowed: give 1 to d_sae_per_head=11"),
        ({"k": 0}, "k=0 is not allowed"),
        ({"d_sae_per_head": 0}, "d_sae_per_head=0 is not allowed"),
        ({"n_heads": 0}, "n_heads=0 with d_head=6 is not allowed"),
        ({"d_in": 17}, "d_in=17 contradicts 3 heads of 6 = 18"),
        ({"d_sae": 30}, "d_sae=30 contradicts 3 heads of 11 = 33"),
        ({"normalize_activations": "layer_norm"}, "it would mix the heads of a layer"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not supported"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sqs.QueryHeadTopKTrainingSAEConfig(**{**SIZES, "k": 4, **change})


def test_an_sae_without_heads_says_where_they_come_from():
    config = sqs.QueryHeadTopKTrainingSAEConfig(d_sae_per_head=11, k=2)
    with pytest.raises(ValueError, match="n_heads and d_head are not set"):
        sqs.QueryHeadTopKTrainingSAE(config)
