"""Files that someone else may have made: read under limits, and only where they belong.

All that is refused is refused by one ValueError (FileNotFoundError where there is no file) that
names the file, and before anything of the size that the file claims is read or allocated.
"""

import json
import math
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open

MAX_JSON = 16 * 2**20
"""Bytes of a JSON file at most. Source: our choice; the largest that we wrote has 0.1 MiB."""

MAX_DEPTH = 64
"""Levels of lists and objects in a JSON file at most. Source: our choice."""

MAX_HEADER = 4 * 2**20
"""Bytes of a safetensors header at most, some 30,000 tensors: safetensors itself takes 100 MB, and
a million tensors without content keep it busy for minutes. Source: our choice."""

MAX_AXES = 8
"""Axes of a tensor at most. Source: our choice; ours have up to four."""

DTYPES = frozenset(("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"))
"""Number formats of tensors that are read, by safetensors' names."""

FLOATS = frozenset(("F16", "BF16", "F32", "F64"))
"""Those of weights."""


def inside(folder: Path, name: str, *, root: Path | None = None) -> Path:
    """Return the path of a name that a file gave, if it stays within a folder.

    Args:
        folder: where it starts.
        name: relative, its parts divided by "/"; there need not be such a file.
        root: what it may not lead out of, links followed. None is the folder itself; but in a
            snapshot of Hugging Face's cache, whose files are links to blobs beside it, it is the
            folder of that repository in the cache.

    Raises:
        ValueError: the name is no plain relative one, or leads outside through a link.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    windows = PureWindowsPath("/".join(parts))
    if {"", ".", ".."} & set(parts) or "\\" in name or windows.drive or not name.isprintable():
        raise ValueError(
            f"{folder} refers to {name!r:.80}: allowed are names of what lies in it, without '..' "
            "and without a '/' in front"
        )
    path = folder / name
    try:
        root = (root or _root_of(folder)).resolve()
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        raise ValueError(f"{path} can't be read: {error}") from error
    if not real.is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {real}, outside of {root}: what lies in a folder is not followed "
            "out of it; if you trust that file, put a copy of it in the place of the link (cp -L)"
        )
    return path


def _root_of(folder: Path) -> Path:
    here = folder.resolve()
    for snapshot in (here, *here.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and re.match(
            "(models|datasets|spaces)--", repository.name
        ):
            return repository
    return folder


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes; it is not opened, as a pipe would block.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pipe, a device or a socket, or can't be looked at.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(f"no file {path}")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is a pipe, a device or a socket: only regular files are read")
    return found.st_size


def json_of(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger or deeper than allowed, or not JSON as UTF-8 with finite numbers
            and different keys.
    """
    size = size_of(path)
    with path.open("rb") as file:
        data = file.read(MAX_JSON + 1)  # some files, as in /proc, say that they are empty
    if max(size, len(data)) > MAX_JSON:
        raise ValueError(
            f"{path} has {max(size, len(data))} bytes: JSON is read up to {MAX_JSON}; it is not "
            "what this package writes"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            object_pairs_hook=_different,
        )
        _check_depth(value)
    except RecursionError as error:
        raise ValueError(f"{path} is not JSON: more than {MAX_DEPTH} levels") from error
    except ValueError as error:  # also what is not UTF-8, and a number of thousands of digits
        raise ValueError(f"{path} is not JSON: {error}") from error
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice!r:.80} twice")
    return found


def _check_depth(value: Any) -> None:
    level = [[value]]
    for _ in range(MAX_DEPTH + 1):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return
    raise RecursionError


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return number format and shape of each tensor of a safetensors file, from its header alone.

    safetensors itself checks the header against the file: every tensor lies within it, none on
    another, and nothing is left over. So what the shapes claim is there, up to axes beside an axis
    of 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, is truncated, larger than the free memory, or has a
            header that is too large or names a format that is not in `DTYPES`, or axes that no
            file of its size can have.
    """
    size, free = size_of(path), psutil.virtual_memory().available
    if size > free:  # it may be mostly a hole
        raise ValueError(
            f"{path} has {size / 2**30:.3g} GiB of tensors, where {free / 2**30:.3g} GiB of memory "
            "are free: read it on a machine that has more"
        )
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    told = f"{path} is not a readable safetensors file: "
    if len(start) < 8 or length > MAX_HEADER:
        by_magic = [kind for magic, kind in _OTHERS.items() if start.startswith(magic)]
        raise ValueError(
            f"{told}{f'it begins as {by_magic[0]}' if by_magic else 'it is cut off or another'}; "
            f"its header would have {length} bytes of at most {MAX_HEADER}; only safetensors are "
            "read, as a pickle can run code"
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, MemoryError, OSError) as error:
        raise ValueError(f"{told}{error}") from error
    for name, (dtype, shape) in found.items():
        if dtype not in DTYPES or len(shape) > MAX_AXES or max(shape, default=0) > size:
            raise ValueError(
                f"{told}{name!r:.80} is {dtype} {list(shape)!s:.80}; allowed are {sorted(DTYPES)}, "
                f"up to {MAX_AXES} axes, none longer than the file"
            )
    return found


_OTHERS = {b"PK\x03\x04": "a zip archive, which torch.save writes", b"\x80": "a pickle"}
