"""What foretells where a steer works: rank correlations over sites, verdicts, and a figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
from scipy.stats import spearmanr

from sae_query_steer.storage.folders import new_file
from sae_query_steer.storage.markdown import markdown_table

STRENGTHS = (1.0, 2.0)
"""In distances from the latent to the centroid: to it, and as far beyond."""

MAIN = STRENGTHS[0]
REACHED = 0.1
"""Change of the target rate above which a site counts as steered, in the table of verdicts."""

PREDICTORS = {
    "class_effect": "class effect, nats",
    "moved_beyond": "probability moved, beyond control",
    "toward_share": "toward_share",
    "paired_class_share": "class share, paired prompts",
    "achieved_class_share": "the same of the steer itself (one forward pass)",
    "accuracy_latents": "separability (latents)",
    "label_share": "label's share of q's variance",
    "layer": "layer index",
}
RIVALS = ("accuracy_latents", "layer")


def rank(values: Any, change: Any) -> float:
    """Return Spearman's rho; NaN where either never changes."""
    if values.nunique() < 2 or change.nunique() < 2:
        return math.nan
    found: Any = spearmanr(values, change, nan_policy="omit")
    return float(found.statistic)


def correlations(table: pd.DataFrame, change: str, *, draws: int = 1000) -> pd.DataFrame:
    """Return rho of each predictor over all sites, with intervals over sites drawn anew."""
    generator = np.random.default_rng(0)
    groups = [np.flatnonzero(table["model"] == m) for m in table["model"].unique()]
    samples = [
        table.iloc[np.concatenate([generator.choice(g, len(g)) for g in groups])]
        for _ in range(draws)
    ]
    drawn = {name: [rank(s[name], s[change]) for s in samples] for name in PREDICTORS}
    rows = []
    for name, said in PREDICTORS.items():
        row = {
            "predictor": said,
            "all sites": _interval(rank(table[name], table[change]), drawn[name]),
        }
        for rival in RIVALS:
            beyond = rank(table[name], table[change]) - rank(table[rival], table[change])
            apart = np.subtract(drawn[name], drawn[rival]).tolist()
            row[f"minus {rival}"] = "" if name == rival else _interval(beyond, apart)
        for model, part in table.groupby("model", sort=False):
            value = rank(part[name], part[change])
            row[str(model)] = "" if math.isnan(value) else f"{value:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def picked(table: pd.DataFrame, change: str) -> pd.DataFrame:
    """Return the change at the site that each predictor puts first, the mean where it is a tie."""
    rows: list[dict[str, str]] = [{"picked by": "looking at the result"}]
    for model, part in table.groupby("model", sort=False):
        rows[0][str(model)] = f"{part[change].max():.2f}"
    for name, said in PREDICTORS.items():
        row = {"picked by": said}
        for model, part in table.groupby("model", sort=False):
            first = part[part[name] == part[name].max()]
            row[str(model)] = f"{first[change].mean():.2f}" if len(first) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(value: float, drawn: Sequence[float]) -> str:
    if math.isnan(value):
        return ""
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def report(table: pd.DataFrame, out: Path) -> None:
    """Print the tables and write the CSV and the figure."""
    with new_file(out / "sites.csv") as new:
        table.to_csv(new, index=False)
    change = f"change_{MAIN:g}"
    for strength in STRENGTHS:
        print(f"\nrank correlation with the change of the target rate at strength {strength:g}\n")
        print(markdown_table(correlations(table, f"change_{strength:g}").astype(str)))
    print(f"\nchange at strength {MAIN:g} of the site that each puts first\n")
    print(markdown_table(picked(table, change).astype(str)))
    rows = []
    for model, part in table.groupby("model", sort=False):
        first = part.iloc[0]
        said = part["steer_here"].astype(bool).to_numpy()
        did = part[change].to_numpy() > REACHED
        rows.append(
            {
                "model": model,
                "sites": len(part),
                "unsteered / asked": f"{first['unsteered']:.2f} / {first['instruction']:.2f}",
                "best change": f"{part[change].max():.2f}",
                "steered, said so": int((said & did).sum()),
                "steered, not said": int((~said & did).sum()),
                "said so, not steered": int((said & ~did).sum()),
                "neither": int((~said & ~did).sum()),
            }
        )
    print(f"\nverdicts, and whether the target rate rose by more than {REACHED}\n")
    print(markdown_table(pd.DataFrame(rows).astype(str)))
    shown = table.assign(
        site=[f"layer {r['layer']}, head {r['head']}" for r in table.to_dict("records")]
    )
    long = shown.melt(
        id_vars=["model", "site", change], value_vars=list(PREDICTORS), value_name="predicted"
    ).replace({"variable": PREDICTORS})
    figure = px.scatter(
        long,
        x="predicted",
        y=change,
        color="model",
        facet_col="variable",
        facet_col_wrap=3,
        hover_name="site",
        template="plotly_white",
        labels={change: "change of target rate"},
        height=900,
    )
    figure.update_xaxes(matches=None, showticklabels=True)
    figure.for_each_annotation(lambda a: a.update(text=a.text.partition("=")[2]))
    with new_file(out / "prediction.html") as new:
        figure.write_html(new, include_plotlyjs=True)
