"""Attention targets whose scores are linear in the queries: the same steps without autograd."""

from dataclasses import replace

import pytest
import torch
from recipe_models import write_tiny
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_query_steer as sqs
from sae_query_steer.diagnostics.sae_scores import ConstantEncoder
from sae_query_steer.sae import QueryHeadTopKSAE, QueryHeadTopKSAEConfig
from sae_query_steer.sae.encoders import IdentityEncoder, decoded_difference, linear_decoder
from sae_query_steer.scopes import AtPositions, EveryPosition, ResponseTokens
from sae_query_steer.steering import AttentionSteerer, LookAt
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.where import Where

PROMPTS = ["w1 w20 w33 w5", "w20 w33", "w40 w41 w20 w33 w9 w17", "w20 w33 w2 w2 w3"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
END = sqs.LastPromptToken() | ResponseTokens()
PHRASE = LookAt("w20 w33")
SETTINGS = {
    "plain": {},
    "until": {"until": 0.5, "max_relative_change": None},
    "few latents": {"n_latents": 2},
    "several": {"look_at": (PHRASE, LookAt(AtPositions([0]), weight=-0.5), LookAt("w33", 0.3))},
    "away": {"look_at": LookAt("w20 w33", weight=-1.0), "max_relative_change": 0.1},
}


class BothWays(Edit):
    """Makes a change with and without autograd, and returns the latter."""

    needs_keys = True

    def __init__(self, descent) -> None:
        self.descent, self.found, self.linear = descent, [], True

    def change(self, activations, at, tokens, *, keys, record=False):
        assert (keys.linear is not None) == self.linear
        made = self.descent.change(activations, at, tokens, keys=keys, record=True)
        general = replace(keys)
        vars(general)["linear"] = None
        slow = self.descent.change(activations, at, tokens, keys=general, record=True)
        self.found.append((made, slow, activations.norm(dim=-1, keepdim=True)))
        return made


def compare(model, encoders, prompts=PROMPTS, *, scope=END, heads=None, linear=True, **settings):
    """Generate; at each token and head the changes are the same, and most are not 0."""
    both = BothWays(AttentionSteerer(encoders, **{"look_at": PHRASE, **settings}))
    both.linear = linear
    with Steerer(both, Where(both.descent.where.sites, scope=scope, heads=heads)).apply(model):
        model.generate(prompts, **GREEDY)
    assert len(both.found) >= 4
    for made, slow, norm in both.found:
        assert ((made.delta - slow.delta).norm(dim=-1) <= 1e-6 * norm[..., 0]).all()
        for name in ("loss", "mass_before", "mass_after"):
            ours, other = getattr(made, name), getattr(slow, name)
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert sum((made.delta.norm(dim=-1) > 0).float().mean() for made, *_ in both.found) > 1


@pytest.fixture(params=["sparse", "dense", "rotated"])
def encoders(request, tiny_models, saes):
    if request.param == "sparse":
        return saes
    rotated = request.param == "rotated"
    sites = sqs.query_sites(tiny_models["bridge"], [0, 2], rotated=rotated)
    return sqs.sae.identity_encoders(sites)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_equal_those_by_autograd(model, encoders, settings):
    compare(model, encoders, **settings)


@pytest.mark.parametrize("scope", [EveryPosition(), AtPositions([[2, 3], [1], [4, 6], [5, 7]])])
@pytest.mark.parametrize("heads", [None, [3, 1]])
def test_of_some_tokens_of_the_prompt_and_some_heads_too(model, encoders, scope, heads):
    compare(model, encoders, scope=scope | ResponseTokens(), heads=heads)


def test_of_one_row_too(model, encoders):
    compare(model, encoders, PROMPTS[:1], scope=EveryPosition())


def test_with_a_sliding_window_too(tmp_path):
    folder = write_tiny("mistralai/Mistral-7B-Instruct-v0.2", tmp_path / "model")
    model = sqs.load_model(str(folder), device="cpu")
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [1]))
    prompts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w3 w4"]
    compare(model, encoders, prompts, look_at=LookAt("w3 w4"), scope=EveryPosition())


CONFIGS = {
    "without rotary embedding": {},
    "partial rotary": {"positional_embedding_type": "rotary", "rotary_dim": 4},
    "adjacent pairs": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 6,
        "rotary_adjacent_pairs": True,
    },
    "another scale": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "attn_scale": 1.5,
        "use_attn_scale": True,
    },
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_of_every_kind_of_attention_that_is_linear(tiny_models, changes):
    model = random_model(tiny_models, **changes)
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model))
    compare(model, encoders, scope=EveryPosition())


@pytest.mark.parametrize("changes", [{"use_qk_norm": True}, {"attn_scores_soft_cap": 2.0}])
def test_a_norm_of_queries_or_a_soft_cap_is_not_linear(tiny_models, changes):
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8}
    model = random_model(tiny_models, **rotary, **changes)
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model))
    compare(model, encoders, linear=False)
    rotated = sqs.sae.identity_encoders(sqs.query_sites(model, rotated=True))
    compare(model, rotated, linear="use_qk_norm" in changes)


def random_model(tiny_models, **changes):
    settings = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 16}
    config = HookedTransformerConfig(**settings, d_vocab=64, act_fn="gelu", **changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return HookedTransformer(config, tokenizer=tiny_models["hooked"].tokenizer)


def test_a_new_prompt_of_equal_length_takes_nothing_from_the_one_before(model, encoders):
    steerer = AttentionSteerer(encoders, PHRASE, n_steps=3, scope=END)
    one, two = ["w1 w20 w33 w5 w9"], ["w4 w5 w20 w33 w8"]
    with steerer.apply(model):
        model.generate(one, **{**GREEDY, "max_new_tokens": 1})  # ends with as many keys
        after = logits(model, two)
    fresh = AttentionSteerer(encoders, PHRASE, n_steps=3, scope=END)
    with fresh.apply(model):
        assert torch.equal(logits(model, two), after)
        assert (logits(model, one) - after).abs().max() > 1e-3


def logits(model, prompts):
    output = model.generate(prompts, return_type="tokens", output_logits=True, **GREEDY)
    return torch.stack(output.logits, dim=1)


def test_scope_and_goal_are_asked_once_a_pass_and_hook_points_are_not_listed(model, monkeypatch):
    asked, looked, listed = [], [], []

    def scope(positions):
        asked.append(positions)
        return positions.valid

    def source(positions):
        looked.append(positions)
        return positions.index < 2

    encoders = sqs.sae.identity_encoders(sqs.query_sites(model))
    with AttentionSteerer(encoders, LookAt(source), scope=scope, n_steps=1).apply(model):
        kind = type(model)
        if isinstance(getattr(kind, "hook_dict", None), property):
            whole = kind.hook_dict.fget
            spy = property(lambda self: listed.append(1) or whole(self))
            monkeypatch.setattr(kind, "hook_dict", spy)
        model.generate(PROMPTS[:1], **GREEDY)
    assert len(asked) == 4
    assert len(looked) == 4
    assert len(listed) <= 1


class Halved(QueryHeadTopKSAE):
    def linear_decode(self, latents):
        return super().linear_decode(latents) / 2


class OwnDecode(IdentityEncoder):
    def decode(self, feature_acts, /):
        return feature_acts.tanh()


@pytest.mark.parametrize("rescale", [False, True])
def test_only_decoders_that_are_known_to_be_linear_are_taken_for_it(rescale):
    config = QueryHeadTopKSAEConfig(
        n_heads=3, d_head=4, d_sae_per_head=6, k=2, rescale_acts_by_decoder_norm=rescale
    )
    z, pull = torch.randn(5, 3, 6), torch.randn(5, 3, 4)
    sae = QueryHeadTopKSAE(config)
    decode, transposed = linear_decoder(sae)
    torch.testing.assert_close(decode(z), decoded_difference(sae, z, torch.zeros_like(z)))
    torch.testing.assert_close((decode(z) * pull).sum(), (z * transposed(pull)).sum())
    patched = QueryHeadTopKSAE(config)
    patched.linear_decode = lambda latents: latents[..., :4]
    for other in (
        Halved(config),
        patched,
        OwnDecode(n_heads=3, d_head=4),
        ConstantEncoder(torch.ones(3, 4)),
    ):
        assert linear_decoder(other) is None


def test_an_encoder_that_decodes_in_its_own_way_is_steered_by_its_own_way(model):
    sites = sqs.query_sites(model, [0])
    own = {site.hook_name: OwnDecode(n_heads=4, d_head=8) for site in sites}
    steerer = AttentionSteerer(own, PHRASE, max_relative_change=None, step_size=0.5)
    with steerer.apply(model, record=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    table = trace.to_dataframe()
    assert (table["mass_after"] > table["mass_before"]).all()
    assert table["delta_norm"].max() <= 2 * 8**0.5, "tanh is between -1 and 1"
