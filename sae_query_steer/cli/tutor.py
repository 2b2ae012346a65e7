"""`demo`: the comparison of steering methods on the tutor."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import sae_query_steer as sqs
from sae_query_steer.cli.options import (
    Device,
    Overwrite,
    Resume,
    Seed,
    show,
)
from sae_query_steer.compare import FULL, QUICK, Comparison, DemoSettings, compare_into, run_demo
from sae_query_steer.compare.report import display_rows, display_sites, samples, verdict
from sae_query_steer.storage.records import read_json
from sae_query_steer.toy import NULL_TUTOR_FOLDER, TUTOR_FOLDER

CARD = "tutor.json"
"""How a tutor was trained, in its folder."""


def demo(
    tutor: Annotated[
        Path | None,
        typer.Option("--tutor", help="Folder of another tutor; the shipped one if unset."),
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", help="The shipped tutor on which a query can change nothing.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for report.html and results.json.")
    ] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look, too small to tell methods apart.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="More prompts, every method, every layer: half an hour at most."
        ),
    ] = False,
    n: Annotated[int | None, typer.Option("--n", help="Test prompts of each row.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Steer the tutor's feedback to each of Bloom's levels, and compare the ways to do it.

    What was written is logged as it comes.
    """
    if quick and full:
        raise ValueError("--quick and --full name two sizes: give one of them")
    settings = dataclasses.replace(QUICK if quick else FULL if full else DemoSettings(), seed=seed)
    if n is not None:
        settings = dataclasses.replace(settings, n_test=n)
    if tutor is None:
        tutor = NULL_TUTOR_FOLDER if null else TUTOR_FOLDER
    elif null:
        raise ValueError("--tutor and --null name two tutors: give one of them")
    notes = bool(tutor_card(tutor)["settings"]["notes"])

    def compare(log: Path) -> Comparison:
        model = sqs.load_model(str(tutor), device=device)
        return run_demo(model, notes=notes, settings=settings, log=log)

    found = compare_into(out, compare, resume=resume, overwrite=overwrite)
    if found.sites is not None:
        show(display_sites(found.sites))
    show(display_rows(found))
    for sample in samples(found):
        typer.echo(f"\n{sample['prompt']} ... ({sample['title']})")
        for name, text, _ in sample["texts"].head(12).itertuples(index=False, name=None):
            typer.echo(f"  {name}: {text.strip()}")
    judge = ", ".join(f"{name} {share:.3f}" for name, share in found.judge.items())
    typer.echo(f"\njudge: {judge}\n\n{verdict(found)}\n\nwrote {out / 'report.html'}")


def tutor_card(folder: Path) -> dict[str, Any]:
    """Return the card of a tutor.

    Raises:
        FileNotFoundError: the folder holds none, so it is no tutor.
    """
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"--tutor {folder} is not the folder of a tutor: it has no {CARD}")
    return read_json(folder / CARD)
