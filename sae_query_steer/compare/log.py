"""The log of a comparison: a JSON line for each outcome, written as soon as it is measured."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from glob import escape
from pathlib import Path
from typing import Any

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.storage.folders import lock_for, size_of
from sae_query_steer.targets.centroids import CentroidTargets

HEAD = "sae_query_steer.comparison/1"


class ComparisonLog:
    """Outcomes by key, in a file of JSON lines.

    The first line holds the settings; a log of other settings is refused. Lines are only appended:
    a last line without its end, as a killed process or a full disk leaves it, is cut off when the
    log is opened again, and a line that cannot be read is skipped with a warning. Other processes
    cannot open the file for as long as this object lives.

    Args:
        path: the file; made with its folder.
        settings: what outcomes depend on: model, data, seeds, sizes.
        rank: in a launch of several processes each writes a file of its own, and reads those of
            all: `log.jsonl` of rank 0 and `log-1.jsonl` of rank 1.

    Raises:
        BlockingIOError: another process writes to the file.
        ValueError: the file is the log of another comparison, or no log.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, rank: int = 0) -> None:
        self._first = first = Path(path)
        self.path = first.with_stem(f"{first.stem}-{rank}") if rank else first
        self._known: dict[str, dict[str, Any]] = {}
        self._head = {"format": HEAD, "settings": json.loads(json.dumps(settings))}
        lock_for(self, self.path)
        if not (self.path.exists() and self._read(self.path)):
            self._write(self._head)
        self.read_others()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the outcome of a key, or None."""
        return self._known.get(_name(key))

    def add(self, key: dict[str, Any], outcome: dict[str, Any]) -> None:
        """Append an outcome to the file."""
        self._write({"key": key, "outcome": outcome})
        self._known[_name(key)] = json.loads(json.dumps(outcome))

    def read_others(self) -> None:
        """Read what other processes of this comparison have measured, now or in an earlier run."""
        first = self._first
        others = first.parent.glob(f"{escape(first.stem)}-[0-9]*{first.suffix}")
        for path in {first, *others} - {self.path}:
            if path.exists():
                self._read(path)

    def _read(self, path: Path) -> bool:
        """Read the whole lines, and of the own file cut off what follows; return whether any."""
        size_of(path)  # a pipe would block
        data = path.read_bytes()
        whole, end, cut = data.rpartition(b"\n")
        if not end and _line(self._head).startswith(cut):  # not even the head was written whole
            self._cut(path, 0)
            return False
        first, *lines = map(_parsed, whole.split(b"\n"))
        if first.get("format") != HEAD:
            raise ValueError(f"{path} is no log of a comparison")
        if first != self._head:
            then, now = dict(first.get("settings") or {}), self._head["settings"]
            names = sorted(n for n in {*then, *now} if then.get(n) != now.get(n))
            differing = ", ".join(f"{n}={then.get(n)!r} there, {now.get(n)!r} here" for n in names)
            raise ValueError(
                f"{path} is the log of another comparison ({differing}): give another folder, or "
                "the settings of that one"
            )
        self._cut(path, len(whole + end))
        parts = ("key", "outcome")
        good = [line for line in lines if all(isinstance(line.get(part), dict) for part in parts)]
        self._known |= {_name(line["key"]): line["outcome"] for line in good}
        if damaged := len(lines) - len(good):
            warnings.warn(
                f"{path} has {damaged} damaged line(s): these outcomes are measured again",
                stacklevel=3,
            )
        return True

    def _cut(self, path: Path, size: int) -> None:
        if path == self.path:  # a file of another process may grow meanwhile
            os.truncate(path, size)

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a write that failed must not cost this line
                    file.write(b"\n")
            file.write(_line(line))


def digest_of(centroids: Iterable[CentroidTargets], examples: Iterable[LabelledExample]) -> str:
    """Return a digest of centroids and texts; centroids depend on the model and the SAEs."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr((example.prompt, example.response, str(example.label))).encode())
    for targets in centroids:
        for mean in targets.means.values():
            found.update(mean.cpu().numpy().tobytes())
    return found.hexdigest()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the object of a line, empty if there is none."""
    try:
        found = json.loads(line)
    except (RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
