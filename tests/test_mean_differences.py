"""Mean differences at queries, keys, values and head outputs, and in heads chosen by probes."""

import pytest
import torch
from conftest import HOSTS
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import sae_query_steer as sqs
from sae_query_steer.baselines import (
    class_means,
    inference_time_intervention,
    mean_difference,
    probe_heads,
    random_direction,
)
from sae_query_steer.compare.methods import (
    SteeringCase,
    intervention_methods,
    mean_difference_methods,
)
from sae_query_steer.models.activations import read_activations
from sae_query_steer.scopes import EveryPosition, ResponseTokens
from sae_query_steer.steering import JoinedSteerers

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
HEADS = {"attn.hook_q": 4, "attn.hook_k": 2, "attn.hook_v": 2, "attn.hook_z": 4}
SCOPE = sqs.LastPromptToken() | ResponseTokens()


@pytest.fixture(scope="module")
def tokenized(tiny_models, examples):
    return sqs.tokenize_examples(tiny_models["bridge"], examples)


@pytest.fixture(scope="module")
def means(tiny_models, tokenized):
    return {at: class_means(tiny_models["bridge"], tokenized, [0, 2], at=at) for at in HEADS}


@pytest.fixture(scope="module")
def probed(tiny_models, tokenized):
    return probe_heads(tiny_models["bridge"], tokenized, [0, 1, 2], seed=1)


@pytest.fixture(scope="module")
def outputs(tiny_models, tokenized):
    """Activations of the last prompt token of each example, by hook name, by a loop."""
    names = [f"blocks.{layer}.{at}" for layer in range(3) for at in HEADS]
    read = [
        read_activations(tiny_models["bridge"], e.tokens[None, : e.prompt_length], names)
        for e in tokenized
    ]
    return {name: torch.stack([one[name][0, -1] for one in read]) for name in names}


def difference(outputs, labels, name, target):
    """Mean of the target's activations minus the mean of the other classes' means."""
    own, *others = (
        outputs[name][[label == k for label in labels]].mean(0)
        for k in sorted(set(labels), key=lambda k: k != target)
    )
    return own - torch.stack(others).mean(0)


def generate(model, prompts, **changes):
    output = model.generate(prompts, return_type="tokens", output_logits=True, **GREEDY | changes)
    return torch.stack(output.logits, dim=1)


def change(model, steerer, name):
    """What a steerer adds to a row of 4 prompt tokens and 2 more at a hook point."""
    before, after = [], []
    with (
        model.hooks(fwd_hooks=[(name, lambda x, hook: before.append(x.clone()))]),
        steerer.apply(model, prompt_lengths=4),
        model.hooks(fwd_hooks=[(name, lambda x, hook: after.append(x.clone()))]),
    ):
        model(model.to_tokens("w1 w20 w33 w7 w30", prepend_bos=True))
    heads = HEADS[name.split(".", 2)[2]]
    return before[0].view(1, 6, heads, -1), (after[0] - before[0]).view(1, 6, heads, -1)


@pytest.mark.parametrize("at", HEADS)
def test_the_difference_is_added_to_the_chosen_heads_at_the_scoped_tokens_alone(
    model, means, outputs, tokenized, at
):
    name = f"blocks.2.{at}"
    steerer = mean_difference(means[at], target="create", strength=1.5, heads=[1], scope=SCOPE)
    _, found = change(model, steerer, name)
    expected = torch.zeros_like(found)
    own = difference(outputs, tokenized.labels, name, "create")
    assert own.shape == (HEADS[at], 8)
    expected[:, 3:, 1] = 1.5 * own[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[:, :3] == 0).all()
    assert (found[:, :, 0] == 0).all()


@pytest.fixture(params=[*HEADS, "both", "intervention"])
def make(request, means, probed):
    """Make each of the steerers with a target and a strength."""

    def make(target, strength):
        chosen = {"target": target, "strength": strength, "scope": SCOPE}
        if request.param == "intervention":
            return inference_time_intervention(probed, n_heads=5, **chosen)
        kinds = ["attn.hook_q", "attn.hook_v"] if request.param == "both" else [request.param]
        made = [mean_difference(means[at], **chosen) for at in kinds]
        return JoinedSteerers(*made) if len(made) > 1 else made[0]

    return make


def test_a_strength_of_zero_leaves_the_logits_bitwise_unchanged(model, make):
    plain = generate(model, PROMPTS)
    with make("create", 0.0).apply(model):
        assert torch.equal(generate(model, PROMPTS), plain)


def test_cache_on_equals_cache_off_and_a_batch_equals_its_rows(model, make):
    targets, strengths = ["apply", "create", "remember"], [2.0, 5.0, 3.0]
    with make(targets, strengths).apply(model):
        on = generate(model, PROMPTS)
        off = generate(model, PROMPTS, use_past_kv_cache=False)
    torch.testing.assert_close(on, off, rtol=0, atol=1e-4)
    for row, prompt in enumerate(PROMPTS):
        with make(targets[row], strengths[row]).apply(model):
            torch.testing.assert_close(generate(model, prompt)[0], on[row], rtol=0, atol=1e-4)
    assert not torch.allclose(on, generate(model, PROMPTS), atol=1e-4)


def test_both_hosts_give_equal_steered_logits(tiny_models, make):
    results = []
    for host in HOSTS:
        with make("create", 4.0).apply(tiny_models[host]):
            results.append(generate(tiny_models[host], PROMPTS))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_queries_and_values_together_are_both_differences(model, means, outputs, tokenized):
    q, v = (mean_difference(means[f"attn.hook_{k}"], target="apply", strength=2.0) for k in "qv")
    for at in ("attn.hook_q", "attn.hook_v"):
        _, found = change(model, JoinedSteerers(q, v), f"blocks.0.{at}")
        own = difference(outputs, tokenized.labels, f"blocks.0.{at}", "apply")
        torch.testing.assert_close(found[0, 3], 2 * own, rtol=1e-4, atol=1e-5)


def test_a_random_direction_is_as_long_as_the_mean_difference(model, means):
    steerer = mean_difference(means["attn.hook_v"], target="apply", strength=2.0)
    name = "blocks.0.attn.hook_v"
    (_, real), (_, drawn) = (change(model, s, name) for s in (steerer, random_direction(steerer)))
    torch.testing.assert_close(drawn.norm(dim=-1), real.norm(dim=-1), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(drawn, real, atol=1e-3)


def test_an_intervention_adds_standard_deviations_along_the_unit_difference(
    model, probed, outputs, tokenized
):
    steerer = inference_time_intervention(probed, target="remember", strength=3.0, n_heads=5)
    chosen = probed.best(5)
    for layer in range(3):
        name = f"blocks.{layer}.attn.hook_z"
        own = difference(outputs, tokenized.labels, name, "remember")
        unit = own / own.norm(dim=-1, keepdim=True)
        sigma = (outputs[name] * unit).sum(-1).var(0, correction=0).sqrt()
        expected = torch.zeros(4, 8)
        for head in chosen.get(layer, []):
            expected[head] = 3.0 * sigma[head] * unit[head]
        _, found = change(model, steerer, name)
        torch.testing.assert_close(found[0, 3], expected, rtol=1e-4, atol=1e-6)


def test_the_heads_are_those_whose_probes_do_best_on_held_out_examples(probed, outputs, tokenized):
    labels = list(tokenized.labels)
    train, test = train_test_split(
        range(len(labels)), test_size=0.5, stratify=labels, random_state=1
    )
    scores = {}
    for layer in range(3):
        for head in range(4):
            x = outputs[f"blocks.{layer}.attn.hook_z"][:, head].numpy()
            scale = StandardScaler().fit(x[train])
            probe = LogisticRegression(max_iter=1000).fit(
                scale.transform(x[train]), [labels[i] for i in train]
            )
            guess = probe.predict(scale.transform(x[test]))
            hits = [g == labels[i] for g, i in zip(guess, test, strict=True)]
            scores[layer, head] = sum(hits) / len(hits)  # the classes are equally many
            found = probed.accuracies[f"blocks.{layer}.attn.hook_z"][head]
            assert float(found) == pytest.approx(scores[layer, head], abs=0.05)
    worst = min(scores[layer, head] for layer, heads in probed.best(5).items() for head in heads)
    assert worst >= sorted(scores.values())[-5] - 0.05
    assert sum(map(len, probed.best(5).values())) == 5


def test_more_heads_than_were_probed_are_refused(probed):
    with pytest.raises(ValueError, match="n_heads must be a whole number >= 1 and <= 12, got 13"):
        inference_time_intervention(probed, target="create", strength=1.0, n_heads=13)


def test_a_sweep_takes_the_methods_with_a_target_for_each_case(model, means, probed):
    queries, values = means["attn.hook_q"], means["attn.hook_v"]
    choices = {"span": "last prompt token", "layers": [[0], [0, 2]]}
    classes = queries.classes
    cases = [SteeringCase(prompt=p, target=t) for p, t in zip(PROMPTS, classes, strict=True)]
    methods = [
        *mean_difference_methods(values, **choices),
        *mean_difference_methods(queries, values, **choices),
        *intervention_methods(probed, span="last prompt token"),
    ]
    names = {"value mean difference", "query and value mean difference"}
    assert {m.name for m in methods} == {*names, "inference-time intervention"}
    assert [m.layers for m in methods] == [(0,), (0, 2)] * 2 + [(0, 1, 2)]
    for method in methods:
        found = sqs.compare.continuations(
            model, PROMPTS, max_new_tokens=2, steerer=method.steerer(cases, 2.0)
        )
        assert min(found.relative_changes) > 0


def test_where_a_difference_is_taken_must_be_a_hook_point_of_the_model(model, tokenized):
    with pytest.raises(ValueError, match="got 'blocks.0.attn.hook_pattern'"):
        class_means(model, tokenized, [0], at="attn.hook_pattern")
    with pytest.raises(ValueError, match="no query site at layer 3"):
        class_means(model, tokenized, [3], at="attn.hook_v")
    with pytest.raises(ValueError, match="no head 3 at layer 0: the heads are 0 to 1"):
        mean_difference(
            class_means(model, tokenized, [0], at="attn.hook_v"),
            target="create",
            strength=1.0,
            heads=[3],
            scope=EveryPosition(),
        )
