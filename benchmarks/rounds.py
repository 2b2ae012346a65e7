"""Two sides measured in one process, alternating, and the row of a table that compares them."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_query_steer.storage.folders import new_file


def seconds_of(
    ours: Callable[[], Any], other: Callable[[], Any], rounds: int, *, warm_up: bool = True
) -> list[tuple[float, float]]:
    """Return the seconds of both sides, round by round; a first round does not count.

    Args:
        ours: one side.
        other: the other side.
        rounds: measured rounds.
        warm_up: run the first round; False where both sides ran before.
    """
    found = []
    for _ in range(rounds + warm_up):
        pair = []
        for side in (ours, other):
            begun = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - begun)
        found.append((pair[0], pair[1]))
    return found[warm_up:]


def row_of(
    name: str,
    ours: Sequence[float],
    other: Sequence[float],
    ratios: Sequence[float],
    *,
    equal: bool,
) -> dict[str, Any]:
    """Return a row: medians of both sides, and of the ratios of each round with their range."""
    return {
        "name": name,
        "ours": statistics.median(ours),
        "other": statistics.median(other),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(ratios),
        "equal": equal,
    }


def faster(name: str, seconds: Sequence[tuple[float, float]], *, equal: bool) -> dict[str, Any]:
    """Return the row of seconds of both sides, whose ratio is how much faster ours is."""
    ours, other = zip(*seconds, strict=True)
    return row_of(name, ours, other, [b / a for a, b in seconds], equal=equal)


def show(rows: Sequence[dict[str, Any]], file: Path | None) -> None:
    """Print the rows, and write them to a file if one is given."""
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    if file is not None:
        with new_file(file) as new:
            new.write_text(json.dumps(rows, indent=1), encoding="utf-8")
