"""Folders that someone broke, on purpose or not: seeded mutations, and what became of reading them.

A mutated folder of `hostile_kinds.KINDS` may be read (then it must be usable) or refused by
ValueError or FileNotFoundError, which say what is wrong; all else is a crash.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile_kinds import HOOKS, KINDS, TEXTS
from safetensors.torch import load_file, save_file


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53, 2**63, 2**64, 10**40, 1.5, -0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", ".", "..", "../outside", "/etc/passwd"),
    *("C:\\x", "\\\\host\\share", "a\0b", "\ud800", "x" * 5000, "saes/../../outside", "float16"),
    *([], {}, [[]], [{}], [1, "a", None], {"a": 1}, [0] * 1000, ["x"] * 1000, {"": ""}),
    *({"kind": "Popen", "fields": {}}, {"kind": [], "fields": {}}, {"kind": "Not", "fields": {}}),
    *({"tensor": [1.0, 2.0], "dtype": "float32"}, {"tensor": [[1], []], "dtype": "bool"}),
    *({"tensor": 10**40, "dtype": "float64"}, {"mapping": [[1]]}, {"mapping": [[[], 1]]}),
    *({"mapping": [["create", 1e400]]}, deep(50), deep(700), "query_head_topk", "cuda:7", "meta"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from places(item, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def change_json(value: Any, random: Random) -> str:
    """JSON, one place of which holds what it should not."""
    paths = list(places(value))
    *above, key = path = random.choice(paths[1:])
    holder = at(value, tuple(above))
    match random.choice(["swap"] * 5 + ["drop", "name", "other", "twice", "key"]):
        case "swap":
            holder[key] = random.choice(HOSTILE)
        case "other":
            holder[key] = at(value, random.choice([p for p in paths if path[: len(p)] != p]))
        case "drop":
            del holder[key]
        case "key" if isinstance(holder, dict):
            holder[random.choice(["", "../x", "__class__", "to_dict", "k", "\ud800"])] = 1
        case "name" if isinstance(holder, dict):
            holder[random.choice(["x", "../x", "__class__", "saes", HOOKS[0]])] = holder.pop(key)
        case _:
            text = json.dumps(value)
            return text[:-1] + ", " + text[1:]
    return json.dumps(value)


def change_header(data: bytes, random: Random) -> bytes:
    """A safetensors file whose header says what is not so."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = random.choice(list(header))
    entry = header[name]
    big = random.choice([0, 1, -1, 2, 7, 2**31, 2**40, 2**62, 2**63, 2**64, 1.5, "1", None, True])
    match random.choice(["dtype", "axis", "axes", "end", "offsets", "name", "json", "length"]):
        case "dtype" if "dtype" in entry:
            entry["dtype"] = random.choice(
                ["F64", "F16", "BF16", "I32", "BOOL", "U8", "C64", "F8_E4M3", "F4", "X", 1, None]
            )
        case "axis" if entry.get("shape"):
            entry["shape"][random.randrange(len(entry["shape"]))] = big
        case "axes" if "shape" in entry:
            entry["shape"] = random.choice([[], [0], [2**62, 0, 2**62], [1] * 70, "x", big, {}])
        case "end" if "data_offsets" in entry:
            entry["data_offsets"][random.randrange(2)] = big
        case "offsets":
            entry["data_offsets"] = random.choice([[0, 0], [], [0], [0, 2**62], "x", None, big])
        case "name":
            header[random.choice(["x", "", "../x", "counts", "W_dec", "threshold"])] = header.pop(
                name
            )
        case "length":
            fake = random.choice([0, 1, length - 1, length + 1, 2**20, 2**31, 2**63, 2**64 - 1])
            return struct.pack("<Q", fake) + data[8:]
        case _:
            text = change_json(header, random).encode(errors="surrogatepass")
            return struct.pack("<Q", len(text)) + text + body
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def change_tensors(path: Path, random: Random) -> None:
    """A sound safetensors file of other tensors."""
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    name = random.choice(list(tensors))
    t = tensors[name]
    match random.choice(["nan", "type", "axis", "flat", "less", "drop", "more", "empty", "minus"]):
        case "nan" if t.is_floating_point():
            t.view(-1)[0] = random.choice([float("nan"), float("inf"), -1e38])
        case "type":
            kinds = [torch.bool, torch.int8, torch.int64, torch.float16, torch.float64]
            tensors[name] = t.to(random.choice([*kinds, torch.complex64, torch.float8_e4m3fn]))
        case "axis":
            tensors[name] = t[None] if random.random() < 0.5 else t[..., None].clone()
        case "flat":
            tensors[name] = t.flatten()
        case "less":
            tensors[name] = t[:-1].clone()
        case "drop":
            del tensors[name]
        case "more":
            tensors[random.choice(["x", "../x", "scaling_factor", "mean.2"])] = t.clone()
        case "empty":
            tensors[name] = t[:0].clone()
        case _:
            tensors[name] = -t if t.dtype != torch.bool else ~t
    save_file(tensors, path)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut off, put in, or put behind."""
    where = random.randrange(len(data))
    match random.choice(["flip", "flip", "cut", "insert", "behind", "nothing", "twice"]):
        case "flip":
            changed = bytearray(data)
            for _ in range(random.choice([1, 1, 2, 8])):
                changed[random.randrange(min(len(data), 600))] ^= 1 << random.randrange(8)
            return bytes(changed)
        case "cut":
            return data[:where]
        case "insert":
            return data[:where] + random.randbytes(random.choice([1, 8, 100])) + data[where:]
        case "behind":
            return data + random.choice([b"\0", b" ", b"\n{}", random.randbytes(1000)])
        case "twice":
            return data + data
    return b""


def change_text(data: bytes, random: Random) -> bytes:
    """Something that a text file may hold, put into it once or several times."""
    odd = [b'"', b",", b"\t", b"\n", b"\r", b"\0", b"{", b"\xef\xbb\xbf", b"\xe9", b"\xed\xa0\x80"]
    odd += [b"NaN", b'{"q": ' * 3000, b"1e999", b"9" * 5000, b'"q": 1, ', "\u2028".encode()]
    for _ in range(random.choice([1, 1, 2, 5])):
        where = random.randrange(len(data) + 1)
        data = data[:where] + random.choice(odd) + data[where + random.choice([0, 0, 1]) :]
    return data


def change_kind(path: Path, outside: Path, random: Random) -> None:
    """Something else under the name of a file, or nothing."""
    shutil.copy(path, outside)
    path.unlink()
    match random.choice(
        ["gone", "folder", "pipe", "link", "loop", "dead", "device", "pickle", "zip"]
    ):
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(outside)
        case "loop":
            path.symlink_to(path)
        case "dead":
            path.symlink_to("nowhere")
        case "device":
            path.symlink_to("/dev/zero")
        case "pickle":
            path.write_bytes(pickle.dumps({"W_enc": [1.0]}))
        case "zip":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("archive/data.pkl", pickle.dumps([1]))


def mutate(path: Path, outside: Path, random: Random) -> str:
    """Change a file, of which `outside` becomes a copy; return what was done."""
    data, how = path.read_bytes(), random.choice(["bytes", "kind", *["inside"] * 4])
    if how == "kind":
        change_kind(path, outside, random)
    elif how == "bytes":
        path.write_bytes(change_bytes(data, random))
    elif path.suffix == ".json":
        path.write_text(change_json(json.loads(data), random))
    elif path.suffix in TEXTS:
        path.write_bytes(change_text(data, random))
    elif random.random() < 0.5:
        how = "header"
        path.write_bytes(change_header(data, random))
    else:
        how = "tensors"
        change_tensors(path, random)
    return f"{how} of {path.parent.name}/{path.name}"


@contextmanager
def limits(seconds: float = 30.0, memory: int = 2**30) -> Iterator[None]:
    """Let nothing take so much longer, or so much more memory, in bytes."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, before[1]))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(kind: str, number: int, seed: int, tmp: Path) -> tuple[str, str]:
    """Make, mutate and read a folder.

    Returns:
        "loaded", "refused" or "crashed", and what was done and how it ended.
    """
    random = Random(f"{kind} {number} {seed}")
    make, read = KINDS[kind]
    room = tmp / f"{kind}-{number}"
    folder, outside, out = room / "folder", room / "outside", room / "out"
    room.mkdir()
    outside.write_text("{}")
    try:
        make(folder, number)
        read_back = (".json", ".safetensors", *TEXTS)
        files = sorted(path for path in folder.rglob("*") if path.suffix in read_back)
        chosen = random.sample(files, min(len(files), random.choice([1, 1, 1, 2])))
        done = [mutate(path, outside, random) for path in chosen]
        before = sorted(room.rglob("*"))
        try:
            with limits():
                read(folder, out)
        except (ValueError, FileNotFoundError) as error:
            kept = before == sorted(p for p in room.rglob("*") if out not in (p, *p.parents))
            name = str(folder) in str(error)
            where = "" if name else " (names no file)"
            return ("refused" if kept else "crashed"), f"{done}: {error!r}{where}"
        except BaseException as error:  # whatever it is, it is what is looked for here
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            return "crashed", f"{done}: {error!r} at {Path(last.filename).name}:{last.lineno}"
        return "loaded", f"{done}"
    finally:
        shutil.rmtree(room)
