"""The figures of a comparison: what strength costs, which layer does it, from where to where."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from sae_query_steer.compare.comparison import MAX_PERPLEXITY_RATIO
from sae_query_steer.compare.sweep import SweepResult

WHICH = ["task", "method", "objective", "centroids", "span", "scope", "layers", "heads"]
"""The columns that tell rows apart."""


def named(row: Mapping[Any, Any]) -> str:
    """Return a name for a row of a sweep: method, objective and layers."""
    parts = [str(row[key]) for key in ("method", "objective") if isinstance(row[key], str)]
    return ", ".join([*parts, *([f"layer {row['layers']}"] if row["layers"] else [])])


def frontier_figure(
    curves: pd.DataFrame, name: Callable[[Mapping[Any, Any]], str] = named
) -> go.Figure:
    """Return target rate against perplexity ratio, task by task, a line for each way of steering.

    Args:
        curves: of a sweep.
        name: what a line is called, from one of its rows.
    """
    tasks = list(dict.fromkeys(curves["task"])) if len(curves) else [""]
    figure = make_subplots(
        cols=len(tasks), shared_yaxes=True, subplot_titles=tasks if len(tasks) > 1 else None
    )
    colours: dict[str, str] = {}
    lines = curves.groupby(WHICH, dropna=False, sort=False) if len(curves) else ()
    for _, part in lines:
        part = part.sort_values("step_size")
        first = part.iloc[0].to_dict()
        called = name(first)
        new = called not in colours
        colour = colours.setdefault(called, _COLOURS[len(colours) % len(_COLOURS)])
        figure.add_scatter(
            col=tasks.index(first["task"]) + 1,
            row=1,
            x=part["perplexity_ratio"],
            y=part["target_rate"],
            mode="lines+markers",
            name=called,
            legendgroup=called,
            showlegend=new,
            line={"color": colour},
            marker={"symbol": _SYMBOLS[list(colours).index(called) % len(_SYMBOLS)]},
            customdata=part[["step_size"]],
            hovertemplate="step size %{customdata[0]:g}: target %{y:.2f} at ratio %{x:.2f}",
        )
    figure.add_vline(x=MAX_PERPLEXITY_RATIO, line={"dash": "dot", "color": "#9aa0a6"})
    figure.update_layout(
        height=460 + 20 * max(0, len(colours) - 16),
        template="plotly_white",
        margin={"l": 10, "r": 10, "t": 30, "b": 40},
    )
    figure.update_xaxes(title="perplexity ratio", type="log")
    figure.update_yaxes(range=[0, 1.03])
    figure.update_yaxes(title="target rate", col=1)
    return figure


_COLOURS = qualitative.Dark24
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")


def layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the most success that each way of steering one layer alone reached there.

    A row for each layer, a column for each method, or for each task and method.
    """
    chosen = rows[rows["layers"].str.fullmatch(r"\d+") & rows["delta_q_ratio"].notna()]
    chosen = chosen[~chosen["method"].str.startswith("random direction")]
    layer = pd.Series([int(name) for name in chosen["layers"]], index=chosen.index, dtype=int)
    kind = chosen["method"]
    if len(set(rows["task"])) > 1:
        kind = chosen["task"] + ": " + kind
    return (
        chosen.assign(layer=layer, kind=kind)
        .pivot_table(index="layer", columns="kind", values="success", aggfunc="max", sort=False)
        .rename_axis(columns=None)
        .sort_index()
        .reset_index()
    )


def across(by_layer: pd.DataFrame) -> pd.DataFrame:
    """Return the table by layer as it is read: a row for each way, a column for each layer."""
    rows = [
        {"method": kind}
        | {
            f"layer {n}": "" if pd.isna(x) else f"{x:.2f}"
            for n, x in zip(by_layer["layer"], by_layer[kind], strict=True)
        }
        for kind in by_layer.columns.drop("layer")
    ]
    return pd.DataFrame(rows)


def layer_figure(by_layer: pd.DataFrame) -> go.Figure:
    """Return success by layer, a line for each way of steering; from `layer_table`."""
    long = by_layer.melt(id_vars="layer", var_name="method", value_name="success").dropna()
    figure = px.line(long, x="layer", y="success", color="method", markers=True)
    figure.update_layout(
        height=320,
        template="plotly_white",
        margin={"l": 10, "r": 10, "t": 20, "b": 30},
        xaxis={"dtick": 1},
        yaxis={"range": [0, 1.03]},
    )
    return figure


def matrix_figure(result: SweepResult) -> go.Figure | None:
    """Return the success of the best steer by source and target class; None without sources."""
    known = pd.DataFrame(result.texts[result.texts["source"].notna()])
    rows = pd.DataFrame(result.rows[result.rows["task"].isin(list(known["task"]))])
    steered = pd.DataFrame(rows[rows["step_size"].notna()])
    if len(rows) == 0:
        return None
    best = best_row(steered if len(steered) else rows)
    for key in WHICH:
        same = known[key].isna() if pd.isna(best[key]) else known[key] == best[key]
        known = known[same]
    hit = known.assign(hit=known["success"].astype(float))
    grid = hit.pivot_table(index="source", columns="target", values="hit", aggfunc="mean")
    figure = px.imshow(grid, zmin=0, zmax=1, color_continuous_scale="Blues")
    figure.update_traces(texttemplate="%{z:.2f}")
    figure.update_layout(
        height=120 + 48 * len(grid),
        template="plotly_white",
        margin={"l": 10, "r": 10, "t": 20, "b": 30},
    )
    return figure


def best_row(rows: pd.DataFrame) -> Any:
    """Return the row of most success."""
    return rows.iloc[int(rows["success"].to_numpy().argmax())]
