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


def test_metrics_are_drawn_by_site_and_the_last_value_of_a_step_counts():
    told = [
        {"step": 100, "tokens": 800, "loss/a": 5.0, "dead/a": 0},
        {"step": 100, "tokens": 800, "loss/b/c": 7.0},  # of another process
        {"step": 300, "tokens": 2400, "loss/a": 9.0, "dead/a": 1},
        {"step": 200, "tokens": 1600, "loss/a": 4.0, "dead/a": 2},  # resumed behind step 100
        {"step": 300, "tokens": 2400, "loss/a": 3.0, "dead/a": 1},
    ]
    figure = sqs.plots.plot_metrics(pd.DataFrame(told))
    lines = {(line.name, line.xaxis): (list(line.x), list(line.y)) for line in figure.data}
    assert [title.text for title in figure.layout.annotations] == ["dead", "loss"]
    assert lines == {
        ("a", "x2"): ([100, 200, 300], [5.0, 4.0, 3.0]),
        ("b/c", "x2"): ([100], [7.0]),
        ("a", "x"): ([100, 200, 300], [0, 2, 1]),
    }


def test_the_history_of_learning_is_drawn_by_class():
    history = {
        "step": [0.0, 0.0, 5.0, 5.0],
        "label": ["a", "b"] * 2,
        "loss": [None, None, 3.0, 2.0],
    }
    figure = sqs.plots.plot_metrics(pd.DataFrame(history | {"n_latents": [0.0, 0.0, 4.0, 5.0]}))
    assert [(line.name, list(line.y)) for line in figure.data if len(line.x) == 1] == [
        ("a", [3.0]),
        ("b", [2.0]),
    ]
    with pytest.raises(ValueError, match=r"'loss/SITE', got \['step', 'loss'\]"):
        sqs.plots.plot_metrics(pd.DataFrame({"step": [1], "loss": [2.0]}))
