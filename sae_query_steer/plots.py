"""Plotly figures of the tables of diagnostics, traces and runs."""

import html
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from sae_query_steer.sites import ALL_HEADS


def plot_sites(table: pd.DataFrame, value: str = "class_effect") -> go.Figure:
    """Return a heatmap of a value by layer (rows) and head (columns).

    The last column is for all heads of a layer together. Tooltips show the standard error if the
    table has it (`<value>_se`). The colour scale is centred at 0 if there are negative values.

    Args:
        table: the result of `interchange_effect` or `separability`.
        value: the column to show.

    Raises:
        ValueError: the table has no such column; the message lists those it has.
    """
    if not {value, "layer", "head"} <= set(table.columns):
        raise ValueError(
            f"no column {value!r} by layer and head: the columns are {list(table.columns)}"
        )
    heads = sorted({head for head in table["head"] if head != ALL_HEADS})
    columns = [*heads, *([ALL_HEADS] if ALL_HEADS in set(table["head"]) else [])]

    def by_site(name: str) -> pd.DataFrame:
        return table.pivot(index="layer", columns="head", values=name).sort_index()[columns]

    grid = by_site(value)
    hover = grid.map("{:.3f}".format)
    if f"{value}_se" in table.columns:
        hover = hover + " ± " + by_site(f"{value}_se").map("{:.3f}".format)
    signed = bool((grid.to_numpy() < 0).any())
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(),
            x=[str(head) for head in columns],
            y=[str(layer) for layer in grid.index],
            customdata=hover.to_numpy(),
            hovertemplate="layer %{y}, head %{x}: %{customdata}<extra></extra>",
            colorscale="RdBu" if signed else "Blues",
            zmid=0 if signed else None,
            colorbar={"title": value},
        )
    )
    return figure.update_layout(
        title=f"{value} by layer and head",
        xaxis={"title": "head", "type": "category"},
        yaxis={"title": "layer", "type": "category", "autorange": "reversed"},
    )


def plot_trace(table: pd.DataFrame, value: str = "relative_change") -> go.Figure:
    """Return a value over the positions, mean over heads: a line for each run, row and layer.

    Args:
        table: the result of `SteeringTrace.to_dataframe`.
        value: the column to show, such as "relative_change", "distance_after.analyze" or
            "posterior_after.analyze".

    Raises:
        ValueError: the table has no such column, or no rows.
    """
    if len(table) == 0 or value not in table.columns:
        raise ValueError(
            f"nothing to draw: the trace has {len(table)} rows and the columns "
            f"{list(table.columns)}"
        )
    return go.Figure(_lines(table, value)).update_layout(
        title=f"{value} of the steered tokens, mean over heads",
        xaxis_title="position",
        yaxis_title=value,
    )


def plot_metrics(table: pd.DataFrame) -> go.Figure:
    """Return the curves of a run: a panel for each metric, and in it a line for each site or class.

    `plot_metrics(...).write_html(file)` makes a page that needs no network.

    Args:
        table: the mappings of `on_metrics`, a row for each call, such as
            `pd.read_json("saes/metrics.jsonl", lines=True)`, or `LearnedTargets.history`. If a step
            is there twice, as after a run was resumed, the last value counts.

    Raises:
        ValueError: the table has no such columns.
    """
    keys = [name for name in ("step", "label") if name in table.columns]
    metrics = [str(name) for name in table.columns if "label" in keys or "/" in str(name)]
    metrics = [name for name in metrics if name not in keys]
    if "step" not in keys or not metrics:
        raise ValueError(
            "table must have the column 'step', and 'label' or columns such as 'loss/SITE', got "
            f"{list(table.columns)}"
        )
    long = table.melt(keys, metrics, var_name="metric").dropna(subset="value")
    if "label" not in keys:
        long[["metric", "label"]] = long["metric"].str.split("/", n=1, expand=True)
    long = long.groupby(["metric", "label", "step"], sort=False)["value"].last().reset_index()
    n_metrics, n_lines = long["metric"].nunique(), long["label"].nunique()
    scale = px.colors.sample_colorscale("Turbo", n_lines) if n_lines > 10 else None
    figure = px.line(
        long.sort_values("step", kind="stable"),
        x="step",
        y="value",
        color="label",
        facet_col="metric",
        facet_col_wrap=1,
        category_orders={name: list(long[name].unique()) for name in ("metric", "label")},
        color_discrete_sequence=scale,
        markers=True,
        height=180 + 240 * n_metrics,
        template="plotly_white",
    )
    figure.for_each_annotation(lambda title: title.update(text=title.text.partition("=")[2]))
    figure.update_yaxes(matches=None, title=None)
    return figure.update_layout(
        legend={"orientation": "h", "y": -0.25 / n_metrics, "maxheight": 100, "title": None},
        margin={"l": 50, "r": 20, "t": 40},
    )


def _lines(table: pd.DataFrame, value: str) -> list[go.Scatter]:
    """Return the mean of a value over heads at every position, by run, row and layer."""
    wanted: dict[str, Any] = {"value": (value, "mean")}
    if "text" in table.columns:
        wanted["text"] = ("text", "first")
    means = table.groupby(["run", "row", "layer", "position"], as_index=False).agg(**wanted)
    texts = means["text"] if "text" in means else pd.Series("", index=means.index)
    # Plotly would read the token <s> as a tag.
    means["text"] = [html.escape(repr(text), quote=False) for text in texts]
    return [
        go.Scatter(
            x=line["position"],
            y=line["value"],
            mode="lines+markers",
            name=f"run {run}, row {row}, layer {layer}",
            text=list(line["text"]),
            hovertemplate="position %{x} %{text}: %{y:.3f}",
        )
        for (run, row, layer), line in means.groupby(["run", "row", "layer"])
    ]
