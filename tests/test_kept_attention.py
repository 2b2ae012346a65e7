"""Steers that take no attention from chosen tokens, on both hosts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_look_at import GREEDY, PHRASE, PLACES, PROMPTS, SCOPE, logits
from transformer_lens import HookedTransformer

import sae_query_steer as sqs
from sae_query_steer.baselines import keep_attention, mean_difference
from sae_query_steer.compare.attention_methods import keeping_attention
from sae_query_steer.compare.methods import Method
from sae_query_steer.models.activations import read_activations
from sae_query_steer.scopes import AtPositions
from sae_query_steer.steering import LookAt

Q, PATTERN = "blocks.2.attn.hook_q", "blocks.2.attn.hook_pattern"


@pytest.fixture(scope="module")
def dense(tiny_models, examples):
    model = tiny_models["bridge"]
    tokenized = sqs.tokenize_examples(model, examples)
    return sqs.baselines.class_means(model, tokenized, [0, 2], at="attn.hook_q")


@pytest.fixture(params=["mean difference", "descent"])
def make(request, dense, saes, targets):
    """Make a steerer of queries of some layers."""

    def make(strength=6.0, layers=None, scope=SCOPE, target="create"):
        given = {"target": target, "scope": scope, "layers": layers}
        if request.param == "mean difference":
            return mean_difference(dense, strength=strength, **given)
        contrast = sqs.objectives.CentroidContrast()
        return sqs.LatentGradientSteerer(
            saes, targets, objective=contrast, n_steps=1, step_size=strength, **given
        )

    return make


def seen(model, prompt, steerer=None):
    """Queries and pattern of layer 2 at the last token, [head ...]; scores follow the pattern."""
    kept = {}
    hooks = [(PATTERN, lambda x, hook: kept.__setitem__("pattern", x[0, :, -1].clone()))]
    if steerer is None:
        with model.hooks(fwd_hooks=hooks):
            model(model.to_tokens(prompt))
        return None, kept["pattern"]
    with steerer.apply(model, record=True, prompt_lengths=5) as trace, model.hooks(fwd_hooks=hooks):
        model(model.to_tokens(prompt))
    return trace.to_dataframe()["delta_norm"].to_numpy(), kept["pattern"]


@pytest.mark.parametrize("target", ["apply", "remember"])
def test_the_attention_on_the_tokens_is_not_lowered_and_heads_that_raise_it_stay(
    model, make, target
):
    steerer = make(layers=[2], scope=sqs.LastPromptToken(), target=target)
    _, plain = seen(model, PROMPTS[0])
    length, free = seen(model, PROMPTS[0], steerer)
    kept_length, kept = seen(model, PROMPTS[0], keep_attention(steerer, PHRASE))
    before, after, bound = (p[:, PLACES[0]].sum(-1) for p in (plain, free, kept))
    lowered = after < before
    assert lowered.all() == (target == "remember")
    assert lowered.any()
    assert (bound >= before * 0.998).all()
    torch.testing.assert_close(bound[lowered], before[lowered], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(kept[~lowered], free[~lowered], rtol=0, atol=1e-6)
    assert kept_length[~lowered] == pytest.approx(length[~lowered], rel=1e-5)
    assert (kept_length[lowered] > 0.1 * length[lowered]).all(), "and much of the steer is left"
    assert not torch.allclose(kept, plain, atol=1e-3)


def test_the_change_is_the_projection_written_out_with_autograd(model, dense):
    steerer = mean_difference(
        dense, target="create", strength=6.0, layers=[2], scope=sqs.LastPromptToken()
    )
    tokens = model.to_tokens(PROMPTS[0])
    scores_name = "blocks.2.attn.hook_attn_scores"
    start = read_activations(model, tokens, [Q, scores_name])
    own = dense.means[Q]
    index = dense.class_index("create")
    whole = 6.0 * (own[index] - own[[i for i in range(3) if i != index]].mean(0))

    def loss(delta):  # of all heads at the last token, by running the model
        seen = []

        def add(q, hook):
            changed = q.clone().reshape(*q.shape[:2], 4, 8)
            changed[0, -1] += delta
            return changed.reshape(q.shape)

        hooks = [(Q, add), (scores_name, lambda s, hook: seen.append(s[0, :, -1]))]
        with model.hooks(fwd_hooks=hooks):
            model(tokens)
        scores = seen[0]
        return scores.logsumexp(-1) - scores[:, PLACES[0]].logsumexp(-1)

    most = loss(torch.zeros(4, 8)).detach()
    expected = whole.clone()
    for _ in range(20):
        leaf = expected.clone().requires_grad_()
        now = loss(leaf)
        (slope,) = torch.autograd.grad(now.sum(), leaf)
        over = (now.detach() - most).clamp(min=0)
        expected -= (over / slope.square().sum(-1))[:, None] * slope
    with keep_attention(steerer, PHRASE).apply(model, record=True, prompt_lengths=5) as trace:
        model(tokens)
    found = trace.to_dataframe()["delta_norm"].tolist()
    assert found == pytest.approx(expected.norm(dim=-1).tolist(), rel=1e-3)
    assert start[Q].shape[2] == 4


def test_a_strength_of_zero_leaves_the_logits_bitwise_unchanged(model, make):
    plain = logits(model, PROMPTS)
    with keep_attention(make(0.0), PHRASE).apply(model):
        assert torch.equal(logits(model, PROMPTS), plain)


def test_cache_on_equals_cache_off_and_a_batch_equals_its_rows(model, make):
    looks = [PHRASE, LookAt(AtPositions([0])), (PHRASE, LookAt(AtPositions([1]), weight=0.5))]
    steerer = keep_attention(make(), looks)
    with steerer.apply(model):
        on = logits(model, PROMPTS)
        off = logits(model, PROMPTS, use_past_kv_cache=False)
    torch.testing.assert_close(on, off, rtol=0, atol=1e-3)
    for row, (prompt, look) in enumerate(zip(PROMPTS, looks, strict=True)):
        with keep_attention(make(), look).apply(model):
            torch.testing.assert_close(logits(model, prompt)[0], on[row], rtol=0, atol=1e-3)
    with make().apply(model):
        assert not torch.allclose(on, logits(model, PROMPTS), atol=1e-2)


def test_the_method_keeps_the_attention_on_the_phrase_of_each_case(model, make):
    cases = [SimpleNamespace(phrase=phrase, listed=phrase) for phrase in ("w20", "w33", "w41 w20")]
    plain = Method(name="plain", steerer=lambda cases, strength: make(strength))
    method = keeping_attention(plain)
    assert method.name == "plain, attention kept"
    looks = [LookAt(case.phrase) for case in cases]
    found = []
    for steerer in (method.steerer(cases, 6.0), keep_attention(make(), looks)):
        with steerer.apply(model):
            found.append(logits(model, PROMPTS))
    assert torch.equal(*found)


def test_scores_that_are_not_linear_and_other_steerers_are_refused(tiny_models, untyped):
    with pytest.raises(TypeError, match="steerer must be Steerer, got LookAt"):
        keep_attention(PHRASE, PHRASE)
    config = replace(tiny_models["hooked"].cfg, attn_scores_soft_cap=2.0)
    capped = HookedTransformer(config, tokenizer=tiny_models["hooked"].tokenizer)
    encoders = sqs.sae.identity_encoders(sqs.query_sites(capped, [1]))
    look = LookAt(AtPositions([1]))
    kept = keep_attention(sqs.steering.AttentionSteerer(encoders, look), look)
    with kept.apply(capped), pytest.raises(ValueError, match="must have scores linear in its"):
        capped.generate("w1 w2", **GREEDY)
