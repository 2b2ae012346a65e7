"""The demo's report: one HTML file that opens offline, and the same numbers as JSON."""

import html
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from sae_query_steer.compare.comparison import MAX_PERPLEXITY_RATIO
from sae_query_steer.compare.demo_cases import TASKS
from sae_query_steer.compare.demo_results import DemoResult
from sae_query_steer.compare.pages import STYLE, page_parts, table_html, versions
from sae_query_steer.compare.sweep_figures import (
    across,
    frontier_figure,
    layer_figure,
    layer_table,
    matrix_figure,
)
from sae_query_steer.diagnostics.site_verdicts import closing_sentence, site_verdicts
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import write_json

RESULTS = "results.json"

COLOURS = {
    "unsteered": "#9aa0a6",
    "instruction": "#5f6368",
    "few-shot": "#80868b",
    "interchange": "#202124",
    "mean difference": "#b06000",
    "dense descent": "#e8710a",
    "SAE descent": "#1a73e8",
    "random direction": "#bdc1c6",
    "decoder rows": "#188038",
    "residual mean difference": "#a142f4",
}


def write_report(result: DemoResult, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write `report.html`, `results.json`, and tables as CSV to a folder, whole or not at all.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else.
    """
    with new_folder(folder, overwrite=overwrite, holding=RESULTS) as new:
        write_json(new / RESULTS, result.to_json())
        (new / "report.html").write_text(report_html(result), encoding="utf-8")
        result.rows.to_csv(new / "table.csv", index=False)
        result.compared.curves.to_csv(new / "curves.csv", index=False)
        result.compared.texts.to_csv(new / "texts.csv", index=False)


def report_html(result: DemoResult) -> str:
    """Return the report as one page that holds all it needs, plotly included."""
    n = max(result.rows["n"].tolist())
    layers = ", ".join(map(str, result.layers))
    parts = [
        success_figure(result),
        "<h2>The table</h2>",
        table_html(display_table(result)),
        "<h2>What strength does</h2><p>Each line is a method on the validation prompts, from weak "
        "to strong. Compare methods at equal perplexity ratio.</p>",
        frontier_figure(result.frontier_rows(), result.label),
        "<h2>Where to steer: known before the first steer</h2><p>The class effect says how far "
        "real queries of another level move the next token towards that level, in nats, beyond "
        "what queries of the same level do. Separability says that the levels can be told apart; "
        "it does not say that anything reads them.</p>",
        site_figure(result),
        table_html(display_sites(result.sites)),
    ]
    by_layer = layer_table(result.rows)
    if len(by_layer) > 1:
        parts += [
            "<h2>Layer by layer</h2><p>The most success of each way of steering one layer alone. "
            "Four layers can neither confirm nor refute that middle layers are best.</p>",
            layer_figure(by_layer),
            table_html(across(by_layer)),
        ]
    matrix = matrix_figure(result.compared)
    if matrix is not None:
        parts += [
            "<h2>From which level to which</h2><p>Success of the best steer by the level that the "
            "prompt requests (down) and the target (across).</p>",
            matrix,
        ]
    parts += [
        "<h2>Three examples in full</h2>",
        *(example_html(example) for example in result.examples()),
        "<h2>Judges, SAEs, cost, settings</h2>",
        table_html(pd.DataFrame({"judge": result.judge.keys(), "share": result.judge.values()})),
        table_html(result.saes),
        table_html(
            pd.DataFrame({"step": result.seconds.keys(), "seconds": result.seconds.values()})
        ),
        table_html(
            pd.DataFrame(
                [(name, str(value)) for name, value in vars(result.settings).items()]
                + list(versions().items()),
                columns=["setting", "value"],
            )
        ),
    ]
    head = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>sae_query_steer demo</title><style>{STYLE}</style>",
        "<h1>Does steering the query change the level of the feedback?</h1>",
        f"<p class='verdict'>{html.escape(verdict(result))}</p>",
        f"<p>{n} held-out prompts a row, greedy decoding, steered at the last prompt token of "
        f"layer{'s' if len(result.layers) > 1 else ''} {layers}, where no other is named. Success: "
        "the classifier finds "
        "the target level and the target's note is restated. Bars: 95 % Wilson intervals. Every "
        "method's strength was chosen on other prompts, at a perplexity ratio of "
        f"{MAX_PERPLEXITY_RATIO} or less. The mean difference is dense descent on the "
        "contrast. Specificity: how far, in nats, the steer changes the next tokens of feedback "
        "that is of the target level already.</p>",
    ]
    return "\n".join([*head, *page_parts(parts), "</html>"])


def verdict(result: DemoResult) -> str:
    """Return the result in one or two sentences."""
    said = []
    for task in TASKS:
        rows = result.rows[result.rows["task"] == task].set_index("method")["success"]
        best = rows.loc[["SAE descent"]].max()
        said.append(
            f"{task}: SAE descent {best:.2f} at best, dense descent "
            f"{rows.loc[['dense descent']].max():.2f}, real queries patched in "
            f"{rows.loc[['interchange']].max():.2f}, unsteered {rows['unsteered']:.2f}, the "
            f"request itself {rows['instruction']:.2f}"
        )
    before = closing_sentence(site_verdicts(result.sites))
    return f"Beforehand, from real queries patched in: {before} Success, {'; '.join(said)}."


def display_table(result: DemoResult) -> pd.DataFrame:
    """Return the table as it is read: names in words, intervals beside their shares."""

    def share(row: pd.Series, low: str, high: str, value: str) -> str:
        return f"{row[value]:.2f} [{row[low]:.2f}, {row[high]:.2f}]"

    shown = []
    for _, row in result.rows.iterrows():
        strength = row["step_size"]
        shown.append(
            {
                "task": row["task"],
                "method": result.label(row.to_dict()),
                "steps x size": "" if pd.isna(strength) else f"{row['n_steps']:.0f} x {strength:g}",
                "relative change": ""
                if pd.isna(row["delta_q_ratio"])
                else f"{row['delta_q_ratio']:.2f}",
                "target [95 %]": share(row, "ci_low", "ci_high", "target_rate"),
                "grounded": "" if pd.isna(row["grounded"]) else f"{row['grounded']:.2f}",
                "success [95 %]": share(row, "success_low", "success_high", "success"),
                "perplexity ratio": f"{row['perplexity_ratio']:.2f}",
                "under own prompt": f"{row['perplexity_ratio_original']:.2f}",
                "specificity": "" if pd.isna(row["specificity"]) else f"{row['specificity']:.2f}",
            }
        )
    return pd.DataFrame(shown)


def display_sites(sites: pd.DataFrame) -> pd.DataFrame:
    """Return the table of sites with the columns that are read."""
    return pd.DataFrame(
        {
            "layer": sites["layer"].astype(str),
            "class effect, nats": [
                f"{e:.3f} ± {s:.3f}"
                for e, s in zip(sites["class_effect"], sites["class_effect_se"], strict=True)
            ],
            "probability moved (by the own class)": [
                f"{m:.2f} ({c:.2f})"
                for m, c in zip(sites["moved"], sites["moved_control"], strict=True)
            ],
            "label's share of q's variance": sites["label_share"].map("{:.2f}".format),
            "levels told apart: latents": sites["accuracy_latents"].map("{:.2f}".format),
            "raw q": sites["accuracy_query"].map("{:.2f}".format),
            "token alone": sites["accuracy_token"].map("{:.2f}".format),
        }
    )


def success_figure(result: DemoResult) -> go.Figure:
    """Return success of every row as bars with intervals, open and redirected side by side."""
    figure, rows = go.Figure(), result.rows
    for i, task in enumerate(TASKS):
        part = rows[rows["task"] == task].iloc[::-1]
        figure.add_bar(
            y=[result.label(row.to_dict()) for _, row in part.iterrows()],
            x=part["success"],
            orientation="h",
            xaxis=f"x{i + 1 if i else ''}",
            yaxis=f"y{i + 1 if i else ''}",
            marker_color=[_colour(method) for method in part["method"]],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": part["success_high"] - part["success"],
                "arrayminus": part["success"] - part["success_low"],
                "thickness": 1,
                "color": "#202124",
            },
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    figure.update_layout(
        height=110 + 26 * (len(rows) // 2),
        template="plotly_white",
        showlegend=False,
        margin={"l": 10, "r": 10, "t": 50, "b": 40},
        xaxis={"domain": [0, 0.49], "range": [0, 1.02], "title": "success"},
        xaxis2={"domain": [0.51, 1], "range": [0, 1.02], "title": "success"},
        yaxis={"automargin": True},
        yaxis2={"anchor": "x2", "showticklabels": False},
        annotations=[
            {"text": text, "x": x, "y": 1.0, "xref": "paper", "yref": "paper", "yanchor": "bottom",
             "showarrow": False, "font": {"size": 15}}
            for text, x in (("open prompts", 0.2), ("redirected prompts", 0.8))
        ],
    )  # fmt: skip
    return figure


def _colour(method: str) -> str:
    return next((c for name, c in COLOURS.items() if method.startswith(name)), "#5f6368")


def site_figure(result: DemoResult) -> go.Figure:
    """Return interchange effect by layer, with two standard errors; the steered layers in blue."""
    sites = result.sites
    steered = [int(layer) in result.layers for layer in sites["layer"]]
    figure = go.Figure(
        go.Bar(
            x=[f"layer {layer}" for layer in sites["layer"]],
            y=sites["class_effect"],
            error_y={"type": "data", "array": 2 * sites["class_effect_se"], "thickness": 1.5},
            marker_color=[COLOURS["SAE descent" if s else "unsteered"] for s in steered],
            hovertemplate="%{x}: %{y:.3f} nats<extra></extra>",
        )
    )
    figure.update_layout(
        height=300,
        template="plotly_white",
        margin={"l": 10, "r": 10, "t": 20, "b": 30},
        yaxis={"title": "class effect, nats (± 2 s.e.)"},
    )
    return figure


def example_html(example: Mapping[str, str]) -> str:
    """Return one case: its prompt, and what each method wrote."""
    asked = example["requested"]
    title = f"target {example['target']}, " + (
        f"prompt asks for {asked}" if asked else "prompt leaves the level open"
    )
    written = pd.DataFrame(
        [
            {"method": name, "feedback": text}
            for name, text in example.items()
            if name not in ("task", "prompt", "requested", "target")
        ]
    )
    return (
        f"<h3>{html.escape(title)}</h3><pre>{html.escape(example['prompt'])} ...</pre>"
        + table_html(written)
    )
