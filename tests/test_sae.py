"""Query-head SAEs: block-diagonal, in both layouts, and SAELens's own."""

import dataclasses

import pytest
import torch
from sae_cases import CONFIGS, SIZES, randn, step, trained_like
from sae_lens import SAE, TrainingSAE

import sae_query_steer.sae as sqs_sae
from sae_query_steer.config import ARCHITECTURES, MatryoshkaBatchTopK

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
        sqs_sae.QueryHeadTopKTrainingSAEConfig(n_heads=1, d_head=6, d_sae_per_head=11, k=2)
    )
    x = randn(4, 1, 6)
    assert torch.equal(sae.encode(x), sae.encode(x[:, 0])[:, None])


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5), (4, 17), (3,)])
def test_a_shape_that_is_neither_layout_raises(shape):
    with pytest.raises(
        ValueError, match=r"queries must be \[\.\.\., 3, 6\] \(headed\) or \[\.\.\., 18\]"
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
    inference = sqs_sae.to_inference(sae)
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
    sae = sqs_sae.QueryHeadTopKTrainingSAE(
        sqs_sae.QueryHeadTopKTrainingSAEConfig(**SIZES, k=4, decoder_init_norm=0.25)
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((3, 11), 0.25))
    assert torch.equal(sae.W_enc, sae.W_dec.mT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 0}, "n_heads=0, d_head=6"),
        ({"d_in": 17}, "d_in must be left out or 18, of all heads, got 17"),
        ({"d_sae": 30}, "d_sae must be left out or 33, of all heads, got 30"),
        ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none'.*'hook_z'"),
    ],
)
def test_sizes_that_contradict_the_heads_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sqs_sae.QueryHeadTopKTrainingSAEConfig(**{**SIZES, "k": 4, **change})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("TopKTraining", {"k": 12}, "k must be .*11, got 12"),
        ("TopK", {"k": 12}, "k must be .*11, got 12"),
        ("TopK", {"k": 4, "d_sae_per_head": 0}, "d_sae_per_head must .* > 0, got 0"),
        ("StandardTraining", {"l1_coefficient": -1.0}, "l1_coefficient must be .* got -1.0"),
        ("GatedTraining", {"l1_warm_up_steps": -5}, "l1_warm_up_steps must be .* got -5"),
        ("JumpReLUTraining", {"jumprelu_bandwidth": 0.0}, "jumprelu_bandwidth must be .* got 0.0"),
        ("KLSparseTraining", {"rho": 0.0}, "rho must be .* got 0.0"),
        ("BatchTopKTraining", {"k": 11.5}, "k must be .*11, got 11.5"),
        (
            "MatryoshkaBatchTopKTraining",
            {"k": 2.0, "matryoshka_widths": [4, 9]},
            r"matryoshka_widths must .*11, got \(4, 9\)",
        ),
    ],
)
def test_a_config_has_the_checks_of_the_plain_settings(config, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(sqs_sae, f"QueryHead{config}SAEConfig")(**{**SIZES, **settings})


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_saelens_config_of_plain_settings_has_their_values(settings):
    own = {"d_sae_per_head": 48, "apply_b_dec_to_input": False}
    if settings is MatryoshkaBatchTopK:
        own["matryoshka_widths"] = (16, 48)
    values = settings(**own)
    config = sqs_sae.training_config(values, n_heads=3, d_head=6)
    assert (config.d_in, config.d_sae, config.architecture()) == (18, 144, settings.name)
    for name, value in dataclasses.asdict(values).items():
        assert getattr(config, name) == value


def test_an_sae_without_heads_says_where_they_come_from():
    config = sqs_sae.QueryHeadTopKTrainingSAEConfig(d_sae_per_head=11, k=2)
    with pytest.raises(ValueError, match="n_heads and d_head must be set"):
        sqs_sae.QueryHeadTopKTrainingSAE(config)


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


def test_decoder_norms_of_1_can_be_folded_whatever_the_config():
    sae = sqs_sae.to_inference(trained_like(CONFIGS["topk"]))
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    assert sae.cfg.rescale_acts_by_decoder_norm is False
    sae.fold_W_dec_norm()
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_sparse_latents_are_decoded_as_dense_ones():
    sae = sqs_sae.to_inference(trained_like(CONFIGS["topk"]))
    latents = sae.encode(randn(5, 18))
    assert torch.equal(sae.decode(latents.to_sparse()), sae.decode(latents))
