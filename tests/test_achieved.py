"""The achieved effect: the metric of the interchange effect for a steerer."""

import pandas as pd
import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.compare.interchange import query_patch
from sae_query_steer.data.tokenized import tokenize_example
from sae_query_steer.diagnostics.patches import draw_pairs
from sae_query_steer.models.activations import read_activations

MEASURED = ["kl", "moved", "toward_class", "toward_control", "class_effect", "class_effect_se"]


@pytest.fixture
def same_texts(examples):
    """Three classes of six texts each, those of a class all alike."""
    firsts = [next(e for e in examples if e.label == k) for k in ("apply", "create", "remember")]
    return [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in firsts for _ in range(6)]


def steerer_to(targets, saes, **settings):
    given = {"objective": sqs.SquaredDistance(), "n_steps": 1, "step_size": 1.0} | settings
    return sqs.LatentGradientSteerer(saes, targets, target="create", **given)


def effect(model, sites, examples, **settings):
    """The interchange effect of prompts without their responses."""
    prompts = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in examples]
    others = settings.pop("counterparts", None)
    if others is not None:
        settings["counterparts"] = sqs.tokenize_examples(model, others)
    return sqs.diagnostics.interchange_effect(
        model, sites, sqs.tokenize_examples(model, prompts), per_head=False, **settings
    )


def test_to_steer_all_the_way_to_real_queries_is_to_patch_them_in(model, same_texts):
    # Where all texts of a class are one text, its dense centroid is the donor's real query.
    sites = sqs.query_sites(model, [0, 2])
    dense = sqs.sae.identity_encoders(sites)
    tokenized = sqs.tokenize_examples(model, same_texts)
    centroids = sqs.CentroidTargetBuilder(model, dense).fit(tokenized)
    patched = sqs.diagnostics.interchange_effect(model, sites, tokenized, n_pairs=12, seed=3)
    steered = sqs.diagnostics.achieved_effect(
        model, steerer_to(centroids, dense), tokenized, n_pairs=12, seed=3
    )
    assert list(steered.columns) == list(patched.columns)
    assert patched["class_effect"].abs().max() > 1e-2
    pd.testing.assert_frame_equal(steered, patched, rtol=1e-3, atol=2e-5)


def test_no_steps_move_nothing(model, saes, targets, examples):
    for still in ({"n_steps": 0}, {"step_size": 0.0}):
        steerer = steerer_to(targets, saes, **still)
        tokenized = sqs.tokenize_examples(model, examples)
        table = sqs.diagnostics.achieved_effect(model, steerer, tokenized, n_pairs=6)
        assert table["kl"].abs().max() < 1e-6
        assert (table[["moved", "moved_control"]].abs() < 1e-6).all(axis=None)
        assert (table[["toward_class", "class_effect"]].abs() < 1e-5).all(axis=None)


def test_it_is_what_the_same_steer_does_in_a_forward_pass(model, saes, targets, examples):
    given = {"objective": sqs.PrototypeLogLikelihood(), "n_steps": 5, "step_size": 2.0}
    tokenized = sqs.tokenize_examples(model, examples, batch_size=2)
    table = sqs.diagnostics.achieved_effect(
        model, steerer_to(targets, saes, **given), tokenized, n_pairs=3, seed=1
    )
    pairs = draw_pairs([e.label for e in examples], 3, seed=1)
    for layer, head in ((2, "all"), (0, 1)):
        moved, kl = [], []
        for pair in pairs:
            tokens = tokenize_example(model, examples[pair.base])
            steerer = sqs.LatentGradientSteerer(
                saes,
                targets,
                target=examples[pair.source].label,
                layers=[layer],
                heads=None if head == "all" else [head],
                **given,
            )

            def log_probs(tokens=tokens):
                logits = model(tokens.tokens[None], prepend_bos=False)
                return logits[0, tokens.prompt_length - 1].detach().log_softmax(-1)

            clean = log_probs()
            with steerer.apply(model, prompt_lengths=[tokens.prompt_length]):
                changed = log_probs()
            moved.append(float((clean.exp() - changed.exp()).abs().sum() / 2))
            kl.append(float((clean.exp() * (clean - changed)).sum()))
        row = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
        assert row["moved"] == pytest.approx(sum(moved) / 3, rel=1e-2, abs=1e-6)
        assert row["kl"] == pytest.approx(sum(kl) / 3, rel=1e-2, abs=1e-6)
        assert row["moved"] > 1e-4


def test_every_token_of_a_span_is_steered(model, saes, targets, examples):
    tokenized = sqs.tokenize_examples(model, examples, span=sqs.scopes.ResponseTokens())
    steerer = steerer_to(targets, saes)
    table = sqs.diagnostics.achieved_effect(model, steerer, tokenized, n_pairs=6, per_head=False)
    assert list(table["head"]) == ["all", "all"]
    assert table["kl"].min() > 1e-5


def test_heads_that_the_steerer_leaves_alone_are_not_measured(model, saes, targets, examples):
    tokenized = sqs.tokenize_examples(model, examples)
    two = steerer_to(targets, saes, layers=[2], heads=[3, 1])
    table = sqs.diagnostics.achieved_effect(model, two, tokenized, n_pairs=4)
    whole = sqs.diagnostics.achieved_effect(model, steerer_to(targets, saes), tokenized, n_pairs=4)
    whole = whole[whole["layer"] == 2].set_index("head")
    assert sorted(table["head"].astype(str)) == ["1", "3", "all"]
    table = table.set_index("head")
    for head in (1, 3):
        assert table.loc[head, "kl"] == pytest.approx(whole.loc[head, "kl"], rel=1e-4)
    assert table.loc["all", "kl"] != pytest.approx(whole.loc["all", "kl"], rel=1e-2)


def test_it_refuses_what_it_cannot_steer(model, saes, targets, examples):
    unknown = [sqs.LabelledExample(prompt=f"w{i} w{i + 1}", label="wild") for i in range(4)]
    with pytest.raises(ValueError, match="no class 'wild': the classes are"):
        sqs.diagnostics.achieved_effect(
            model,
            steerer_to(targets, saes),
            sqs.tokenize_examples(model, [*examples, *unknown]),
            n_pairs=40,
        )
    with pytest.raises(ValueError, match="n_pairs must be a whole number >= 1, got 0"):
        sqs.diagnostics.achieved_effect(
            model, steerer_to(targets, saes), sqs.tokenize_examples(model, examples), n_pairs=0
        )


def counterparts_of(examples):
    """The same texts with their last word changed, as if made for another class."""
    classes = sorted({e.label for e in examples})
    return [
        sqs.LabelledExample(
            prompt=f"{e.prompt} w{40 + i % 5}",
            label=classes[(classes.index(e.label) + 1 + i % 2) % 3],
        )
        for i, e in enumerate(examples)
    ]


def test_a_counterpart_gives_its_own_queries_and_is_its_own_aim(tiny_models, examples):
    model = tiny_models["hooked"]
    others = counterparts_of(examples)
    site = sqs.query_sites(model, [1])[0]
    prompts = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in examples]
    table = effect(model, [site], prompts, counterparts=others, n_pairs=5, seed=4)
    toward, gaps = [], []
    for pair in draw_pairs([e.label for e in prompts], 5, seed=4, counterparts=True):
        assert pair.source == len(prompts) + pair.base
        donor = model.to_tokens(others[pair.base].prompt)
        receiver = model.to_tokens(prompts[pair.base].prompt)
        given = read_activations(model, donor, [site.hook_name])[site.hook_name][:, -1]
        steerer = query_patch([site], {site.hook_name: given})
        aim, clean = (
            model(tokens, prepend_bos=False)[0, -1].detach().log_softmax(-1)
            for tokens in (donor, receiver)
        )
        with steerer.apply(model, prompt_lengths=[receiver.shape[1]]):
            patched = model(receiver, prepend_bos=False)[0, -1].detach().log_softmax(-1)
        toward.append(float((aim.exp() * (patched - clean)).sum()))
        gaps.append(float((aim.exp() * (aim - clean)).sum()))
    row = table.iloc[0]
    assert row["toward_class"] == pytest.approx(sum(toward) / 5, rel=1e-2, abs=1e-5)
    assert row["class_gap"] == pytest.approx(sum(gaps) / 5, rel=1e-3)
    assert row["class_share"] == pytest.approx(row["class_effect"] / row["class_gap"])
    assert row["toward_share"] == pytest.approx(row["toward_class"] / row["class_gap"], rel=1e-3)


def test_counterparts_of_equal_length_give_the_last_layer_all_that_it_can(tiny_models, examples):
    model = tiny_models["hooked"]
    # The next token of the counterpart itself has no gap left: a receiver equal to it moves 0.
    prompts = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in examples]
    same = [sqs.LabelledExample(prompt=e.prompt, label="other" + e.label) for e in prompts]
    table = effect(model, sqs.query_sites(model, [0]), prompts, counterparts=same, n_pairs=4)
    assert table["class_gap"].abs().max() < 1e-6
    assert table["kl"].abs().max() < 1e-6


def test_the_gap_leaves_the_donor_out_of_its_class(tiny_models, examples):
    model = tiny_models["hooked"]
    prompts = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in examples[:9]]
    labels = [e.label for e in prompts]
    table = effect(model, sqs.query_sites(model, [0]), prompts, n_pairs=7, seed=2)
    logs = [model(model.to_tokens(e.prompt))[0, -1].detach().log_softmax(-1) for e in prompts]
    gaps = []
    for pair in draw_pairs(labels, 7, seed=2):
        rest = [i for i, k in enumerate(labels) if k == labels[pair.source] and i != pair.source]
        goal = torch.stack([logs[i].exp() for i in rest]).mean(0)
        gaps.append(float((goal * (logs[pair.source] - logs[pair.base])).sum()))
    assert table["class_gap"].iloc[0] == pytest.approx(sum(gaps) / 7, rel=1e-2, abs=1e-4)


def test_counterparts_that_do_not_fit_are_refused(tiny_models, examples):
    model = tiny_models["hooked"]
    others = counterparts_of(examples)
    sites = sqs.query_sites(model, [0])
    with pytest.raises(ValueError, match="one for each of the 48 examples.*got 47"):
        effect(model, sites, examples, counterparts=others[:-1])
    with pytest.raises(ValueError, match="counterpart of example 0 .* another class .*'apply'"):
        effect(model, sites, examples, counterparts=examples)
