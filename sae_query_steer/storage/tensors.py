"""Safetensors files, checked by their header before a tensor is read or allocated."""

from collections.abc import Mapping
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_query_steer.storage.folders import inside, new_file, size_of

MAX_HEADER = 4 * 2**20
"""Largest safetensors header in bytes, some 30,000 tensors: safetensors itself allows 100 MB, and
a million tensors without content take it minutes. Source: our choice."""

MAX_AXES = 8
"""Most axes of a tensor. Source: our choice; ours have up to four."""

DTYPES = frozenset(("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"))
"""Number formats that are read, by safetensors' names."""

FLOATS = frozenset(("F16", "BF16", "F32", "F64"))
"""Number formats of weights and activations."""

INTEGERS = frozenset(("I64",))
"""Number formats of counts and token ids."""

Spec = tuple[frozenset[str], tuple[int, ...] | None]
"""Allowed number formats and the shape of a tensor; None allows any shape."""


def read_tensors(
    folder: str | Path, name: str, expected: Mapping[str, Spec] | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file onto the CPU.

    Args:
        folder: the folder.
        name: name of the file in it, see `inside`.
        expected: the tensors that the file must hold, no more and no less; checked before any is
            read. None allows all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_shapes`, or the tensors are not those `expected`.
    """
    path = inside(Path(folder), name)
    shapes = read_shapes(folder, name)
    if expected is not None:
        if missing := sorted(expected.keys() - shapes.keys()):
            raise ValueError(f"{path} is incomplete: it has no tensor {missing[0]!r}")
        if unknown := sorted(shapes.keys() - expected.keys()):
            raise ValueError(f"{path} has an unknown tensor {unknown[0]!r:.80}")
        for key, (kinds, shape) in expected.items():
            if shapes[key][0] not in kinds or shape not in (None, shapes[key][1]):
                raise ValueError(
                    f"{path}: {key} must be {' or '.join(sorted(kinds))}"
                    f"{'' if shape is None else f' {list(shape)}'}, got {shapes[key][0]} "
                    f"{list(shapes[key][1])!s:.80}"
                )
    return load_file(path)


def read_shapes(folder: str | Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return number format and shape of each tensor of a safetensors file, from its header alone.

    safetensors checks the header against the file: the tensors fill it without gap or overlap. So
    the shapes claim no more than the file holds, except for axes beside an axis of length 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not allowed by `inside`; not a safetensors file; truncated; larger than the free
            memory; or a header, number format or axis beyond the limits of this module.
    """
    path = inside(Path(folder), name)
    size, free = size_of(path), psutil.virtual_memory().available
    if size > free:  # it may be a sparse file
        raise ValueError(
            f"{path} has {size / 2**30:.3g} GiB of tensors, but {free / 2**30:.3g} GiB of memory "
            "are free: read it on a machine with more memory"
        )
    with path.open("rb") as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER:
        kinds = [kind for magic, kind in _OTHERS.items() if start.startswith(magic)]
        raise ValueError(
            f"{path} is not a readable safetensors file: it is "
            f"{kinds[0] if kinds else 'truncated or of another kind'}, its header would have "
            f"{length} bytes (at most {MAX_HEADER}); only safetensors are read, a pickle can run "
            "code"
        )
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            found = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (SafetensorError, MemoryError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    for key, (dtype, shape) in found.items():
        if dtype not in DTYPES or len(shape) > MAX_AXES or max(shape, default=0) > size:
            raise ValueError(
                f"{path}: {key!r:.80} must be one of {sorted(DTYPES)} with at most {MAX_AXES} "
                f"axes, none longer than the file, got {dtype} {list(shape)!s:.80}"
            )
    return found


_OTHERS = {b"PK\x03\x04": "a zip archive, which torch.save writes", b"\x80": "a pickle"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, whole or not at all."""
    # Copies, because safetensors refuses two names for the same memory.
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    with new_file(path) as new:
        save_file(copies, new)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all numbers are finite.

    Raises:
        ValueError: the message names the tensor.
    """
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinite numbers")
