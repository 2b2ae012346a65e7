"""Print the results of the studies as Markdown tables.

    python -m experiments.exercise.report --out runs/exercise

Intervals of success are Wilson's at 95 %; differences of the trained SAE from its controls are
paired over cases, with a bootstrap interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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
        for key in ("kl_removed", "latents_a_head", "latents_in_all"):
            if key in row:
                line[key] = f"{row[key]:.2f}" if key == "kl_removed" else f"{row[key]:.0f}"
        found.append(line)
    return pd.DataFrame(found).fillna("")


def differences(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return how much the trained SAE is ahead of each control, at equal numbers of latents."""
    by = {}
    for row in rows:
        setting = dict(row["setting"])
        kind = setting.pop("dictionary")
        by[json.dumps(setting, sort_keys=True), kind] = row
    found = []
    for (key, kind), row in by.items():
        ours = by.get((key, "trained"))
        if kind == "trained" or ours is None:
            continue
        setting = json.loads(key)
        line = {k: v for k, v in setting.items() if k.startswith(("n_latents", "seed"))}
        line["trained ahead of"] = kind
        for task in ("open", "redirected"):
            a, b = (np.array(r[task]["each"], dtype=float) for r in (ours, row))
            told = paired_difference(a, b)
            line[task] = f"{told.mean:+.2f} [{told.low:+.2f}, {told.high:+.2f}]"
        found.append(line)
    return pd.DataFrame(found).fillna("")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", required=True)
    lines = (Path(parser.parse_args().out) / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    for study in dict.fromkeys(row["setting"]["study"] for row in results):
        own = [row for row in results if row["setting"]["study"] == study]
        print(f"\n## {study}\n")
        print(markdown_table(table(own)))
        if study in ("sparsity", "seeds"):
            print()
            print(markdown_table(differences(own)))
