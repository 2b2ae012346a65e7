"""Sizes and hashes of files, by which a damaged or exchanged one is found."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from sae_query_steer.storage.folders import inside, size_of
from sae_query_steer.storage.records import Record


class ListedFile(Record):
    """What an index says of a file."""

    bytes: Annotated[int, Field(ge=0)]
    """Its size."""

    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    """Hash of its content."""


def listed(path: Path) -> ListedFile:
    """Return size and hash of a file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return ListedFile(bytes=path.stat().st_size, sha256=found)


def list_files(folder: Path) -> dict[str, ListedFile]:
    """Return size and hash of every file below a folder, by its path with forward slashes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): listed(path) for path in paths}


def check_files(folder: Path, files: Mapping[str, ListedFile]) -> None:
    """Raise unless every listed file is there, with its size and hash.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in the folder (see `inside`), or differs from the list.
    """
    for name, expected in files.items():
        path = inside(folder, name)
        try:
            size = size_of(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} lacks {name}") from error
        # The size first, so that a file that is too large is not read.
        if size != expected.bytes:
            raise ValueError(f"{path} must have {expected.bytes} bytes, got {size}")
        if (found := listed(path).sha256) != expected.sha256:
            raise ValueError(f"{path} must have the SHA-256 {expected.sha256}, got {found}")
