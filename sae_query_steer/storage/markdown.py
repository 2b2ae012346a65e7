"""Text and tables as Markdown."""

import re

import pandas as pd


def markdown_text(text: object) -> str:
    """Return a text on one line in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def markdown_table(table: pd.DataFrame, *, digits: int = 3) -> str:
    """Return a table as GitHub's Markdown, without its index; a missing value is an empty cell.

    Args:
        table: any table; markup in its names and cells is escaped.
        digits: digits after the point of numbers that are not whole.
    """
    lines = [[markdown_text(name) for name in table.columns], ["---"] * table.shape[1]]
    lines += [[_cell(value, digits) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: object, digits: int) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return markdown_text(value)
