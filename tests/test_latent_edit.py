"""Edits by hand, against a loop over latents on the SAE itself."""

from typing import Any

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations
from sae_query_steer.steering import edit_latents

NAME = "blocks.2.attn.hook_q"
PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
VALUES = {
    "set": {1: {3: 2.0, 7: 0.0}, 3: {0: 1.5}},
    "add": {1: {3: 2.0, 7: -0.5}, 3: {0: 1.5}},
    "scale": {1: {3: 0.0, 7: 2.0}, 3: {0: -1.0}},
    "clamp": {1: {3: (0.5, 0.7), 7: (0.0, 0.1)}, 3: {0: (0.2, 9.0)}},
}


def changed(z, how, value):
    """One latent of one token, by the definition."""
    match how:
        case "set":
            return torch.as_tensor(value)
        case "add":
            return (z + value).clamp(min=0)
        case "scale":
            return (z * value).clamp(min=0)
        case _:
            return z.clamp(*value)


@pytest.mark.parametrize("how", VALUES)
def test_the_query_gets_the_difference_of_two_decodings_at_these_heads_alone(model, saes, how):
    tokens = model.to_tokens(PROMPTS[0])
    query = read_activations(model, tokens, [NAME])[NAME]
    before = saes[NAME].encode(query)
    after = before.clone()
    for head, values in VALUES[how].items():
        for latent, value in values.items():
            for position in range(1, tokens.shape[1] - 1):
                z = before[0, position, head, latent]
                after[0, position, head, latent] = changed(z, how, value)
    expected = query + saes[NAME].decode(after) - saes[NAME].decode(before)
    steerer = edit_latents(saes, {NAME: VALUES[how]}, how=how, scope=sqs.scopes.Window(1, 3))
    with steerer.apply(model, record=True, prompt_lengths=[4]) as trace:
        found = read_activations(model, tokens, [NAME])[NAME]
    assert (found - expected).abs().max() < 1e-5
    assert (found - query).abs().max() > 0.1
    assert torch.equal(found[:, :, [0, 2]], query[:, :, [0, 2]])
    assert torch.equal(found[:, [0, 3]], query[:, [0, 3]])
    table = trace.to_dataframe()
    assert set(table["head"]) == {1, 3}
    assert set(table["method"]) == {f"latents by hand ({how})"}
    assert all(latent in VALUES[how][3] for latent, _ in table["latents_moved"].iloc[-1])


def test_what_changes_no_latent_is_the_identity_and_removing_is_setting_to_zero(model, saes):
    tokens = model.to_tokens(PROMPTS[0])
    every = sqs.scopes.EveryPosition()
    plain = model(tokens)
    same: tuple[tuple[Any, Any], ...] = (("add", 0.0), ("scale", 1.0), ("clamp", (0.0, 1e9)))
    for how, value in same:
        values = {NAME: {head: dict.fromkeys(range(16), value) for head in range(4)}}
        with edit_latents(saes, values, how=how, scope=every).apply(model):
            assert torch.equal(model(tokens), plain)
    found = []
    for how in ("set", "scale"):
        values = {NAME: {head: dict.fromkeys(range(16), 0.0) for head in range(4)}}
        with edit_latents(saes, values, how=how, scope=every).apply(model):
            found.append(model(tokens))
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain)


def test_a_batch_with_and_without_cache_is_edited_as_each_prompt_alone(model, saes):
    steerer = edit_latents(saes, {NAME: {0: {2: 9.0}}}, scope=sqs.scopes.ResponseTokens())
    with steerer.apply(model):
        together = model.generate(PROMPTS, **GREEDY)
        assert model.generate(PROMPTS, **GREEDY, use_past_kv_cache=False) == together
        assert [model.generate(prompt, **GREEDY) for prompt in PROMPTS] == together


@pytest.mark.parametrize(
    ("latents", "how", "message"),
    [
        (
            {"blocks.1.attn.hook_q": {0: {1: 1.0}}},
            "set",
            "no hook name 'blocks.1.attn.hook_q': the",
        ),
        ({NAME: {4: {1: 1.0}}}, "set", "a head at .* must be a whole number >= 0 and <= 3, got 4"),
        ({NAME: {0: {16: 1.0}}}, "add", "a latent at .*head 0 must be .* <= 15, got 16"),
        ({NAME: {0: {1: -1.0}}}, "set", "the value of latent 1 at .* finite number >= 0, got -1.0"),
        ({NAME: {0: {1: float("nan")}}}, "add", "must be a finite number, got nan"),
        ({NAME: {0: {1: (2.0, 1.0)}}}, "clamp", r"must be a pair .*, got \(2.0, 1.0\)"),
        ({NAME: {0: {}}}, "set", "must name at least one latent at .*, head 0"),
        ({NAME: {0: {1: 1.0}}}, "zero", "how must be one of .*'scale'.*, got 'zero'"),
    ],
)
def test_what_there_is_not_is_refused(saes, untyped, latents, how, message):
    with pytest.raises(ValueError, match=message):
        edit_latents(saes, latents, how=how, scope=sqs.LastPromptToken())
