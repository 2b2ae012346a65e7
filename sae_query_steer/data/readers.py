"""Readers: labelled examples and texts from files and data sets, whose columns the user names."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any, cast

import pandas as pd
from datasets import Dataset, load_from_disk

from sae_query_steer.data.examples import LabelledExample


def examples_from_csv(
    path: str | Path,
    *,
    prompt: str,
    label: str,
    response: str | None = None,
    parse_label: Callable[[str], str] = str,
    where: Mapping[str, str] | None = None,
) -> list[LabelledExample]:
    r"""Return the labelled examples of a CSV file with a header, in order.

    Args:
        path: the file, in UTF-8.
        prompt: a column, or a template over columns if it has a brace in it, such as
            "Question: {question}\nAnswer: {answer}\n".
        label: a column.
        response: a column or a template; None leaves responses empty.
        parse_label: makes the name of the class from the cell, as `BloomLevel.parse` does.
        where: keep only rows whose columns have these values, such as {"lang": "english"}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column that is absent, a blank cell in a row that is kept, a cell that
            `parse_label` refuses, or no rows. Rows count from 1 after the header.

    Source: our choice.
    """
    rows = _csv_rows(path)
    return _examples(rows, path, (prompt, response), label, parse_label, where or {})


def texts_from_file(path: str | Path, *, text: str = "text") -> list[str]:
    """Return the texts of a file, or of the folder of a data set.

    Args:
        path: a CSV with a header, JSON lines, a Parquet file, or a folder that
            `Dataset.save_to_disk` wrote; or plain text (`.txt`), whose documents are parted by
            blank lines. All in UTF-8.
        text: a column, or a template over columns; see `examples_from_csv`. Plain text has none.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a kind of file that is not read, a column that is absent, a blank cell, or no
            text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}: look at the path and its folder")
    if path.suffix == ".txt":
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        texts = [paragraph for paragraph in paragraphs if paragraph.strip()]
    else:
        parts = _template(text)
        texts = ["".join(_filled_parts(parts, row, f"{path}, {n}")) for n, row in _rows(path)]
    if not texts:
        raise ValueError(f"{path} has no rows")
    return texts


def examples_from_jsonl(
    path: str | Path,
    *,
    prompt: str,
    label: str,
    response: str | None = None,
    parse_label: Callable[[str], str] = str,
    where: Mapping[str, str] | None = None,
) -> list[LabelledExample]:
    """Return the labelled examples of a file with one JSON object a line; blank lines are skipped.

    Args and Raises as `examples_from_csv`; columns are the keys of the objects, and a line that
    is no JSON object raises too, with its number.
    """
    return _examples(_jsonl_rows(path), path, (prompt, response), label, parse_label, where or {})


def examples_from_dataset(
    dataset: Dataset,
    *,
    prompt: str,
    label: str,
    response: str | None = None,
    parse_label: Callable[[str], str] = str,
    where: Mapping[str, str] | None = None,
) -> list[LabelledExample]:
    """Return the labelled examples of one split of a Hugging Face data set, in order.

    Args and Raises as `examples_from_csv`, but rows count from 0, as in `dataset[0]`. Numbers are
    read as text: a `ClassLabel` column gives "0", "1", ..., which `parse_label` can turn to names.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}: give a datasets.Dataset, which is one split, "
            'such as load_dataset(...)["train"]'
        )
    return _examples(
        _dataset_rows(dataset), "the data set", (prompt, response), label, parse_label, where or {}
    )


def _rows(path: Path) -> Iterable[tuple[str, Mapping[Any, Any]]]:
    if path.is_dir():
        data = load_from_disk(str(path))
        if not isinstance(data, Dataset):
            raise ValueError(f"{path} holds the splits {list(data)}: give the folder of one")
        return _dataset_rows(data)
    match path.suffix:
        case ".csv":
            return _csv_rows(path)
        case ".jsonl":
            return _jsonl_rows(path)
        case ".parquet":
            records = pd.read_parquet(path).to_dict("records")
            return ((f"row {n}", row) for n, row in enumerate(records, start=1))
        case suffix:
            raise ValueError(
                f"{path} is of kind {suffix!r}: give .csv, .jsonl, .parquet or .txt, or the folder "
                "of a data set"
            )


def _dataset_rows(dataset: Dataset) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    plain = cast(Iterable[dict[str, Any]], dataset.with_format(None))
    return ((f"row {n}", row) for n, row in enumerate(plain))


def _jsonl_rows(path: str | Path) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    with _existing(path).open(encoding="utf-8") as file:
        for n, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {n}", _json_object(line, f"{path}, line {n}")


def _csv_rows(path: str | Path) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    try:
        frame = pd.read_csv(_existing(path), dtype=str, keep_default_na=False, na_filter=False)
    except pd.errors.EmptyDataError:
        frame = pd.DataFrame()
    if not isinstance(frame.index, pd.RangeIndex):
        # pandas takes the first cells for an index and so shifts all columns by one.
        raise ValueError(f"{path}: rows have more cells than the header's {list(frame.columns)}")
    return ((f"row {n}", row) for n, row in enumerate(frame.to_dict("records"), start=1))


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}: look at the path and its folder")
    return Path(path)


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}; put one whole object on a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a JSON {type(row).__name__}: put one object on a line")
    return row


def _examples(
    rows: Iterable[tuple[str, Mapping[Any, Any]]],
    source: str | Path,
    prompt_and_response: tuple[str, str | None],
    label: str,
    parse_label: Callable[[str], str],
    where: Mapping[str, str],
) -> list[LabelledExample]:
    templates = [_template(text) for text in prompt_and_response]
    examples, n_rows = [], 0
    for number, row in rows:
        n_rows += 1
        place = f"{source}, {number}"
        if any(_cell(row, column, place) != value for column, value in where.items()):
            continue
        raw = _filled_cell(row, label, place)
        try:
            name = str(parse_label(raw))
        except (ValueError, KeyError) as error:  # KeyError: of a dictionary's __getitem__
            raise ValueError(f"{place}, column {label!r}: parse_label refused: {error}") from error
        prompt, response = ("".join(_filled_parts(parts, row, place)) for parts in templates)
        examples.append(LabelledExample(prompt=prompt, response=response, label=name))
    if not examples:
        raise ValueError(
            f"{source} gives no examples: of its {n_rows} rows where={dict(where)} keeps none"
        )
    return examples


def _template(text: str | None) -> list[tuple[str, str | None]]:
    """Return pairs of plain text and the column that follows it, if one does."""
    if text is None or "{" not in text:
        return [("", text)]
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"the template {text!r} can't be read: {error}") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ValueError(f"the template {text!r} formats a column: write {{column}} and no more")
    return [(plain, column) for plain, column, _, _ in parts]


def _filled_parts(
    parts: Iterable[tuple[str, str | None]], row: Mapping[Any, Any], place: str
) -> Iterator[str]:
    for plain, column in parts:
        yield plain if column is None else plain + _filled_cell(row, column, place)


def _cell(row: Mapping[Any, Any], column: str, place: str) -> str:
    if column not in row:
        raise ValueError(f"{place}: there is no column {column!r}; the columns are {list(row)}")
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"{place}: column {column!r} holds a {type(value).__name__}, but only text and numbers "
            "can be read: flatten it first"
        )
    return str(value)


def _filled_cell(row: Mapping[Any, Any], column: str, place: str) -> str:
    text = _cell(row, column, place)
    if not text.strip():
        raise ValueError(
            f"{place}: column {column!r} is blank; fill it in, or leave such rows out with where"
        )
    return text
