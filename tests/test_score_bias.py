"""A constant on attention scores: the rival of `AttentionSteerer`, in the same engine."""

import pytest
import torch
from conftest import greedy_logits
from test_look_at import GREEDY, PHRASE, PLACES, PROMPTS, SCOPE, first, logits

import sae_query_steer as sqs
from sae_query_steer.baselines import attention_bias
from sae_query_steer.compare.attention_methods import attention_bias_method
from sae_query_steer.compare.exercise_task import ExerciseCase
from sae_query_steer.scopes import AtPositions, EveryPosition
from sae_query_steer.steering import AttentionSteerer, JoinedSteerers, LookAt


@pytest.fixture
def sites(model):
    return sqs.query_sites(model, [0, 2])


def seen(model, name, steerer=None):
    """What a hook at a point of layer 0 sees when the prompts are read, padded on the left."""
    kept = []
    hooks = [(f"blocks.0.attn.{name}", lambda x, hook: kept.append(x.clone()))]
    with model.hooks(fwd_hooks=hooks):
        if steerer is None:
            model.generate(PROMPTS, **{**GREEDY, "max_new_tokens": 1})
        else:
            with steerer.apply(model):
                model.generate(PROMPTS, **{**GREEDY, "max_new_tokens": 1})
    return kept[0]


def test_the_pattern_is_the_softmax_of_the_scores_and_the_bias(model, sites):
    looks = (PHRASE, LookAt(AtPositions([0]), weight=-0.5))
    steerer = attention_bias(sites, looks, bias=2.0, layers=[0], heads=[1, 3])
    scores = seen(model, "hook_attn_scores").clone()
    for row, length in enumerate((5, 3, 7)):
        for head in (1, 3):
            for place in PLACES[row]:
                scores[row, head, -1, 7 - length + place] += 2.0
            scores[row, head, -1, 7 - length] -= 1.0
    found, bare = seen(model, "hook_pattern", steerer), seen(model, "hook_pattern")
    torch.testing.assert_close(found[:, :, -1], scores[:, :, -1].softmax(-1))
    assert torch.equal(found[:, [0, 2]], bare[:, [0, 2]])
    assert torch.equal(found[:, :, :-1], bare[:, :, :-1])


@pytest.mark.parametrize("scope", [SCOPE, EveryPosition()], ids=["end", "every"])
def test_cache_on_equals_cache_off_and_a_batch_equals_its_rows(model, sites, scope):
    steerer = attention_bias(sites, PHRASE, bias=3.0, scope=scope)
    bare = logits(model, PROMPTS)
    with steerer.apply(model):
        batch = logits(model, PROMPTS)
        off = logits(model, PROMPTS, use_past_kv_cache=False)
        torch.testing.assert_close(off, batch, rtol=0, atol=2e-5)
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(logits(model, [prompt])[0], batch[row], rtol=0, atol=2e-5)
    assert (batch - bare).abs().max() > 1e-2


def test_both_hosts_give_equal_logits(tiny_models):
    found = []
    for model in tiny_models.values():
        sites = sqs.query_sites(model, [0, 2], rotated=len(found) > 0)
        with attention_bias(sites, PHRASE, bias=3.0, scope=SCOPE).apply(model):
            found.append(logits(model, PROMPTS))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_a_bias_of_0_leaves_every_bit(model, sites):
    bare, tokens = logits(model, PROMPTS), model.to_tokens(PROMPTS[0], prepend_bos=True)
    plain = model(tokens)
    steerer = attention_bias(sites, PHRASE, bias=0.0, scope=EveryPosition())
    with steerer.apply(model):
        assert torch.equal(logits(model, PROMPTS), bare)
    with steerer.apply(model, prompt_lengths=[5]):
        assert torch.equal(model(tokens), plain)


def test_the_trace_has_the_masses_that_the_model_then_pays(model, sites):
    steerer = attention_bias(sites, PHRASE, bias=1.5, scope=SCOPE, layers=[2], heads=[1, 3])
    with steerer.apply(model, record_attention=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    table = trace.to_dataframe().set_index(["row", "position", "head"]).sort_index()
    change = trace.attention_change(model)
    inside = [s in PLACES[r] for r, s in zip(change["row"], change["source_position"], strict=True)]
    by_head = change[inside].groupby(["row", "position", "head"])
    sums = by_head[["attention_before", "attention_after"]].sum()
    assert (sums["attention_after"] - table["mass_after"]).abs().max() < 1e-5
    assert (sums["attention_before"] - table["mass_before"]).abs().max() < 1e-5
    before, after = (torch.tensor(table[f"mass_{when}"].array) for when in ("before", "after"))
    shift = after.logit() - before.logit()
    torch.testing.assert_close(shift, torch.full_like(after, 1.5), rtol=0, atol=1e-4)
    assert (table["delta_norm"] == 0).all()
    assert set(table["method"]) == {"attention bias"}
    assert set(table["target"]) == {"w20 w33"}


def test_a_negative_weight_is_a_negative_bias(model, sites):
    one = attention_bias(sites, LookAt("w20 w33", weight=-0.5), bias=2.0)
    two = attention_bias(sites, PHRASE, bias=-1.0)
    found = []
    for steerer in (one, two):
        with steerer.apply(model):
            found.append(greedy_logits(model, PROMPTS))
    assert torch.equal(*found)
    table = first(model, one)
    assert (table["mass_after"] < table["mass_before"]).all()


def test_two_at_one_site_add_up(model, sites):
    one, two, both = (attention_bias(sites, PHRASE, bias=bias, scope=SCOPE) for bias in (1, 2, 3))
    with JoinedSteerers(one, two).apply(model):
        found = logits(model, PROMPTS)
    with both.apply(model):
        torch.testing.assert_close(found, logits(model, PROMPTS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias_first", [True, False])
def test_a_descent_at_the_same_site_sees_the_bias(model, sites, bias_first):
    dense = sqs.sae.identity_encoders(sites)
    steerers = [
        attention_bias(sites, PHRASE, bias=1.0, scope=SCOPE, layers=[0], heads=[0, 2]),
        AttentionSteerer(dense, PHRASE, n_steps=2, scope=SCOPE, layers=[0], heads=[0, 2]),
    ]
    joined = JoinedSteerers(*(steerers if bias_first else steerers[::-1]))
    with joined.apply(model, record=True) as traces:
        batch = logits(model, PROMPTS)
        off = logits(model, PROMPTS, use_past_kv_cache=False)
    torch.testing.assert_close(off, batch, rtol=0, atol=2e-5)
    one, two = (trace.to_dataframe() for trace in traces)
    assert one["mass_after"].to_numpy() == pytest.approx(two["mass_before"].to_numpy(), abs=1e-5)
    assert (two["mass_after"] > one["mass_before"]).all()


def test_each_row_looks_where_it_is_told(model, sites):
    looks = [LookAt("w1"), (PHRASE, LookAt("w33", -1.0)), LookAt("w9 w17")]
    with attention_bias(sites, looks, bias=2.0, scope=SCOPE).apply(model, record=True) as trace:
        batch = logits(model, PROMPTS)
    for row, look in enumerate(looks):
        with attention_bias(sites, look, bias=2.0, scope=SCOPE).apply(model):
            alone = logits(model, [PROMPTS[row]])[0]
        torch.testing.assert_close(alone, batch[row], rtol=0, atol=2e-5)
    targets = trace.to_dataframe().groupby("row")["target"].first()
    assert list(targets) == ["w1", "w20 w33, away from w33", "w9 w17"]


def test_gradients_pass_through_a_biased_model(model, sites):
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    with attention_bias(sites, PHRASE, bias=2.0).apply(model, prompt_lengths=[5]):
        with torch.no_grad():
            expected = model(tokens)
        found = model(tokens)
        found[0, -1, 3].backward()
    torch.testing.assert_close(found, expected)
    model.zero_grad()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": float("nan")}, "bias must be .* got nan"),
        ({"look_at": []}, "at least one LookAt"),
        ({"layers": [1]}, "no site at layer 1"),
        ({"heads": [4]}, "no head 4 at layer 0"),
    ],
)
def test_values_out_of_range_are_refused(sites, changes, message):
    with pytest.raises(ValueError, match=message):
        attention_bias(sites, **{"look_at": PHRASE, "bias": 1.0, **changes})


def test_what_is_not_in_the_prompt_once_is_refused(model, sites):
    with (
        attention_bias(sites, LookAt("w6"), bias=1.0).apply(model),
        pytest.raises(ValueError, match="'w6' is not in the prompt of row 0"),
    ):
        model.generate(PROMPTS, **GREEDY)
    with pytest.raises(ValueError, match="sees keys, which plain hooks don't show: use apply"):
        attention_bias(sites, PHRASE, bias=1.0).fwd_hooks(model)


def test_the_method_looks_at_the_phrase_and_then_away_from_the_list(model, sites):
    names = {"target": "create", "topic": "", "template": "", "begun": False}
    cases = [
        ExerciseCase(prompt=prompt, phrase="w33", listed="w20 w33", **names) for prompt in PROMPTS
    ]
    method = attention_bias_method("attention bias", sites)
    with method.steerer(cases, 4.0).apply(model, record=True) as traces:
        model.generate(PROMPTS, **{**GREEDY, "max_new_tokens": 8})
    one, two = (trace.to_dataframe() for trace in traces)
    assert method.layers == (0, 2) and method.scope == repr(SCOPE)
    assert (one["mass_after"] > one["mass_before"]).all()
    looked = two[two["mass_before"] > 1e-6]
    assert len(looked) > 0.8 * len(two) and (looked["mass_after"] < looked["mass_before"]).all()
    for table, start, n in ((one, 0, 5), (two, 5, 3)):  # from the last prompt token on
        found = [sorted(set(rows)) for _, rows in table.groupby("row")["position"]]
        assert found == [list(range(last + start, last + start + n)) for last in (4, 2, 6)]
