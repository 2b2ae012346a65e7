"""A sweep as one offline page, as CSV, and as JSON."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.compare.comparison import GRID_ENDS_AT_RATIO, MAX_PERPLEXITY_RATIO
from sae_query_steer.compare.pages import STYLE, page_parts, table_html, versions
from sae_query_steer.compare.sweep import SweepResult
from sae_query_steer.compare.sweep_figures import (
    best_row,
    frontier_figure,
    layer_figure,
    layer_table,
    matrix_figure,
)
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import write_json

RESULTS = "sweep.json"

_SHOWN = {
    "method": "method",
    "layers": "layers",
    "objective": "objective",
    "span": "centroids over",
    "scope": "steered at",
    "step_size": "step size",
    "delta_q_ratio": "relative change",
    "target_rate": "target rate",
    "interval": "95 %",
    "source_rate": "source rate",
    "grounded": "grounded",
    "success": "success",
    "specificity": "specificity, nats",
    "distinct_2": "distinct-2",
    "perplexity_ratio": "perplexity ratio",
    "perplexity_ratio_original": "under own prompt",
}

_SITES = {
    "layer": "layer",
    "class_effect": "class effect, nats",
    "class_effect_se": "its s.e.",
    "moved": "probability moved",
    "moved_control": "by the own class",
    "accuracy_latents": "told apart: latents",
    "accuracy_query": "raw q",
    "accuracy_token": "token alone",
    "verdict": "beforehand, from real queries patched in",
}
"""What is shown of a site beside what steering reached there."""


def write_sweep(
    result: SweepResult,
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    judge: Mapping[str, float],
    sites: pd.DataFrame | None = None,
    overwrite: bool = False,
) -> None:
    """Write `report.html`, `table.csv`, `curves.csv`, `texts.csv` and `sweep.json` to a folder.

    All of it or nothing.

    Args:
        result: what the sweep found.
        folder: the folder to make.
        settings: what was asked for, shown and kept.
        judge: how far the judge is to be believed: its held-out accuracy and the like.
        sites: separability and interchange effect by layer, shown beside what steering reached.
        overwrite: replace a sweep that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else.
    """
    with new_folder(folder, overwrite=overwrite, holding=RESULTS) as new:
        for name in ("rows", "curves", "texts"):
            file = "table.csv" if name == "rows" else f"{name}.csv"
            getattr(result, name).to_csv(new / file, index=False)
        if sites is not None:
            sites.to_csv(new / "sites.csv", index=False)
        write_json(
            new / RESULTS,
            {
                "settings": dict(settings),
                "judge": dict(judge),
                "versions": versions(),
            },
        )
        page = sweep_html(result, settings=settings, judge=judge, sites=sites)
        (new / "report.html").write_text(page, encoding="utf-8")


def sweep_html(
    result: SweepResult,
    *,
    settings: Mapping[str, Any],
    judge: Mapping[str, float],
    sites: pd.DataFrame | None = None,
) -> str:
    """Return the page: it holds all it needs, plotly included."""
    parts = [
        "<h2>Target rate against perplexity</h2><p>Validation cases; a line is a method from weak "
        "to strong. Compare methods at equal perplexity ratio.</p>",
        frontier_figure(result.curves),
    ]
    by_layer = layer_table(result.rows)
    if len(by_layer):
        parts += [
            "<h2>Layer by layer</h2><p>The most success that each way of steering one layer alone "
            "reached on the test cases. A model of few layers can neither confirm nor refute that "
            "middle layers are best.</p>",
            layer_figure(by_layer),
        ]
        if sites is not None:
            together = by_layer.merge(sites[[c for c in _SITES if c in sites]], on="layer")
            parts.append(table_html(together.astype({"layer": str}).rename(columns=_SITES)))
    matrix = matrix_figure(result)
    if matrix is not None:
        parts += [
            "<h2>From which class to which</h2><p>Success of the best steer by the class that "
            "the prompt leads to (down) and the target (across).</p>",
            matrix,
        ]
    parts += [
        "<h2>Texts side by side</h2>",
        *_samples(result),
        "<h2>Judge and settings</h2>",
        table_html(pd.DataFrame({"judge": judge.keys(), "value": judge.values()})),
        table_html(
            pd.DataFrame({"setting": settings.keys(), "value": map(str, settings.values())})
        ),
    ]
    drawn = page_parts(parts)
    n = max(result.rows["n"].tolist())
    head = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>sae_query_steer sweep</title><style>{STYLE}</style>",
        "<h1>Which way of steering reaches the target class?</h1>",
        f"<p class='verdict'>{html.escape(sweep_verdict(result))}</p>",
        f"<p>{n} held-out cases a row, each towards another class than its prompt's own; the same "
        "prompts for every method. The strength of each method was chosen on other cases, at a "
        f"perplexity ratio of {MAX_PERPLEXITY_RATIO} or less; a grid ends where the target rate "
        f"has fallen or the ratio passes {GRID_ENDS_AT_RATIO}. The perplexity is that given the "
        "prompt that requests the target; where there is none, given the case's own prompt, under "
        "which a text of another class is less likely however fluent it is.</p>",
        "<h2>The table</h2>",
        table_html(display_rows(result.rows)),
    ]
    return "\n".join([*head, *drawn, "</html>"])


def sweep_verdict(result: SweepResult) -> str:
    """Return the result in a few sentences: the best of each kind, and whether chance does it."""
    rows = result.rows
    control = rows[rows["method"].str.startswith("random direction")]
    steered = pd.DataFrame(rows[rows["step_size"].notna()])
    best = best_row(steered) if len(steered) else None
    bare = rows[rows["method"] == "unsteered"]
    said = []
    if len(bare):
        said.append(f"Unsteered, {_rate(bare.iloc[0])} of the texts are of the target class.")
    if best is not None:
        objective = "" if pd.isna(best["objective"]) else f", {best['objective']}"
        said.append(
            f"The best steer, {best['method']}{objective} at layer {best['layers']}, reaches "
            f"{_rate(best)} at a perplexity ratio of {best['perplexity_ratio']:.2f}."
        )
    if best is not None and len(control):
        highest = best_row(pd.DataFrame(control))
        clear = best["ci_low"] > highest["ci_high"]
        said.append(
            f"Random directions of the same length reach {_rate(highest)} at most"
            + ("." if clear else ": the steer is not told apart from chance.")
        )
    return " ".join(said)


def display_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table as it is read, without the columns that say nothing here."""
    interval = [
        f"{low:.2f} to {high:.2f}"
        for low, high in zip(rows["ci_low"], rows["ci_high"], strict=True)
    ]
    given = rows.assign(interval=interval)
    own = rows["perplexity_ratio"].equals(rows["perplexity_ratio_original"])
    silent = {name for name in _SHOWN if bool(given[name].isna().to_numpy().all())}
    silent |= {"perplexity_ratio_original"} if own else set()
    silent |= {"success"} if "grounded" in silent else set()  # there it is the target rate
    # What is the same in every row stands among the settings.
    silent |= {name for name in ("span", "scope") if len(set(given[name].dropna())) == 1}
    table = pd.DataFrame({said: given[n] for n, said in _SHOWN.items() if n not in silent})
    for name in table.columns:
        if pd.api.types.is_float_dtype(table[name]):
            digits = ".3g" if name in ("step size", "relative change") else ".2f"
            table[name] = ["" if pd.isna(x) else format(x, digits) for x in table[name]]
    return table.fillna("")


def _samples(result: SweepResult, n: int = 3) -> list[str]:
    texts, shown = result.texts, []
    first = texts[["task", "prompt", "target"]].drop_duplicates().head(n)
    for task, prompt, target in first.itertuples(index=False, name=None):
        same = (texts["task"] == task) & (texts["prompt"] == prompt) & (texts["target"] == target)
        rows = texts[same]
        label = [
            ", ".join(str(x) for x in named if x and not pd.isna(x))
            for named in rows[["method", "objective", "layers"]].itertuples(index=False, name=None)
        ]
        written = pd.DataFrame(
            {"method": label, "text": rows["text"], "judged": rows["judged"].fillna("none")}
        )
        title = html.escape(f"target {target}")
        shown.append(f"<h3>{title}</h3><pre>{html.escape(prompt)}</pre>{table_html(written)}")
    return shown


def _rate(row: Any) -> str:
    return f"{row['target_rate']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
