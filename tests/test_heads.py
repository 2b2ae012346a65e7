"""Plain SAELens SAEs of single heads: equal to ours, without us, scored by SAELens, and back."""

import pytest
import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations
from sae_query_steer.sae import heads as module
from sae_query_steer.sae.heads import join_heads, split_heads
from sae_query_steer.steering.attach import attached_saes

HOOK = "blocks.1.attn.hook_q"
SIZES = {"n_heads": 3, "d_head": 6, "d_sae_per_head": 11}
METADATA = {
    "hook_name": HOOK,
    "model_name": "tiny",
    "context_size": 9,
    "prepend_bos": True,
    "training_tokens": 1234,
}
KINDS = {
    "topk": (sqs.sae.QueryHeadTopKSAE, sqs.sae.QueryHeadTopKSAEConfig, {"k": 4}),
    "topk, not rescaled": (
        sqs.sae.QueryHeadTopKSAE,
        sqs.sae.QueryHeadTopKSAEConfig,
        {"k": 4, "rescale_acts_by_decoder_norm": False},
    ),
    "topk, b_dec not in the input": (
        sqs.sae.QueryHeadTopKSAE,
        sqs.sae.QueryHeadTopKSAEConfig,
        {"k": 4, "apply_b_dec_to_input": False},
    ),
    "standard": (sqs.sae.QueryHeadStandardSAE, sqs.sae.QueryHeadStandardSAEConfig, {}),
    "standard, 64 bits": (
        sqs.sae.QueryHeadStandardSAE,
        sqs.sae.QueryHeadStandardSAEConfig,
        {"dtype": "float64"},
    ),
}
KINDS |= {
    "jumprelu": (sqs.sae.QueryHeadJumpReLUSAE, sqs.sae.QueryHeadJumpReLUSAEConfig, {}),
    "gated": (sqs.sae.QueryHeadGatedSAE, sqs.sae.QueryHeadGatedSAEConfig, {}),
}
CLASSES = {"topk": TopKSAE, "standard": StandardSAE, "jumprelu": JumpReLUSAE, "gated": GatedSAE}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def make(kind: str):
    """An SAE of three heads with weights that no initialisation gives."""
    sae_class, config_class, settings = KINDS[kind]
    sae = sae_class(config_class(**SIZES, **settings, metadata=SAEMetadata(**METADATA)))
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i + 1) / 2)
    return sae.requires_grad_(False)


def plain(head: int | None, **changes) -> TopKSAE:
    """A plain SAE of one head of another origin than ours."""
    metadata = {**METADATA, "hook_head_index": head, **changes.pop("metadata", {})}
    config = {"d_in": 6, "d_sae": 11, "k": 4, **changes}
    return TopKSAE(TopKSAEConfig(**config, metadata=SAEMetadata(**metadata)))


def assert_equal_outputs(one: SAE, ours, head: int) -> None:
    """Of a head: latents, decoding and forward, for flat tokens and for batches of rows."""
    for shape in ((7,), (2, 5)):
        x = randn(*shape, 3, 6, seed=9)
        latents = ours.encode(x)
        close = {"rtol": 0, "atol": 1e-5}
        assert (latents[..., head, :] != 0).any()
        torch.testing.assert_close(one.encode(x[..., head, :]), latents[..., head, :], **close)
        torch.testing.assert_close(
            one.decode(latents[..., head, :]), ours.decode(latents)[..., head, :], **close
        )
        torch.testing.assert_close(one(x[..., head, :]), ours(x)[..., head, :], **close)
        flat = ours.encode(x.flatten(-2)).unflatten(-1, (3, 11))
        torch.testing.assert_close(one.encode(x[..., head, :]), flat[..., head, :], **close)


def test_each_head_is_a_plain_saelens_sae_with_equal_outputs_and_loads_back(kind, tmp_path):
    ours = make(kind)
    for head, one in enumerate(split_heads(ours)):
        assert type(one) is CLASSES[one.cfg.architecture()]
        assert_equal_outputs(one, ours, head)
        one.save_model(tmp_path / str(head))
        loaded = SAE.load_from_disk(tmp_path / str(head))
        assert type(loaded) is type(one)
        assert loaded.cfg == one.cfg
        assert_equal_outputs(loaded, ours, head)


def test_a_head_carries_the_metadata_of_its_layer_and_says_which_head_it_is(kind):
    ours = make(kind)
    for head, one in enumerate(split_heads(ours)):
        said = one.cfg.metadata.to_dict()
        assert said == {**ours.cfg.metadata.to_dict(), "hook_head_index": head, "n_heads": 3}
        assert (one.cfg.d_in, one.cfg.d_sae, one.cfg.dtype) == (6, 11, ours.cfg.dtype)
    assert "hook_head_index" not in ours.cfg.metadata


def test_the_heads_share_no_memory_and_need_no_gradient():
    ours = make("topk")
    one = split_heads(ours)[1]
    assert not any(parameter.requires_grad for parameter in one.parameters())
    one.W_enc.zero_()
    one.cfg.metadata.model_name = "another"
    assert ours.W_enc.all()
    assert ours.cfg.metadata.model_name == "tiny"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_split_and_then_joined_the_weights_are_bitwise_the_same(kind, order, tmp_path):
    ours = make(kind)
    ones = split_heads(ours)
    for head, one in enumerate(ones):
        one.save_model(tmp_path / str(head))
    loaded = [SAE.load_from_disk(tmp_path / str(head)) for head in range(3)]
    for heads in (ones, loaded):
        joined = join_heads(heads[head] for head in order)
        assert type(joined) is type(ours)
        assert joined.cfg == ours.cfg
        assert joined.state_dict().keys() == ours.state_dict().keys()
        for name, value in ours.state_dict().items():
            assert torch.equal(joined.state_dict()[name], value)
        assert torch.equal(joined(randn(5, 3, 6)), ours(randn(5, 3, 6)))
        assert not any(parameter.requires_grad for parameter in joined.parameters())


def test_saes_that_saelens_trained_head_by_head_are_joined(tmp_path):
    for head in range(2):
        solo = TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=6, d_sae=11, k=4, rescale_acts_by_decoder_norm=True)
        )
        with torch.no_grad():
            for parameter in solo.parameters():
                parameter.copy_(randn(*parameter.shape, seed=head) / 2)
        solo.cfg.metadata.hook_name = HOOK
        solo.cfg.metadata.hook_head_index = head
        solo.cfg.metadata.seed = head  # one of the things in which solo runs differ
        solo.save_inference_model(tmp_path / str(head))
    ones = [SAE.load_from_disk(tmp_path / str(head)) for head in range(2)]
    joined = join_heads(reversed(ones))
    x = randn(4, 2, 6)
    for head, one in enumerate(ones):
        torch.testing.assert_close(joined(x)[:, head], one(x[:, head]), rtol=0, atol=1e-5)
    assert joined.cfg.metadata.hook_name == HOOK
    assert not {"seed", "hook_head_index"} & set(joined.cfg.metadata.keys())


def test_heads_that_rescale_by_norms_of_1_are_joined_with_heads_that_do_not(tmp_path):
    # The referee is SAELens: one of its own training SAEs, as it saves it, among ours.
    ours = make("topk, not rescaled")
    solo = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=11, k=4))
    with torch.no_grad():
        for i, parameter in enumerate(solo.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i + 20) / 2)
    solo.cfg.metadata = SAEMetadata(**METADATA, hook_head_index=1)
    solo.save_inference_model(tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    parts = split_heads(ours)
    assert [one.cfg.rescale_acts_by_decoder_norm for one in (theirs, parts[1])] == [True, False]
    joined = join_heads([theirs, parts[0], parts[2]])
    assert joined.cfg == ours.cfg
    assert_equal_outputs(theirs, joined, 1)
    for head in (0, 2):
        assert_equal_outputs(parts[head], joined, head)
    for name, value in theirs.state_dict().items():
        assert torch.equal(joined.state_dict()[name][1], value)
    assert theirs.cfg.rescale_acts_by_decoder_norm


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, r"same rescale_acts.*, got True for head 0 and False for head 1 .*fold_W_dec_norm\(\)"),
        (2, "same rescale_acts_by_decoder_norm, got False for head 0 and True for head 2"),
    ],
)
def test_heads_that_rescale_by_other_norms_are_joined_once_these_are_folded(
    place, message, monkeypatch
):
    parts = split_heads(make("topk, not rescaled"))
    parts[place] = split_heads(make("topk"))[place]
    parts[place].W_dec.div_(parts[place].W_dec.norm(dim=-1, keepdim=True))
    parts[place].W_dec[[3, 7]] *= torch.tensor([[0.5], [1.25]])
    before = parts[place](randn(7, 6))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(module, "with_weights", None)
        join_heads(parts)
    parts[place].fold_W_dec_norm()
    joined = join_heads(parts)
    assert not joined.cfg.rescale_acts_by_decoder_norm
    assert_equal_outputs(parts[place], joined, place)
    torch.testing.assert_close(parts[place](randn(7, 6)), before)


def test_a_joined_sae_is_saved_loaded_and_steered_as_any_other(tiny_models, saes, tmp_path):
    again = sqs.QuerySAEs({name: join_heads(split_heads(sae)) for name, sae in saes.items()})
    again.save(tmp_path / "saes")
    for name, sae in sqs.QuerySAEs.load(tmp_path / "saes").items():
        assert sae.cfg == saes[name].cfg
        x = randn(6, 4, 8)
        assert torch.equal(sae(x), saes[name](x))


def test_the_global_random_state_is_left_as_it_was():
    ours = make("topk")
    before = torch.get_rng_state()
    join_heads(split_heads(ours))
    assert torch.equal(torch.get_rng_state(), before)


def test_saelens_scores_one_head_on_the_queries_of_that_head(model, saes):
    # The referee: explained variance, L0 and KL from the same tokens, by hand.
    rows = torch.randint(4, 52, (8, 16), generator=torch.Generator().manual_seed(6))
    ours = saes["blocks.2.attn.hook_q"]
    queries = read_activations(model, rows, ["blocks.2.attn.hook_q"])["blocks.2.attn.hook_q"]
    bare = model(rows).log_softmax(-1).detach()
    for head in (0, 3):
        sae = split_heads(ours)[head]
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=[{"tokens": row} for row in rows.tolist()],
            streaming=False,
            store_batch_size_prompts=8,
            context_size=16,
        )
        scores, per_latent = run_evals(
            sae,
            store,
            model,
            ActivationScaler(),
            get_eval_everything_config(
                n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
            ),
            exclude_special_tokens=False,
        )
        x = queries[:, :, head].flatten(0, 1)
        residual = (x - ours(queries)[:, :, head].flatten(0, 1)).square().sum(-1).mean()
        explained = 1 - residual / (x - x.mean(0)).square().sum(-1).mean()
        l0 = (ours.encode(queries)[:, :, head] != 0).sum(-1).float().mean()
        assert scores["reconstruction_quality"]["explained_variance"] == pytest.approx(
            explained.item(), abs=1e-4
        )
        assert scores["sparsity"]["l0"] == pytest.approx(l0.item())
        preserved = scores["model_behavior_preservation"]
        with torch.no_grad(), attached_saes(model, saes, layers=[2], heads=[head]):
            log_probs = model(rows).log_softmax(-1)
        kl = (bare.exp() * (bare - log_probs)).sum(-1).mean()
        assert preserved["kl_div_with_sae"] == pytest.approx(kl.item(), rel=1e-3)
        assert 0 < preserved["kl_div_with_sae"] < preserved["kl_div_with_ablation"]
        assert len(per_latent["feature_density"]) == 16


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        ([], "each of the heads 0 to 0 once, got \\[\\]"),
        ([plain(0), plain(2)], r"heads 0 to 2 once, got \[0, 2\]"),
        ([plain(0), plain(1), plain(1)], r"heads 0 to 1 once, got \[0, 1, 1\]"),
        ([plain(0), plain(None)], r"heads 0 to 0 once, got \[0, None\]"),
        ([plain(-1)], r"heads 0 to 0 once, got \[-1\]"),
        ([plain(0), plain(1, k=5)], "same k, got 4 for head 0 and 5 for head 1"),
        ([plain(1, d_sae=12), plain(0)], "same d_sae, got 11 for head 0 and 12 for head 1"),
        ([plain(0), plain(1, d_in=5)], "same d_in, got 6 for head 0 and 5 for head 1"),
        ([plain(0), plain(1, dtype="float64")], r"same dtype, .*'float64' for head 1.*sae\.to"),
        (
            [plain(0), plain(1, metadata={"hook_name": "blocks.2.attn.hook_q"})],
            "same hook_name.*'blocks.1.attn.hook_q' .*'blocks.2.attn.hook_q' for head 1",
        ),
        (
            [plain(0), plain(1, metadata={"model_name": "large"})],
            "same model_name, got 'tiny' for head 0 and 'large' for head 1",
        ),
        (
            [plain(0, metadata={"hook_name": None})],
            "'None' is no query hook point",
        ),
        (
            [plain(0, metadata={"hook_name": "blocks.1.attn.hook_k"})],
            "'blocks.1.attn.hook_k' is no query hook point",
        ),
        (
            [plain(0, normalize_activations="layer_norm")],
            "normalize_activations must be 'none' for inference .* got 'layer_norm'",
        ),
        ([plain(0), plain(1, metadata={"n_heads": 3})], "heads 0 to 2 once"),
        (
            [GatedSAE(GatedSAEConfig(d_in=6, d_sae=11, metadata=plain(0).cfg.metadata))],
            r"one of .*topk.*, got 'gated'",
        ),
        (
            [
                plain(0),
                StandardSAE(StandardSAEConfig(d_in=6, d_sae=11, metadata=plain(1).cfg.metadata)),
            ],
            "same architecture, got 'topk' for head 0 and 'standard'",
        ),
    ],
)
def test_heads_that_do_not_make_one_layer_are_refused(saes, message, monkeypatch):
    # Whatever can be joined in time: none of these may be.
    monkeypatch.setattr(module, "with_weights", None)
    if "gated" in message:
        monkeypatch.setattr(module, "PLAIN", {"query_head_topk": "topk"})
    with pytest.raises(ValueError, match=message):
        join_heads(saes)


def test_what_is_no_plain_inference_sae_is_refused():
    with pytest.raises(TypeError, match="saes must be plain .* got QueryHeadTopKSAE"):
        join_heads([make("topk")])
    training = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=11, k=4))
    with pytest.raises(TypeError, match="saes must be.*save_inference.*TopKTrainingSAE"):
        join_heads([plain(0), training])


def test_what_cannot_be_split_is_refused(untyped, monkeypatch):
    with pytest.raises(TypeError, match="query-head SAE for inference, got TopKSAE"):
        split_heads(plain(0))
    training = sqs.sae.QueryHeadTopKTrainingSAE(
        sqs.sae.QueryHeadTopKTrainingSAEConfig(**SIZES, k=4)
    )
    with pytest.raises(TypeError, match="got QueryHeadTopKTrainingSAE; to_inference"):
        split_heads(training)
    monkeypatch.delitem(module.PLAIN, "query_head_standard")
    with pytest.raises(ValueError, match="one of .*query_head_topk.* got 'query_head_standard'"):
        split_heads(make("standard"))
