"""Queries scaled to a norm of sqrt(d_head) head by head, and folded away after training."""

import dataclasses

import pytest
import torch
from sae_cases import CONFIGS, SIZES, new, randn, solo, trained_like
from sae_lens import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

import sae_query_steer as sqs
from sae_query_steer.sae import (
    QueryHeadKLSparseTrainingSAEConfig,
    QueryHeadTopKSAEConfig,
    QueryHeadTopKTrainingSAEConfig,
)
from sae_query_steer.training.saelens import HeadwiseScaler

NORMALIZE = "expected_average_only_in"
SIZE = torch.tensor([0.02, 1.0, 30.0])[:, None]
FACTORS = torch.tensor([3.0, 0.5, 20.0], dtype=torch.float64)

every_config = pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(config, normalize_activations=NORMALIZE)
        for config in (*CONFIGS.values(), QueryHeadKLSparseTrainingSAEConfig(**SIZES))
    ],
    ids=[*CONFIGS, "kl_sparse"],
)


def queries(n_batches: int, dtype=torch.float32) -> torch.Tensor:
    return ((randn(n_batches, 50, 3, 6) + 0.3) * SIZE).to(dtype)


def scaler_with(factors=FACTORS) -> HeadwiseScaler:
    scaler = HeadwiseScaler(3)
    scaler.scaling_factor = factors
    return scaler


def test_a_second_estimate_starts_afresh():
    scaler = HeadwiseScaler(3)
    for size in (1.0, 3.0):
        scaler.estimate_scaling_factor(18, iter([size * torch.ones(5, 18)] * 2), 2)
        assert scaler.scaling_factor.tolist() == pytest.approx([1 / size] * 3)


def factors_of(batches) -> torch.Tensor:
    scaler = HeadwiseScaler(3)
    for batch in batches:
        scaler.update(batch.flatten(-2))
    scaler.set_factors(6)
    assert scaler.scaling_factor is not None
    return scaler.scaling_factor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_and_scaled_queries_are_bitwise_those_of_saelens_head_by_head(dtype):
    batches = queries(7, dtype)
    ours = scaler_with(factors_of(batches[:5]))
    scaled = ours.scale(batches[-1].flatten(-2))
    assert scaled.dtype == dtype
    assert torch.equal(ours(batches[-1].flatten(-2)), scaled)
    for head in range(3):
        theirs = ActivationScaler()
        alone = [batch[:, head].contiguous() for batch in batches]
        theirs.estimate_scaling_factor(6, iter(alone), n_batches_for_norm_estimate=5)
        assert float(ours.scaling_factor[head]) == theirs.scaling_factor
        assert torch.equal(scaled.unflatten(-1, (3, 6))[:, head], theirs.scale(alone[-1]))


def test_a_large_query_in_one_head_changes_the_factor_of_no_other():
    batches = queries(4)
    before = factors_of(batches)
    batches[2, 7, 1] = 1e6
    after = factors_of(batches)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert after[1] < before[1] / 100


def test_queries_are_scaled_in_any_number_of_axes_and_unchanged_without_factors():
    x, scaler = queries(2, torch.float64).flatten(-2), scaler_with()
    assert not torch.allclose(scaler.scale(x), x)
    assert torch.equal(scaler.scale(x)[1], scaler.scale(x[1]))
    assert HeadwiseScaler(3).scale(x) is x


@every_config
def test_a_folded_sae_on_raw_queries_is_the_unfolded_one_on_scaled_queries_scaled_back(config):
    sae = trained_like(dataclasses.replace(config, dtype="float64"))
    x, scaler = randn(50, 18, dtype=torch.float64), scaler_with()
    latents = sae.encode(scaler.scale(x)).unflatten(-1, (3, 11))
    expected = scaler_with(1 / FACTORS).scale(sae(scaler.scale(x)))
    sae.fold_activation_norm_scaling_factor(FACTORS)
    assert sae.cfg.normalize_activations == "none"
    torch.testing.assert_close(sae(x), expected)
    if getattr(config, "rescale_acts_by_decoder_norm", False):
        latents = latents / FACTORS[:, None]  # measured in decoder rows, which are divided
    torch.testing.assert_close(sae.encode(x).unflatten(-1, (3, 11)), latents)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_folding_is_bitwise_saelens_folding_head_by_head(config, dtype):
    config = dataclasses.replace(config, dtype=dtype, normalize_activations=NORMALIZE)
    sae = trained_like(config)
    solos = [solo(sae, head) for head in range(3)]
    factors = torch.tensor([1 / 3, 0.7, 20.1], dtype=torch.float64)
    sae.fold_activation_norm_scaling_factor(factors)
    for alone, factor, head in zip(solos, factors.tolist(), range(3), strict=True):
        alone.fold_activation_norm_scaling_factor(factor)
        for name, value in alone.state_dict().items():
            assert torch.equal(sae.state_dict()[name][head], value), name


@pytest.mark.parametrize("name", ["batchtopk", "batchtopk, rows as they are", "matryoshka"])
def test_inference_fires_on_raw_queries_where_the_running_threshold_was_passed_on_scaled(name):
    config = dataclasses.replace(CONFIGS[name], normalize_activations=NORMALIZE, dtype="float64")
    sae, x = trained_like(config), randn(50, 3, 6, dtype=torch.float64)
    pre = sae.encode_with_hidden_pre(x * FACTORS[:, None])[1]
    expected = (pre > sae.topk_threshold[:, None]) & (pre > 0)
    sae.fold_activation_norm_scaling_factor(FACTORS)
    fires = sqs.sae.to_inference(sae).encode(x) > 0
    assert 0 < fires.double().mean() < 1
    assert torch.equal(fires, expected)


def test_one_number_folds_as_that_number_for_every_head():
    one, each = (trained_like(CONFIGS["batchtopk"]) for _ in range(2))
    one.fold_activation_norm_scaling_factor(2.3)
    each.fold_activation_norm_scaling_factor(torch.full((3,), 2.3, dtype=torch.float64))
    for name, value in one.state_dict().items():
        assert torch.equal(value, each.state_dict()[name])


@every_config
def test_what_takes_scaled_queries_is_not_saved_for_inference_until_it_is_folded(config, tmp_path):
    sae = trained_like(config)
    message = "must be 'none' to save.*fold_activation_norm_scaling_factor"
    with pytest.raises(ValueError, match=message):
        sqs.sae.to_inference(sae)
    with pytest.raises(ValueError, match=message):
        sae.save_inference_model(tmp_path)
    assert not list(tmp_path.iterdir())
    sae.fold_activation_norm_scaling_factor(FACTORS)
    sae.save_inference_model(tmp_path)
    x = randn(5, 3, 6)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.normalize_activations == "none"
    assert torch.equal(loaded(x), sqs.sae.to_inference(sae)(x))


def test_a_checkpoint_of_a_run_on_scaled_queries_loads_for_training_but_not_for_inference(tmp_path):
    sae = new(dataclasses.replace(CONFIGS["topk"], normalize_activations=NORMALIZE))
    sae.save_model(tmp_path)
    assert TrainingSAE.load_from_disk(tmp_path).cfg.normalize_activations == NORMALIZE
    with pytest.raises(ValueError, match="must be 'none' for inference"):
        SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    ("config", "normalize", "message"),
    [
        (QueryHeadTopKTrainingSAEConfig, "layer_norm", r"one of \('none', 'exp.*got 'layer_norm'"),
        (QueryHeadTopKTrainingSAEConfig, "covariance_whitening", "got 'covariance_whitening'"),
        (QueryHeadTopKSAEConfig, "layer_norm", "'none' for inference.*got 'layer_norm'"),
        (QueryHeadTopKSAEConfig, NORMALIZE, f"'none' for inference.*got '{NORMALIZE}'"),
    ],
)
def test_normalizations_that_would_mix_heads_are_refused(config, normalize, message, untyped):
    with pytest.raises(ValueError, match=message):
        config(**SIZES, k=4, normalize_activations=normalize)


@pytest.mark.parametrize(("value", "mean"), [(0.0, "0.0"), (float("nan"), "nan")])
def test_a_head_without_a_norm_is_named(value, mean):
    batch = randn(5, 3, 6)
    batch[:, 1] = value
    with pytest.raises(ValueError, match=rf"mean norm of every head .* got \[\S+, {mean}, \S+\]"):
        factors_of([batch])
