"""Rows of CSV, TSV, JSON lines and Parquet files; imports neither torch nor datasets.

One set of rules for all formats: no value is converted, none is guessed to be missing, and a file
that is not what it claims to be is refused with its name and row.
"""

import csv
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from sae_query_steer.arguments import check_name
from sae_query_steer.storage.folders import size_of

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands in its file, such as "row 3", and its cells by column."""

MAX_BYTES = 8 << 30
"""Largest size of a Parquet file's values when they are unpacked."""

_LONG_CELLS = threading.Lock()
"""Held while the limit of the csv module, which is global, is another."""

KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
"""Suffixes of the files that are read, in any case."""


def check_columns(
    path: str | Path,
    templates: Iterable[str | None],
    *,
    encoding: str = "utf-8",
    sep: str | None = None,
) -> None:
    """Raise unless the header of a file has every column that templates name.

    Args:
        path: see `read_rows`; of JSON lines the first object counts. Plain text has no columns, and
            nothing is checked.
        templates: columns, or templates over columns; None is skipped.
        encoding: see `read_rows`.
        sep: see `read_rows`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a column is absent, a template can't be read, or see `read_rows`.
    """
    path = existing(path)
    if path.is_dir():
        info = (path / "dataset_info.json").read_text(encoding="utf-8")
        columns = list(json.loads(info)["features"])
    else:
        match kind_of(path):
            case ".txt":
                return
            case ".csv" | ".tsv":
                columns = _csv_rows(path, encoding, sep, 1)[0]
            case ".parquet":
                columns = _parquet(path).schema_arrow.names
            case _:
                columns = list(next(iter(read_rows(path, encoding=encoding)), ("", {}))[1])
    for text in templates:
        for _, column in template_parts(text):
            if column is not None:
                check_name("column", column, columns, place=f"{path}: ")


def read_rows(
    path: str | Path, *, encoding: str = "utf-8", sep: str | None = None
) -> Iterator[Row]:
    """Return an iterator over the rows of a file, with no value converted or taken for missing.

    Args:
        path: `.csv` or `.tsv` with a header, `.jsonl` (one object per line) or `.parquet`, where a
            `ClassLabel` of the `datasets` library gives its name. Rows count from 1 after the
            header, lines of JSON from 1.
        encoding: of text files; a byte order mark of UTF-8 is skipped.
        sep: separator of a CSV file; None means a comma, in `.tsv` a tab.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind or encoding of file, a row with more or fewer cells than the
            header, a column or key twice, or a line that is not a JSON object.
    """
    path = existing(path)
    match kind_of(path):
        case ".csv" | ".tsv":
            header, *cells = _csv_rows(path, encoding, sep)
            rows = enumerate((dict(zip(header, row, strict=True)) for row in cells), start=1)
        case ".jsonl":
            return _json_rows(path, encoding)
        case ".parquet":
            rows = enumerate(_parquet_rows(path), start=1)
        case _:
            raise ValueError(f"{path} is plain text, which has no columns: use read_texts")
    return ((f"row {n}", row) for n, row in rows)


def read_paragraphs(path: str | Path, *, encoding: str = "utf-8") -> list[str]:
    """Return the documents of a plain text file, which blank lines separate."""
    path = existing(path)
    with _text(path, encoding) as file:
        return [part for part in file.read().split("\n\n") if part.strip()]


def existing(path: str | Path) -> Path:
    """Return a path, if there is a regular file or a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pipe, a device or a socket.
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"no file {str(path)!r}: check the path")
    if not found.is_dir():
        size_of(found)
    return found


def kind_of(path: Path) -> str:
    """Return the suffix of a file in lower case.

    Raises:
        ValueError: another kind of file.
    """
    if (kind := path.suffix.lower()) not in KINDS:
        raise ValueError(
            f"{path} must be one of {', '.join(KINDS)} or the folder of a dataset, got "
            f"{path.suffix!r}"
        )
    return kind


@contextmanager
def _text(path: Path, encoding: str, newline: str | None = None) -> Iterator[Any]:
    """Open a text file; another encoding is an error that names both."""
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        with path.open(encoding=name, newline=newline) as file:
            yield file
    except (UnicodeError, LookupError) as error:
        raise ValueError(
            f"{path} must be text in {encoding}: {error}; name its encoding with encoding= "
            "(--encoding), such as 'cp1252' (Windows) or 'utf-16'"
        ) from error


def _csv_rows(
    path: Path, encoding: str, sep: str | None, n_rows: int | None = None
) -> list[list[str]]:
    """Return header and rows of a CSV file, the first `n_rows` alone if given; none is blank."""
    if sep is not None and len(sep) != 1:
        raise ValueError(f"sep must be one character, got {sep!r}")
    given, sep = sep, sep or ("\t" if path.suffix.lower() == ".tsv" else ",")
    with _text(path, encoding, newline="") as file, _LONG_CELLS:
        limit = csv.field_size_limit(2**31 - 1)  # a text may be longer than the default of 128 KiB
        read = csv.reader(file, delimiter=sep, strict=True)
        try:
            rows = list(islice(filter(None, read), n_rows)) or [[]]
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {read.line_num}, is no CSV: {error}; close every quoted cell, and "
                "write a quotation mark inside one twice"
            ) from error
        finally:
            csv.field_size_limit(limit)
    other = next((one for one in ";\t|," if len(rows[0]) == 1 and one in rows[0][0]), None)
    if given is None and other is not None:
        raise ValueError(
            f"{path} has one column, {rows[0][0]!r}; name its separator with sep= (--sep), which "
            f"may be {other!r}"
        )
    if twice := [name for name in rows[0] if rows[0].count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} is there twice; rename one")
    for n, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path}, row {n} must have {len(rows[0])} cells as the header has, got "
                f"{len(row)}: quote cells that hold {sep!r}, or name another separator with sep= "
                "(--sep)"
            )
    return rows


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    with _damage(path):
        file = pq.ParquetFile(path)
    groups = (file.metadata.row_group(n) for n in range(file.metadata.num_row_groups))
    if (size := sum(group.total_byte_size for group in groups)) > MAX_BYTES:
        raise ValueError(
            f"{path} would take {size / 2**30:.1f} GiB unpacked, more than {MAX_BYTES >> 30}: read "
            "it in parts"
        )
    return file


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn the errors that a damaged Parquet file gives into one that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or not a Parquet file: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    file = _parquet(path)
    stored = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = {
        column: feature["names"]
        for column, feature in stored.get("info", {}).get("features", {}).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    with _damage(path):
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield with_names(row, names)


def with_names(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> Mapping[str, Any]:
    """Return a row in which the numbers of `ClassLabel` columns are names; -1 is missing."""
    if not names:
        return row
    found = dict(row)
    for column, of_column in names.items():
        if isinstance(index := found.get(column), int):
            found[column] = of_column[index] if index >= 0 else None
    return found


def _json_rows(path: Path, encoding: str) -> Iterator[Row]:
    with _text(path, encoding) as file:
        for n, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line, object_pairs_hook=_unique)
                except (RecursionError, ValueError) as error:
                    raise ValueError(f"{path}, line {n} must be a JSON object: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}, line {n} must be a JSON object, got {type(row).__name__}"
                    )
                yield f"line {n}", row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


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
