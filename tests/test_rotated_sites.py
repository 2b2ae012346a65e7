"""Sites after rotary embedding, `hook_rot_q`: SAEs, centroids and steering there."""

import re

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
NAMES = ["blocks.0.attn.hook_rot_q", "blocks.2.attn.hook_rot_q"]


def logits(model, prompts, **changes):
    output = model.generate(
        prompts, return_type="tokens", output_logits=True, **{**GREEDY, **changes}
    )
    return torch.stack(output.logits, dim=1)


@pytest.fixture(scope="module")
def saes(tiny_models) -> sqs.QuerySAEs:
    model = tiny_models["bridge"]
    return sqs.train_query_saes(
        model,
        torch.randint(4, 52, (32, 16), generator=torch.Generator().manual_seed(5)),
        sqs.query_sites(model, [0, 2], rotated=True),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=16, k=3),
            training_tokens=1024,
            train_batch_size_tokens=128,
            metric_tokens=0,
            lr=3e-3,
        ),
    )


@pytest.fixture(scope="module")
def make(tiny_models, saes, examples):
    targets = sqs.CentroidTargetBuilder(tiny_models["bridge"], saes).fit(
        sqs.tokenize_examples(tiny_models["bridge"], examples)
    )

    def make(**changes):
        settings = {
            "target": "create",
            "objective": sqs.SquaredDistance(),
            "n_steps": 3,
            "step_size": 0.3,
            "scope": sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
        }
        return sqs.LatentGradientSteerer(saes, targets, **{**settings, **changes})

    return make


def test_rotation_keeps_the_norm_of_every_query_and_turns_all_but_those_at_position_0(model):
    tokens = torch.tensor([[1, 9, 9, 30, 12]])
    plain, rotated = (sqs.query_sites(model, [1], rotated=value)[0] for value in (False, True))
    assert rotated.hook_name == "blocks.1.attn.hook_rot_q"
    found = read_activations(model, tokens, [plain.hook_name, rotated.hook_name])
    before, after = (found[site.hook_name] for site in (plain, rotated))
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert (after - before).norm(dim=-1)[:, 1:].min() > 1e-3


def test_a_rotated_site_comes_back_from_its_hook_name():
    site = sqs.QuerySite(layer=2, n_heads=3, d_head=5, rotated=True)
    assert sqs.QuerySite.from_hook_name(site.hook_name, n_heads=3, d_head=5) == site


def test_saes_and_centroids_of_rotated_sites_are_named_and_saved_as_such(saes, make, tmp_path):
    assert list(saes) == NAMES
    assert list(make().targets.means) == NAMES
    saes.save(tmp_path / "saes")
    assert list(sqs.QuerySAEs.load(tmp_path / "saes")) == NAMES
    assert sqs.sae.split_heads(saes[NAMES[0]])[1].cfg.metadata.hook_name == NAMES[0]


def test_no_step_is_the_identity_and_steps_are_not(model, make):
    bare = logits(model, PROMPTS)
    with make(n_steps=0).apply(model):
        assert torch.equal(logits(model, PROMPTS), bare)
    with make().apply(model):
        assert (logits(model, PROMPTS) - bare).abs().max() > 1e-3


def test_cache_on_equals_cache_off_and_a_batch_equals_its_rows(model, make):
    with make().apply(model):
        batch = logits(model, PROMPTS)
        torch.testing.assert_close(
            logits(model, PROMPTS, use_past_kv_cache=False), batch, rtol=0, atol=1e-5
        )
        for row, prompt in enumerate(PROMPTS):
            alone = logits(model, [prompt])[0]
            torch.testing.assert_close(alone, batch[row], rtol=0, atol=1e-5)


def test_both_hosts_give_equal_steered_logits(tiny_models, make):
    found = []
    for model in tiny_models.values():
        with make().apply(model):
            found.append(logits(model, PROMPTS))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_two_sites_of_one_layer_want_a_steerer_each(tiny_models):
    model = tiny_models["bridge"]
    sites = [sqs.query_sites(model, [0], rotated=value)[0] for value in (False, True)]
    encoders = sqs.sae.identity_encoders(sites)
    text = (
        "blocks.0.attn.hook_q and blocks.0.attn.hook_rot_q are sites of the same layer: make a "
        "steerer of each, and join them with JoinedSteerers"
    )
    with (
        pytest.raises(ValueError, match=f"^{re.escape(text)}$"),
        sqs.steering.attached_saes(model, encoders),
    ):
        pass


def test_a_model_without_rotary_embedding_has_no_rotated_sites():
    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=4, d_vocab=9, n_ctx=7, act_fn="gelu"
    )
    text = "no hook point blocks.0.attn.hook_rot_q: this architecture has "
    with pytest.raises(ValueError, match=re.escape(text)):
        sqs.query_sites(HookedTransformer(config), rotated=True)
