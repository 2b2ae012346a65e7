"""Labelled examples and texts from files and datasets; the user names the columns."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.files import Row, existing, read_rows, template_parts

Source = str | Path | Any
"""A file, the folder of a dataset, or a `datasets.Dataset` or `datasets.IterableDataset`."""


def read_examples(
    source: Source,
    *,
    prompt: str,
    label: str,
    response: str | None = None,
    parse_label: Callable[[str], str] = str,
    where: Mapping[str, str] | None = None,
) -> list[LabelledExample]:
    r"""Return the labelled examples of a file or dataset, in order.

    Cells are read as text: no value is converted or taken for missing ("None", "NA").

    Args:
        source: a CSV file with a header, JSON lines or Parquet, in UTF-8; a folder that
            `Dataset.save_to_disk` wrote; or one split of a `datasets` dataset. A streaming one is
            read to its end: limit it with `take`.
        prompt: a column, or a template over columns if it contains a brace, such as
            "Question: {question}\nAnswer: {answer}\n".
        label: a column. A `ClassLabel` gives its number as text, see `parse_label`.
        response: a column or a template; None leaves responses empty.
        parse_label: returns the name of the class for a cell, such as `BloomLevel.parse`.
        where: keep only rows whose columns have these values, such as {"lang": "english"}.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: a dataset of several splits.
        ValueError: a column is absent, a cell is blank in a row that is kept, `parse_label` refuses
            a cell, or no rows are left. The message names the row: rows of a file count from 1
            after the header, lines of JSON from 1, rows of a dataset from 0.

    Source: our choice.
    """
    templates = [template_parts(text) for text in (prompt, response)]
    examples, n_rows = [], 0
    for number, row in _rows(source):
        n_rows += 1
        place = f"{_name(source)}, {number}"
        if any(_cell(row, column, place) != value for column, value in (where or {}).items()):
            continue
        raw = _filled_cell(row, label, place)
        try:
            name = str(parse_label(raw))
        except (ValueError, KeyError) as error:  # KeyError: of a dictionary's __getitem__
            raise ValueError(f"{place}, column {label!r}: parse_label refused: {error}") from error
        texts = (_filled(parts, row, place) for parts in templates)
        examples.append(LabelledExample(prompt=next(texts), response=next(texts), label=name))
    if not examples:
        raise ValueError(
            f"{_name(source)} gives no examples: where={dict(where or {})} keeps 0 of {n_rows} rows"
        )
    return examples


def read_texts(source: Source, *, text: str = "text") -> list[str]:
    """Return the texts of a file or dataset, in order.

    Args:
        source: as for `read_examples`; or plain text (`.txt`) with blank lines between documents.
        text: a column or a template, see `read_examples`; plain text has none.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: a dataset of several splits.
        ValueError: a kind of file that is not read, a column is absent, a cell is blank, or there
            is no text.
    """
    if isinstance(source, str | Path) and Path(source).suffix == ".txt":
        paragraphs = existing(source).read_text(encoding="utf-8").split("\n\n")
        texts = [paragraph for paragraph in paragraphs if paragraph.strip()]
    else:
        parts, name = template_parts(text), _name(source)
        texts = [_filled(parts, row, f"{name}, {n}") for n, row in _rows(source)]
    if not texts:
        raise ValueError(f"{_name(source)} has no rows")
    return texts


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the dataset"


def _rows(source: Source) -> Iterator[Row]:
    if isinstance(source, str | Path) and not existing(source).is_dir():
        return read_rows(source)
    from datasets import Dataset, IterableDataset, load_from_disk

    data = load_from_disk(str(source)) if isinstance(source, str | Path) else source
    if not isinstance(data, Dataset | IterableDataset):
        splits = f" of the splits {list(data)}" if isinstance(data, Mapping) else ""
        raise TypeError(
            f"source must be a file or one split of a dataset, such as load_dataset(...)['train'], "
            f"got {type(data).__name__}{splits}"
        )
    return ((f"row {n}", row) for n, row in enumerate(data.with_format(None)))


def _filled(parts: Iterable[tuple[str, str | None]], row: Mapping[str, Any], place: str) -> str:
    return "".join(
        plain if column is None else plain + _filled_cell(row, column, place)
        for plain, column in parts
    )


def _filled_cell(row: Mapping[str, Any], column: str, place: str) -> str:
    text = _cell(row, column, place)
    if not text.strip():
        raise ValueError(
            f"{place}: column {column!r} is blank; fill it in, or leave such rows out with where"
        )
    return text


def _cell(row: Mapping[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise ValueError(f"{place}: no column {column!r}; the columns are {list(row)}")
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"{place}: column {column!r} must hold text or numbers, got {type(value).__name__}"
        )
    return str(value)
