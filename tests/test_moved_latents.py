"""Which latents a steer moved, what each makes of its change, and the attention that they cause."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations

NAME, LAYER = "blocks.2.attn.hook_q", 2
PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]  # with BOS 4, 2 and 6 tokens
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
OBJECTIVES = {
    "squared distance": {"objective": sqs.SquaredDistance(), "n_steps": 2, "step_size": 0.4},
    "prototype": {"objective": sqs.PrototypeLogLikelihood(), "n_steps": 6, "step_size": 0.7},
}
EVERY = {NAME: {head: range(16) for head in range(4)}}
SOME = {NAME: {0: [1, 5, 9], 1: [0, 2], 3: list(range(12))}}


@pytest.fixture(scope="module")
def make(saes, targets):
    def made(objective="squared distance", **changes):
        settings = {
            "target": "create",
            "scope": sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
            "layers": [LAYER],
            **OBJECTIVES[objective],
        }
        return sqs.LatentGradientSteerer(saes, targets, **{**settings, **changes})

    return made


def traced(model, steerer, prompts=PROMPTS, **changes):
    with steerer.apply(model, record=True) as trace:
        model.generate(prompts, **GREEDY | changes)
    return trace


def deltas(model, steerer) -> torch.Tensor:
    """What is added at the last token of the prompts; the query is the same for all steerers."""
    found = traced(model, steerer, max_new_tokens=1).records
    return torch.cat([record.change.delta for record in found])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shares_and_projections_of_a_head_sum_to_one(model, make, objective):
    steerer = make(objective)
    table = sqs.diagnostics.moved_latents(steerer, traced(model, steerer))
    sums = table.groupby("head")[["share", "projection"]].sum()
    assert sums.index.tolist() == [0, 1, 2, 3]
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-5)
    assert (table["share"] >= 0).all()
    assert (table["projection"] - table["share"]).abs().max() > 0.01, "decoder rows overlap"
    for _, own in table.groupby("head"):
        assert own["rank"].tolist() == list(range(1, len(own) + 1))
        assert own["share"].is_monotonic_decreasing
    assert (table["moved"] > 0).all()


def test_a_row_is_what_a_loop_over_the_steered_tokens_finds(model, make, saes, targets):
    steerer = make(scope=sqs.LastPromptToken(), heads=[1, 3])
    table = sqs.diagnostics.moved_latents(steerer, traced(model, steerer)).set_index(
        ["head", "latent"]
    )
    queries = [
        read_activations(model, model.to_tokens(prompt), [NAME])[NAME][0, -1] for prompt in PROMPTS
    ]
    before = torch.stack([saes[NAME].encode(query) for query in queries])[:, 3]
    centroid = targets.means[NAME][targets.classes.index("create"), 3]
    change = (1 - 0.6**2) * (centroid - before)  # two steps of 0.4 on the squared distance
    length = change.abs() * saes[NAME].W_dec[3].norm(dim=-1)
    whole = change @ saes[NAME].W_dec[3]
    led = change * (whole @ saes[NAME].W_dec[3].T)
    for latent, row in table.loc[3].iterrows():
        assert row["before"] == pytest.approx(float(before[:, latent].mean()), abs=1e-5)
        assert row["change"] == pytest.approx(float(change[:, latent].mean()), abs=1e-5)
        assert row["after"] == pytest.approx(row["before"] + row["change"], abs=1e-5)
        assert row["centroid"] == pytest.approx(float(centroid[latent]), abs=1e-5)
        assert row["moved"] == float((change[:, latent] != 0).double().mean())
        assert row["share"] == pytest.approx(float(length[:, latent].sum() / length.sum()), 1e-4)
        expected = float(led[:, latent].sum() / whole.square().sum())
        assert row["projection"] == pytest.approx(expected, abs=1e-5)
        assert row["n_tokens"] == 3
    assert set(table.loc[3].index) == set(change.any(0).nonzero()[:, 0].tolist())
    assert set(table.index.get_level_values("head")) == {1, 3}


def test_it_is_the_same_with_the_cache_on_and_off(model, make):
    steerer = make()
    on, off = (
        sqs.diagnostics.moved_latents(steerer, traced(model, steerer, use_past_kv_cache=cache))
        for cache in (True, False)
    )
    keys = ["head", "latent"]
    on, off = (table.sort_values(keys, ignore_index=True) for table in (on, off))
    pd.testing.assert_frame_equal(on.drop(columns="rank"), off.drop(columns="rank"), rtol=1e-3)
    assert (on["n_tokens"] == 12).all()


def test_targets_by_row_have_their_own_rows(tiny_models, make):
    model = tiny_models["bridge"]
    mixed = make(target=["create", {"apply": 1, "create": -1}, "create"])
    table = sqs.diagnostics.moved_latents(mixed, traced(model, mixed))
    assert table.groupby("target")["n_tokens"].first().to_dict() == {
        "+1 apply -1 create": 4,
        "create": 8,
    }
    assert table.groupby("target")["centroid"].count()["+1 apply -1 create"] == 0
    alone = make()
    expected = sqs.diagnostics.moved_latents(alone, traced(model, alone, [PROMPTS[0], PROMPTS[2]]))
    own = table[table["target"] == "create"].reset_index(drop=True)
    merged = own.merge(expected, on=["head", "latent"], suffixes=("", ".alone"))
    assert len(merged) == len(own) == len(expected)
    assert merged["share"].to_numpy() == pytest.approx(merged["share.alone"].to_numpy(), abs=1e-4)


def test_dense_steerers_have_coordinates_for_latents(tiny_models, make, examples):
    model = tiny_models["bridge"]
    dense = sqs.sae.identity_encoders(sqs.query_sites(model, [LAYER]))
    centroids = sqs.CentroidTargetBuilder(model, dense).fit(sqs.tokenize_examples(model, examples))
    steerer = replace(make(), saes=dense, targets=centroids)
    table = sqs.diagnostics.moved_latents(steerer, traced(model, steerer))
    assert table.groupby("head")["latent"].apply(sorted).tolist() == [list(range(8))] * 4
    # Orthogonal rows: what a coordinate leads is never back.
    assert (table["projection"] >= 0).all()


def test_the_most_moved_are_those_of_least_rank(tiny_models, make):
    steerer = make(heads=[0, 3])
    table = sqs.diagnostics.moved_latents(steerer, traced(tiny_models["bridge"], steerer))
    top = sqs.diagnostics.most_moved(table, 2)
    for head in (0, 3):
        own = table[table["head"] == head].sort_values("share", ascending=False)
        assert top[NAME][head] == own["latent"].tolist()[:2]
    assert set(top[NAME]) == {0, 3}
    assert len(sqs.diagnostics.most_moved(table, 99)[NAME][0]) == (table["head"] == 0).sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_latents_held_is_no_steer_and_none_held_is_the_steer(model, make, objective):
    steerer = make(objective, scope=sqs.LastPromptToken())
    whole = deltas(model, steerer)
    assert whole.norm() > 0.1
    for latents, expected in (
        (sqs.control.ExceptLatents(EVERY), torch.zeros_like(whole)),
        (sqs.control.ExceptLatents({}), whole),
        (sqs.control.GivenLatents(EVERY), whole),
    ):
        for some in (
            replace(steerer, latents=latents),
            sqs.steering.partial_steerer(steerer, latents=latents),
        ):
            torch.testing.assert_close(deltas(model, some), expected, rtol=1e-4, atol=1e-5)
    assert not deltas(model, replace(steerer, latents=sqs.control.ExceptLatents(EVERY))).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_part_and_the_rest_sum_to_the_steer(tiny_models, make, objective):
    model, steerer = tiny_models["bridge"], make(objective, scope=sqs.LastPromptToken())
    parts = [
        deltas(model, sqs.steering.partial_steerer(steerer, latents=choice(SOME)))
        for choice in (sqs.control.GivenLatents, sqs.control.ExceptLatents)
    ]
    assert all(part.norm() > 0.05 for part in parts)
    torch.testing.assert_close(sum(parts), deltas(model, steerer), rtol=1e-4, atol=1e-5)


def test_held_and_taken_out_differ_only_where_latents_hang_together(tiny_models, make):
    model, differences = tiny_models["bridge"], {}
    for objective in OBJECTIVES:
        steerer = make(objective, scope=sqs.LastPromptToken())
        some = sqs.control.ExceptLatents(SOME)
        held = deltas(model, replace(steerer, latents=some))
        taken = deltas(model, sqs.steering.partial_steerer(steerer, latents=some))
        differences[objective] = float((held - taken).norm() / taken.norm())
    assert differences["squared distance"] < 1e-5
    assert differences["prototype"] > 1e-3


def test_of_a_part_only_the_chosen_latents_moved_and_as_far_as_before(tiny_models, make):
    model, steerer = tiny_models["bridge"], make("prototype", scope=sqs.LastPromptToken())
    part = sqs.steering.partial_steerer(steerer, latents=sqs.control.GivenLatents(SOME))
    keys = ["head", "latent"]
    whole = sqs.diagnostics.moved_latents(steerer, traced(model, steerer)).set_index(keys)
    found = sqs.diagnostics.moved_latents(part, traced(model, part)).set_index(keys)
    assert set(found.index) <= {(h, i) for h, some in SOME[NAME].items() for i in some}
    assert len(found) > 3
    expected = whole.loc[found.index]
    assert found["change"].to_numpy() == pytest.approx(expected["change"].to_numpy(), abs=1e-5)
    assert traced(model, part).to_dataframe()["method"].unique() == ["a part of latent gradient"]


def test_a_part_keeps_to_the_limits_of_the_steer(tiny_models, make):
    model, limits = tiny_models["bridge"], {"max_relative_change": 0.02, "keep_norm": True}
    part = sqs.steering.partial_steerer(make(**limits), latents=sqs.control.GivenLatents(EVERY))
    table = traced(model, part).to_dataframe()
    assert 0 < table["relative_change"].max() <= 0.02 + 1e-5


def test_attention_of_all_latents_is_that_of_the_steer(model, make):
    steerer = make(scope=sqs.LastPromptToken())
    with steerer.apply(model, record_attention=True) as trace:
        model.generate(PROMPTS, **GREEDY | {"max_new_tokens": 1})
    expected = trace.attention_change(model)
    found = sqs.diagnostics.latent_attention(model, steerer, PROMPTS, EVERY)
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-5)
    assert found["change"].abs().max() > 1e-3
    without = sqs.diagnostics.latent_attention(model, steerer, PROMPTS, EVERY, without=True)
    assert without["change"].abs().max() < 1e-5


def test_attention_of_a_latent_is_that_of_its_own_move(tiny_models, make, saes, targets):
    model = tiny_models["bridge"]
    steerer = make(scope=sqs.LastPromptToken())
    table = sqs.diagnostics.latent_attention(model, steerer, [PROMPTS[0]], {NAME: {1: [6], 3: []}})
    assert set(table["head"]) == {1, 3}
    assert table.loc[table["head"] == 3, "change"].abs().max() < 1e-6
    tokens = model.to_tokens(PROMPTS[0])
    query = read_activations(model, tokens, [NAME])[NAME][0, -1]
    before = saes[NAME].encode(query)[1, 6]
    centroid = targets.means[NAME][targets.classes.index("create"), 1, 6]
    added = (1 - 0.6**2) * (centroid - before) * saes[NAME].W_dec[1, 6]

    def move(queries, hook):
        del hook
        shape = queries.shape
        queries = queries.clone().reshape(*shape[:2], 4, 8)
        queries[0, -1, 1] += added
        return queries.reshape(shape)

    pattern = f"blocks.{LAYER}.attn.hook_pattern"
    with torch.no_grad(), model.hooks(fwd_hooks=[(NAME, move)]):
        cache = model.run_with_cache(tokens, names_filter=[pattern], prepend_bos=False)[1]
    own = table[table["head"] == 1].sort_values("source_position")
    assert own["attention_after"].to_numpy() == pytest.approx(
        cache[pattern][0, 1, -1].numpy(), abs=1e-5
    )


def test_other_traces_and_wrong_numbers_are_refused(tiny_models, make, untyped):
    model = tiny_models["bridge"]
    steerer = make()
    trace = traced(model, steerer)
    for other in (make(step_size=0.3), make(heads=[0, 1]), make(layers=[0])):
        with pytest.raises(ValueError, match="the trace is that of another steerer: at layer 2"):
            sqs.diagnostics.moved_latents(other, trace)
    with steerer.apply(model) as unrecorded:
        model.generate(PROMPTS, **GREEDY)
    with pytest.raises(ValueError, match="the trace holds no steered token: use `with"):
        sqs.diagnostics.moved_latents(steerer, unrecorded)
    table = sqs.diagnostics.moved_latents(steerer, trace)
    two = pd.concat([table, table.assign(target="apply")])
    for call, text in (
        (
            lambda: sqs.diagnostics.most_moved(table, 0),
            "m must be a whole number >= 1, got 0",
        ),
        (
            lambda: sqs.diagnostics.most_moved(two, 1),
            "targets ['create', 'apply']: name one with target",
        ),
        (
            lambda: sqs.diagnostics.most_moved(two, 1, target="x"),
            "no target 'x': it has ['create', 'apply']",
        ),
        (
            lambda: sqs.diagnostics.latent_attention(model, steerer, [], EVERY),
            "one text or more, got []",
        ),
        (
            lambda: sqs.diagnostics.latent_attention(model, steerer, "w1", EVERY),
            "one text or more, got 'w1'",
        ),
        (
            lambda: sqs.diagnostics.latent_attention(model, steerer, PROMPTS, {}),
            "latents must name at least one latent",
        ),
        (
            lambda: deltas(model, make(latents=sqs.control.ExceptLatents({NAME: {3: [16]}}))),
            "a latent at blocks.2.attn.hook_q head 3 must be a whole number >= 0 and <= 15, got 16",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    with pytest.raises(TypeError, match="LatentGradientSteerer, got Steerer"):
        sqs.steering.partial_steerer(
            sqs.baselines.random_direction(steerer, seed=0), latents=sqs.control.TopLatents(1)
        )
    with pytest.raises(TypeError, match=r"latents must be a value, .*got \[1\]"):
        sqs.steering.partial_steerer(steerer, latents=[1])
