"""The trace: what a steer did, per token, layer and head."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations
from sae_query_steer.steering.engine import SteeringWarning

PROMPTS = ["w1 w20 w33", "w5"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture
def steerer(saes, targets):
    return sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=3,
        step_size=0.5,
        scope=sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
        heads={0: [1, 3], 2: [0]},
    )


def record(model, steerer, prompts=PROMPTS, **changes) -> pd.DataFrame:
    with steerer.apply(model, record=True) as trace:
        model.generate(prompts, **GREEDY | changes)
    return trace.to_dataframe()


def test_a_trace_is_freed_with_its_last_reference(model, steerer):
    gc.collect()
    gc.disable()  # tensors do not make the garbage collector run
    try:
        with steerer.apply(model, record=True) as trace:
            model.generate(PROMPTS, **GREEDY)
        found = weakref.ref(trace.records[0])
        del trace
        assert found() is None
    finally:
        gc.enable()


def test_there_is_one_row_for_each_steered_token_layer_and_head(model, steerer):
    table = record(model, steerer)
    keys = table[["run", "row", "position", "layer", "head"]]
    assert not keys.duplicated().any()
    # Prompts of 4 and 2 tokens with BOS; the last of four new tokens is never read again.
    wanted = [
        (0, row, position, layer, head)
        for row, n in ((0, 4), (1, 2))
        for position in range(n - 1, n + 3)
        for layer, head in ((0, 1), (0, 3), (2, 0))
    ]
    assert list(keys.itertuples(index=False, name=None)) == wanted


def test_a_steer_towards_the_centroid_shortens_the_distance_by_the_closed_form(model, steerer):
    table = record(model, steerer)
    ratio = table["distance_after.create"] / table["distance_before.create"]
    np.testing.assert_allclose(ratio, 0.5**3, rtol=1e-4)
    np.testing.assert_allclose(table["loss_before"], table["distance_before.create"] ** 2 / 2, 1e-4)
    np.testing.assert_allclose(table["loss_after"], table["distance_after.create"] ** 2 / 2, 1e-4)
    assert (table["lowering_steps"] == 1).all()
    assert (table["target"] == "create").all()
    assert (table["nearest_after"] == "create").mean() > (
        table["nearest_before"] == "create"
    ).mean()
    classes = {"remember", "apply", "create"}
    assert set(table["nearest_before"]) <= classes


def test_distances_and_norms_are_those_of_the_query(model, steerer, saes, targets):
    tokens, name = model.to_tokens(PROMPTS[0]), "blocks.0.attn.hook_q"
    query = read_activations(model, tokens, [name])[name][0, -1]
    latent = saes[name].encode(query)[3]
    table = record(model, steerer, PROMPTS[0]).set_index(["position", "layer", "head"])
    row = table.loc[(3, 0, 3)]
    for index, label in enumerate(targets.classes):
        distance = (latent - targets.means[name][index, 3]).norm()
        assert row[f"distance_before.{label}"] == pytest.approx(float(distance), rel=1e-4)
    assert row["query_norm"] == pytest.approx(float(query[3].norm()), rel=1e-4)
    assert row["relative_change"] == pytest.approx(row["delta_norm"] / row["query_norm"])


def test_the_table_is_the_same_with_the_cache_on_and_off(model, steerer):
    pd.testing.assert_frame_equal(
        record(model, steerer), record(model, steerer, use_past_kv_cache=False), rtol=1e-3
    )


def test_tokens_are_named_by_id_and_text(model, steerer):
    with steerer.apply(model, record=True) as trace:
        output = model.generate(model.to_tokens(PROMPTS[0]), **GREEDY)
    table = trace.to_dataframe().query("layer == 2")
    assert table["token"].tolist() == output[0, 3:-1].tolist()
    assert table["text"].tolist() == [model.tokenizer.decode([t]) for t in output[0, 3:-1]]


def test_every_call_is_a_run_of_its_own(model, steerer):
    tokens = model.to_tokens(PROMPTS[0])
    with steerer.apply(model, record=True, prompt_lengths=[4]) as trace:
        model(tokens)
        model.generate(tokens, **GREEDY)
        model(tokens)
    table = trace.to_dataframe()
    assert table.groupby("run")["position"].nunique().tolist() == [1, 4, 1]
    assert table.query("run == 2")["token"].tolist() == [37] * 3


def test_an_unrecorded_steer_keeps_nothing(model, steerer):
    with steerer.apply(model) as trace:
        model.generate(PROMPTS, **GREEDY)
    assert trace.records == []
    with pytest.raises(ValueError, match="use `with steerer.apply"):
        trace.to_dataframe()


def test_a_recorded_steer_without_a_scoped_position_gives_an_empty_table(model, saes, targets):
    nowhere = sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=1,
        step_size=1.0,
        scope=lambda positions: torch.zeros_like(positions.valid),
    )
    table = record(model, nowhere)
    assert len(table) == 0
    with pytest.warns(SteeringWarning), nowhere.apply(model, record=True) as trace:
        assert len(trace.summary()) == 0
    assert {"run", "row", "position", "layer", "head", "relative_change"} <= set(table.columns)


def test_a_plain_forward_after_a_generation_is_a_run_of_its_own(model, steerer):
    tokens = model.to_tokens(PROMPTS[0])
    with steerer.apply(model, record=True, prompt_lengths=4) as trace:
        model.generate(tokens, **GREEDY)
        model(tokens)
        model.generate(tokens, **GREEDY)
    table = trace.to_dataframe()
    assert table.groupby("run")["position"].nunique().tolist() == [4, 1, 4]


def test_the_summary_has_means_by_layer(model, steerer):
    with steerer.apply(model, record=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    table, summary = trace.to_dataframe(), trace.summary()
    assert summary["layer"].tolist() == [0, 2]
    assert summary["n_tokens"].tolist() == [8, 8]
    for _, row in summary.iterrows():
        own = table[table["layer"] == row["layer"]]
        for name in ("loss_after", "lowering_steps", "relative_change"):
            assert row[name] == pytest.approx(own[name].mean())
        assert row["distance_after"] == pytest.approx(own["distance_after.create"].mean())
        assert row["nearest_is_target_after"] == (own["nearest_after"] == "create").mean()


def test_the_summary_of_rows_with_targets_of_their_own_has_the_distances_to_these(model, steerer):
    with replace(steerer, target=["apply", {"create": 1, "apply": -1}]).apply(
        model, record=True
    ) as trace:
        model.generate(PROMPTS, **GREEDY)
    summary, table = trace.summary(), trace.to_dataframe().query("row == 0 and layer == 2")
    assert summary[["layer", "row"]].values.tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    distance = table["distance_before.apply"].mean()
    assert summary["distance_before"].iloc[2] == pytest.approx(distance)
    assert summary["distance_before"].isna().tolist() == [False, True] * 2  # none of a mixture


def test_the_summary_shows_a_descent_that_overshoots(model, saes, targets):
    given = {"target": "create", "objective": sqs.PrototypeLogLikelihood(), "n_steps": 20}
    steerer = sqs.LatentGradientSteerer(saes, targets, **given, step_size=40.0)
    with pytest.warns(SteeringWarning), steerer.apply(model, record=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    summary = trace.summary()
    assert (summary["nearest_is_target_after"] == 1).all()
    assert (summary["loss_after"] < 0.05 * summary["loss_before"]).all()
    assert (summary["distance_after"] > summary["distance_before"]).all()
    assert (summary["lowering_steps"] < 0.9).all()


def test_a_cache_that_was_begun_outside_the_scope_goes_on_inside_it(tiny_models, steerer):
    model = tiny_models["hooked"]
    tokens = model.to_tokens(PROMPTS[0])
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    with torch.no_grad():
        model(tokens, past_kv_cache=cache)
        with steerer.apply(model, record=True, prompt_lengths=4) as trace:
            for token in (9, 10):
                model(torch.tensor([[token]]), past_kv_cache=cache)
    table = trace.to_dataframe()
    assert table["run"].unique().tolist() == [0]
    assert table["position"].unique().tolist() == [4, 5]
    assert table.drop_duplicates("position")["token"].tolist() == [9, 10]
