"""Centroids from labelled texts: streamed, merged, and bound to their model."""

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations, read_at_span
from sae_query_steer.models.fingerprint import relative_difference
from sae_query_steer.targets.capture import take_fingerprint

NAME = "blocks.2.attn.hook_q"
SPANS = {
    "last prompt token": (sqs.LastPromptToken(), lambda e: [e.prompt_length - 1]),
    "response": (sqs.ResponseTokens(), lambda e: range(e.prompt_length, len(e.tokens))),
    "last response token": (sqs.LastResponseToken(), lambda e: [len(e.tokens) - 1]),
    "a function": (lambda p: p.index == 1, lambda e: [1]),
}


@pytest.mark.parametrize(("span", "positions"), SPANS.values(), ids=SPANS)
def test_centroids_are_mean_and_variance_of_the_latents_in_the_span(
    model, saes, examples, span, positions
):
    targets = sqs.CentroidTargetBuilder(model, saes, span=span, batch_size=5).fit(examples)
    latents: dict[str, list[torch.Tensor]] = {}
    for example in sqs.tokenize_examples(model, examples):
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


def test_two_builders_merged_equal_one(model, saes, examples):
    classes = ["apply", "create", "remember"]
    one = sqs.CentroidTargetBuilder(model, saes, classes=classes).fit(examples)
    parts = [
        sqs.CentroidTargetBuilder(model, saes, classes=classes).update(part)
        for part in (examples[:11], examples[11:])
    ]
    merged = parts[0].merge(parts[1]).targets()
    stepwise = sqs.CentroidTargetBuilder(model, saes, classes=classes)
    twice = stepwise.update(examples[:30]).update(examples[30:]).targets()
    for other in (merged, twice):
        assert torch.equal(other.counts, one.counts)
        for name in saes:
            torch.testing.assert_close(other.means[name], one.means[name], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                other.variances[name], one.variances[name], rtol=1e-5, atol=1e-6
            )


def test_the_order_and_batching_of_the_texts_do_not_matter(model, saes, examples):
    one = sqs.CentroidTargetBuilder(model, saes, batch_size=64).fit(examples)
    other = sqs.CentroidTargetBuilder(model, saes, batch_size=7).fit(examples[::-1])
    for name in saes:
        torch.testing.assert_close(one.means[name], other.means[name], rtol=1e-5, atol=1e-6)


def test_both_hosts_give_one_fingerprint_and_equal_centroids(tiny_models, saes, examples):
    hooked, bridge = (
        sqs.CentroidTargetBuilder(tiny_models[host], saes).fit(examples)
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
                objective=sqs.CentroidContrast(),
                n_steps=1,
                step_size=2.0,
                scope=sqs.EveryPosition(),
            )
            with steerer.apply(host):
                logits.append(host(host.to_tokens("w1 w2 w3")))
        assert torch.equal(*logits)


def test_any_label_set_works_and_bloom_levels_keep_their_order(model, saes, examples):
    renamed = [sqs.LabelledExample(prompt=e.prompt, label=f"style {e.label[0]}") for e in examples]
    targets = sqs.CentroidTargetBuilder(model, saes).fit(renamed)
    assert targets.classes == ("style a", "style c", "style r")


def test_a_failed_update_leaves_the_builder_as_it_was(model, saes, examples):
    builder = sqs.CentroidTargetBuilder(model, saes)
    before = builder.fit(examples)
    bad = sqs.LabelledExample(prompt="w1", label="analyze")
    with pytest.raises(ValueError, match="example 1 has the label 'analyze', which is no class"):
        builder.update([examples[0], bad])
    assert torch.equal(builder.targets().means[NAME], before.means[NAME])


def test_tokenised_examples_and_texts_give_the_same(model, saes, examples):
    tokenized = sqs.tokenize_examples(model, examples)
    one = sqs.CentroidTargetBuilder(model, saes).fit(tokenized)
    other = sqs.CentroidTargetBuilder(model, saes).fit(examples)
    assert torch.equal(one.means[NAME], other.means[NAME])


def test_the_model_is_run_once_over_each_text(model, saes, examples):
    tokenized = sqs.tokenize_examples(model, examples, batch_size=9)
    seen = [
        row for batch in read_at_span(model, tokenized, list(saes)) for row in batch.row.tolist()
    ]
    assert sorted(seen) == list(range(len(examples)))


def test_examples_that_cannot_work_are_refused(model, saes, examples):
    def fit(given, **settings):
        return sqs.CentroidTargetBuilder(model, saes, **settings).fit(given)

    one_class = [e for e in examples if e.label == "apply"]
    with pytest.raises(ValueError, match="the labels name 1 class"):
        fit(one_class)
    single = sqs.LabelledExample(prompt="w1", label="analyze")
    with pytest.raises(ValueError, match="class 'analyze' has 1 example"):
        fit([*examples, single])
    bare = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in examples]
    with pytest.raises(ValueError, match="has no token in the span"):
        fit(bare, span=sqs.ResponseTokens())
    with pytest.raises(ValueError, match="got none"):
        fit([])
    with pytest.raises(ValueError, match="more than the model's context of 64"):
        fit([*examples, sqs.LabelledExample(prompt="w1 " * 70, label="apply")])
    with pytest.raises(ValueError, match=r"class 'create' has 0 example\(s\)"):
        fit(one_class, classes=["apply", "create"])
    with pytest.raises(ValueError, match="batch_size=0|batch_size must be"):
        fit(examples, batch_size=0)
    with pytest.raises(ValueError, match="no examples were read yet"):
        sqs.CentroidTargetBuilder(model, saes).targets()


def test_builders_that_measure_different_things_do_not_merge(model, saes, examples):
    one = sqs.CentroidTargetBuilder(model, saes).update(examples)
    for other, message in (
        (sqs.CentroidTargetBuilder(model, saes, span=sqs.ResponseTokens()), "different span"),
        (sqs.CentroidTargetBuilder(model, {NAME: saes[NAME]}), "different sites"),
    ):
        with pytest.raises(ValueError, match=message):
            one.merge(other.update(examples))
    with pytest.raises(ValueError, match="must have read examples"):
        one.merge(sqs.CentroidTargetBuilder(model, saes))


def test_a_site_that_the_model_does_not_have_is_refused(tiny_models, untyped):
    site = sqs.QuerySite(layer=1, n_heads=2, d_head=16)
    with pytest.raises(ValueError, match="the site at layer 1 has 2 heads of 16"):
        sqs.CentroidTargetBuilder(tiny_models["bridge"], sqs.identity_encoders([site]))
    with pytest.raises(TypeError, match="span='response' is no scope"):
        sqs.CentroidTargetBuilder(
            tiny_models["bridge"],
            sqs.identity_encoders(sqs.query_sites(tiny_models["bridge"])),
            span="response",
        )


def test_queries_that_are_not_finite_are_refused(model, saes, examples):
    with (
        model.hooks(fwd_hooks=[(NAME, lambda q, hook: q / 0)]),
        pytest.raises(ValueError, match="are not finite"),
    ):
        sqs.CentroidTargetBuilder(model, saes).fit(examples)


def test_a_fingerprint_does_not_see_a_users_hooks(model, saes):
    bare = take_fingerprint(model, saes)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_q", lambda q, hook: q * 2)]):
        hooked = take_fingerprint(model, saes)
    for name in saes:
        assert torch.equal(bare.queries[name], hooked.queries[name])


def test_dense_centroids_save_and_load(model, examples, tmp_path):
    encoders = sqs.identity_encoders(sqs.query_sites(model, [2]))
    targets = sqs.CentroidTargetBuilder(model, encoders).fit(examples)
    targets.save(tmp_path / "dense")
    assert torch.equal(
        sqs.CentroidTargets.load(tmp_path / "dense").means[NAME], targets.means[NAME]
    )


def test_the_span_is_kept_as_it_prints_and_a_function_by_its_name(model, saes, examples):
    def second(positions):
        return positions.index == 1

    targets = sqs.CentroidTargetBuilder(model, saes, span=second).fit(examples)
    assert targets.span.endswith("second")
    assert "0x" not in targets.span


@pytest.mark.parametrize("settings", [{"prepend_bos": False}, {"chat_template": True}])
def test_settings_of_the_tokens_reach_the_centroids(model, saes, examples, settings, monkeypatch):
    template = "w9 {{ messages[0]['content'] }} w8"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    wanted = sqs.CentroidTargetBuilder(model, saes).fit(
        sqs.tokenize_examples(model, examples, **settings)
    )
    found = sqs.CentroidTargetBuilder(model, saes, **settings).fit(examples)
    plain = sqs.CentroidTargetBuilder(model, saes).fit(examples)
    assert torch.equal(found.means[NAME], wanted.means[NAME])
    assert not torch.equal(found.means[NAME], plain.means[NAME])


def test_builders_with_other_saes_or_tokens_do_not_merge(model, saes, examples):
    name = "blocks.0.attn.hook_q"
    one = sqs.CentroidTargetBuilder(model, {name: saes[name]}).update(examples)
    other = sqs.sae.QueryHeadTopKTrainingSAE(
        sqs.QueryHeadTopKTrainingSAEConfig(n_heads=4, d_head=8, d_sae_per_head=16, k=3)
    )
    stranger = sqs.CentroidTargetBuilder(model, {name: sqs.sae.to_inference(other)}).update(
        examples
    )
    with pytest.raises(ValueError, match="another SAE"):
        one.merge(stranger)
    bare = sqs.CentroidTargetBuilder(model, {name: saes[name]}, prepend_bos=False)
    with pytest.raises(ValueError, match="different prepend_bos"):
        one.merge(bare.update(examples))
