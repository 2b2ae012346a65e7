"""The list of a bundle's files, by size and hash: what is not on it is neither read nor sent."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_query_steer.storage.safe_reading import inside, size_of

MAX_FILES = 65_536
"""Files that a bundle may list. Source: our choice; 32 layers of 32 heads have 2,112."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_KINDS = (".json", ".safetensors")


def list_files(folder: Path, *, leave_out: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below a folder, by its path with forward slashes."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in leave_out:
            found[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def read_list(value: object) -> dict[str, dict[str, Any]]:
    """Return a list of files as it was read from JSON, once every entry is what it may be.

    Raises:
        ValueError: another form, too many files, or a name that is no plain relative path of a
            JSON or safetensors file.
    """
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_FILES:
        raise ValueError(f"the list of files must be an object with 1 to {MAX_FILES} entries")
    for name, entry in value.items():
        parts = name.split("/")
        if not (
            len(parts) <= 3
            and all(_NAME.fullmatch(part) for part in parts)
            and name.endswith(_KINDS)
        ):
            raise ValueError(
                f"the file name {name[:200]!r} is not allowed: a bundle holds "
                f"{' and '.join(_KINDS)} files, with letters, digits, dots, _ and - in their "
                "names, two folders deep"
            )
        if not (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and entry["bytes"] >= 0
            and isinstance(entry.get("sha256"), str)
        ):
            raise ValueError(f"the entry of {name} must hold its size in bytes and its sha256")
    return value


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless every file of a list is there, of that size and hash.

    Args:
        folder: the bundle.
        files: what is to be there, of `read_list`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file leads elsewhere, or is another than the list says.
    """
    for name, entry in files.items():
        path = inside(folder, name)
        try:
            size = size_of(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} lacks {name}: fetch it again, whole") from error
        if size != entry["bytes"]:  # before a byte is read
            raise ValueError(
                f"{folder / name} has {size} bytes, the bundle's list says {entry['bytes']}: it "
                "is truncated or another file; fetch the bundle again, or save it anew"
            )
        if sha256(path) != entry["sha256"]:
            raise ValueError(
                f"{folder / name} is not the file that the bundle lists (SHA-256 differs): fetch "
                "the bundle again, or save it anew"
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
