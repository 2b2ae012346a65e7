"""Attention patterns held while a steer acts, on both hosts."""

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.baselines import class_means, mean_difference
from sae_query_steer.models.activations import LOGITS, read_activations
from sae_query_steer.scopes import EveryPosition
from sae_query_steer.steering import JoinedSteerers, freeze_attention
from sae_query_steer.steering.block import SteeringWarning

PATTERNS = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
LENGTHS = [4, 3]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 52, (2, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def make(tiny_models, examples):
    """Make a strong steer of queries, values or the residual stream."""
    tokenized = sqs.tokenize_examples(tiny_models["bridge"], examples)
    means = {
        at: class_means(tiny_models["bridge"], tokenized, [0, 1, 2], at=at)
        for at in ("attn.hook_q", "attn.hook_v", "hook_resid_pre")
    }

    def make(at, layers=(0, 1, 2), strength=8.0):
        chosen = {"target": "create", "strength": strength, "scope": EveryPosition()}
        return mean_difference(means[at], layers=list(layers), **chosen)

    return make


def steered(model, steerer, tokens, **given):
    with torch.no_grad(), steerer.apply(model, prompt_lengths=LENGTHS):
        return model(tokens, **given)


def frozen(model, steerer, tokens, **settings):
    """Logits with a steer inside held attention."""
    given = {k: v for k, v in settings.items() if k == "attention_mask"}
    with freeze_attention(model, tokens, **settings):
        return steered(model, steerer, tokens, **given)


def patched(model, steerer, tokens, **settings):
    """Logits with the patterns of a steer, and without it."""
    settings = {"prompt_lengths": LENGTHS} | settings
    with torch.no_grad(), freeze_attention(model, tokens, of=steerer, **settings):
        return model(tokens)


def test_a_steer_of_queries_does_nothing_without_its_patterns_and_all_with_them(
    model, make, tokens
):
    steerer = make("attn.hook_q")
    with torch.no_grad():
        plain = model(tokens)
    assert not torch.allclose(steered(model, steerer, tokens), plain, atol=1e-2)
    assert torch.equal(frozen(model, steerer, tokens), plain)
    assert torch.equal(patched(model, steerer, tokens), steered(model, steerer, tokens))


def test_values_of_the_last_layer_work_without_patterns_alone(model, make, tokens):
    steerer = make("attn.hook_v", [2])
    with torch.no_grad():
        plain = model(tokens)
    assert torch.equal(frozen(model, steerer, tokens), steered(model, steerer, tokens))
    assert torch.equal(patched(model, steerer, tokens), plain)


@pytest.mark.parametrize("strength", [0.0, 8.0])
def test_a_residual_steer_runs_on_the_unsteered_patterns(model, make, tokens, strength):
    steerer = make("hook_resid_pre", strength=strength)
    plain = read_activations(model, tokens, [*PATTERNS, LOGITS])
    hooks = [(name, lambda _, hook, kept=plain[name]: kept) for name in PATTERNS]
    with model.hooks(fwd_hooks=hooks):
        expected = steered(model, steerer, tokens)
    found = frozen(model, steerer, tokens)
    assert torch.equal(found, expected)
    assert torch.equal(found, plain[LOGITS]) == (strength == 0)
    assert torch.equal(found, steered(model, steerer, tokens)) == (strength == 0)


def test_only_the_named_layers_and_heads_are_held(model, make, tokens):
    steerer = JoinedSteerers(make("attn.hook_q"), make("hook_resid_pre"))
    before = read_activations(model, tokens, PATTERNS)
    seen = {}
    hooks = [
        (name, lambda p, hook, name=name: seen.__setitem__(name, p.clone())) for name in PATTERNS
    ]
    with freeze_attention(model, tokens, heads={1: [3, 0]}), model.hooks(fwd_hooks=hooks):
        steered(model, steerer, tokens)
    assert torch.equal(seen[PATTERNS[1]][:, [0, 3]], before[PATTERNS[1]][:, [0, 3]])
    for name, heads in ((PATTERNS[0], slice(None)), (PATTERNS[1], [1, 2])):
        assert (seen[name] != before[name])[:, heads].flatten(2).any(-1).all()
    free = steered(model, steerer, tokens)
    assert not torch.equal(frozen(model, steerer, tokens, heads=[3], layers=[1]), free)


def test_padded_rows_are_held_as_rows_of_their_own(model, make, tokens):
    steerer, pad = make("hook_resid_pre"), 3
    rows = torch.cat([torch.full((2, pad), model.tokenizer.pad_token_id), tokens], dim=1)
    mask = torch.cat([torch.zeros(2, pad), torch.ones(2, 7)], dim=1).long()
    padded = frozen(model, steerer, rows, attention_mask=mask)
    alone = frozen(model, steerer, tokens)
    torch.testing.assert_close(padded[:, pad:], alone, rtol=0, atol=1e-4)


def test_a_pass_over_other_tokens_is_refused_and_nothing_is_left(model, make, tokens):
    steerer = make("hook_resid_pre")
    message = r"holds patterns of \[2, 7\] tokens, got a forward pass over"
    with freeze_attention(model, tokens), pytest.raises(ValueError, match=message):
        model(tokens[:, :6])
    with freeze_attention(model, tokens), pytest.raises(ValueError, match=message):
        model(tokens.flip(1))
    with freeze_attention(model, tokens), pytest.raises(ValueError, match=message):
        model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False)
    with steerer.apply(model):
        with pytest.raises(ValueError, match="steer"), freeze_attention(model, tokens):
            pass
        model(tokens)
    with (
        pytest.raises(ValueError, match="no head 4 at layer 0"),
        freeze_attention(model, tokens, heads=[4]),
    ):
        pass
    with pytest.warns(SteeringWarning, match="no forward pass"), freeze_attention(model, tokens):
        pass
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_the_patterns_are_read_in_eval_mode(model, tokens):
    modes, block = [], model.blocks[0]
    handle = block.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train()
    try:
        with freeze_attention(model, tokens):
            model(tokens)
        assert block.training
    finally:
        handle.remove()
        model.eval()
    assert modes == [False, True]
