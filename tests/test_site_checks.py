"""Separability and interchange effect: what they measure, on models where the answer is known."""

from functools import partial

import pandas as pd
import pytest
import torch
from test_prefix import batch_of
from transformer_lens.model_bridge import TransformerBridge

import sae_query_steer as sqs
from sae_query_steer.diagnostics import trial
from sae_query_steer.diagnostics.patches import Patch, draw_pairs, next_tokens, prefixed_rows
from sae_query_steer.models.activations import read_activations


# A latent that never fires has no deviation: scikit-learn says so.
@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_:UserWarning")
def test_separability_is_the_held_out_balanced_accuracy_of_the_nearest_centroid(
    tiny_models, saes, examples
):
    model = tiny_models["hooked"]
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import NearestCentroid

    # Classes of unequal size: 16, 16 and 6.
    few = [e for e in examples if e.label == "apply"][:6]
    examples = [e for e in examples if e.label != "apply"] + few
    tokenized = sqs.tokenize_examples(model, examples)
    table = sqs.diagnostics.separability(model, saes, tokenized, seed=3)
    name, head = "blocks.2.attn.hook_q", 1
    labels = [e.label for e in tokenized]
    queries = torch.stack(
        [
            read_activations(model, e.tokens[None, : e.prompt_length], [name])[name][0, -1]
            for e in tokenized
        ]
    )
    latents = saes[name].encode(queries)
    train, test = train_test_split(
        range(len(labels)), test_size=0.5, stratify=labels, random_state=3
    )
    truth = [labels[i] for i in test]
    row = table.query("layer == 2 and head == @head").iloc[0]
    together = table.query("layer == 2 and head == 'all'").iloc[0]
    for column, values in (("accuracy_latents", latents), ("accuracy_query", queries)):
        for where, features in ((row, values[:, head]), (together, values.flatten(1))):
            referee = NearestCentroid().fit(features[train], [labels[i] for i in train])
            expected = balanced_accuracy_score(truth, referee.predict(features[test]))
            assert where[column] == pytest.approx(expected)
    assert row["n_test"] == len(test)
    assert row["n_train"] == len(train)
    assert row["chance"] == pytest.approx(1 / 3)
    assert len(table) == 2 * 5


def tokens(model, examples, **settings):
    return sqs.tokenize_examples(model, examples, **settings)


def test_labels_without_meaning_score_at_chance_however_unequal_the_classes(tiny_models, saes):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(48, (160, 4), generator=generator)
    examples = [
        sqs.LabelledExample(
            prompt=" ".join(f"w{j}" for j in row), label="rare" if i % 5 == 0 else "common"
        )
        for i, row in enumerate(words)
    ]
    model = tiny_models["hooked"]
    table = sqs.diagnostics.separability(model, saes, sqs.tokenize_examples(model, examples))
    for column in ("accuracy_latents", "accuracy_query", "accuracy_position", "accuracy_token"):
        assert table[column].mean() == pytest.approx(0.5, abs=0.12), column
    assert (table["chance"] == 0.5).all()


def test_classes_that_differ_by_their_last_token_alone_are_told_apart_by_the_token(
    tiny_models, saes
):
    examples = [
        sqs.LabelledExample(prompt=f"w{i} w{i + 9} {last}", label=last)
        for last in ("w40", "w41")
        for i in range(12)
    ]
    model = tiny_models["hooked"]
    table = sqs.diagnostics.separability(model, saes, sqs.tokenize_examples(model, examples))
    assert (table["accuracy_token"] == 1).all()
    assert (table["accuracy_position"] == 0.5).all()


def test_classes_that_differ_by_length_alone_are_told_apart_by_position(tiny_models, saes):
    examples = [
        sqs.LabelledExample(prompt=" ".join(["w1"] * n), label=label)
        for label, n in (("short", 3), ("long", 9))
        for _ in range(12)
    ]
    model = tiny_models["hooked"]
    table = sqs.diagnostics.separability(model, saes, sqs.tokenize_examples(model, examples))
    assert (table["accuracy_position"] == 1).all()


def test_separability_refuses_what_it_cannot_split(tiny_models, saes, examples):
    model = tiny_models["bridge"]
    few = [e for e in examples if e.label != "apply"][:20] + [
        sqs.LabelledExample(prompt=f"w{i}", label="apply") for i in range(3)
    ]
    with pytest.raises(ValueError, match="class 'apply' has 3 example"):
        sqs.diagnostics.separability(model, saes, sqs.tokenize_examples(model, few))


def test_the_interchange_effect_equals_a_patch_made_by_hand(model, examples):
    # Two examples of two classes: every pair is known.
    chosen = [next(e for e in examples if e.label == k) for k in ("apply", "create")]
    pair = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in chosen for _ in (0, 1)]
    table = sqs.diagnostics.interchange_effect(
        model, sqs.query_sites(model, [1]), tokens(model, pair), n_pairs=2
    )
    name = "blocks.1.attn.hook_q"
    a, b = (model.to_tokens(e.prompt) for e in chosen)

    def log_probs(tokens, hooks=()):
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))
        return logits.detach()[0, -1].log_softmax(-1)

    for head in (0, 1, 2, 3, "all"):
        heads = slice(None) if head == "all" else [head]
        kl, toward, before = [], [], []
        for receiver, donor in ((a, b), (b, a)):
            donated = read_activations(model, donor, [name])[name][:, -1]

            def patch(q, hook, donated=donated, heads=heads):
                q = q.clone()
                q[:, -1, heads] = donated[:, heads]
                return q

            clean, goal = log_probs(receiver), log_probs(donor)
            patched = log_probs(receiver, [(name, patch)])
            kl.append((clean.exp() * (clean - patched)).sum())
            toward.append((goal.exp() * (patched - clean)).sum())
            before.append((goal.exp() * (goal - clean)).sum())
        row = table[table["head"] == head].iloc[0]
        assert row["kl"] == pytest.approx(float(sum(kl) / 2), rel=1e-3, abs=1e-6)
        assert row["kl_control"] == pytest.approx(0, abs=1e-6)  # the donor has the same text
        assert row["toward_control"] == pytest.approx(0, abs=1e-5)
        assert row["class_effect"] == pytest.approx(row["toward_class"] - row["toward_control"])
        effects = [float(t) for t in toward]
        error = abs(effects[0] - effects[1]) / 2  # two receivers, deviations of half of that
        assert row["class_effect_se"] == pytest.approx(error, rel=1e-2, abs=1e-5)
        assert row["toward_class"] == pytest.approx(float(sum(toward) / 2), rel=1e-2, abs=1e-5)
        assert row["toward_share"] == pytest.approx(
            float(sum(toward) / sum(before)), rel=1e-2, abs=1e-5
        )


def test_a_site_whose_output_is_cut_off_has_no_effect(tiny_folder, examples):
    model = sqs.load_model(str(tiny_folder), device="cpu")
    with torch.no_grad():
        model.blocks[1].attn.o.original_component.weight.zero_()
    table = sqs.diagnostics.interchange_effect(
        model, sqs.query_sites(model), tokens(model, examples), n_pairs=6, per_head=False
    ).set_index("layer")
    assert table.loc[1, "kl"] == pytest.approx(0, abs=1e-6)
    assert table.loc[0, "kl"] > 1e-3
    assert list(table["head"]) == ["all"] * 3


def test_spans_of_unequal_length_are_patched_as_far_as_both_go(tiny_models, examples):
    model = tiny_models["hooked"]
    table = sqs.diagnostics.interchange_effect(
        model,
        sqs.query_sites(model, [0]),
        tokens(model, examples, span=sqs.scopes.ResponseTokens(), batch_size=4),
        n_pairs=6,
        per_head=False,
    )
    assert table["kl"].iloc[0] > 1e-3


def test_equal_seeds_give_equal_tables_and_leave_no_hook(model, examples):
    tokenized = tokens(model, examples)
    tables = [
        sqs.diagnostics.interchange_effect(
            model, sqs.query_sites(model, [2]), tokenized, n_pairs=5, seed=seed, per_head=False
        )
        for seed in (1, 1, 2)
    ]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])
    points = {id(point): point for point in model.hook_dict.values()}.values()
    assert not any(point._forward_hooks for point in points)
    with pytest.raises(ValueError, match="n_pairs must be a whole number >= 1, got 0"):
        sqs.diagnostics.interchange_effect(model, sqs.query_sites(model), tokenized, n_pairs=0)


@pytest.mark.slow
def test_the_error_counts_examples_and_not_pairs(tiny_models, examples):
    model = tiny_models["hooked"]
    # Six examples make two hundred pairs no more certain than they are.
    few = [e for k in ("apply", "create", "remember") for e in examples if e.label == k][::8]
    errors = [
        sqs.diagnostics.interchange_effect(
            model, sqs.query_sites(model, [0]), tokens(model, few), n_pairs=n, per_head=False
        )["class_effect_se"].iloc[0]
        for n in (12, 192)
    ]
    assert errors[1] > errors[0] / 2
    alone = sqs.diagnostics.interchange_effect(
        model, sqs.query_sites(model, [0]), tokens(model, examples), n_pairs=1, per_head=False
    )
    assert alone["class_effect_se"].isna().all()


def test_every_example_is_a_receiver_once_before_one_is_so_twice():
    labels = ["a", "b", "c"] * 5
    pairs = draw_pairs(labels, 15, seed=0)
    assert sorted(pair.base for pair in pairs) == list(range(15))
    for pair in pairs:
        assert labels[pair.source] != labels[pair.base] == labels[pair.control]
        assert pair.control != pair.base


@pytest.mark.filterwarnings("ignore:no forward pass ran")
def test_a_steered_model_is_not_measured(model, saes, targets, examples):
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=1.0
    )
    tokenized = tokens(model, examples)
    with steerer.apply(model):
        for measure in (
            lambda: sqs.CentroidTargetBuilder(model, saes).fit(tokenized),
            lambda: sqs.diagnostics.separability(model, saes, tokenized),
            lambda: sqs.diagnostics.interchange_effect(model, sqs.query_sites(model), tokenized),
        ):
            with pytest.raises(ValueError, match="queries are being changed at blocks.0"):
                measure()
    with pytest.raises(ValueError, match="sites must have at least one"):
        sqs.diagnostics.interchange_effect(model, [], tokenized)


def test_the_control_is_a_patch_from_the_own_class_aimed_at_the_other(tiny_models, examples):
    model = tiny_models["hooked"]
    chosen = [e for k in ("apply", "create") for e in [x for x in examples if x.label == k][:2]]
    chosen = [sqs.LabelledExample(prompt=e.prompt, label=e.label) for e in chosen]
    labels = [e.label for e in chosen]
    assert sorted(labels) == ["apply", "apply", "create", "create"]
    table = sqs.diagnostics.interchange_effect(
        model, sqs.query_sites(model, [1]), tokens(model, chosen), n_pairs=4, seed=2, per_head=False
    )
    name = "blocks.1.attn.hook_q"
    rows = [model.to_tokens(e.prompt) for e in chosen]

    def log_probs(i, donor=None):
        hooks = []
        if donor is not None:
            donated = read_activations(model, rows[donor], [name])[name][:, -1]

            def patch(q, hook):
                q = q.clone()
                q[:, -1] = donated
                return q

            hooks.append((name, patch))
        logits = model.run_with_hooks(rows[i], fwd_hooks=hooks).detach()
        return logits[0, -1].log_softmax(-1)

    expected: dict[str, list[float]] = {"kl": [], "kl_control": [], "toward_control": []}
    for pair in draw_pairs(labels, 4, seed=2):
        own_class = [i for i in range(4) if labels[i] == labels[pair.source]]
        aim = torch.stack([log_probs(i).exp() for i in own_class]).mean(0)
        clean = log_probs(pair.base)
        other, control = (log_probs(pair.base, d) for d in (pair.source, pair.control))
        expected["kl"].append(float((clean.exp() * (clean - other)).sum()))
        expected["kl_control"].append(float((clean.exp() * (clean - control)).sum()))
        expected["toward_control"].append(float((aim * (control - clean)).sum()))
    assert abs(sum(expected["toward_control"])) > 1e-3
    for column, values in expected.items():
        assert table[column].iloc[0] == pytest.approx(sum(values) / 4, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("head", ["all", 2])
def test_a_patch_behind_a_prefix_equals_a_patch_in_a_whole_pass(model, head):
    batch = batch_of()  # four rows of different lengths
    rows, columns = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([6, 8, 0, 13, 2, 3])
    sites = sqs.query_sites(model)
    queries = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    patch, twice = (
        Patch(rows, columns, dict.fromkeys((site.hook_name for site in sites), given))
        for given in (queries, 2 * queries)
    )
    heads = slice(None) if head == "all" else slice(2, 3)

    def by_hand(q, hook, given=queries):
        del hook
        q = q.clone()
        q[rows, columns, heads] = given[:, heads]
        return q

    def log_probs(hooks=()):
        logits = read_activations(model, batch.tokens, ["logits"], fwd_hooks=hooks)["logits"]
        return logits[rows, columns].log_softmax(-1)

    mask = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    mask[rows, columns] = True
    prefixed = prefixed_rows(model, batch, mask)
    assert prefixed.tokens.shape[1] == 3
    unpatched = prefixed.unchanged(rows, columns, [site.layer for site in sites], copies=True)
    whole = log_probs()
    torch.testing.assert_close(unpatched, whole, atol=1e-4, rtol=0)
    for site in sites:
        expected = log_probs([(site.hook_name, by_hand)])
        assert not torch.allclose(expected, whole, atol=1e-3)
        other = log_probs([(site.hook_name, partial(by_hand, given=2 * queries))])
        (alone,) = next_tokens(prefixed, site, [(patch, head)])
        three = next_tokens(
            prefixed.repeated(3), site, [(patch, head), (twice, head), (patch, head)]
        )
        for found, wanted in zip(
            (alone, *three), (expected, expected, other, expected), strict=True
        ):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert prefixed.shares_cache == isinstance(model, TransformerBridge)


def test_prompts_whose_caches_are_too_large_to_keep_run_again(model, examples, monkeypatch):
    tokenized, runs = tokens(model, examples, span=sqs.LastPromptToken()), []
    made = trial.prefixed_rows
    monkeypatch.setattr(trial, "prefixed_rows", lambda *given: runs.append(1) or made(*given))

    def table():
        runs.clear()
        found = sqs.diagnostics.interchange_effect(
            model, sqs.query_sites(model, [1]), tokenized, n_pairs=len(examples) + 3, per_head=False
        )
        return found, len(runs)

    kept, once = table()
    monkeypatch.setattr(trial, "CACHE_BYTES", 0)
    again, twice = table()
    assert twice == 2 * once
    pd.testing.assert_frame_equal(kept, again, atol=1e-5)


def test_two_sites_of_a_layer_have_a_row_each(tiny_models, examples):
    model = tiny_models["hooked"]
    sites = [*sqs.query_sites(model, [1]), *sqs.query_sites(model, [1], rotated=True)]
    tokenized = tokens(model, examples, span=sqs.LastPromptToken())
    both = sqs.diagnostics.interchange_effect(model, sites, tokenized, n_pairs=6, per_head=False)
    assert list(both["layer"]) == [1, 1]
    for row, site in zip(both["kl"], sites, strict=True):
        alone = sqs.diagnostics.interchange_effect(
            model, [site], tokenized, n_pairs=6, per_head=False
        )
        assert row == pytest.approx(alone["kl"].iloc[0], rel=1e-4)
