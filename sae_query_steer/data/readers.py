"""Labelled examples and texts from files, frames and datasets; the user names the columns."""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_query_steer.arguments import check_name, listed
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.files import (
    Row,
    existing,
    read_paragraphs,
    read_rows,
    template_parts,
    with_names,
)

Source = str | Path | Any
"""A file, the folder of a dataset, a `datasets.Dataset` or `datasets.IterableDataset`, or a pandas
or polars frame."""


def read_examples(
    source: Source,
    *,
    prompt: str,
    label: str,
    response: str | None = None,
    parse_label: Callable[[str], str] = str,
    where: Mapping[str, str] | Callable[[Mapping[str, Any]], bool] | None = None,
    strip: bool = False,
    skip_blank: bool = False,
    merge_labels: bool = False,
    min_class_size: int = 1,
    encoding: str = "utf-8",
    sep: str | None = None,
) -> list[LabelledExample]:
    r"""Return the labelled examples of a file, frame or dataset, in order.

    Every cell is read as text: "None", "NA" and "nan" in a text file are words, and only a null,
    NaN, or an empty or white cell is blank. Whole numbers have no decimal point. Labels lose white
    space around them and are normalised (Unicode NFC).

    Args:
        source: a CSV or TSV file with a header, JSON lines or Parquet; a folder that
            `Dataset.save_to_disk` wrote; one split of a `datasets` dataset (a streaming one is
            read to its end: limit it with `take`); a pandas or polars frame.
        prompt: a column, or a template over columns if it contains a brace, such as
            "Question: {question}\nAnswer: {answer}\n".
        label: a column; a `ClassLabel` gives its names.
        response: a column or a template; None leaves responses empty.
        parse_label: returns the name of the class for a cell, such as `BloomLevel.parse`.
        where: keep only rows whose columns have these values, such as {"lang": "english"}, or for
            which a function of the row is true.
        strip: remove white space around prompts. A prompt that ends in white space makes that its
            last token.
        skip_blank: leave out rows with a blank cell.
        merge_labels: read labels that differ only in case or white space as the first of them.
        min_class_size: leave out the classes that have fewer examples.
        encoding: of a text file.
        sep: separator of a CSV file; None means a comma, in `.tsv` a tab.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: a dataset of several splits, or something else that is not read.
        ValueError: a column is absent, a cell is blank in a row that is kept, `parse_label` refuses
            a cell, labels differ only in case or white space, or no rows are left. The message
            lists up to 10 rows: rows of a file count from 1 after the header, lines of JSON from 1,
            rows of a dataset or frame from 0.

    Source: our choice.
    """
    templates = [template_parts(text) for text in (prompt, response)]
    examples: list[LabelledExample] = []
    problems: list[str] = []
    left_out = Counter[str]()
    for number, row in _rows(source, encoding, sep):
        place = f"{_name(source)}, {number}"
        if not _kept(row, where, place):
            left_out["where"] += 1
            continue
        try:
            texts = [_filled(parts, row, place) for parts in templates]
            raw = _filled_cell(row, label, place).strip()
        except _BlankError as error:
            if skip_blank:
                left_out["blank cell"] += 1
            else:
                problems.append(str(error))
            continue
        try:
            name = str(parse_label(raw))
        except (ValueError, KeyError) as error:  # KeyError: of a dictionary's __getitem__
            problems.append(f"{place}, column {label!r}: parse_label refused: {error}")
            continue
        start = texts[0].strip() if strip else texts[0]
        name = unicodedata.normalize("NFC", name.strip())
        examples.append(LabelledExample(prompt=start, response=texts[1], label=name, place=number))
    first: dict[str, LabelledExample] = {}
    for example in examples:
        first.setdefault(_key(example.label), example)
    if merge_labels:
        examples = [replace(one, label=first[_key(one.label)].label) for one in examples]
    problems += _near_equal_labels(_name(source), first, examples)
    if problems:
        raise ValueError(listed(problems))
    counts = Counter(example.label for example in examples)
    examples = [example for example in examples if counts[example.label] >= min_class_size]
    if counts and not examples:
        raise ValueError(f"min_class_size={min_class_size} leaves no class: there are {counts}")
    if not examples:
        kept = f"where={where if callable(where) else dict(where or {})}"
        n_rows = left_out.total()
        raise ValueError(f"{_name(source)} gives no examples: {kept} keeps 0 of {n_rows} rows")
    if small := counts.total() - len(examples):
        left_out["class too small"] = small
    return ExampleList(examples, left_out)


class ExampleList(list[LabelledExample]):
    """Labelled examples that were read, and how many rows were left out."""

    def __init__(self, examples: Iterable[LabelledExample], left_out: Mapping[str, int]) -> None:
        super().__init__(examples)
        self.left_out = dict(left_out)
        """Rows that were left out, by reason: "where", "blank cell", "class too small"."""


def read_texts(
    source: Source,
    *,
    text: str = "text",
    skip_blank: bool = False,
    encoding: str = "utf-8",
    sep: str | None = None,
) -> list[str]:
    """Return the texts of a file, frame or dataset, in order.

    Args:
        source: as for `read_examples`; or plain text (`.txt`) with blank lines between documents.
        text: a column or a template, see `read_examples`; plain text has none.
        skip_blank: leave out rows with a blank cell.
        encoding: of a text file.
        sep: separator of a CSV file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: a dataset of several splits, or something else that is not read.
        ValueError: a kind of file that is not read, a column is absent, cells are blank, or there
            is no text.
    """
    path = existing(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and path.suffix.lower() == ".txt":
        texts = read_paragraphs(path, encoding=encoding)
    else:
        parts, name, texts, problems = template_parts(text), _name(source), [], []
        for number, row in _rows(source, encoding, sep):
            try:
                texts.append(_filled(parts, row, f"{name}, {number}"))
            except _BlankError as error:
                problems += [] if skip_blank else [str(error)]
        if problems:
            raise ValueError(listed(problems))
    if not texts:
        raise ValueError(f"{_name(source)} has no rows")
    return texts


class _BlankError(ValueError):
    """A cell that must hold text is blank."""


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the dataset"


def _rows(source: Source, encoding: str, sep: str | None) -> Iterator[Row]:
    if isinstance(source, str | Path) and not existing(source).is_dir():
        return read_rows(source, encoding=encoding, sep=sep)
    frame: Any = source
    if hasattr(frame, "iter_rows"):  # polars
        return ((f"row {n}", row) for n, row in enumerate(frame.iter_rows(named=True)))
    if hasattr(frame, "to_dict") and hasattr(frame, "itertuples"):  # pandas
        return ((f"row {n}", row) for n, row in enumerate(frame.to_dict("records")))
    from datasets import ClassLabel, Dataset, IterableDataset, load_from_disk

    data = load_from_disk(str(source)) if isinstance(source, str | Path) else source
    if not isinstance(data, Dataset | IterableDataset):
        splits = f" of the splits {list(data)}" if isinstance(data, Mapping) else ""
        raise TypeError(
            "source must be a file, a frame, or one split of a dataset, such as "
            f"load_dataset(...)['train'], got {type(data).__name__}{splits}"
        )
    features = data.features or {}  # unknown of some streaming datasets
    names = {column: f.names for column, f in features.items() if isinstance(f, ClassLabel)}
    rows = enumerate(data.with_format(None))
    return ((f"row {n}", with_names(row, names)) for n, row in rows)


def _kept(row: Mapping[str, Any], where: Any, place: str) -> bool:
    if callable(where):
        return bool(where(row))
    return all(_cell(row, column, place) == value for column, value in (where or {}).items())


def _filled(parts: Iterable[tuple[str, str | None]], row: Mapping[str, Any], place: str) -> str:
    return "".join(
        plain if column is None else plain + _filled_cell(row, column, place)
        for plain, column in parts
    )


def _filled_cell(row: Mapping[str, Any], column: str, place: str) -> str:
    text = _cell(row, column, place)
    if not text.strip():
        raise _BlankError(
            f"{place}: column {column!r} is blank; fill it in, or leave such rows out with "
            "skip_blank=True (--skip-blank) or where"
        )
    return text


def _cell(row: Mapping[str, Any], column: str, place: str) -> str:
    if column not in row:
        check_name("column", column, row, place=f"{place}: ")
    value = row[column]
    missing = value is None or type(value).__name__ in ("NAType", "NaTType")
    if missing or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
        raise ValueError(
            f"{place}: column {column!r} must hold text or finite numbers, got "
            f"{value if isinstance(value, float) else type(value).__name__}"
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: column {column!r} is no valid Unicode: {error}") from error
    return text


def _near_equal_labels(
    name: str, first: Mapping[str, LabelledExample], examples: Sequence[LabelledExample]
) -> list[str]:
    """Return a message for each label that is not that of the first example with its key."""
    near = {one.label: one for one in reversed(examples)}
    return [
        f"{name}: the labels {other.label!r} ({other.place}) and {one.label!r} ({one.place}) "
        "differ only in case or white space; write them alike, or pass merge_labels=True "
        "(--merge-labels) or parse_label= (--bloom for Bloom levels)"
        for one in near.values()
        if (other := first[_key(one.label)]).label != one.label
    ]


def _key(label: str) -> str:
    """Return what near-equal labels have in common."""
    return " ".join(label.casefold().split())
