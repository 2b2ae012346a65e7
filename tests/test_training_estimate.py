"""The paper's models at their true sizes, without their weights; and what a run will take."""

import re
from dataclasses import asdict

import pytest
import torch
from command_line import invoke
from recipe_models import PUBLISHED, write_config, write_tiny
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM
from wheel_check import word_tokenizer

import sae_query_steer as sqs
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.shapes import model_shape
from sae_query_steer.training.estimate import FORWARD_RATIO, estimate_training
from sae_query_steer.training.saelens import HeadwiseTrainer, trainer_config

MISTRAL, MISTRAL_3, PHI3 = PUBLISHED
SAE = TopK(d_sae_per_head=1024, k=32)


@pytest.mark.parametrize(
    ("name", "parameters", "d_head", "numbers"),
    [
        (MISTRAL, 7_241_732_096, 128, 65_536),
        (MISTRAL_3, 7_248_023_552, 128, 65_536),
        (PHI3, 3_821_079_552, 96, 196_608),
    ],
)
def test_the_published_configs_give_the_published_sizes(
    name, parameters, d_head, numbers, tmp_path
):
    shape = model_shape(str(write_config(name, tmp_path / "config")))
    assert shape.n_parameters == parameters
    assert (shape.n_layers, shape.n_heads, shape.d_head) == (32, 32, d_head)
    assert shape.key_value_numbers == numbers


@pytest.mark.parametrize("name", [MISTRAL, PHI3])
def test_a_shape_is_that_of_the_model_that_is_loaded(name, tmp_path):
    folder = write_tiny(name, tmp_path / "model")
    shape = model_shape(str(folder))
    model = sqs.load_model(str(folder), device="cpu", dtype=torch.bfloat16)
    assert shape.sites() == sqs.query_sites(model)
    assert shape.n_ctx == model.cfg.n_ctx
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.n_parameters == sum(p.numel() for p in plain.parameters())
    for count, block in zip(shape.block_parameters, plain.model.layers, strict=True):
        assert count == sum(p.numel() for p in block.parameters())
    # Fused projections are split in place: no second copy lies in memory. The buffers are small.
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in model.parameters()}
    assert sum(s.nbytes() for s in held.values()) < 1.01 * 2 * shape.n_parameters


def test_mistral_at_its_true_size_has_the_query_sites_of_its_shape(tmp_path):
    folder = write_config(MISTRAL, tmp_path / "config")
    word_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
        model = TransformerBridge.boot_transformers(
            str(folder), hf_model=plain, dtype=torch.bfloat16, device="meta"
        )
    sites = sqs.query_sites(model, [8, 20])
    assert sites == model_shape(str(folder)).sites([20, 8])
    names = [site.hook_name for site in sites]
    for query in read_activations(model, torch.ones(2, 6, dtype=torch.long), names).values():
        assert (query.shape, query.dtype) == ((2, 6, 32, 128), torch.bfloat16)


# TransformerLens splits fused weights only where they have values: one layer of the true width.
def test_phi3_at_its_true_width_has_the_query_sites_of_its_shape(tmp_path):
    true = {name: PUBLISHED[PHI3][name] for name in ("hidden_size", "num_attention_heads")}
    true |= {"num_key_value_heads": 32, "num_hidden_layers": 1}
    folder = write_tiny(PHI3, tmp_path / "model", **true)
    model = sqs.load_model(str(folder), device="cpu", dtype=torch.bfloat16)
    (site,) = sqs.query_sites(model)
    assert (site.n_heads, site.d_head) == (32, 96)
    tokens = torch.tensor([[1, 7, 9, 12]])
    (query,) = read_activations(model, tokens, [site.hook_name]).values()
    inner = model.original_model.model
    with torch.no_grad():
        block = inner.layers[0]
        normed = block.input_layernorm(inner.embed_tokens(tokens))
        weight = block.self_attn.qkv_proj.weight[: site.d_in]
        expected = (normed @ weight.T).unflatten(-1, (32, 96))
    torch.testing.assert_close(query, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("d_head", [128, 96])
def test_a_layer_of_the_true_size_trains_and_takes_the_disk_that_was_estimated(d_head, tmp_path):
    site = sqs.QuerySite(layer=0, n_heads=32, d_head=d_head)
    config = TrainingConfig(sae=SAE, training_tokens=64, train_batch_size_tokens=64)
    sae = sqs.sae.QueryHeadTopKTrainingSAE(
        sqs.sae.QueryHeadTopKTrainingSAEConfig(n_heads=32, d_head=d_head, **asdict(SAE))
    )
    queries = torch.randn(64, site.d_in, generator=torch.Generator().manual_seed(0))
    before = sae.W_dec.detach().clone()
    HeadwiseTrainer(cfg=trainer_config(config, "cpu"), sae=sae, data_provider=iter(())).step(
        queries
    )
    assert (sae.W_dec != before).flatten(1).any(1).all(), "every head took the step"
    sqs.QuerySAEs({site.hook_name: sqs.sae.to_inference(sae)}).save(tmp_path / "saes")
    written = sum(path.stat().st_size for path in (tmp_path / "saes").rglob("*") if path.is_file())
    (folder,) = [name for name in (MISTRAL, PHI3) if PUBLISHED[name]["hidden_size"] == site.d_in]
    shape = model_shape(str(write_config(folder, tmp_path / "config")))
    told = estimate_training(shape, shape.sites([0]), config)
    assert told.saved_bytes == 2 * 32 * d_head * 1024 * 4
    assert told.saved_bytes < written < 1.02 * told.saved_bytes


def test_the_estimate_counts_what_its_formulas_say(tmp_path):
    shape = model_shape(str(write_config(MISTRAL, tmp_path / "config")))
    told = estimate_training(
        shape,
        shape.sites([2, 5]),
        TrainingConfig(
            sae=SAE,
            training_tokens=10_000,
            train_batch_size_tokens=1000,
            context_size=256,
        ),
        model_item=2,
    )
    assert told.model_bytes == 2 * 7_241_732_096
    assert told.training_bytes == 4 * told.saved_bytes
    assert told.disk_bytes == 7 * told.saved_bytes
    assert told.buffer_bytes == 64 * 256 * 2 * 4096 * 2
    block = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14336 + 2 * 4096
    assert told.model_flops == 2 * 6 * block
    assert told.sae_flops == 2 * 6 * 2 * 4096 * 1024
    assert told.seconds(1e12) == pytest.approx(FORWARD_RATIO * 10_000 * 12 * block / 1e12)
    with pytest.raises(ValueError, match="flops_per_second must be .* > 0, got 0.0"):
        told.seconds(0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--layers": "30-32"}, "no query site at layer 32: the model has 32 layers (0 to 31)"),
        ({"--training-tokens": "100"}, "training_tokens must be at least one step of"),
        ({"--context-size": "99999"}, "context_size must be at most n_ctx=4096, got 99999"),
        ({"--flops": "0"}, "flops_per_second must be a finite number > 0"),
        ({"--flops": "1e12", "--dry-run": None}, "--flops must be given with --dry-run only"),
        ({"--dtype": "int8"}, "--dtype"),
        ({"--model": "/none/such"}, "no model folder /none/such"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_and_writes_nothing(change, message, tmp_path):
    (tmp_path / "texts.txt").write_text("a text", encoding="utf-8")
    given = {
        "--model": write_config(PHI3, tmp_path / "config"),
        "--layers": "8-20",
        "--training-tokens": "500000",
        "--sae.d-sae-per-head": "64",
        "--texts": tmp_path / "texts.txt",
        "--out": tmp_path / "saes",
        "--dry-run": "",
    } | change
    words = [w for pair in given.items() if pair[1] is not None for w in map(str, pair) if w]
    done = invoke(["train", "topk", *words])
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        raise done.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "texts.txt"]
