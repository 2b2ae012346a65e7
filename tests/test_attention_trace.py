"""The attention that steered tokens paid, and would have paid."""

import pytest
import torch

import sae_query_steer as sqs

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]  # with BOS 4, 2 and 6 tokens
LENGTHS = [4, 2, 6]
NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "stop_at_eos": False}
LAYER, HEADS = 2, [0, 3]
KEYS = ["row", "position", "layer", "head"]


@pytest.fixture(scope="module")
def make(saes, targets):
    def make(**changes):
        settings = {
            "target": "create",
            "objective": sqs.SquaredDistance(),
            "n_steps": 4,
            "step_size": 0.3,
            "scope": sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
            "layers": [LAYER],
            "heads": HEADS,
        }
        return sqs.LatentGradientSteerer(saes, targets, **{**settings, **changes})

    return make


@torch.no_grad()
def pattern(model, tokens, layer=LAYER):
    name = f"blocks.{layer}.attn.hook_pattern"
    return model.run_with_cache(tokens[None], names_filter=[name], prepend_bos=False)[1][name][0]


@pytest.mark.parametrize("cache", [True, False])
def test_it_is_the_attention_of_the_same_text_read_with_and_without_the_steer(model, make, cache):
    steerer = make()
    with steerer.apply(model, record_attention=True) as trace:
        tokens = model.generate(PROMPTS, return_type="tokens", use_past_kv_cache=cache, **GREEDY)
    table = trace.attention_change(model)
    assert set(table["head"]) == set(HEADS)
    for row, length in enumerate(LENGTHS):
        own = tokens[row, -(length + NEW) :][:-1]  # the last token is never read
        bare = pattern(model, own)
        with steerer.apply(model, prompt_lengths=[length]):
            steered = pattern(model, own)
        here = table[table["row"] == row]
        assert set(here["position"]) == set(range(length - 1, length + NEW - 1))
        at = tuple(
            torch.tensor(here[name].to_numpy()) for name in ("head", "position", "source_position")
        )
        for name, expected in (("attention_before", bare), ("attention_after", steered)):
            found = torch.tensor(here[name].to_numpy())
            torch.testing.assert_close(found, expected[at].double(), rtol=0, atol=1e-5)
        assert here["source_token"].tolist() == own[at[2]].tolist()
        assert (
            here.groupby("position")["source_position"].max().reset_index().diff(axis=1).iloc[:, 1]
            == 0
        ).all()
    sums = table.groupby(KEYS)[["attention_before", "attention_after", "change"]].sum()
    torch.testing.assert_close(
        torch.tensor(sums.to_numpy()),
        torch.tensor([[1.0, 1.0, 0.0]]).double().expand(len(sums), 3),
        rtol=0,
        atol=1e-5,
    )
    assert table["change"].abs().max() > 1e-3
    assert table["source_text"].str.contains("w20").any()


def test_without_steps_no_attention_changes(model, make):
    with make(n_steps=0).apply(model, record_attention=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    assert trace.attention_change(model)["change"].abs().max() < 1e-5


def test_joined_steerers_record_their_attention_too(model, make):
    joined = sqs.steering.JoinedSteerers(make(), make(layers=[0]))
    with joined.apply(model, record_attention=True) as traces:
        model.generate(PROMPTS, **GREEDY)
    assert [set(t.attention_change(model)["layer"]) for t in traces] == [{2}, {0}]


def test_nobody_asked_means_nothing_kept_and_a_clear_error(model, make):
    with make().apply(model, record=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    with pytest.raises(ValueError, match="no attention was recorded: use `with steerer.apply"):
        trace.attention_change(model)


def test_a_model_that_is_steered_still_cant_tell_what_would_have_been(model, make):
    with make().apply(model, record_attention=True) as trace:
        model.generate(PROMPTS, **GREEDY)
        with pytest.raises(ValueError, match="the model's queries are being changed"):
            trace.attention_change(model)
