"""The log of a sweep: a line of JSON for each outcome, written as it comes, to go on from."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_query_steer.storage.folders import size_of
from sae_query_steer.targets.centroids import CentroidTargets

HEAD = "sae_query_steer.sweep/3"


class SweepLog:
    """Outcomes by what was done, in a file of JSON lines.

    The first line says what the sweep is: a log of another sweep is refused. A line that was cut
    off, as by a kill, is dropped when the log is opened again.

    Args:
        path: the file; made with the folder that it is in.
        settings: what must be equal for outcomes to be the same: model, data, seeds, sizes.

    Raises:
        ValueError: the file is of another sweep, or no log.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._known: dict[str, dict[str, Any]] = {}
        head = {"format": HEAD, "settings": json.loads(json.dumps(settings))}
        if self.path.exists():
            self._read(head)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(head)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the outcome of what was done before, or None."""
        return self._known.get(_name(key))

    def add(self, key: dict[str, Any], outcome: dict[str, Any]) -> None:
        """Keep an outcome: it is in the file when this returns."""
        self._write({"key": key, "outcome": outcome})
        self._known[_name(key)] = json.loads(json.dumps(outcome))

    def rows(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return what was done, with its outcomes, in the order in which they came."""
        return [(json.loads(name), outcome) for name, outcome in self._known.items()]

    def _read(self, head: dict[str, Any]) -> None:
        size_of(self.path)  # a pipe would block
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no log of a sweep: {error}") from error
        whole, _, rest = text.rpartition("\n")
        lines = [_parsed(line, self.path) for line in whole.splitlines()]
        if not lines or lines[0].get("format") != HEAD:
            raise ValueError(f"{self.path} is no log of a sweep: give another file")
        if lines[0] != head:
            stored, now = lines[0].get("settings"), head["settings"]
            then = stored if isinstance(stored, dict) else {}
            names = sorted(n for n in {*then, *now} if then.get(n) != now.get(n))
            told = ", ".join(f"{n}={then.get(n)!r} there, {now.get(n)!r} here" for n in names)
            raise ValueError(
                f"{self.path} is the log of another sweep ({told}): give another folder, or the "
                "settings of that one"
            )
        for line in lines[1:]:
            if not all(isinstance(line.get(part), dict) for part in ("key", "outcome")):
                raise ValueError(f"{self.path} is damaged: a line is no record")
            self._known[_name(line["key"])] = line["outcome"]
        if rest:
            self.path.write_text(whole + "\n", encoding="utf-8")

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def digest_of(centroids: Iterable[CentroidTargets], *contents: bytes) -> str:
    """Return what tells centroids, and with them model, SAEs and texts, from others.

    Args:
        centroids: in the same order whenever digests are compared.
        contents: what else must be equal.
    """
    found = hashlib.sha256()
    for part in contents:
        found.update(part)
    for targets in centroids:
        for mean in targets.means.values():
            found.update(mean.cpu().numpy().tobytes())
    return found.hexdigest()


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: a line is no record")
    return found
