"""Tables as CSV in which no text is a formula to a spreadsheet."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV without its index; texts that begin like a formula get an apostrophe.

    Source: OWASP, CSV injection.
    """
    escaped = _with_texts(table, lambda text: f"'{text}" if _FORMULA.match(text) else text)
    # Quoted, because a carriage return in a text would end its row.
    return escaped.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)


def read_csv_text(path: Path) -> pd.DataFrame:
    """Return the table of a file that `csv_text` wrote, without the apostrophes."""
    return _with_texts(
        pd.read_csv(path),
        lambda text: text[1:] if text.startswith("'") and _FORMULA.match(text) else text,
    )


def _with_texts(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """Return a table in which names of columns and texts are changed, and numbers are not."""

    def changed(cell: object) -> object:
        return change(cell) if isinstance(cell, str) else cell

    made = table.rename(columns=changed)
    for name in made.select_dtypes(exclude=["number", "bool"]):
        made[name] = made[name].map(changed)
    return made
