"""Write the figures of the findings on a real model, as PNG.

    python -m experiments.exercise.figures --out runs/exercise --to docs

They are of the study "rivals" and of `experiments.exercise.mechanism`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sae_query_steer.diagnostics.metrics import wilson_interval

OPEN, REDIRECTED = (f"{name}, trained wording" for name in ("open", "redirected"))
GROUPS = {
    "learned moves": "tab:blue",
    "learned offset": "tab:purple",
    "centroids": "tab:orange",
    "mean difference": "tab:green",
    "instruction": "black",
    "unsteered": "black",
}
"""Colours by the beginning of a method's name; others are grey."""


def colour(name: str) -> str:
    """Return the colour of a method."""
    return next((c for begin, c in GROUPS.items() if name.startswith(begin)), "tab:gray")


def success(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the success of every method with its interval, open and redirected."""
    rows = sorted(rows, key=lambda row: row[OPEN]["success"])
    figure = Figure(figsize=(10, 0.32 * len(rows) + 1.2))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, task, title in zip(axes, (OPEN, REDIRECTED), ("open", "redirected"), strict=True):
        for place, row in enumerate(rows):
            each = row[task]["each"]
            low, high = wilson_interval(sum(each), len(each))
            chosen = colour(row["setting"]["method"])
            axis.plot([low, high], [place, place], color=chosen, linewidth=2)
            axis.plot(row[task]["success"], place, "o", color=chosen)
        plain = next(r for r in rows if r["setting"]["method"] == "unsteered")
        axis.axvline(plain[task]["success"], color="0.7", linestyle=":", zorder=0)
        axis.set(xlim=(0, 1), xlabel="success, 95 % interval", title=f"{title} prompts")
    axes[0].set_yticks(range(len(rows)), [row["setting"]["method"] for row in rows])
    save(figure, file)


def frontier(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw success against the perplexity ratio at every strength, on validation topics."""
    figure = Figure(figsize=(7.5, 5))
    axis = figure.subplots()
    for row in rows:
        name, curve = row["setting"]["method"], row[OPEN].get("validation", [])
        points = sorted((p["perplexity_ratio"], p["success"]) for p in curve)
        if points and points[0][0] < 4:
            best = [max(s for x, s in points if x <= at) for at, _ in points]
            axis.plot([x for x, _ in points], best, "-", color=colour(name), alpha=0.5)
            axis.plot(*zip(*points, strict=True), ".", color=colour(name), markersize=7)
    for name in ("unsteered", "instruction"):
        row = next(r for r in rows if r["setting"]["method"] == name)[OPEN]
        axis.plot(row["perplexity_ratio"], row["success"], "k*", markersize=12)
        axis.annotate(f" {name}", (row["perplexity_ratio"], row["success"]))
    for begin, chosen in list(GROUPS.items())[:4]:
        axis.plot([], [], color=chosen, label=begin)
    axis.plot([], [], color="tab:gray", label="others")
    axis.set(xlim=(0.9, 4), ylim=(0, 1), xlabel="perplexity ratio", ylabel="success, open prompts")
    axis.legend()
    save(figure, file)


def heads(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the share of the effect that the best heads have, by their number."""
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    for row in rows:
        sizes = {int(n): share for n, share in row["effect_by_number"].items()}
        whole = sizes[max(sizes)]
        axis.plot(list(sizes), [share / whole for share in sizes.values()], "o-")
    axis.axhline(0.9, color="0.7", linestyle=":")
    axis.set(xscale="log", xlabel="heads that are steered", ylabel="share of the effect of all")
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write a figure."""
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def draw(out: Path, to: Path) -> None:
    """Write the figures of the results in a folder to another one."""

    def read(name: str) -> list[dict[str, Any]]:
        file = out / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    rows = [row for row in read("results.jsonl") if row["setting"]["study"] == "rivals"]
    names = {row["setting"]["method"] for row in rows}
    measured = [row for row in rows if f"{row['setting']['method']}, 120 updates" not in names]
    success(measured, to / "exercise_success.png")
    frontier(measured, to / "exercise_frontier.png")
    if ranked := [row for row in read("mechanism.jsonl") if row["measure"] == "heads"]:
        heads(ranked, to / "exercise_heads.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--to", type=Path, required=True, help="folder of the figures")
    given = parser.parse_args()
    draw(given.out, given.to)
