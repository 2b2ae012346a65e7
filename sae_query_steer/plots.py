"""Figures of the tables, as plotly figures that a notebook shows and `write_html` saves."""

import html

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

from sae_query_steer.diagnostics.separability import ALL_HEADS

_COLORS = qualitative.Plotly


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
    figure = go.Figure(_lines(table, value))
    figure.update_layout(
        title=f"{value} of the steered tokens, mean over heads",
        xaxis_title="position",
        yaxis_title=value,
    )
    return figure


def plot_posterior(table: pd.DataFrame, target: str | None = None) -> go.Figure:
    """Return the posterior of a class over the positions: dashed before the steer, solid after.

    The posterior is the one that the distances to the centroids give. The mean over the heads of a
    layer is drawn, one pair of lines for each layer; rows and runs are drawn apart.

    Args:
        table: what `SteeringTrace.to_dataframe` returned.
        target: the class; None means the target of the steer, that of each row where the rows have
            their own.

    Raises:
        ValueError: the table has no rows or no posteriors, or the target is not one of its classes.
    """
    prefix = "posterior_after."
    classes = [name.removeprefix(prefix) for name in table.columns if name.startswith(prefix)]
    if len(table) == 0 or not classes:
        raise ValueError(
            f"nothing to draw: the trace has {len(table)} rows and the columns "
            f"{list(table.columns)}; posteriors are recorded by a steerer towards centroids, such "
            "as LatentGradientSteerer"
        )
    if target is None:
        tables = {str(name): rows for name, rows in table.groupby("target", sort=False)}
    else:
        tables = {str(target): table}
    for name in tables:
        if name not in classes:
            raise ValueError(
                f"no posterior of {name!r}: the classes are {classes}; choose one of them, as in "
                f"plot_posterior(table, target={classes[0]!r})"
            )
    lines = []
    for name, rows in tables.items():
        before = _lines(rows, f"posterior_before.{name}")
        after = _lines(rows, f"posterior_after.{name}")
        for first, second in zip(before, after, strict=True):
            color = _COLORS[len(lines) // 2 % len(_COLORS)]
            for line, when, dash in ((first, "before", "dash"), (second, "after", "solid")):
                line.update(name=f"{line.name}, {name} {when}", line={"color": color, "dash": dash})
                lines.append(line)
    figure = go.Figure(lines)
    figure.update_layout(
        title=f"posterior of {' / '.join(tables)} before and after the steer, mean over heads",
        xaxis_title="position",
        yaxis={"title": "posterior", "range": [-0.02, 1.02]},
    )
    return figure


def _lines(table: pd.DataFrame, value: str) -> list[go.Scatter]:
    """Return the mean of a value over heads at every position, by run, row and layer."""
    keys = ["run", "row", "layer"]
    means = table.groupby([*keys, "position"], as_index=False).agg(value=(value, "mean"))
    texts = {}
    if "text" in table.columns:
        named = table[["run", "row", "position", "text"]].itertuples(index=False, name=None)
        texts = {(run, row, position): text for run, row, position, text in named}
    lines = []
    for run, row, layer in means[keys].drop_duplicates().itertuples(index=False, name=None):
        line = means.query("run == @run and row == @row and layer == @layer")
        shown = [repr(texts.get((run, row, position), "")) for position in line["position"]]
        lines.append(
            go.Scatter(
                x=line["position"],
                y=line["value"],
                mode="lines+markers",
                name=f"run {run}, row {row}, layer {layer}",
                # Plotly would read the token <s> as the beginning of struck text.
                text=[html.escape(text, quote=False) for text in shown],
                hovertemplate="position %{x} %{text}: %{y:.3f}",
            )
        )
    return lines
