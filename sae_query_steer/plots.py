"""Figures of the tables, as plotly figures that a notebook shows and `write_html` saves."""

import pandas as pd
import plotly.graph_objects as go

from sae_query_steer.separability import ALL_HEADS


def plot_sites(table: pd.DataFrame, value: str = "class_effect") -> go.Figure:
    """Return a map of a table of sites: layers down, heads across, one value a cell.

    Beside the heads stands a column for all heads of a layer together. Where the table has a
    standard error of the value (`<value>_se`), it is told on hovering. Values that may be negative
    are coloured around 0.

    Args:
        table: what `interchange_effect` or `separability` returned.
        value: the column to show.

    Raises:
        ValueError: the table has no such column; the message lists those it has.
    """
    if value not in table.columns or not {"layer", "head"} <= set(table.columns):
        raise ValueError(
            f"the table has no column {value!r} by layer and head: it has {list(table.columns)}"
        )
    heads = sorted({head for head in table["head"] if head != ALL_HEADS})
    columns = [*heads, *([ALL_HEADS] if ALL_HEADS in set(table["head"]) else [])]
    layers = sorted(table["layer"].unique())
    grid = table.pivot(index="layer", columns="head", values=value).reindex(layers)[columns]
    hover = grid.map(lambda x: f"{x:.3f}")
    if f"{value}_se" in table.columns:
        errors = table.pivot(index="layer", columns="head", values=f"{value}_se")
        errors = errors.reindex(layers)[columns]
        hover = hover + " ± " + errors.map(lambda x: f"{x:.3f}")
    signed = bool((grid.to_numpy() < 0).any())
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(),
            x=[str(head) for head in columns],
            y=[str(layer) for layer in layers],
            customdata=hover.to_numpy(),
            hovertemplate="layer %{y}, head %{x}: %{customdata}<extra></extra>",
            colorscale="RdBu" if signed else "Blues",
            zmid=0 if signed else None,
            colorbar={"title": value},
        )
    )
    figure.update_layout(
        title=f"{value} by layer and head",
        xaxis={"title": "head", "type": "category"},
        yaxis={"title": "layer", "type": "category", "autorange": "reversed"},
    )
    return figure


def plot_trace(table: pd.DataFrame, value: str = "relative_change") -> go.Figure:
    """Return a trace as lines: a value over the positions of a row, one line for each layer.

    The mean over the heads of a layer is drawn; rows and runs are drawn apart.

    Args:
        table: what `SteeringTrace.to_dataframe` returned.
        value: the column to show, such as "relative_change" or "distance_after.analyze".

    Raises:
        ValueError: the table has no such column, or no rows.
    """
    if value not in table.columns or len(table) == 0:
        raise ValueError(
            f"nothing to draw: the trace has {len(table)} rows and the columns "
            f"{list(table.columns)}"
        )
    keys = ["run", "row", "layer"]
    means = table.groupby([*keys, "position"], as_index=False).agg(value=(value, "mean"))
    texts = {}
    if "text" in table.columns:
        named = table[["run", "row", "position", "text"]].itertuples(index=False, name=None)
        texts = {(run, row, position): text for run, row, position, text in named}
    figure = go.Figure()
    for run, row, layer in means[keys].drop_duplicates().itertuples(index=False, name=None):
        line = means.query("run == @run and row == @row and layer == @layer")
        figure.add_scatter(
            x=line["position"],
            y=line["value"],
            mode="lines+markers",
            name=f"run {run}, row {row}, layer {layer}",
            text=[repr(texts.get((run, row, position), "")) for position in line["position"]],
            hovertemplate="position %{x} %{text}: %{y:.3f}",
        )
    figure.update_layout(
        title=f"{value} of the steered tokens, mean over heads",
        xaxis_title="position",
        yaxis_title=value,
    )
    return figure
