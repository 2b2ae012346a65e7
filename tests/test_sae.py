"""Query-head SAEs: block-diagonal, in both layouts, and SAELens's own."""

import dataclasses

import pytest
import torch
from sae_cases import CONFIGS, SIZES, randn, step, trained_like
from sae_lens import SAE, TrainingSAE

import sae_query_steer as sqs
import sae_query_steer.sae as sqs_sae

every_architecture = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOPK = CONFIGS["topk"]


@every_architecture
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
        trained_like(TOPK).encode(randn(*shape))


@every_architecture
def test_heads_are_independent(config):
    sae, x = trained_like(config), randn(9, 3, 6)
    before = sae.encode(x)
    x[:, 1] += 1
    after = sae.encode(x)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


@every_architecture
def test_inference_gives_what_training_gave_and_loads_back_exactly(config, tmp_path):
    sae, x = trained_like(config), randn(5, 3, 6)
    inference = sqs.sae.to_inference(sae)
    if inference.cfg.architecture() == config.architecture():
        torch.testing.assert_close(inference(x), sae(x))
    assert not any(parameter.requires_grad for parameter in inference.parameters())
    sae.save_inference_model(tmp_path / "by saelens")
    inference.save_model(tmp_path / "by us")
    for folder in ("by saelens", "by us"):
        loaded = SAE.load_from_disk(tmp_path / folder)
        assert type(loaded) is type(inference)
        assert loaded.cfg == inference.cfg
        assert torch.equal(loaded(x), inference(x))


@every_architecture
def test_a_training_checkpoint_loads_back_for_training(config, tmp_path):
    sae = trained_like(config)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    for name, value in sae.state_dict().items():
        back = loaded.state_dict()[name]
        # SAELens casts all that it loads to the dtype of the SAE, running thresholds too.
        assert torch.equal(back, value.to(back.dtype))


@every_architecture
def test_folding_the_decoder_norms_keeps_the_outputs(config):
    sae, x = trained_like(config), randn(5, 3, 6)
    if getattr(config, "rescale_acts_by_decoder_norm", True) is False:
        with pytest.raises(NotImplementedError, match="they would change which latents are the k"):
            sae.fold_W_dec_norm()
        return
    before = sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(3, 11))
    torch.testing.assert_close(sae(x), before)


def test_decoder_rows_start_with_the_norm_that_was_asked_for():
    sae = sqs.sae.QueryHeadTopKTrainingSAE(
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
        (
            {"normalize_activations": "layer_norm"},
            r"normalize_activations='layer_norm' is not supported for QueryHeadTopKTrainingSAE"
            r"Config: allowed are \['none', 'expected_average_only_in'\]; all else would mix the",
        ),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not supported"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sqs.QueryHeadTopKTrainingSAEConfig(**{**SIZES, "k": 4, **change})


def test_an_sae_without_heads_says_where_they_come_from():
    config = sqs.QueryHeadTopKTrainingSAEConfig(d_sae_per_head=11, k=2)
    with pytest.raises(ValueError, match="n_heads and d_head are not set"):
        sqs.sae.QueryHeadTopKTrainingSAE(config)


JUMPRELU = sqs_sae.QueryHeadJumpReLUTrainingSAEConfig
BATCHTOPK = sqs_sae.QueryHeadBatchTopKTrainingSAEConfig
GATED = sqs_sae.QueryHeadGatedTrainingSAEConfig
MATRYOSHKA = sqs_sae.QueryHeadMatryoshkaBatchTopKTrainingSAEConfig


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (JUMPRELU, {"jumprelu_sparsity_loss_mode": "l1"}, "='l1' is not allowed: give 'step'"),
        (
            JUMPRELU,
            {"jumprelu_sparsity_loss_mode": "quadratic"},
            "target_l0=None is not allowed with 'quadratic': give more than 0, at most d_sae",
        ),
        (
            JUMPRELU,
            {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 12.0},
            "target_l0=12.0 is not allowed with 'quadratic'.*at most d_sae_per_head=11",
        ),
        (JUMPRELU, {"jumprelu_bandwidth": 0.0}, "jumprelu_bandwidth=0.0 is not allowed: give a"),
        (
            JUMPRELU,
            {"jumprelu_init_threshold": -0.1},
            "jumprelu_init_threshold=-0.1 is not allowed",
        ),
        (JUMPRELU, {"jumprelu_tanh_scale": float("nan")}, "jumprelu_tanh_scale=nan is not allowed"),
        (JUMPRELU, {"l0_coefficient": -1.0}, "l0_coefficient=-1.0 is not allowed: give a finite"),
        (JUMPRELU, {"pre_act_loss_coefficient": -1.0}, "pre_act_loss_coefficient=-1.0 is not"),
        (JUMPRELU, {"l0_warm_up_steps": -1}, "l0_warm_up_steps=-1 is not allowed: give 0 or more"),
        (BATCHTOPK, {"k": 11.5}, "k=11.5 is not allowed: give more than 0, at most d_sae_per_head"),
        (BATCHTOPK, {"k": 0}, "k=0 is not allowed"),
        (BATCHTOPK, {"k": 2, "topk_threshold_lr": 0.0}, "topk_threshold_lr=0.0 is not allowed"),
        (GATED, {"l1_coefficient": float("inf")}, "l1_coefficient=inf is not allowed"),
        (GATED, {"l1_warm_up_steps": -5}, "l1_warm_up_steps=-5 is not allowed"),
        (MATRYOSHKA, {"k": 2}, r"matryoshka_widths=\[\] is not allowed: give two or more rising"),
        (MATRYOSHKA, {"k": 2, "matryoshka_widths": [11]}, "for one width use QueryHeadBatchTopK"),
        (MATRYOSHKA, {"k": 2, "matryoshka_widths": [4, 4, 11]}, "is not allowed: give two or more"),
        (MATRYOSHKA, {"k": 2, "matryoshka_widths": [0, 11]}, "rising widths of 1 or more"),
        (MATRYOSHKA, {"k": 2, "matryoshka_widths": [4, 9]}, "the last of them d_sae_per_head=11"),
    ],
)
def test_settings_of_an_architecture_that_cannot_work_are_refused(
    config, settings, message, untyped
):
    with pytest.raises(ValueError, match=message):
        config(**SIZES, **settings)


def test_thresholds_learn_from_batches_of_any_number_of_axes():
    config = dataclasses.replace(CONFIGS["jumprelu"], jumprelu_bandwidth=2.0)
    x, grads = randn(4, 5, 3, 6), []
    for batch in (x, x.flatten(0, 1)):
        sae = trained_like(config)
        sae(batch).sum().backward()
        grads.append(sae.threshold.grad)
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads)


def test_thresholds_of_jumprelu_in_training_stay_in_float32_and_never_act_below_zero():
    sae = trained_like(CONFIGS["jumprelu"]).to(dtype=torch.bfloat16)
    assert sae.threshold.dtype == torch.float32
    assert sae.W_enc.dtype == torch.bfloat16
    with torch.no_grad():
        sae.threshold[1, 2] = -0.5
    sae.training_forward_pass(step(randn(8, 18)))
    assert sae.threshold[1, 2] == 0


def test_a_head_in_which_nothing_fires_keeps_its_running_threshold():
    sae = trained_like(CONFIGS["batchtopk"])
    before = sae.topk_threshold.clone()
    with torch.no_grad():
        sae.b_enc[1] = -1e3
    output = sae.training_forward_pass(step(randn(8, 18)))
    moved = sae.topk_threshold != before
    assert moved.tolist() == [True, False, True]
    assert output.metrics["topk_threshold"] == sae.topk_threshold.mean()
    fired = (output.feature_acts.unflatten(-1, (3, 11)) > 0).sum((0, 2))
    assert fired.tolist() == [21, 0, 21]  # int(2.7 * 8) of each head
