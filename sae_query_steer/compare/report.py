"""A comparison as one offline page, as CSV, and as JSON."""

import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_query_steer.compare.comparison import MAX_PERPLEXITY_RATIO, Comparison
from sae_query_steer.compare.held_out import judge_accuracy, judge_sentence, may_guess
from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.diagnostics.verdicts import closing_sentence
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.storage.csv_files import csv_text
from sae_query_steer.storage.folders import check_replaceable, locked, new_folder
from sae_query_steer.storage.records import write_json

RESULTS = "comparison.json"
"""This file identifies the folder of a comparison."""

_PARTS = {
    "objective": "{}",
    "centroids": "{} prompts",
    "span": "over {}",
    "scope": "at {}",
    "layers": "layer {}",
    "heads": "heads {}",
}

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
    "verdict": "verdict",
    "class_effect": "class effect, nats",
    "class_effect_se": "its s.e.",
    "moved": "probability moved",
    "moved_control": "by the own class",
    "accuracy_latents": "separability: latents",
    "accuracy_query": "raw q",
    "accuracy_token": "token alone",
}


def write_comparison(
    found: Comparison,
    folder: str | Path,
    *,
    beside: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Write `report.html`, `comparison.json` and the tables as CSV, whole or not at all.

    The tables are `table.csv`, `classes.csv` of `success_by_class`, `curves.csv`, `texts.csv` and,
    if measured, `sites.csv` and `saes.csv`.

    Args:
        found: the comparison.
        folder: the folder to make.
        beside: folders to copy into it, such as those of SAEs.
        overwrite: replace a comparison that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else.
    """
    names = {"table": "rows"} | {name: name for name in ("curves", "texts", "sites", "saes")}
    with new_folder(folder, overwrite=overwrite, holding=RESULTS) as new:
        tables = {name: getattr(found, part) for name, part in names.items()}
        for name, table in (tables | {"classes": success_by_class(found)}).items():
            if table is not None:
                (new / f"{name}.csv").write_text(csv_text(table), encoding="utf-8")
        told = {"settings": dict(found.settings), "judge": dict(found.judge)}
        write_json(new / RESULTS, told | {"versions": _versions()})
        (new / "report.html").write_text(comparison_html(found), encoding="utf-8")
        for other in beside:
            shutil.copytree(other, new / other.name)


def success_by_class(found: Comparison) -> pd.DataFrame:
    """Return the success of every method for each target class, to show it in a bundle's card.

    Returns:
        Columns task, method, target, n, success, low and high, the 95 % Wilson interval, and judge,
        its accuracy on held-out texts.
    """
    texts = found.texts.assign(method=row_names(found.texts, found.rows))
    groups = texts.groupby(["task", "method", "target"], sort=False)["success"]
    table = groups.agg(n="size", success="mean", hits="sum").reset_index()
    pairs = zip(table.pop("hits"), table["n"], strict=True)
    table[["low", "high"]] = [wilson_interval(int(hits), int(n)) for hits, n in pairs]
    return table.assign(judge=judge_accuracy(found.judge))


def comparison_html(found: Comparison) -> str:
    """Return the report as one page that holds all it needs, plotly included."""
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
        success=_drawn(_success_figure(found)),
        rows=display_rows(found),
        frontier=_drawn(_frontier_figure(found)) if len(found.curves) else None,
        sites=None if found.sites is None else display_sites(found.sites),
        samples=list(samples(found)),
        judge=_pairs(found.judge),
        saes=found.saes,
        settings=_pairs({**found.settings, **_versions()}),
    )


def _versions() -> dict[str, str]:
    packages = ("torch", "transformer-lens", "sae-lens", "transformers", "sae-query-steer")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _pairs(values: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({"name": values.keys(), "value": map(str, values.values())})


def _drawn(figure: go.Figure) -> Markup:
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return Markup(drawn)  # noqa: S704


def _success_figure(found: Comparison) -> go.Figure:
    """Return success of every row as bars with 95 % intervals, the tasks side by side."""
    rows = found.rows.assign(name=row_names(found.rows, found.rows))
    names = list(dict.fromkeys(rows["name"]))
    figure = px.bar(
        rows,
        x="success",
        y="name",
        error_x=rows["success_high"] - rows["success"],
        error_x_minus=rows["success"] - rows["success_low"],
        color="method",
        facet_col="task",
        category_orders={"name": names},
        range_x=[0, 1.02],
        height=110 + 26 * len(names),
        template="plotly_white",
        labels={"name": ""},
    )
    return figure.update_layout(showlegend=False)


def _frontier_figure(found: Comparison) -> go.Figure:
    """Return target rate against perplexity ratio on the validation cases, a line for a method."""
    curves = found.curves.assign(name=row_names(found.curves, found.rows))
    figure = px.line(
        curves.sort_values("step_size", kind="stable"),
        x="perplexity_ratio",
        y="target_rate",
        color="name",
        symbol="name",
        facet_col="task",
        hover_data=["step_size", "n", "ci_low", "ci_high"],
        log_x=True,
        range_y=[0, 1.03],
        height=460,
        template="plotly_white",
        labels={"name": "", "perplexity_ratio": "perplexity ratio", "target_rate": "target rate"},
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.2})
    return figure.add_vline(x=MAX_PERPLEXITY_RATIO, line={"dash": "dot", "color": "#9aa0a6"})


def row_names(table: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """Return a name for each row of a table: the method, and what tells its rows apart.

    A part that two thirds or more of the rows share is left out.

    Args:
        table: rows, curves or texts of a comparison.
        rows: its rows.
    """
    every = pd.concat([rows, table])[["method", *_PARTS]]
    several = every.groupby("method").nunique() > 1
    usual: dict[str, Any] = {}
    for part in _PARTS:
        shares = rows.loc[rows["layers"] != "", part].value_counts(normalize=True)
        usual[part] = shares.index[0] if len(shares) and shares.iloc[0] >= 2 / 3 else None

    def name(row: Mapping[Any, Any]) -> str:
        shown = {p: row[p] for p in _PARTS if isinstance(row[p], str) and row["layers"] != ""}
        shown = {p: x for p, x in shown.items() if several.at[row["method"], p] and x != usual[p]}
        return ", ".join([row["method"], *(_PARTS[p].format(x) for p, x in shown.items())])

    return [name(row) for row in table.to_dict("records")]


def verdict(found: Comparison) -> str:
    """Return the result in a few sentences: the judge, the best of each kind, and the control.

    If the judge may be guessing, there is no result.
    """
    said = [] if found.sites is None else [closing_sentence(found.sites)]
    said.append(judge_sentence(found.judge))
    if may_guess(found.judge):
        return " ".join(said)
    named = found.rows.assign(name=row_names(found.rows, found.rows))
    for task, rows in named.groupby("task", sort=False):
        kinds = {
            "unsteered": rows["method"] == "unsteered",
            "requested": rows["method"] == "instruction",
            "few-shot": rows["method"].str.startswith("few-shot"),
            "best steering": rows["step_size"].notna(),
            "random directions of its length": rows["method"].str.startswith("random direction"),
        }
        best: dict[str, Any] = {
            kind: rows[which].iloc[int(rows[which]["success"].to_numpy().argmax())]
            for kind, which in kinds.items()
            if which.any()
        }
        parts = {kind: f"{kind} {_rate(row)}" for kind, row in best.items()}
        overlap = False
        if (row := best.get("best steering")) is not None:
            of = f" ({row['name']}; perplexity ratio {row['perplexity_ratio']:.2f})"
            parts["best steering"] += of
            control = best.get("random directions of its length")
            overlap = control is not None and row["success_low"] <= control["success_high"]
        said.append(f"Success, {task}, n = {rows['n'].max()}: " + ", ".join(parts.values()) + ".")
        if overlap:
            said.append(
                "The last two intervals overlap: steering is not shown to be better than random "
                "directions; more cases narrow them."
            )
    return " ".join(said)


def _rate(row: Any, name: str = "success", ends: str = "success") -> str:
    return f"{row[name]:.2f} [{row[f'{ends}_low']:.2f}, {row[f'{ends}_high']:.2f}]"


def display_rows(found: Comparison) -> pd.DataFrame:
    """Return the table to read: names in words, intervals, no empty column."""
    rows = found.rows
    made = rows.assign(
        name=row_names(rows, rows),
        target=[_rate(row, "target_rate", "ci") for row in rows.to_dict("records")],
        succeeded=list(map(_rate, rows.to_dict("records"))),
    )
    hidden = {name for name in _SHOWN if bool(made[name].isna().to_numpy().all())}
    hidden |= {"succeeded"} if "grounded" in hidden else set()  # there it is the target rate
    if rows["perplexity_ratio"].equals(rows["perplexity_ratio_original"]):
        hidden.add("perplexity_ratio_original")
    return _rounded(pd.DataFrame({s: made[n] for n, s in _SHOWN.items() if n not in hidden}))


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


def samples(found: Comparison) -> Iterator[dict[str, Any]]:
    """Return three cases in full: the first, the middle and the last one.

    Returns:
        title, prompt, and texts, a table of method, text and judged class.
    """
    texts = found.texts.assign(name=row_names(found.texts, found.rows))
    cases = list(texts.groupby(["task", "prompt", "target"], sort=False))
    for index in sorted({0, len(cases) // 2, len(cases) - 1}):
        (task, prompt, target), own = cases[index]
        shown = own[["name", "text", "judged"]].fillna("none")
        yield {"title": f"{task}: target {target}", "prompt": prompt, "texts": shown}


def compare_into(
    out: str | Path,
    compare: Callable[[Path], Comparison],
    *,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Run a comparison and write it to a folder; until then its log is in `<out>.unfinished`.

    Folders that the comparison wrote beside its log, such as SAEs, are in the folder as well.

    Args:
        out: the folder; see `write_comparison`.
        compare: the comparison, from the path of its log.
        resume: continue a run of the same settings that was stopped.
        overwrite: replace a comparison that is there.
        ranks: the processes of a launch, all of which run `compare`; the first one writes.

    Raises:
        BlockingIOError: another process writes to the folder.
        FileExistsError: the folder exists and `overwrite` is False, or is something else; or a
            stopped run is there and `resume` is False. Both before anything runs.
    """
    out = Path(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    writes = ranks.rank == 0
    with locked(out) if writes else nullcontext():
        if writes:
            check_replaceable(out, overwrite=overwrite, holding=RESULTS)
        if writes and unfinished.exists() and not resume:
            raise FileExistsError(
                f"{unfinished} holds a stopped run: continue it with --resume, or delete it"
            )
        ranks.wait()
        found = compare(unfinished / "log.jsonl")
        if writes:
            beside = sorted(path for path in unfinished.iterdir() if path.is_dir())
            write_comparison(found, out, beside=beside, overwrite=overwrite)
            shutil.rmtree(unfinished)
        ranks.wait()
        return found
