"""What the demo found, and how it is written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sae_query_steer.compare.demo_methods import MAIN
from sae_query_steer.compare.demo_settings import DemoSettings
from sae_query_steer.compare.pages import versions
from sae_query_steer.compare.sweep import SweepResult


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoResult:
    """All that the demo found."""

    settings: DemoSettings
    notes: bool
    """Whether the tutor's prompts hold notes; without, there is nothing to choose."""

    compared: SweepResult
    """The table, the curves that strengths were chosen from, and every text."""

    sites: pd.DataFrame
    """Interchange effect, separability and the label's share of the variance, by layer."""

    layers: tuple[int, ...]
    """The layers that were steered."""

    judge: Mapping[str, float]
    """How the classifier does on held-out texts, and how often both judges agree."""

    saes: pd.DataFrame
    """The SAEs' metrics by layer."""

    seconds: Mapping[str, float]
    """Time of each step."""

    @property
    def rows(self) -> pd.DataFrame:
        """The table, a row for each task and method."""
        return self.compared.rows

    def label(self, row: Mapping[Any, Any]) -> str:
        """Return the name of a row of this demo."""
        return label_of(row, self.layers)

    def main_rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of a table of this demo that have the main centroids and layers."""
        named = table["centroids"].notna()
        others = named & ((table["centroids"] != MAIN[0]) | (table["span"] != MAIN[1]))
        here = table["layers"].isin(["", ",".join(map(str, self.layers))])
        return pd.DataFrame(table[~others & here])

    def frontier_rows(self) -> pd.DataFrame:
        """Return the curves with the main centroids and layers; in the residual stream any layer.

        A vector added after a layer is read by the queries of the next, so there the steered layer
        is not the one to look at.
        """
        curves = self.compared.curves
        added = curves["method"].str.startswith("residual") & (curves["span"] == MAIN[1])
        return pd.DataFrame(curves[added | curves.index.isin(self.main_rows(curves).index)])

    def examples(self) -> list[dict[str, str]]:
        """Return three cases in full, two open, one redirected, with what main methods wrote."""
        shown = []
        texts = self.main_rows(self.compared.texts)
        for task, index in (("open", 0), ("open", 5), ("redirect", 3)):
            here = texts[texts["task"] == task]
            prompts = here["prompt"].drop_duplicates().tolist()
            prompt = prompts[min(index, len(prompts) - 1)]
            rows = _records(pd.DataFrame(here[here["prompt"] == prompt]))
            example = {
                "task": task,
                "prompt": rows[0]["prompt"],
                "requested": rows[0]["source"] or "",
                "target": rows[0]["target"],
            }
            shown.append(example | {self.label(row): row["text"].strip() for row in rows})
        return shown

    def to_json(self) -> dict[str, Any]:
        """Return what `results.json` holds."""
        return {
            "rows": _records(self.rows),
            "judge_accuracy": dict(self.judge),
            "sites": _records(self.sites),
            "layers": list(self.layers),
            "settings": vars(self.settings) | {"notes": self.notes, "sampling": "greedy"},
            "curves": _records(self.compared.curves),
            "examples": self.examples(),
            "saes": _records(self.saes),
            "seconds": {name: round(s, 2) for name, s in self.seconds.items()},
            "versions": versions(),
        }


def label_of(row: Mapping[Any, Any], layers: Sequence[int]) -> str:
    """Return the name of a row: method, objective, and what is not as in the main rows.

    Args:
        row: of the table.
        layers: those that the main rows steer.
    """
    parts = [str(row["method"])]
    if isinstance(row["objective"], str) and row["method"] != "mean difference":
        parts.append(row["objective"])
    if isinstance(row["centroids"], str) and (row["centroids"], row["span"]) != MAIN:
        parts.append(f"{row['centroids']} prompts, {row['span']}")
    if row["layers"] not in ("", ",".join(map(str, layers))):
        parts.append(f"layer {row['layers']}")
    return ", ".join(parts)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as JSON knows them: missing numbers are null."""
    return [
        {
            str(key): None if not isinstance(value, str) and pd.isna(value) else value
            for key, value in row.items()
        }
        for row in table.astype(object).to_dict("records")
    ]
