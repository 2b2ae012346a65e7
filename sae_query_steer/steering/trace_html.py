"""The text of a steer, coloured by how much each token was steered: HTML for notebooks.

The HTML is plain ASCII with its styles inline: it has no script and no style sheet, which notebooks
drop, and reads the same in whatever encoding a file of it is opened.
"""

import html
import math
from collections.abc import Hashable
from itertools import groupby
from typing import Any

import pandas as pd

_KEYS = ["run", "row", "position"]

_UP, _DOWN = "66,133,244", "230,110,0"
"""Colours, as red, green, blue, of values above and below 0."""

_LARGEST_OPACITY = 0.6
"""Our choice: dark text on white and light text on black stay readable over it."""

_SHOWN = {code: chr(0x2400 + code) for code in range(32)} | {
    ord("\n"): "↵\n",
    ord("\t"): "⇥\t",
    127: "␡",
}
"""Control characters as they are shown; a new line is marked, and begins."""


def text_html(table: pd.DataFrame, value: str = "relative_change") -> str:
    """Return the steered tokens of every run and row in order, coloured by a value.

    The value of a token is its mean over layers and heads. The opacity of its background is the
    value's share of the largest one; values below 0 have a colour of their own. An ellipsis stands
    for the tokens before and between the steered ones, which the table does not know.

    Args:
        table: what `SteeringTrace.to_dataframe` returned.
        value: the column to show, such as "delta_norm" or "posterior_after.analyze".

    Raises:
        ValueError: the table has no such column of numbers; the message lists those it has.
    """
    if len(table) == 0:
        return note_html("no token was steered: the scope met no position")
    columns = [name for name in table.columns if name not in _KEYS]
    numbers = [name for name in columns if pd.api.types.is_numeric_dtype(table[name])]
    if value not in numbers:
        raise ValueError(f"the trace has no column {value!r} of numbers: it has {numbers}")
    tokens = _tokens(table, value)
    sizes = [abs(token["value"]) for token in tokens if math.isfinite(token["value"])]
    scale = max(sizes, default=0.0)
    parts = [_legend(value, scale, signed=any(token["value"] < 0 for token in tokens))]
    if not any(map(_text, tokens)):
        parts.append("<div>The text of the tokens is not known: positions are shown instead.</div>")
    for (run, row), own in groupby(tokens, lambda token: (token["run"], token["row"])):
        parts.append(_row(f"run {run}, row {row}", list(own), value, scale))
    return _ascii(f"<div>{''.join(parts)}</div>")


def note_html(message: str) -> str:
    """Return a message in place of a text."""
    return _ascii(f"<div><em>{html.escape(message)}</em></div>")


def _legend(value: str, scale: float, signed: bool) -> str:
    shades = [_background(share) for share in ((-1.0, 0.0, 1.0) if signed else (0.0, 1.0))]
    gradient = f"linear-gradient(to right,{','.join(shades)})"
    bar = f'<span style="padding:0 3em;background:{gradient}"></span>'
    least = f"{-scale:.3g}" if signed else "0"
    return (
        f"<div>{html.escape(value)}, mean over layers and heads: {least} {bar} {scale:.3g} "
        f"(largest)</div>"
    )


def _tokens(table: pd.DataFrame, value: str) -> list[dict[Hashable, Any]]:
    """Return the steered tokens in order, each with what the table says of it."""
    wanted = {
        "value": (value, "mean"),
        "relative_change": ("relative_change", "mean"),
        "text": ("text", "first"),
        "target": ("target", _all),
        "before": ("nearest_before", _most),
        "after": ("nearest_after", _most),
    }
    there = {name: how for name, how in wanted.items() if how[0] in table.columns}
    return table.groupby(_KEYS, as_index=False).agg(**there).to_dict("records")


def _row(name: str, tokens: list[dict[Hashable, Any]], value: str, scale: float) -> str:
    targets = dict.fromkeys(token["target"] for token in tokens if token.get("target"))
    if targets:
        name += f", target {' / '.join(targets)}"
    spans, expected = [], 0
    for token in tokens:
        if token["position"] != expected:
            spans.append(_gap(expected, token["position"] - 1))
        spans.append(_token(token, value, scale))
        expected = token["position"] + 1
    return (
        f'<div style="margin-top:0.6em;opacity:0.7">{html.escape(name)}</div>'
        '<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.8">'
        f"{''.join(spans)}</div>"
    )


def _gap(first: int, last: int) -> str:
    which = f"position {first}" if first == last else f"positions {first} to {last}"
    return f'<span title="{which}: not steered" style="opacity:0.6"> … </span>'


def _token(token: dict[Hashable, Any], value: str, scale: float) -> str:
    text = _text(token)
    tooltip = [f"position {token['position']}" + (f": {text!r}" if text else "")]
    if "relative_change" in token:
        tooltip.append(f"relative change {token['relative_change']:.3g}")
    if value != "relative_change":
        tooltip.append(f"{value} {token['value']:.3g}")
    if {"before", "after"} <= set(token):
        tooltip.append(f"nearest class {token['before']} → {token['after']}")
    share = 0.0 if scale == 0 or math.isnan(token["value"]) else token["value"] / scale
    return (
        f'<span title="{"&#10;".join(html.escape(line) for line in tooltip)}" '
        f'style="background:{_background(share)};box-shadow:inset 0 -1px rgba(128,128,128,0.5);'
        'margin-right:1px;unicode-bidi:isolate">'
        f"{html.escape(_visible(text, token['position']))}</span>"
    )


def _text(token: dict[Hashable, Any]) -> str:
    text = token.get("text")  # None or NaN where a forward pass knew no tokens
    return text if isinstance(text, str) else ""


def _all(names: pd.Series) -> str:
    return " / ".join(dict.fromkeys(names.dropna().astype(str)))


def _most(names: pd.Series) -> str:
    """Return the commonest name, and how common it is where there are others."""
    counts = names.dropna().astype(str).value_counts()
    if len(counts) == 0:
        return "unknown"
    name = min(counts.index[counts == counts.iloc[0]])
    return str(name) if len(counts) == 1 else f"{name} ({counts.iloc[0]} of {counts.sum()})"


def _visible(text: str, position: int) -> str:
    """Return a token's text such that one sees it: spaces alone as dots, nothing as a position."""
    if not text:
        return f"[{position}]"
    shown = "·" * len(text) if not text.strip(" ") else text
    return shown.translate(_SHOWN)


def _background(share: float) -> str:
    opacity = _LARGEST_OPACITY * min(abs(share), 1.0)
    return f"rgba({_UP if share >= 0 else _DOWN},{opacity:.3f})"


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")
