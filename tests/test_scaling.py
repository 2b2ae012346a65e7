"""Queries scaled to a norm of sqrt(d_head) head by head, and folded away after training."""

import dataclasses
import json
import weakref

import pytest
import torch
from sae_cases import CONFIGS, SIZES, new, randn, solo, trained_like
from sae_lens import SAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler

import sae_query_steer as sqs
from sae_query_steer.sae import (
    QueryHeadKLSparseTrainingSAEConfig,
    QueryHeadTopKSAEConfig,
    QueryHeadTopKTrainingSAEConfig,
)
from sae_query_steer.training.saelens import HeadwiseTrainer
from sae_query_steer.training.scaling import HeadNorms, HeadwiseScaler

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_estimate_and_scaled_queries_are_bitwise_those_of_saelens_head_by_head(dtype):
    batches, ours = queries(7, dtype), HeadwiseScaler(3)
    stream = (batch.flatten(-2) for batch in batches)
    ours.estimate_scaling_factor(18, stream, n_batches_for_norm_estimate=5)
    assert len(list(stream)) == 2, "it must take as many batches as it is told"
    flat = batches[-1].flatten(-2)
    scaled, unscaled = ours.scale(flat), ours.unscale(flat)
    assert scaled.dtype == unscaled.dtype == dtype
    assert torch.equal(ours(flat), scaled)
    for head in range(3):
        theirs = ActivationScaler()
        alone = [batch[:, head].contiguous() for batch in batches]
        theirs.estimate_scaling_factor(6, iter(alone), n_batches_for_norm_estimate=5)
        assert float(ours.scaling_factor[head]) == theirs.scaling_factor
        assert torch.equal(scaled.unflatten(-1, (3, 6))[:, head], theirs.scale(alone[-1]))
        assert torch.equal(unscaled.unflatten(-1, (3, 6))[:, head], theirs.unscale(alone[-1]))


def test_scaled_queries_have_the_norm_sqrt_d_head_on_average_in_every_head():
    batches, scaler = queries(4), HeadwiseScaler(3)
    scaler.estimate_scaling_factor(18, iter(batches.flatten(-2)), n_batches_for_norm_estimate=4)
    scaled = scaler.scale(batches.flatten(-2)).unflatten(-1, (3, 6))
    torch.testing.assert_close(scaled.norm(dim=-1).mean((0, 1)), torch.full((3,), 6**0.5))


def test_a_large_query_in_one_head_changes_the_factor_of_no_other():
    batches = queries(4)
    factors = []
    for _ in range(2):
        norms = HeadNorms(3, 18)
        for batch in batches:
            norms.update(batch.flatten(-2))
        factors.append(norms.factors())
        batches[2, 7, 1] = 1e6
    assert torch.equal(factors[0][[0, 2]], factors[1][[0, 2]])
    assert factors[1][1] < factors[0][1] / 100


def test_no_batch_is_kept_while_the_norms_are_estimated():
    kept = []

    def served():
        while True:
            batch = queries(1)[0].flatten(-2)
            served_batch = weakref.ref(batch)
            yield batch
            del batch
            kept.append(served_batch() is not None)

    HeadwiseScaler(3).estimate_scaling_factor(18, served(), n_batches_for_norm_estimate=5)
    assert kept == [False] * 4


def test_unscaling_inverts_scaling_in_any_number_of_axes():
    x, scaler = queries(2, torch.float64).flatten(-2), scaler_with()
    assert not torch.allclose(scaler.scale(x), x)
    torch.testing.assert_close(scaler.unscale(scaler.scale(x)), x)
    torch.testing.assert_close(scaler.scale(x)[1], scaler.scale(x[1]), rtol=0, atol=0)


def test_without_factors_queries_stay_as_they_are():
    x, scaler = queries(1)[0].flatten(-2), HeadwiseScaler(3)
    assert scaler.scale(x) is x
    assert scaler.unscale(x) is x


@every_config
def test_a_folded_sae_on_raw_queries_is_the_unfolded_one_on_scaled_queries_scaled_back(config):
    sae = trained_like(dataclasses.replace(config, dtype="float64"))
    x, scaler = randn(50, 18, dtype=torch.float64), scaler_with()
    latents = sae.encode(scaler.scale(x)).unflatten(-1, (3, 11))
    expected = scaler.unscale(sae(scaler.scale(x)))
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


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (FACTORS[:2], "scaling_factor must be 1 or 3 finite numbers above 0, got tensor"),
        (FACTORS * torch.tensor([1.0, 0.0, 1.0]), "1 or 3 finite numbers above 0, got"),
        (FACTORS * torch.tensor([1.0, -1.0, 1.0]), "1 or 3 finite numbers above 0, got"),
        (float("nan"), "finite numbers above 0, got nan"),
        (float("inf"), "finite numbers above 0, got inf"),
        (0.0, "finite numbers above 0, got 0.0"),
    ],
)
def test_factors_that_can_not_be_folded_are_refused_before_a_weight_changes(factors, message):
    sae = trained_like(CONFIGS["batchtopk"])
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sae.fold_activation_norm_scaling_factor(factors)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


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


def test_norms_that_give_no_factor_are_refused():
    with pytest.raises(ValueError, match="d_in=17 is not a multiple of 3 heads: give the size of"):
        HeadNorms(3, 17)
    with pytest.raises(
        ValueError, match=r"activations of shape \[5, 17\] do not fit d_in=18: give them flat"
    ):
        HeadNorms(3, 18).update(randn(5, 17))
    with pytest.raises(ValueError, match="head 0 has mean norm 0.0 over 0 tokens"):
        HeadNorms(3, 18).factors()
    with pytest.raises(ValueError, match="n_batches_for_norm_estimate=0 is not allowed: give 1 or"):
        HeadwiseScaler(3).estimate_scaling_factor(18, iter([]), n_batches_for_norm_estimate=0)


@pytest.mark.parametrize(("value", "mean"), [(0.0, "0.0"), (float("nan"), "nan")])
def test_a_head_without_a_norm_is_named(value, mean):
    batch = randn(5, 3, 6)
    batch[:, 1] = value
    scaler = HeadwiseScaler(3)
    with pytest.raises(
        ValueError, match=f"head 1 has mean norm {mean} over 5 tokens, and no factor scales that"
    ):
        scaler.estimate_scaling_factor(18, iter([batch.flatten(-2)]), n_batches_for_norm_estimate=1)
    assert scaler.scaling_factor is None


def test_whitening_is_refused():
    with pytest.raises(NotImplementedError, match="whitening would mix the heads of a layer: use"):
        HeadwiseScaler(3).estimate_whitening(18, iter([]))


def test_a_stopped_trainer_gets_its_factors_back_exactly(tmp_path):
    settings = SAETrainerConfig(
        total_training_samples=100, train_batch_size_samples=50, lr_end=1e-4
    )
    config = dataclasses.replace(CONFIGS["topk"], normalize_activations=NORMALIZE)
    before, after = (
        HeadwiseTrainer(cfg=settings, sae=new(config), data_provider=iter(())) for _ in range(2)
    )
    before.activation_scaler.scaling_factor = FACTORS / 3
    before.save_trainer_state(tmp_path)
    after.load_trainer_state(tmp_path)
    assert torch.equal(after.activation_scaler.scaling_factor, FACTORS / 3)


@pytest.mark.parametrize("factors", [2.0, [1.0, 2.0]])
def test_a_file_with_factors_of_other_heads_is_refused(factors, tmp_path):
    (tmp_path / "scaler.json").write_text(json.dumps({"scaling_factor": factors}))
    with pytest.raises(ValueError, match="allowed is null or a list of one factor for each of 3"):
        HeadwiseScaler(3).load(tmp_path / "scaler.json")


def test_a_file_without_factors_leaves_none(tmp_path):
    HeadwiseScaler(3).save(str(tmp_path / "scaler.json"))
    scaler = scaler_with()
    scaler.load(tmp_path / "scaler.json")
    assert scaler.scaling_factor is None
