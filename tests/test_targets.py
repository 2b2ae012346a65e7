"""Centroids from labelled texts: streamed, merged, and bound to their model."""

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.fingerprint import relative_difference
from sae_query_steer.sae.encoders import IdentityEncoder
from sae_query_steer.targets.fingerprint import check_belongs, take_fingerprint

NAME = "blocks.2.attn.hook_q"
SPANS = {
    "last prompt token": (sqs.LastPromptToken(), lambda e: [e.prompt_length - 1]),
    "response": (sqs.scopes.ResponseTokens(), lambda e: range(e.prompt_length, len(e.tokens))),
    "last response token": (sqs.scopes.LastResponseToken(), lambda e: [len(e.tokens) - 1]),
    "a function": (lambda p: p.index == 1, lambda e: [1]),
}


@pytest.mark.parametrize(("span", "positions"), SPANS.values(), ids=SPANS)
def test_centroids_are_mean_and_variance_of_the_latents_in_the_span(
    model, saes, examples, span, positions
):
    tokenized = sqs.tokenize_examples(model, examples, span=span, batch_size=5)
    targets = sqs.CentroidTargetBuilder(model, saes).fit(tokenized)
    latents: dict[str, list[torch.Tensor]] = {}
    for example in tokenized:
        query = read_activations(model, example.tokens[None], [NAME])[NAME][0]
        latents.setdefault(example.label, []).append(
            saes[NAME].encode(query)[list(positions(example))]
        )
    assert targets.classes == ("remember", "apply", "create")
    for index, label in enumerate(targets.classes):
        z = torch.cat(latents[label])
        assert targets.counts[index] == len(z)
        torch.testing.assert_close(targets.means[NAME][index], z.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            targets.variances[NAME][index], z.var(0, unbiased=False), rtol=1e-3, atol=1e-4
        )


def test_a_stepwise_builder_equals_one_whatever_the_batches(model, saes, examples):
    classes = ["apply", "create", "remember"]
    tokenized = sqs.tokenize_examples(model, examples, batch_size=7)
    one = sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, examples[::-1]))
    stepwise = sqs.CentroidTargetBuilder(model, saes, classes=classes)
    twice = stepwise.partial_fit(tokenized[:30]).partial_fit(tokenized[30:]).targets_
    assert torch.equal(twice.counts, one.counts)
    for name in saes:
        torch.testing.assert_close(twice.means[name], one.means[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(twice.variances[name], one.variances[name], rtol=1e-5, atol=1e-6)


def test_fit_starts_afresh_and_partial_fit_continues(model, saes, examples):
    tokenized = sqs.tokenize_examples(model, examples)
    builder = sqs.CentroidTargetBuilder(model, saes)
    once = builder.fit(tokenized)
    again = builder.fit(tokenized)
    assert torch.equal(again.counts, once.counts)
    assert torch.equal(again.means[NAME], once.means[NAME])
    assert torch.equal(builder.partial_fit(tokenized).targets_.counts, 2 * once.counts)
    other = builder.fit(sqs.tokenize_examples(model, examples, span=sqs.scopes.ResponseTokens()))
    assert int(other.counts.sum()) == sum(e.response_length for e in tokenized)


def test_centroids_of_the_residual_stream_are_means_of_each_class(model, examples):
    names = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"]
    tokenized = sqs.tokenize_examples(model, examples)
    encoders = {name: IdentityEncoder(n_heads=1, d_head=24) for name in names}
    targets = sqs.CentroidTargetBuilder(model, encoders).fit(tokenized)
    for name in names:
        found = [
            read_activations(model, e.tokens[None], [name])[name][0, e.prompt_length - 1]
            for e in tokenized
            if e.label == "create"
        ]
        mean = targets.means[name][targets.class_index("create")]
        torch.testing.assert_close(mean, torch.stack(found).mean(0), rtol=1e-4, atol=1e-4)
    check_belongs(model, encoders, targets)


def test_a_hook_point_that_the_model_does_not_have_is_refused(model):
    encoders = {"blocks.0.hook_resid_nowhere": IdentityEncoder(n_heads=1, d_head=24)}
    with pytest.raises(ValueError, match=r"no hook point blocks\.0\.hook_resid_nowhere"):
        sqs.CentroidTargetBuilder(model, encoders)


def test_both_hosts_give_one_fingerprint_and_equal_centroids(tiny_models, saes, examples):
    hooked, bridge = (
        sqs.CentroidTargetBuilder(tiny_models[host], saes).fit(
            sqs.tokenize_examples(tiny_models[host], examples)
        )
        for host in ("hooked", "bridge")
    )
    for name in saes:
        torch.testing.assert_close(hooked.means[name], bridge.means[name], rtol=1e-4, atol=1e-5)
        assert (
            relative_difference(hooked.fingerprint.queries[name], bridge.fingerprint.queries[name])
            < 1e-5
        )


def test_saved_centroids_steer_as_before_on_the_other_host(tiny_models, saes, targets, tmp_path):
    targets.save(tmp_path / "targets")
    loaded = sqs.CentroidTargets.load(tmp_path / "targets")
    for host in tiny_models.values():
        logits = []
        for centroids in (targets, loaded):
            steerer = sqs.LatentGradientSteerer(
                saes,
                centroids,
                target="apply",
                objective=sqs.objectives.CentroidContrast(),
                n_steps=1,
                step_size=2.0,
                scope=sqs.scopes.EveryPosition(),
            )
            with steerer.apply(host):
                logits.append(host(host.to_tokens("w1 w2 w3")))
        assert torch.equal(*logits)


def test_any_label_set_works_and_bloom_levels_keep_their_order(model, saes, examples):
    renamed = [sqs.LabelledExample(prompt=e.prompt, label=f"style {e.label[0]}") for e in examples]
    targets = sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, renamed))
    assert targets.classes == ("style a", "style c", "style r")


def test_a_failed_call_leaves_the_builder_as_it_was(model, saes, examples):
    builder = sqs.CentroidTargetBuilder(model, saes)
    before = builder.fit(sqs.tokenize_examples(model, examples))
    bad = sqs.LabelledExample(prompt="w1", label="analyze")
    with pytest.raises(ValueError, match="example 1 has the label 'analyze', which is not a class"):
        builder.partial_fit(sqs.tokenize_examples(model, [examples[0], bad]))
    for settings, name in (
        ({"span": sqs.scopes.PromptTokens()}, "span"),
        ({"prepend_bos": False}, "prepend_bos"),
    ):
        with pytest.raises(ValueError, match=f"different {name} cannot be combined"):
            builder.partial_fit(sqs.tokenize_examples(model, examples, **settings))
    with pytest.raises(ValueError, match="the labels name 1 class"):
        builder.fit(sqs.tokenize_examples(model, examples[:1]))
    assert torch.equal(builder.targets_.means[NAME], before.means[NAME])
    assert torch.equal(builder.targets_.counts, before.counts)


def test_examples_that_cannot_work_are_refused(model, saes, examples, untyped):
    def fit(given, classes=None, **settings):
        tokenized = sqs.tokenize_examples(model, given, **settings)
        return sqs.CentroidTargetBuilder(model, saes, classes=classes).fit(tokenized)

    one_class = [e for e in examples if e.label == "apply"]
    with pytest.raises(ValueError, match="the labels name 1 class"):
        fit(one_class)
    single = sqs.LabelledExample(prompt="w1", label="analyze")
    with pytest.raises(ValueError, match="class 'analyze' has 1 example"):
        fit([*examples, single])
    bare = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in examples]
    with pytest.raises(ValueError, match="has no token in the span"):
        fit(bare, span=sqs.scopes.ResponseTokens())
    with pytest.raises(ValueError, match=r"class 'create' has 0 example\(s\)"):
        fit(one_class, classes=["apply", "create"])
    with pytest.raises(ValueError, match="no examples were read"):
        _ = sqs.CentroidTargetBuilder(model, saes).targets_
    with pytest.raises(TypeError, match="got list: use tokenize_examples"):
        sqs.CentroidTargetBuilder(model, saes).fit(examples)


def test_a_site_that_the_model_does_not_have_is_refused(tiny_models, untyped):
    site = sqs.QuerySite(layer=1, n_heads=2, d_head=16)
    with pytest.raises(ValueError, match="the site at layer 1 has 2 heads of 16"):
        sqs.CentroidTargetBuilder(tiny_models["bridge"], sqs.sae.identity_encoders([site]))


def test_a_fingerprint_does_not_see_a_users_hooks(model, saes):
    bare = take_fingerprint(model, saes)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_q", lambda q, hook: q * 2)]):
        hooked = take_fingerprint(model, saes)
    for name in saes:
        assert torch.equal(bare.queries[name], hooked.queries[name])


def test_dense_centroids_save_and_load(model, examples, tmp_path):
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [2]))
    targets = sqs.CentroidTargetBuilder(model, encoders).fit(sqs.tokenize_examples(model, examples))
    targets.save(tmp_path / "dense")
    assert torch.equal(
        sqs.CentroidTargets.load(tmp_path / "dense").means[NAME], targets.means[NAME]
    )


def test_the_span_is_kept_as_it_prints_and_a_function_by_its_name(model, saes, examples):
    def second(positions):
        return positions.index == 1

    tokenized = sqs.tokenize_examples(model, examples, span=second)
    targets = sqs.CentroidTargetBuilder(model, saes).fit(tokenized)
    assert targets.span.endswith("second")
    assert "0x" not in targets.span


def test_a_chat_template_changes_the_centroids_and_autocast_does_not(
    model, saes, examples, monkeypatch, tmp_path
):
    monkeypatch.setattr(model.tokenizer, "chat_template", "w9 {{ messages[0]['content'] }} w8")
    plain = sqs.tokenize_examples(model, examples)
    chat = sqs.tokenize_examples(model, examples, chat_template=True)
    builder = sqs.CentroidTargetBuilder(model, saes)
    one, other = builder.fit(plain), builder.fit(chat)
    assert not torch.equal(one.means[NAME], other.means[NAME])
    with torch.autocast("cpu", torch.bfloat16):
        again = builder.fit(plain)
        check_belongs(model, saes, one)
    assert torch.equal(again.means[NAME], one.means[NAME])
    assert torch.equal(again.fingerprint.queries[NAME], one.fingerprint.queries[NAME])
    turns = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", turns)
    system = [{"role": "system", "content": "w7"}]
    builder.fit(sqs.tokenize_examples(model, examples, chat_template=system)).save(tmp_path / "t")
    assert sqs.CentroidTargets.load(tmp_path / "t").chat_template == system
