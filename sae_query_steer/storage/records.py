"""JSON files, read into pydantic models or dataclasses under limits of size and depth."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import pandas as pd
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    InstanceOf,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)

from sae_query_steer.storage.folders import check_holds, inside, new_file, size_of

MAX_JSON = 16 * 2**20
"""Largest JSON file in bytes. Source: our choice; the largest that we wrote has 0.1 MiB."""

MAX_DEPTH = 64
"""Most levels of lists and objects in a JSON file. Source: our choice."""

T = TypeVar("T")
Cell = int | float | str | None


class Record(BaseModel):
    """What a JSON file holds: no conversion between types, no unknown keys, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


@overload
def read_record(folder: str | Path, name: str, kind: type[T]) -> T: ...
@overload
def read_record(folder: str | Path, name: str, kind: Any) -> Any: ...
def read_record(folder: str | Path, name: str, kind: Any) -> Any:
    """Read a JSON file of a folder into a `Record` (or any type that pydantic validates).

    Args:
        folder: the folder.
        name: name of the file in it, see `inside`.
        kind: the type to validate against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not allowed by `inside` or `read_json`, or not a valid `kind`; the message
            names the file and the first field that is wrong.
    """
    path = inside(folder := Path(folder), name)
    check_holds(folder, name, "a folder that this package wrote for this use")
    data = _checked_json(path)[0]
    try:
        return _adapter(kind).validate_json(data, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged or of another version: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False)[0]
    where = ".".join(map(str, found["loc"]))
    return f"{where:.80}: {found['msg']:.300}, got {found['input']!r:.80}"


def write_record(path: Path, record: object) -> None:
    """Write a `Record` (or any value that pydantic serialises) as JSON.

    Raises:
        ValueError: see `write_json`.
    """
    write_json(path, _adapter(type(record)).dump_python(record, mode="json"))


@cache
def _adapter(kind: Any) -> Any:  # beartype does not know TypeAdapter as a hint
    return TypeAdapter(kind)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite, or the file would be larger than `MAX_JSON`.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if len(text) > MAX_JSON:  # all of it is ASCII
        raise ValueError(
            f"{path} would have {len(text)} bytes, JSON files must have at most {MAX_JSON}: keep "
            "large tensors in safetensors"
        )
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than `MAX_JSON` or deeper than `MAX_DEPTH`, or not a JSON object in
            UTF-8 with finite numbers and unique keys.
    """
    value = _checked_json(path)[1]
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _checked_json(path: Path) -> tuple[bytes, Any]:
    """Return the bytes of a JSON file and what they say."""
    size = size_of(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON + 1)  # files in /proc claim to be empty
    if max(size, len(data)) > MAX_JSON:
        raise ValueError(
            f"{path} has {max(size, len(data))} bytes, JSON files must have at most {MAX_JSON}: "
            "this package did not write it"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
        _check_depth(value)
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON: more than {MAX_DEPTH} levels") from error
    except ValueError as error:  # also bytes that are not UTF-8, and integers of 5,000 digits
        raise ValueError(f"{path} is not JSON: {error}") from error
    return data, value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r:.80} twice")
    return found


def _check_depth(value: Any) -> None:
    level = [[value]]
    for _ in range(MAX_DEPTH + 1):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return
    raise RecursionError


def table_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table for JSON; numbers that are not finite become null."""
    return [
        {
            str(key): None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        for row in table.to_dict(orient="records")
    ]


def rows_table(rows: Any) -> pd.DataFrame:
    """Return the table of rows read from JSON; all must have the same columns.

    Raises:
        ValueError: the rows differ in their columns, or a cell is not a number, text or null.
    """
    if isinstance(rows, pd.DataFrame):
        return rows
    try:
        found = _adapter(list[dict[str, Cell]]).validate_python(rows, strict=True)
    except ValidationError as error:
        raise ValueError(
            f"the table has a cell that is no number or text: {_first(error)}"
        ) from error
    # pandas would make a cell for every row and every column of rows with different columns.
    if any(row.keys() != found[0].keys() for row in found):
        raise ValueError("the rows of the table have different columns")
    return pd.DataFrame(found)


Table = Annotated[
    InstanceOf[pd.DataFrame], BeforeValidator(rows_table), PlainSerializer(table_rows)
]
"""A field of a `Record`: a table of numbers and text, stored as a list of rows."""
