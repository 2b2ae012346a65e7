"""Folders of safetensors and JSON, written aside and then renamed, read back without pickle."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_query_steer.storage.safe_reading import MAX_JSON, json_of, tensor_shapes


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False, holding: str) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` only once its writer has succeeded.

    Until then it lies beside `path` under another name; after an exception it is removed and
    whatever stood at `path` is as it was.

    Args:
        path: the folder to make.
        overwrite: replace what is there, if it is such a folder.
        holding: a file that every such folder holds; by it, what is there is known as one.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or it is a folder of another kind,
            or a link.
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite, holding=holding)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        written = aside / "new"
        written.mkdir()
        yield written
        check_replaceable(path, overwrite=overwrite, holding=holding)
        if path.exists():
            path.rename(aside / "old")
        written.rename(path)
    finally:
        # A crash between the two renames leaves the old folder under its temporary name.
        if not path.exists() and (aside / "old").exists():
            (aside / "old").rename(path)
        shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(path: Path, *, overwrite: bool, holding: str) -> None:
    """Raise if a folder may not be made or replaced; see `new_folder`.

    Raises:
        FileExistsError: the message says which of the three it is.
    """
    if path.is_symlink():  # whose link it is, and what else relies on it, nobody knows
        raise FileExistsError(f"{path} is a link: give the folder that it leads to, or another")
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists: give another folder, or overwrite=True")
    if not path.is_dir() or (any(path.iterdir()) and not (path / holding).is_file()):
        raise FileExistsError(
            f"{path} is not replaced: it holds no {holding}, so it is something else; give "
            "another folder"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON; numbers that JSON does not know (NaN, infinity) are refused.

    Raises:
        ValueError: such a number, or more than is read back.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if len(text) > MAX_JSON:  # all of it is ASCII
        raise ValueError(
            f"{path} would have {len(text)} bytes: JSON is written and read up to {MAX_JSON}; keep "
            "large tensors in safetensors"
        )
    path.write_text(text, encoding="utf-8")


def json_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table for JSON, in which numbers that are not finite are null."""
    return [
        {
            str(key): None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        for row in table.to_dict(orient="records")
    ]


def rows_table(rows: object, *, texts: bool = False) -> pd.DataFrame:
    """Return the table of rows that were read from JSON, as `json_rows` made them.

    Args:
        rows: what was read.
        texts: whether cells may be text, beside numbers and null.

    Raises:
        ValueError: no list of objects with the same keys, or a cell that is none of these.
    """
    allowed = int | float | str | None if texts else int | float | None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its table is no list of rows")
    kinds = "numbers and texts" if texts else "numbers"
    for row in rows:
        # Of rows with columns of their own pandas makes a cell for each row and each column.
        if row.keys() != rows[0].keys():
            raise ValueError("the rows of its table have different columns")
        for name, value in row.items():
            if not isinstance(value, allowed):
                raise ValueError(
                    f"the column {name!r:.80} of its table holds {value!r:.80}: allowed are {kinds}"
                )
    return pd.DataFrame(rows)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, under the limits of `json_of`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object, or more than allowed.
    """
    value = json_of(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, where an object is expected")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    # A copy of each: safetensors refuses two names for one piece of memory.
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, path)


def read_index(path: Path, expected: str) -> dict[str, Any]:
    """Read the JSON object that says what a folder holds, if it is of a format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no JSON object, or one of another format.
    """
    index = read_json(path)
    if index.get("format") != expected:
        raise ValueError(
            f"{path.parent} has format {index.get('format')!r:.80}: this version reads {expected!r}"
        )
    return index


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors file onto the CPU, once `tensor_shapes` is content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, is truncated, or larger than the free memory.
    """
    tensor_shapes(path)
    return load_file(path)
