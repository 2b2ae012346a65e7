"""Rows of CSV, JSON lines and Parquet files; imports neither torch nor datasets."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands in its file, such as "row 3", and its cells by column."""


def read_columns(path: str | Path) -> list[str] | None:
    """Return the columns of a file from its header; None for plain text, which has none.

    Args:
        path: see `read_rows`; of JSON lines the first object counts.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: see `read_rows`.
    """
    path = existing(path)
    if path.is_dir():
        return list(
            json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        )
    match path.suffix:
        case ".txt":
            return None
        case ".csv":
            return _csv_header(path)
        case ".parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(path).names
        case _:
            return list(next(iter(read_rows(path)), ("", {}))[1])


def check_columns(path: str | Path, templates: Iterable[str | None]) -> None:
    """Raise unless a file has every column that templates name.

    Args:
        path: see `read_rows`.
        templates: columns, or templates over columns; None is skipped.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a column is absent, a template can't be read, or see `read_rows`.
    """
    columns = read_columns(path)
    for text in templates:
        for _, column in template_parts(text):
            if columns is not None and column is not None and column not in columns:
                raise ValueError(f"{path}: no column {column!r}; the columns are {columns}")


def read_rows(path: str | Path) -> Iterator[Row]:
    """Return an iterator over the rows of a file, with no value converted or taken for missing.

    Args:
        path: `.csv` with a header, `.jsonl` (one object per line) or `.parquet`, in UTF-8. Rows
            count from 1 after the header, lines of JSON from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, a row with more or fewer cells than the header, a column
            twice, or a line that is not a JSON object.
    """
    path = existing(path)
    match path.suffix:
        case ".csv":
            rows = enumerate(_csv_rows(path), start=1)
        case ".jsonl":
            return _json_rows(path)
        case ".parquet":
            import pyarrow.parquet as pq

            batches = pq.ParquetFile(path).iter_batches()
            rows = enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        case suffix:
            raise ValueError(
                f"{path} must be .csv, .jsonl, .parquet, .txt or the folder of a dataset, got "
                f"{suffix!r}"
            )
    return ((f"row {n}", row) for n, row in rows)


def existing(path: str | Path) -> Path:
    """Return a path, if there is a file or folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {str(path)!r}: check the path")
    return Path(path)


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next((row for row in csv.reader(file) if row), [])
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} is there twice; rename one")
    return header


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv as arrow

    header = _csv_header(path)
    if not header:
        return []
    try:
        table = arrow.read_csv(
            path,
            # One block: a text may be longer than the default block.
            read_options=arrow.ReadOptions(
                block_size=min(max(path.stat().st_size, 1), 2**31 - 1), use_threads=False
            ),
            parse_options=arrow.ParseOptions(newlines_in_values=True),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a CSV file of {len(header)} columns: {error}") from error
    return table.to_pylist()


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for n, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {n} must be a JSON object: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}, line {n} must be a JSON object, got {type(row).__name__}"
                    )
                yield f"line {n}", row


def template_parts(text: str | None) -> list[tuple[str, str | None]]:
    """Return a column or a template over columns as pairs of plain text and the column after it.

    Raises:
        ValueError: unbalanced braces, or a format such as {column:>9}.
    """
    if text is None or "{" not in text:
        return [("", text)]
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"the template {text!r} can't be read: {error}") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(f"the template {text!r} formats a column: write {{column}} only")
    return [(plain, column) for plain, column, _, _ in parts]
