"""Keys of marked tokens amplified by a spectral projection, on both hosts."""

from types import SimpleNamespace

import pytest
import torch
from conftest import HOSTS
from test_look_at import PHRASE, PLACES, PROMPTS, logits

import sae_query_steer as sqs
from sae_query_steer.baselines import amplify_keys, key_projections
from sae_query_steer.compare.attention_methods import amplified_keys_method
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.prefix import PromptCaches
from sae_query_steer.scopes import AtPositions, LastPromptTokens
from sae_query_steer.steering import LookAt

NAMES = [f"blocks.{layer}.attn.hook_k" for layer in (0, 2)]


@pytest.fixture(scope="module")
def texts(tiny_models):
    """Three words in three contexts of several lengths, read at the words."""
    made = []
    for before in ("", "w3 w4 ", "w50 w1 w7 "):
        examples = [
            sqs.LabelledExample(
                prompt=f"{before * (1 + 5 * i % 3)}w{5 + i} w{20 + i} w{9 + 2 * i}",
                label="ab"[i % 2],
            )
            for i in range(8)
        ]
        made.append(
            sqs.tokenize_examples(
                tiny_models["bridge"], examples, span=LastPromptTokens(3), batch_size=3
            )
        )
    return made


@pytest.fixture(scope="module")
def projections(tiny_models, texts):
    return key_projections(tiny_models["bridge"], *texts, [0, 2], energy=0.8)


def keys_of(model, texts, name, head):
    rows = [read_activations(model, e.tokens[None, : e.prompt_length], [name]) for e in texts]
    return torch.cat([row[name][0, -3:, head] for row in rows]).double()


@pytest.mark.parametrize("energy", [0.5, 0.8, 1.0])
def test_the_projection_is_that_of_the_formula(model, texts, energy):
    found = key_projections(model, *texts, [0, 2], energy=energy)
    assert list(found) == NAMES
    for name in NAMES:
        assert found[name].shape == (2, 8, 8)
        for head in range(2):
            alone, relevant, other = (keys_of(model, one, name, head) for one in texts)
            parts = []
            for keys in (relevant, other):
                u, s, _ = torch.linalg.svd(alone.T @ keys / len(alone))
                k = 1
                while s[:k].sum() / s.sum() < energy and k < 8:
                    k += 1
                parts.append(u[:, :k] if keys is relevant else u[:, k:])
            expected = sum(u @ u.T for u in parts) / 2
            torch.testing.assert_close(found[name][head].double(), expected, rtol=0, atol=1e-4)


def test_heads_whose_keys_do_not_follow_relevance_are_left_alone(model, texts):
    name = NAMES[1]
    sizes = []
    for head in range(2):
        _, relevant, other = (keys_of(model, one, name, head) for one in texts)
        sizes.append(float((relevant - other).norm() / len(other)))
    low, high = (sizes.index(f(sizes)) for f in (min, max))
    found = key_projections(model, *texts, [2], min_difference=sum(sizes) / 2)[name]
    assert (found[low] == 0).all()
    assert (found[high] != 0).any()


def test_marked_keys_are_amplified_and_no_others(model, projections):
    steerer = amplify_keys(model, projections, PHRASE, strength=0.7, layers=[2], heads=[1])
    before, after = [], []
    with (
        model.hooks(fwd_hooks=[(NAMES[1], lambda k, hook: before.append(k.clone()))]),
        steerer.apply(model),
        model.hooks(fwd_hooks=[(NAMES[1], lambda k, hook: after.append(k.clone()))]),
    ):
        logits(model, PROMPTS, max_new_tokens=2)
    (first, second), (_, step) = (after, before)
    keys, found = (x.reshape(3, 7, 2, 8) for x in (before[0], first))
    expected = keys.clone()
    for row, length in enumerate((5, 3, 7)):
        for place in PLACES[row]:
            k = keys[row, 7 - length + place, 1]
            expected[row, 7 - length + place, 1] = k + 0.7 * projections[NAMES[1]][1] @ k
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found == keys, expected == keys)
    assert torch.equal(second, step)


def test_zero_strength_is_the_identity_bitwise_and_cache_on_equals_off(model, projections):
    looks = [PHRASE, LookAt(AtPositions([0])), (PHRASE, LookAt(AtPositions([1]), weight=0.5))]
    plain = logits(model, PROMPTS)
    with amplify_keys(model, projections, looks, strength=0.0).apply(model):
        assert torch.equal(logits(model, PROMPTS), plain)
    with amplify_keys(model, projections, looks, strength=3.0).apply(model):
        on = logits(model, PROMPTS)
        off = logits(model, PROMPTS, use_past_kv_cache=False)
    torch.testing.assert_close(on, off, rtol=0, atol=1e-4)
    assert not torch.allclose(on, plain, atol=1e-3)
    for row, (prompt, look) in enumerate(zip(PROMPTS, looks, strict=True)):
        with amplify_keys(model, projections, look, strength=3.0).apply(model):
            torch.testing.assert_close(logits(model, prompt)[0], on[row], rtol=0, atol=1e-4)


def test_both_hosts_give_equal_logits(tiny_models, projections):
    found = []
    for host in HOSTS:
        steerer = amplify_keys(tiny_models[host], projections, PHRASE, strength=3.0)
        with steerer.apply(tiny_models[host]):
            found.append(logits(tiny_models[host], PROMPTS))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_the_method_amplifies_the_phrase_of_each_case_and_not_behind_a_cache(model, projections):
    cases = [SimpleNamespace(phrase=phrase, listed=phrase) for phrase in ("w20", "w33", "w41 w20")]
    method = amplified_keys_method("SEKA", model, projections)
    assert method.layers == (0, 2)
    looks = [LookAt(case.phrase) for case in cases]
    written = [
        sqs.compare.continuations(
            model, PROMPTS, max_new_tokens=4, steerer=steerer, caches=PromptCaches(model, 2**24)
        )
        for steerer in (
            method.steerer(cases, 2.0),
            amplify_keys(model, projections, looks, strength=2.0),
        )
    ]
    assert written[0].texts == written[1].texts
    assert min(written[0].relative_changes) > 0


def test_what_does_not_fit_is_refused(model, texts, projections):
    other = sqs.tokenize_examples(
        model, [sqs.LabelledExample(prompt="w1 w2", label="a")] * 8, span=LastPromptTokens(2)
    )
    with pytest.raises(ValueError, match="must be the same tokens in all three"):
        key_projections(model, texts[0], other, texts[2], [0])
    with pytest.raises(ValueError, match="energy must be"):
        key_projections(model, *texts, [0], energy=1.5)
    with pytest.raises(ValueError, match="strength must be"):
        amplify_keys(model, projections, PHRASE, strength=-1.0)
    steerer = amplify_keys(model, projections, LookAt("w99"), strength=1.0)
    with steerer.apply(model), pytest.raises(ValueError, match="'w99' is not in the prompt"):
        model.generate(PROMPTS[0], max_new_tokens=1, verbose=False)
    steerer = amplify_keys(model, projections, [PHRASE, PHRASE], strength=1.0)
    with steerer.apply(model), pytest.raises(ValueError, match="look_at is for 2 rows"):
        model.generate(PROMPTS, max_new_tokens=1, verbose=False)
