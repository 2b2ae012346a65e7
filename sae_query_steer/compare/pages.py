"""What the pages of reports share: their style, and tables."""

import html
import platform
from collections.abc import Sequence
from importlib.metadata import version

import pandas as pd
import plotly.graph_objects as go

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#202124;max-width:1060px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:.86rem;width:100%}
th,td{padding:.28rem .5rem;border-bottom:1px solid #e0e0e0;text-align:left;vertical-align:top}
td{white-space:nowrap}td:nth-child(2){white-space:normal}
th{border-bottom:2px solid #80868b}td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;background:#f6f8fa;padding:.7rem;border-radius:6px;font-size:.86rem}
.verdict{background:#f1f3f4;padding:.8rem 1rem;border-radius:6px}
@media print{body{max-width:none}h2{break-after:avoid}table,pre{break-inside:avoid}}
"""


def table_html(table: pd.DataFrame) -> str:
    """Return a table as HTML, numbers to the right with three digits."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    body = []
    for _, row in table.iterrows():
        cells = []
        for value in row:
            number = isinstance(value, float | int)
            text = f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
            cells.append(f"<td class='n'>{text}</td>" if number else f"<td>{text}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def page_parts(parts: Sequence[str | go.Figure]) -> list[str]:
    """Return parts of a page as HTML; the first figure brings plotly along, the others use it."""
    drawn, first = [], True
    for part in parts:
        if isinstance(part, go.Figure):
            part = part.to_html(
                full_html=False, include_plotlyjs=first, config={"displaylogo": False}
            )
            first = False
        drawn.append(part)
    return drawn


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    packages = ("torch", "transformer-lens", "sae-lens", "transformers", "sae-query-steer")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
