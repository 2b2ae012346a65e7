"""A comparison as one offline page, as CSV, and as JSON."""

import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_query_steer.compare import figures
from sae_query_steer.compare.comparison import Comparison
from sae_query_steer.compare.figures import best_row, is_control, row_names
from sae_query_steer.compare.outcomes import MAX_PERPLEXITY_RATIO
from sae_query_steer.diagnostics.verdicts import closing_sentence
from sae_query_steer.storage.folders import check_replaceable, new_folder
from sae_query_steer.storage.records import write_json

RESULTS = "comparison.json"
"""By this file the folder of a comparison is known."""

_SHOWN = {
    "task": "task",
    "name": "method",
    "step_size": "step size",
    "delta_q_ratio": "relative change",
    "target": "target rate [95 %]",
    "source_rate": "source rate",
    "grounded": "grounded",
    "succeeded": "success [95 %]",
    "specificity": "specificity",
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
    "label_share": "label's share of q's variance",
    "accuracy_latents": "separability: latents",
    "accuracy_query": "raw q",
    "accuracy_token": "token alone",
    "verdict": "verdict",
}


def write_comparison(found: Comparison, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write `report.html`, `comparison.json` and the tables as CSV, whole or not at all.

    The tables are `table.csv`, `curves.csv`, `texts.csv` and, where measured, `sites.csv` and
    `saes.csv`.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else.
    """
    tables = {"table": found.rows, "curves": found.curves, "texts": found.texts}
    tables |= {"sites": found.sites, "saes": found.saes}
    with new_folder(folder, overwrite=overwrite, holding=RESULTS) as new:
        for name, table in tables.items():
            if table is not None:
                table.to_csv(new / f"{name}.csv", index=False)
        write_json(
            new / RESULTS,
            {
                "settings": dict(found.settings),
                "judge": dict(found.judge),
                "versions": _versions(),
            },
        )
        (new / "report.html").write_text(comparison_html(found), encoding="utf-8")


def comparison_html(found: Comparison) -> str:
    """Return the report as one page that holds all it needs, plotly included."""
    by_layer = figures.layer_table(found.rows)
    sites, settings = found.sites, {**found.settings, **_versions()}
    environment = Environment(
        loader=PackageLoader("sae_query_steer", "compare"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        plotly=Markup(get_plotlyjs()),  # noqa: S704
        verdict=verdict(found),
        n=max(found.rows["n"].tolist()),
        max_ratio=MAX_PERPLEXITY_RATIO,
        specificity=found.rows["specificity"].notna().any(),
        success=_drawn(figures.success_figure(found)),
        rows=display_rows(found),
        frontier=_drawn(figures.frontier_figure(found)),
        sites=None if sites is None else display_sites(sites),
        layers=by_layer.round(2).astype(str) if len(by_layer) > 1 else None,
        matrix=_drawn(figures.matrix_figure(found)),
        samples=list(samples(found)),
        judge=pd.DataFrame({"judge": found.judge.keys(), "value": found.judge.values()}),
        saes=found.saes,
        settings=pd.DataFrame({"setting": settings.keys(), "value": map(str, settings.values())}),
    )


def _drawn(figure: go.Figure | None) -> Markup | None:
    if figure is None:
        return None
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return Markup(drawn)  # noqa: S704


def verdict(found: Comparison) -> str:
    """Return the result in a few sentences: the best of each kind, and the negative control."""
    said = [] if found.sites is None else [closing_sentence(found.sites)]
    tasks = list(dict.fromkeys(found.rows["task"]))
    for task in tasks:
        rows = found.rows[found.rows["task"] == task]
        steered = rows[rows["step_size"].notna()]
        parts = [
            f"{name} {_rate(rows[rows['method'] == method].iloc[0])}"
            for name, method in (("unsteered", "unsteered"), ("requested", "instruction"))
            if method in list(rows["method"])
        ]
        if len(steered):
            best = best_row(steered)
            (name,) = row_names(pd.DataFrame([best]), found.rows)
            ratio = best["perplexity_ratio"]
            parts.append(f"the best steer {_rate(best)} ({name}; perplexity ratio {ratio:.2f})")
            control = rows[is_control(rows)]
            if len(control):
                highest = best_row(control)
                clear = best["success_low"] > highest["success_high"]
                end = "" if clear else ", which overlaps: the steer is no better than chance"
                parts.append(f"random directions of its length {_rate(highest)}{end}")
        said.append((f"{task}: " if len(tasks) > 1 else "") + ", ".join(parts) + ".")
    return "Success. " + " ".join(said) if found.sites is None else " ".join(said)


def _rate(row: Any) -> str:
    return f"{row['success']:.2f} [{row['success_low']:.2f}, {row['success_high']:.2f}]"


def display_rows(found: Comparison) -> pd.DataFrame:
    """Return the table to read: names in words, intervals, no column that is empty."""
    rows = found.rows
    made = rows.assign(
        name=row_names(rows, rows),
        target=[
            f"{rate:.2f} [{low:.2f}, {high:.2f}]"
            for rate, low, high in rows[["target_rate", "ci_low", "ci_high"]].to_numpy()
        ],
        succeeded=[_rate(row) for _, row in rows.iterrows()],
    )
    hidden = {name for name in _SHOWN if bool(made[name].isna().to_numpy().all())}
    hidden |= {"task"} if len(set(rows["task"])) == 1 else set()
    hidden |= {"succeeded"} if "grounded" in hidden else set()  # there it is the target rate
    if rows["perplexity_ratio"].equals(rows["perplexity_ratio_original"]):
        hidden.add("perplexity_ratio_original")
    table = pd.DataFrame({shown: made[n] for n, shown in _SHOWN.items() if n not in hidden})
    return _rounded(table)


def display_sites(sites: pd.DataFrame) -> pd.DataFrame:
    """Return the table of sites to read."""
    shown = {name: sites[name] for name in _SITES if name in sites}
    return _rounded(pd.DataFrame(shown).rename(columns=_SITES))


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    for name in table.columns:
        if pd.api.types.is_float_dtype(table[name]):
            digits = ".3g" if name in ("step size", "relative change") else ".2f"
            table[name] = ["" if pd.isna(x) else format(x, digits) for x in table[name]]
    return table.astype(object).fillna("")


def samples(found: Comparison, n: int = 3) -> Iterator[dict[str, Any]]:
    """Return cases in full: the first, one from the middle, and the last.

    Returns:
        title, prompt, and texts, a table of method, text and judged class.
    """
    texts = found.texts.assign(name=row_names(found.texts, found.rows))
    keys = ["task", "prompt", "target"]
    cases = texts[keys].drop_duplicates()
    for index in sorted({round(i * (len(cases) - 1) / max(1, n - 1)) for i in range(n)}):
        case = cases.iloc[index]
        own = texts[(texts[keys] == case).all(axis=1)]
        yield {
            "title": f"{case['task']}: target {case['target']}",
            "prompt": case["prompt"],
            "texts": own[["name", "text", "judged"]].fillna("none"),
        }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformer-lens", "sae-lens", "transformers", "sae-query-steer")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def compare_into(
    out: str | Path,
    compare: Callable[[Path], Comparison],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Comparison:
    """Run a comparison and write it to a folder.

    Until it is done, its log is in `<out>.unfinished`.

    Args:
        out: the folder; see `write_comparison`.
        compare: the comparison, from the path of its log.
        resume: continue a run of the same settings that was stopped.
        overwrite: replace a comparison that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else; or a
            stopped run is there and `resume` is False. Both before anything runs.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or --overwrite")
    check_replaceable(out, overwrite=overwrite, holding=RESULTS)
    unfinished = out.with_name(f"{out.name}.unfinished")
    if unfinished.exists() and not resume:
        raise FileExistsError(
            f"{unfinished} holds a run that was stopped: continue it with --resume, or delete it"
        )
    found = compare(unfinished / "log.jsonl")
    write_comparison(found, out, overwrite=overwrite)
    shutil.rmtree(unfinished)
    return found
