"""The text of a trace as HTML for notebooks, each token coloured by how much it was steered."""

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import jinja2
import pandas as pd

from sae_query_steer.steering.attention_trace import KEYS

_CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {10: "↵\n", 9: "⇥\t", 127: "␡"}
"""Control characters as they are shown."""


CONTEXT = 8
"""Tokens that are shown on either side of a steered one."""


def text_html(
    table: pd.DataFrame, value: str = "relative_change", read: pd.DataFrame | None = None
) -> str:
    """Return the steered tokens of every run and row in order, coloured by a value.

    The value of a token is its mean over layers and heads; the opacity of its background is the
    value's share of the largest, and negative values have another colour. An ellipsis stands for
    tokens that are not shown.

    Args:
        table: the result of `SteeringTrace.to_dataframe`.
        value: the column to show, such as "delta_norm" or "posterior_after.analyze".
        read: all tokens, with run, row, position, text and written. Those within `CONTEXT` of a
            steered token are shown too, and those that were written.

    Raises:
        ValueError: the table has no such numeric column; the message lists those it has.
    """
    if len(table) == 0:
        return note_html("no token was steered: no position is in the scope")
    columns = [name for name in table.columns if name not in KEYS[:3]]
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(table[name])]
    if value not in numbers:
        raise ValueError(f"value must be a numeric column of the trace, {numbers}, got {value!r}")
    wanted = {
        "value": (value, "mean"),
        "relative_change": ("relative_change", "mean"),
        "text": ("text", "first"),
        "target": ("target", "first"),
        "before": ("nearest_before", _most),
        "after": ("nearest_after", _most),
    }
    present = {name: how for name, how in wanted.items() if how[0] in table}
    tokens = table.groupby(KEYS[:3], as_index=False).agg(**present)
    scale = max((abs(x) for x in tokens["value"] if math.isfinite(x)), default=0.0)
    tokens["share"] = (tokens["value"] / scale).fillna(0.0) if scale else 0.0
    tokens["steered"] = True
    if read is not None and len(read):
        tokens = _with_others(tokens, read)
    by_row = groupby(tokens.to_dict("records"), lambda token: (token["run"], token["row"]))
    return _render(
        value=value,
        scale=scale,
        signed=bool((tokens["value"] < 0).any()),
        no_text=not any(isinstance(text, str) and text for text in tokens.get("text", ())),
        rows=[(key, list(own)) for key, own in by_row],
    )


def _with_others(tokens: pd.DataFrame, read: pd.DataFrame) -> pd.DataFrame:
    """Return the tokens to show: the steered ones, those around them and those written."""
    own = tokens.drop(columns="text", errors="ignore")
    every = own.merge(read, how="outer", on=KEYS[:3], sort=True)
    for name in ("steered", "written"):
        every[name] = every[name].eq(True)
    by_row = every["steered"].astype(float).groupby([every["run"], every["row"]])
    near = by_row.transform(lambda s: s.rolling(2 * CONTEXT + 1, 1, center=True).max())
    return every[(near > 0) | (every["written"] & (by_row.transform("max") > 0))]


def note_html(message: str) -> str:
    """Return a message as HTML."""
    return _render(message=message)


def _render(message: str = "", **values: Any) -> str:
    html = _TEMPLATE.render(message=message, **values)
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _most(names: pd.Series) -> str:
    """Return the most common name, with its count if there are others."""
    counts = names.dropna().astype(str).value_counts()
    if len(counts) == 0:
        return "unknown"
    name = min(counts.index[counts == counts.iloc[0]])
    return str(name) if len(counts) == 1 else f"{name} ({counts.iloc[0]} of {counts.sum()})"


def _visible(token: Mapping[str, Any]) -> str:
    """Return a token's text with visible spaces and control characters, or its position."""
    text = token.get("text")
    if not isinstance(text, str) or not text:
        return f"[{token['position']}]"
    return ("·" * len(text) if not text.strip(" ") else text).translate(_CONTROL)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("sae_query_steer", "steering"), autoescape=True
)
_ENVIRONMENT.filters["visible"] = _visible
_TEMPLATE = _ENVIRONMENT.get_template("trace.html")
