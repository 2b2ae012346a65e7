"""Print the results of the studies as Markdown tables.

    python -m experiments.exercise.report --out runs/exercise
    python -m experiments.exercise.report --out runs/forms --every 3 --of 1 2

Cases take the classes in turn: the second line leaves out lists, the first of three classes, and
`--every 12 --of 0 1 2 3 4 5` keeps the exercises whose answer is begun. Perplexity ratio and change
are those of all cases.
Intervals of success are Wilson's at 95 %; differences between methods, of dictionaries at equal
numbers of latents, are paired over cases, with a bootstrap interval.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from sae_query_steer.compare.scores import paired_difference
from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.storage.markdown import markdown_table


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return one study: its settings, and for each task success with its interval."""
    found = []
    for row in rows:
        line = {k: v for k, v in row["setting"].items() if k not in ("study", "tasks")}
        for task, scores in row.items():
            if not isinstance(scores, dict) or task == "setting":
                continue
            each = scores["each"]
            low, high = wilson_interval(sum(each), len(each))
            line |= {
                f"{task}: success": f"{scores['success']:.2f} [{low:.2f}, {high:.2f}]",
                f"{task}: first verb": f"{scores['rule']:.2f}",
                f"{task}: perplexity ratio": f"{scores['perplexity_ratio']:.2f}",
                f"{task}: change": f"{scores['change']:.2f}",
            }
            if "strength" in scores:
                at = (scores["strength"], scores["scope"], scores["layers"])
                line[f"{task}: strength, scope, layers"] = ", ".join(map(str, at))
        for key in ("kl_removed", "latents_a_head", "latents_in_all"):
            if key in row:
                line[key] = f"{row[key]:.2f}" if key == "kl_removed" else f"{row[key]:.0f}"
        found.append(line)
    return pd.DataFrame(found).astype(object).fillna("")


def differences(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return how far each method is ahead of each other one, on the cases that both have."""
    found = []
    for one, other in combinations(rows, 2):
        line = {"ahead": name_of(one), "of": name_of(other)}
        for task, scores in one.items():
            if task == "setting" or not isinstance(scores, dict) or task not in other:
                continue
            a, b = (np.array(row[task]["each"], dtype=float) for row in (one, other))
            if len(a) == len(b):
                told = paired_difference(a, b)
                line[task] = f"{told.mean:+.2f} [{told.low:+.2f}, {told.high:+.2f}]"
        found.append(line)
    return pd.DataFrame(found).astype(object).fillna("")


def over_seeds(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return how far dictionaries are ahead of each other by seed, mean over settings of studies.

    The interval is Student's over the seeds, 95 %.
    """
    found = []
    for row in rows:
        told = dict(row["setting"])
        kind, seed = told.pop("dictionary"), told.pop("seed", 0)
        scores = next(s for task, s in row.items() if task in told["tasks"])
        found.append((json.dumps(told), seed, kind, float(np.mean(scores["each"]))))
    columns = ["setting", "seed", "dictionary", "success"]
    success = pd.DataFrame(found, columns=columns).pivot_table(
        index=["setting", "seed"], columns="dictionary", values="success"
    )
    lines = []
    for one, other in combinations(success.columns, 2):
        ahead = (success[one] - success[other]).dropna().groupby("seed").mean()
        line = {"ahead": one, "of": other, "by seed": " / ".join(f"{d:+.2f}" for d in ahead)}
        if len(ahead) > 1:
            low, high = student.interval(0.95, len(ahead) - 1, ahead.mean(), ahead.sem())
            line["mean"] = f"{ahead.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
    return pd.DataFrame(lines).astype(object).fillna("")


def part(row: dict[str, Any], every: int, of: Sequence[int]) -> dict[str, Any]:
    """Return a row whose success is that of some cases, by their place among every so many."""
    kept = dict(row)
    for task, scores in row.items():
        if isinstance(scores, dict) and "each" in scores:
            each = [s for i, s in enumerate(scores["each"]) if i % every in of]
            kept[task] = scores | {"each": each, "success": sum(each) / len(each)}
            if len(each) < len(scores["each"]):
                kept[task]["rule"] = float("nan")  # not kept by case
    return kept


def foretold(rows: list[dict[str, Any]]) -> str:
    """Return how the held-out KL that layers alone remove ranks with their success."""
    frame = pd.DataFrame(
        [
            {"layer": row["setting"]["layer"], "kl": row["kl_removed"], "success": s["success"]}
            for row in rows
            for task, s in row.items()
            if task != "setting" and isinstance(s, dict)
        ]
    )
    of_layer = frame.groupby("layer").mean()
    draws = np.random.default_rng(0).integers(0, len(of_layer), (2000, len(of_layer)))
    found = [rank_correlation(of_layer.iloc[draw]) for draw in draws]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    rank = rank_correlation(of_layer)
    return f"Spearman of KL removed and success over layers: {rank:.2f} [{low:.2f}, {high:.2f}]"


def rank_correlation(frame: pd.DataFrame) -> float:
    """Return Spearman's correlation of the columns "kl" and "success"."""
    return float(frame["kl"].corr(frame["success"], method="spearman"))


def name_of(row: dict[str, Any]) -> str:
    """Return what tells a row from others of its study."""
    left_out = ("study", "split", "n", "tasks")
    return ", ".join(
        f"{v}" if k == "method" else f"{k} {v}"
        for k, v in row["setting"].items()
        if k not in left_out
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--of", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    lines = (Path(given.out) / "results.jsonl").read_text().splitlines()
    results = [part(json.loads(line), given.every, given.of) for line in lines]
    seeded = [row for row in results if row["setting"]["study"] in ("topics", "noise")]
    for study in dict.fromkeys(row["setting"]["study"] for row in results):
        own = [row for row in results if row["setting"]["study"] == study]
        print(f"\n## {study}\n")
        print(markdown_table(table(own)))
        if study in ("methods", "seeds", "norms", "topics", "wide", "rivals"):
            print()
            print(markdown_table(differences(own)))
        if study == "noise":
            print(f"\n{markdown_table(over_seeds(seeded))}")
        if study == "layers":
            print(f"\n{foretold(own)}")
        for limit in ("n_latents", "n_latents_total"):
            for n in sorted({row["setting"].get(limit, 0) for row in own} - {0}):
                print()
                equal = [row for row in own if row["setting"].get(limit) == n]
                print(markdown_table(differences(equal)))
