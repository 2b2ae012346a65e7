"""Edits that see keys: the attention computed again is the model's own."""

import pytest
import torch
from recipe_models import PUBLISHED, write_tiny
from test_engine import NAME, PROMPTS
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM

import sae_query_steer as sqs
from sae_query_steer.sites import Site
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import Where

GREEDY = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
PATTERN = "blocks.1.attn.hook_pattern"
HOOKS = {
    "bare": [],
    "own key hook": [("blocks.1.attn.hook_k", lambda k, hook: k * 1.5 + 0.1)],
    "own query hook": [(NAME, lambda q, hook: q * 1.5 + 0.1)],
}


class Look(Edit):
    """Adds an offset, and keeps the patterns of the queries before and after it."""

    needs_keys = True

    def __init__(self, offset=0.0) -> None:
        self.offset, self.seen = offset, []

    def change(self, activations, at, tokens, *, keys, record=False):
        delta = torch.zeros_like(activations) + self.offset
        after = keys.scores(activations + delta).softmax(-1)
        before = keys.scores(activations).softmax(-1)
        self.seen.append((tokens, before, after, keys.position))
        return QueryChange(delta=delta)


def look(model, offset=0.0, scope=None, **where) -> Steerer:
    scope = sqs.scopes.EveryPosition() if scope is None else scope
    return Steerer(Look(offset), Where(sqs.query_sites(model, [1]), scope=scope, **where))


def assert_same_patterns(model, run, hooks=()):
    """Run with an offset; the patterns that the edit foresaw are those that the model then has."""
    patterns = []
    steerer = look(model, 0.7, heads=[0, 3])
    with (
        steerer.apply(model),
        model.hooks(fwd_hooks=[*hooks, (PATTERN, lambda p, hook: patterns.append(p.clone()))]),
    ):
        run()
    assert len(patterns) == len(steerer.edit.seen) > 0
    for pattern, (tokens, before, after, position) in zip(patterns, steerer.edit.seen, strict=True):
        found = pattern[tokens.row[:, None], torch.tensor([0, 3]), tokens.column[:, None]]
        torch.testing.assert_close(after, found.float(), rtol=0, atol=1e-5)
        assert (after - before).abs().max() > 1e-3 or after.shape[-1] == 1
        assert position.shape[1] == pattern.shape[-1]
        own = position[tokens.row] == tokens.position[:, None]
        assert own.any(1).all(), "the token's own key is there"
        assert (after[~(position[tokens.row] >= 0)[:, None].expand_as(after)] == 0).all()


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("cache", [True, False])
def test_the_attention_foreseen_is_that_of_the_model(model, cache, hooks):
    """Grouped heads; a batch with padding on the left; and the user's own hooks."""

    def run():
        model.generate(PROMPTS, use_past_kv_cache=cache, **GREEDY)

    assert_same_patterns(model, run, hooks)


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-Instruct-v0.2"])
@pytest.mark.parametrize("cache", [True, False])
def test_with_a_sliding_window(tmp_path, name, cache):
    folder = write_tiny(name, tmp_path / "model")
    model = sqs.load_model(str(folder), device="cpu")
    assert PUBLISHED[name]["model_type"] == "mistral"

    def run():
        model.generate(["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w3 w4"], use_past_kv_cache=cache, **GREEDY)

    assert_same_patterns(model, run)


SCALED = {
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5, "sliding_window": 4},
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", SCALED)
def test_with_norms_of_queries_and_keys_and_with_a_soft_cap(tiny_folder, tmp_path, kind, cache):
    from transformers import AutoTokenizer

    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        **SCALED[kind],
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        hf = AutoModelForCausalLM.from_config(config)
        for layer in hf.model.layers if kind == "qwen3" else ():
            torch.nn.init.uniform_(layer.self_attn.q_norm.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 1.5)
    hf.save_pretrained(tmp_path / kind)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / kind)
    model = sqs.load_model(str(tmp_path / kind), device="cpu")
    assert isinstance(model, TransformerBridge)
    assert_same_patterns(model, lambda: model.generate(PROMPTS, use_past_kv_cache=cache, **GREEDY))


def test_without_rotary_embedding(tiny_models):
    config = HookedTransformerConfig(
        n_layers=2, d_model=32, n_heads=4, d_head=8, d_vocab=64, n_ctx=16, act_fn="gelu"
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = HookedTransformer(config, tokenizer=tiny_models["hooked"].tokenizer)
    tokens = torch.tensor([[1, 9, 30, 12, 4]])
    assert_same_patterns(model, lambda: model(tokens))


def test_an_edit_that_adds_a_constant_is_the_same_with_and_without_keys(model):
    class Plain(Edit):
        def change(self, activations, at, tokens, *, record=False):
            return QueryChange(delta=torch.full_like(activations, 0.7))

    scope = sqs.LastPromptToken() | sqs.scopes.ResponseTokens()
    plain = Steerer(Plain(), Where(sqs.query_sites(model, [1]), scope=scope, heads=[2]))
    settings = {"return_type": "tokens", "output_logits": True, **GREEDY}
    bare = torch.stack(model.generate(PROMPTS, **settings).logits)
    with plain.apply(model):
        expected = torch.stack(model.generate(PROMPTS, **settings).logits)
    with look(model, 0.7, scope=scope, heads=[2]).apply(model, record=True) as trace:
        found = torch.stack(model.generate(PROMPTS, **settings).logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, bare, atol=1e-3)
    assert set(trace.to_dataframe()["head"]) == {2}


def test_of_two_at_one_site_the_second_sees_what_the_first_made_of_the_queries(model):
    one, two, both = look(model, 0.3), look(model, 0.4, heads=[2]), look(model, 0.3)
    settings = {"return_type": "tokens", "output_logits": True, **GREEDY}
    with sqs.steering.JoinedSteerers(one, two).apply(model):
        found = torch.stack(model.generate(PROMPTS, **settings).logits)
    with both.apply(model), model.hooks(fwd_hooks=[(NAME, add_to_head_2)]):
        expected = torch.stack(model.generate(PROMPTS, **settings).logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def add_to_head_2(q, hook):
    return q + 0.4 * (torch.arange(4) == 2)[:, None]


def test_plain_hooks_cant_show_keys(model):
    with pytest.raises(ValueError, match="sees keys, which plain hooks don't show: use apply"):
        look(model).fwd_hooks(model)


def test_an_edit_that_changes_nothing_leaves_every_bit(model):
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    plain = model(tokens)
    with look(model).apply(model):
        assert torch.equal(model(tokens), plain)


def test_gradients_pass_through_the_model_to_the_edit(model):
    offset = torch.zeros(8, requires_grad=True)
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    with look(model, offset).apply(model):
        loss = model(tokens)[0, -1].log_softmax(-1)[7]
        (gradient,) = torch.autograd.grad(loss, offset)
        step = 1e-2 * gradient / gradient.norm()
        with torch.no_grad():
            offset += step
            rise = model(tokens)[0, -1].log_softmax(-1)[7] - loss
    assert float(rise) == pytest.approx(float(step @ gradient), rel=0.1)


def test_a_hook_between_query_and_scores_is_refused(model):
    def half(q, hook):
        return q / 2

    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_rot_q", half)]),
        look(model).apply(model),
        pytest.raises(ValueError, match="hook_rot_q"),
    ):
        model(model.to_tokens(PROMPTS[0], prepend_bos=True))


def test_other_sites_than_queries_have_no_keys(model):
    site = Site.of(model, "blocks.1.attn.hook_v")
    with (
        pytest.raises(ValueError, match="must be queries"),
        Steerer(Look(), Where([site])).apply(model),
    ):
        pass
