"""The mean difference in the residual stream: what it adds, where, and on which model."""

import re

import pytest
import torch
from conftest import HOSTS
from wheel_check import make_model

import sae_query_steer as sqs
from sae_query_steer.baselines.directions import class_means, mean_difference
from sae_query_steer.models.activations import read_activations
from sae_query_steer.steering.steerer import Steerer

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
SCOPES = {
    "every": sqs.scopes.EveryPosition(),
    "last prompt token": sqs.LastPromptToken(),
    "both": sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
    "a function": lambda positions: positions.index % 3 == 1,
    "after a token": sqs.scopes.AfterToken(24),
}
FEW = [SCOPES["last prompt token"], SCOPES["after a token"] | sqs.scopes.ResponseTokens()]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture(scope="module")
def means(tiny_models, examples) -> sqs.CentroidTargets:
    return class_means(
        tiny_models["bridge"], sqs.tokenize_examples(tiny_models["bridge"], examples), [0, 2]
    )


@pytest.fixture
def make(means):
    """Make one that visibly changes the tiny model, with some settings changed."""

    def make(**changes) -> Steerer:
        settings = {"target": "create", "strength": 2.0, "scope": sqs.scopes.EveryPosition()}
        return mean_difference(changes.pop("means", means), **{**settings, **changes})

    return make


def generate(model, prompts, **changes):
    """Tokens and logits [row step d_vocab] of a greedy generation."""
    output = model.generate(prompts, return_type="tokens", output_logits=True, **GREEDY | changes)
    return output.sequences, torch.stack(output.logits, dim=1)


def watched(model, steerer, run, layer: int):
    """Run with our hook between two of a user's; return the residual stream before and after."""
    name, before, after = f"blocks.{layer}.hook_resid_post", [], []
    with (
        model.hooks(fwd_hooks=[(name, lambda x, hook: before.append(x.clone()))]),
        steerer.apply(model, prompt_lengths=4),
        model.hooks(fwd_hooks=[(name, lambda x, hook: after.append(x.clone()))]),
    ):
        run()
    return before, after


def direction(means: sqs.CentroidTargets, layer: int, target: str) -> torch.Tensor:
    """The target's mean minus the mean of the other classes' means, by a loop."""
    by_class = means.means[f"blocks.{layer}.hook_resid_post"][:, 0]
    own = by_class[means.classes.index(target)]
    others = [m for name, m in zip(means.classes, by_class, strict=True) if name != target]
    return own - torch.stack(others).mean(0)


@pytest.mark.parametrize("scope", FEW)
def test_a_strength_of_zero_leaves_the_logits_bitwise_unchanged(model, make, scope):
    plain = generate(model, PROMPTS)
    with make(scope=scope, strength=0.0).apply(model):
        for mine, theirs in zip(generate(model, PROMPTS), plain, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_the_difference_is_added_at_the_scoped_positions_and_nowhere_else(
    model, make, means, scope
):
    tokens = model.to_tokens("w1 w20 w33 w7 w30 w2", prepend_bos=True)  # 7 tokens, a prompt of 4
    index = torch.arange(7)[None]
    scoped = scope(
        sqs.scopes.Positions(
            index=index, valid=index >= 0, prompt_lengths=torch.tensor([4]), tokens=tokens
        )
    )[0]
    assert scoped.any(), "a scope that names nothing shows nothing"
    for layer in (0, 2):
        (before,), (after,) = watched(model, make(scope=scope), lambda: model(tokens), layer)
        assert torch.equal(before[:, ~scoped], after[:, ~scoped])
        expected = 2.0 * direction(means, layer, "create")
        torch.testing.assert_close(
            (after - before)[0, scoped], expected.expand(int(scoped.sum()), -1)
        )


def test_layers_that_are_not_named_are_left_alone(model, make):
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    (before,), (after,) = watched(model, make(layers=[2]), lambda: model(tokens), 0)
    assert torch.equal(before, after)
    (before,), (after,) = watched(model, make(layers=[2]), lambda: model(tokens), 2)
    assert (before != after).any(-1).all()


@pytest.mark.parametrize("scope", FEW)
def test_cache_on_equals_cache_off_and_a_batch_equals_its_rows(model, make, scope):
    with make(scope=scope).apply(model):
        tokens, logits = generate(model, PROMPTS)
        without_cache = generate(model, PROMPTS, use_past_kv_cache=False)
        alone = [generate(model, prompt) for prompt in PROMPTS]
    assert torch.equal(tokens, without_cache[0])
    torch.testing.assert_close(logits, without_cache[1], rtol=0, atol=1e-4)
    for row, (own_tokens, own_logits) in enumerate(alone):
        assert torch.equal(tokens[row, -4:], own_tokens[0, -4:])
        torch.testing.assert_close(logits[row], own_logits[0], rtol=0, atol=1e-4)
    assert not torch.allclose(logits, generate(model, PROMPTS)[1], atol=1e-2)


@pytest.mark.parametrize("scope", FEW)
def test_both_hosts_give_equal_steered_logits(tiny_models, make, scope):
    results = []
    for host in HOSTS:
        with make(scope=scope).apply(tiny_models[host]):
            results.append(generate(tiny_models[host], PROMPTS))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-4)


def test_every_row_has_its_own_target_and_strength(model, make):
    targets, strengths = ["apply", "create", "remember"], [0.5, 3.0, 0.0]
    with make(target=targets, strength=strengths).apply(model):
        together = generate(model, PROMPTS)[1]
    for row, prompt in enumerate(PROMPTS):
        with make(target=targets[row], strength=strengths[row]).apply(model):
            alone = generate(model, prompt)[1]
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{"target": ["apply", "create"]}, {"strength": [1.0, 2.0]}])
def test_as_many_rows_are_wanted_as_there_are_targets_or_strengths(model, make, changes):
    name = next(iter(changes))
    message = f"{name} is for 2 rows, the batch has 3: give all prompts in one call"
    with make(**changes).apply(model), pytest.raises(ValueError, match=f"^{message}"):
        generate(model, PROMPTS)


def test_the_trace_tells_what_was_added(model, make, means):
    steerer = make(target=["apply", "create", "create"], scope=sqs.LastPromptToken(), layers=[0])
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    residuals = read_activations(model, tokens, ["blocks.0.hook_resid_post"])[
        "blocks.0.hook_resid_post"
    ][:, :, 0]
    with steerer.apply(model, record=True) as trace:
        generate(model, PROMPTS)
    table = trace.to_dataframe()
    assert table["row"].tolist() == [0, 1, 2]
    assert table["target"].tolist() == ["apply", "create", "create"]
    assert table["position"].tolist() == [3, 1, 5]
    assert table["text"].tolist() == ["w33", "w5", "w9"]
    assert set(table["head"]) == {-1}
    assert set(table["method"]) == {"residual mean difference"}
    norms = [float(2 * direction(means, 0, name).norm()) for name in table["target"]]
    assert table["delta_norm"].tolist() == pytest.approx(norms, rel=1e-4)
    assert table["query_norm"][0] == pytest.approx(float(residuals[0, -1].norm()), rel=1e-4)
    assert trace.summary()["n_tokens"].tolist() == [1, 1, 1]  # a line for each row


def test_another_model_is_refused(tiny_folder, make, tmp_path):
    with torch.random.fork_rng():
        make_model(tmp_path / "shallow", n_layers=2)
    shallow = sqs.load_model(str(tmp_path / "shallow"), device="cpu")
    with pytest.raises(ValueError, match="at layer 2: the model has 2 layers"):
        make().apply(shallow).__enter__()
    other = sqs.load_model(str(tiny_folder), device="cpu")
    make().check_model(other)
    with torch.no_grad():
        other.blocks[0].attn.q.original_component.weight.mul_(1.1)
    message = r"another model: at blocks\.0\.hook_resid_post .* differ from the fingerprint by 0"
    with pytest.raises(ValueError, match=f"^{message}"):
        make().apply(other).__enter__()
    assert not any(point._forward_hooks for point in other.hook_dict.values())


def test_a_residual_stream_that_is_not_finite_names_its_hook(model, make, means, examples):
    def broken(residual, hook):
        return residual / 0

    message = r"at blocks\.2\.hook_resid_post (is|are) not finite: look for"
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", broken)]):
        with pytest.raises(ValueError, match=message):
            class_means(model, sqs.tokenize_examples(model, examples), [2])
        with make().apply(model), pytest.raises(ValueError, match=message):
            generate(model, PROMPTS)
    with make(strength=1e38).apply(model), pytest.raises(ValueError, match="less strength"):
        generate(model, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "analyse"}, ValueError, "no class 'analyse': the classes are ['remember', "),
        ({"target": []}, ValueError, "target must be one value"),
        ({"strength": -1.0}, ValueError, "strength must be"),
        (
            {"strength": [1.0, float("nan")]},
            ValueError,
            "strength must be",
        ),
        (
            {"scope": sqs.scopes.LastResponseToken()},
            ValueError,
            "LastResponseToken() can't be a scope",
        ),
        ({"scope": []}, TypeError, "scope must be a scope"),
        ({"layers": [1]}, ValueError, "no site at layer 1: there are some at [0, 2]"),
        ({"layers": [0, 0]}, ValueError, "layers must name each layer once, got [0, 0]"),
        ({"layers": []}, ValueError, "no site is left by layers=[]"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(make, changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        make(**changes)


@pytest.mark.parametrize("layers", [[3], [-1], []])
def test_layers_that_there_are_not_are_refused(model, examples, layers):
    with pytest.raises(ValueError, match=r"layer 3|blocks\.-1|at least one"):
        class_means(model, sqs.tokenize_examples(model, examples), layers)


def test_attention_that_no_edit_can_change_is_not_recorded(model, make):
    with (
        pytest.raises(ValueError, match="hook_resid_post: use record=True"),
        make().apply(model, record_attention=True),
    ):
        pass
