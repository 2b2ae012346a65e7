"""The figures of a comparison, and the names of its rows."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from sae_query_steer.compare.comparison import Comparison
from sae_query_steer.compare.outcomes import MAX_PERPLEXITY_RATIO

_PARTS = {
    "objective": "{}",
    "centroids": "{} prompts",
    "span": "over {}",
    "scope": "at {}",
    "layers": "layer {}",
    "heads": "heads {}",
}
WHICH = ["task", "method", *_PARTS]
"""The columns that tell rows apart."""

_LAYOUT = {"template": "plotly_white", "margin": {"l": 10, "r": 10, "t": 30, "b": 40}}
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")


def is_control(rows: pd.DataFrame) -> pd.Series:
    """Return which rows are random directions."""
    return rows["method"].str.startswith("random direction")


def row_names(table: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """Return a name for each row of a table: the method, and what is not as in most rows.

    Args:
        table: rows, curves or texts of a comparison.
        rows: its rows, of which two thirds or more are "most".
    """
    usual: dict[str, Any] = {}
    for part in _PARTS:
        shares = rows.loc[rows["layers"] != "", part].value_counts(normalize=True)
        usual[part] = shares.index[0] if len(shares) and shares.iloc[0] >= 2 / 3 else None

    def name(row: Mapping[Any, Any]) -> str:
        shown = {p: row[p] for p in _PARTS if isinstance(row[p], str) and row["layers"] != ""}
        return ", ".join(
            [row["method"], *(_PARTS[p].format(x) for p, x in shown.items() if x != usual[p])]
        )

    return [name(row) for row in table.to_dict("records")]


def best_row(rows: pd.DataFrame) -> Any:
    """Return the row of most success."""
    return rows.iloc[int(rows["success"].to_numpy().argmax())]


def success_figure(found: Comparison) -> go.Figure:
    """Return success of every row as bars with 95 % intervals, the tasks side by side."""
    rows = found.rows.assign(name=row_names(found.rows, found.rows))
    tasks = list(dict.fromkeys(rows["task"]))
    figure = make_subplots(cols=len(tasks), shared_yaxes=True, subplot_titles=tasks)
    kinds = list(dict.fromkeys(rows["method"]))
    for column, task in enumerate(tasks, start=1):
        part = rows[rows["task"] == task].iloc[::-1]
        figure.add_bar(
            col=column,
            row=1,
            y=part["name"],
            x=part["success"],
            orientation="h",
            marker_color=[_color(kinds.index(kind)) for kind in part["method"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": part["success_high"] - part["success"],
                "arrayminus": part["success"] - part["success_low"],
                "thickness": 1,
            },
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    figure.update_xaxes(range=[0, 1.02], title="success")
    figure.update_layout(height=110 + 26 * (len(rows) // len(tasks)), showlegend=False, **_LAYOUT)
    return figure


def frontier_figure(found: Comparison) -> go.Figure:
    """Return target rate against perplexity ratio on the validation cases, a line for a method."""
    curves = found.curves
    tasks = list(dict.fromkeys(curves["task"])) if len(curves) else [""]
    figure = make_subplots(cols=len(tasks), shared_yaxes=True, subplot_titles=tasks)
    seen: list[str] = []
    if len(curves):
        curves = curves.assign(name=row_names(curves, found.rows))
        for key, part in curves.groupby(["task", "name"], sort=False):
            task, name = map(str, key) if isinstance(key, tuple) else (str(key), "")
            new = name not in seen
            seen += [name] if new else []
            line = seen.index(name)
            part = part.sort_values("step_size")
            figure.add_scatter(
                col=tasks.index(task) + 1,
                row=1,
                x=part["perplexity_ratio"],
                y=part["target_rate"],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=new,
                line={"color": _color(line)},
                marker={"symbol": _SYMBOLS[line % len(_SYMBOLS)]},
                customdata=part[["step_size"]],
                hovertemplate="step size %{customdata[0]:g}: target %{y:.2f} at ratio %{x:.2f}",
            )
    figure.add_vline(x=MAX_PERPLEXITY_RATIO, line={"dash": "dot", "color": "#9aa0a6"})
    figure.update_layout(height=460 + 20 * max(0, len(seen) - 16), **_LAYOUT)
    figure.update_xaxes(title="perplexity ratio", type="log")
    figure.update_yaxes(range=[0, 1.03])
    figure.update_yaxes(title="target rate", col=1)
    return figure


def _color(index: int) -> str:
    return qualitative.Dark24[index % len(qualitative.Dark24)]


def layer_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the most success that each way of steering one layer alone reached there.

    A row for each layer, a column for each method, or for each task and method.
    """
    chosen = rows[rows["layers"].str.fullmatch(r"\d+") & rows["delta_q_ratio"].notna()]
    chosen = chosen[~is_control(chosen)]
    several = len(set(rows["task"])) > 1
    kind = (chosen["task"] + ": " if several else "") + chosen["method"]
    return (
        chosen.assign(layer=[int(name) for name in chosen["layers"]], kind=kind)
        .pivot_table(index="layer", columns="kind", values="success", aggfunc="max", sort=False)
        .rename_axis(columns=None)
        .sort_index()
        .reset_index()
    )


def matrix_figure(found: Comparison) -> go.Figure | None:
    """Return the success of the best steer by source and target class; None without sources."""
    known = pd.DataFrame(found.texts[found.texts["source"].notna()])
    rows = pd.DataFrame(found.rows[found.rows["task"].isin(list(known["task"]))])
    steered = pd.DataFrame(rows[rows["step_size"].notna()])
    if len(rows) == 0:
        return None
    best = best_row(steered if len(steered) else rows)
    for key in WHICH:
        known = known[known[key].isna() if pd.isna(best[key]) else known[key] == best[key]]
    hit = known.assign(hit=known["success"].astype(float))
    grid = hit.pivot_table(index="source", columns="target", values="hit", aggfunc="mean")
    figure = px.imshow(grid, zmin=0, zmax=1, color_continuous_scale="Blues")
    figure.update_traces(texttemplate="%{z:.2f}")
    figure.update_layout(height=120 + 48 * len(grid), **_LAYOUT)
    return figure
