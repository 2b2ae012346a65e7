"""Figures show the numbers of their tables."""

import numpy as np
import pandas as pd
import pytest

import sae_query_steer as sqs


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": [3, 3, 3, 1, 1, 1],
            "head": [0, 1, "all"] * 2,
            "class_effect": [0.1, -0.2, 0.3, 0.4, 0.5, 0.6],
            "class_effect_se": [0.01] * 6,
            "kl": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    )


def test_sites_are_drawn_layer_by_layer_with_all_heads_last(table):
    (heat,) = sqs.plots.plot_sites(table).data
    np.testing.assert_allclose(heat.z, [[0.4, 0.5, 0.6], [0.1, -0.2, 0.3]])
    assert list(heat.x) == ["0", "1", "all"]
    assert list(heat.y) == ["1", "3"]
    assert heat.customdata[1][1] == "-0.200 ± 0.010"
    assert heat.zmid == 0


def test_a_value_without_error_or_sign_is_drawn_plainly(table):
    (heat,) = sqs.plots.plot_sites(table, "kl").data
    assert heat.customdata[0][0] == "4.000"
    assert heat.zmid is None


def test_a_column_that_is_absent_is_refused_with_those_there_are(table):
    with pytest.raises(ValueError, match=r"no column 'effect' .*\['layer'"):
        sqs.plots.plot_sites(table, "effect")
    with pytest.raises(ValueError, match="nothing to draw: the trace has 0 rows"):
        sqs.plots.plot_trace(table[:0], "kl")


def test_a_trace_is_drawn_as_the_mean_over_heads_line_by_line():
    table = pd.DataFrame(
        {
            "run": 0,
            "row": [0, 0, 0, 0, 1, 1],
            "position": [5, 5, 6, 6, 2, 2],
            "layer": 1,
            "head": [0, 1] * 3,
            "text": ["a", "a", "b", "b", "c", "c"],
            "relative_change": [0.1, 0.3, 0.5, 0.7, 1.0, 2.0],
        }
    )
    first, second = sqs.plots.plot_trace(table).data
    assert list(first.x) == [5, 6]
    np.testing.assert_allclose(first.y, [0.2, 0.6])
    assert list(first.text) == ["'a'", "'b'"]
    np.testing.assert_allclose(second.y, [1.5])


@pytest.fixture
def steered() -> pd.DataFrame:
    """Two layers of two heads over two positions, steered towards create."""
    return pd.DataFrame(
        {
            "run": 0,
            "row": 0,
            "position": [5, 5, 6, 6] * 2,
            "layer": [1] * 4 + [3] * 4,
            "head": [0, 1] * 4,
            "target": "create",
            "text": ["<s>", "<s>", "b", "b"] * 2,
            "posterior_before.apply": 0.5,
            "posterior_before.create": [0.1, 0.3, 0.2, 0.2, 0.0, 0.1, 0.5, 0.5],
            "posterior_after.apply": 0.25,
            "posterior_after.create": [0.6, 0.8, 0.9, 0.7, 0.4, 0.6, 1.0, 1.0],
        }
    )


def test_the_posterior_is_drawn_before_and_after_for_each_layer(steered):
    lines = sqs.plots.plot_posterior(steered).data
    assert [line.name for line in lines] == [
        f"run 0, row 0, layer {layer}, create {when}"
        for layer in (1, 3)
        for when in ("before", "after")
    ]
    assert [line.line.dash for line in lines] == ["dash", "solid"] * 2
    colors = [line.line.color for line in lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    wanted = [[0.2, 0.2], [0.7, 0.8], [0.05, 0.5], [0.5, 1.0]]
    for line, means in zip(lines, wanted, strict=True):
        assert list(line.x) == [5, 6]
        np.testing.assert_allclose(line.y, means)
        assert list(line.text) == ["'&lt;s&gt;'", "'b'"]


def test_the_posterior_of_another_class_is_drawn_on_request(steered):
    before, after, *_ = sqs.plots.plot_posterior(steered, target="apply").data
    assert list(before.y) == [0.5, 0.5]
    assert list(after.y) == [0.25, 0.25]


def test_rows_with_targets_of_their_own_are_drawn_for_these(steered):
    other = steered.assign(row=1, target="apply")
    lines = sqs.plots.plot_posterior(pd.concat([steered, other])).data
    assert len(lines) == 8
    assert lines[4].name == "run 0, row 1, layer 1, apply before"
    assert list(lines[5].y) == [0.25, 0.25]


def test_a_posterior_that_is_absent_is_refused_with_those_there_are(steered):
    remedy = r"\['apply', 'create'\]"
    with pytest.raises(ValueError, match=f"'crate'.*{remedy}"):
        sqs.plots.plot_posterior(steered, target="crate")
    with pytest.raises(ValueError, match=rf"'\+1 create -1 apply'.*{remedy}"):
        sqs.plots.plot_posterior(steered.assign(target="+1 create -1 apply"))
    with pytest.raises(ValueError, match="8 rows .* centroids"):
        sqs.plots.plot_posterior(steered.loc[:, "run":"text"])
    with pytest.raises(ValueError, match="nothing to draw: the trace has 0 rows"):
        sqs.plots.plot_posterior(steered[:0])
