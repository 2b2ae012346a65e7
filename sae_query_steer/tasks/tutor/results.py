"""What the demo found, and how it is written down."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pandas as pd

from sae_query_steer.tasks.tutor.settings import DemoSettings

MAIN = ("requested", "last prompt token")
"""The centroids with which every objective is tried: of which prompts, over which span."""

OTHERS = (("open", "last prompt token"), ("requested", "response tokens"))
"""The centroids that are tried with one objective: each differs from the main ones in one thing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoResult:
    """All that the demo found."""

    settings: DemoSettings
    notes: bool
    """Whether the tutor's prompts hold notes; without, there is nothing to choose."""

    rows: pd.DataFrame
    """The table, a row for each task and method."""

    curves: pd.DataFrame
    """Every strength that was tried, on the validation cases."""

    sites: pd.DataFrame
    """Interchange effect, separability and the label's share of the variance, by layer."""

    layers: tuple[int, ...]
    """The layers that were steered."""

    examples: tuple[Mapping[str, str], ...]
    """Three cases in full, with what each method wrote."""

    judge: Mapping[str, float]
    """How the classifier does on held-out texts, and how often both judges agree."""

    saes: pd.DataFrame
    """The SAEs' metrics by layer."""

    seconds: Mapping[str, float]
    """Time of each step."""

    def to_json(self) -> dict[str, Any]:
        """Return what `results.json` holds."""
        packages = ("torch", "transformer-lens", "sae-lens", "transformers", "sae-query-steer")
        return {
            "rows": _records(self.rows),
            "judge_accuracy": dict(self.judge),
            "sites": _records(self.sites),
            "layers": list(self.layers),
            "settings": vars(self.settings) | {"notes": self.notes, "sampling": "greedy"},
            "curves": _records(self.curves),
            "examples": [dict(example) for example in self.examples],
            "saes": _records(self.saes),
            "seconds": {name: round(s, 2) for name, s in self.seconds.items()},
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        }


def label_of(row: Mapping[str, object]) -> str:
    """Return the name of a row: method, objective, and centroids where they are not the main."""
    parts = [str(row["method"])]
    if isinstance(row["objective"], str):
        parts.append(row["objective"])
    if isinstance(row["centroids"], str) and (row["centroids"], row["span"]) != MAIN:
        parts.append(f"{row['centroids']} prompts, {row['span']}")
    return ", ".join(parts)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as JSON knows them: missing numbers are null."""
    return [
        {
            key: None if not isinstance(value, str) and pd.isna(value) else value
            for key, value in row.items()
        }
        for row in table.astype(object).to_dict("records")
    ]
