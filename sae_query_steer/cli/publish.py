"""`bundle`, `push` and `registry-entry`: what was trained, in a folder that others can load."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

import sae_query_steer as sqs
from sae_query_steer.cli.options import (
    Bloom,
    Device,
    Dtype,
    Model,
    Out,
    Overwrite,
    Response,
    Saes,
    check_free,
    labelled_examples,
    load_host,
    load_saes,
    show,
)
from sae_query_steer.hub.layout import BUNDLE
from sae_query_steer.steering.files import steerer_from_settings, steerer_settings

Folder = Annotated[Path, typer.Argument(help="A bundle, of `bundle` or `save_bundle`.")]


def bundle(
    model: Model,
    saes: Saes,
    out: Out,
    targets: Annotated[
        Path | None, typer.Option("--targets", help="Folder that `targets` wrote.")
    ] = None,
    steerer: Annotated[
        Path | None, typer.Option("--steerer", help="Folder that `save_steerer` wrote.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="The labelled texts, of which a hash is kept.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Column or template of the prompt.")] = None,
    response: Response = None,
    label: Annotated[str | None, typer.Option(help="Column of the class.")] = None,
    bloom: Bloom = False,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="CSV with a table of scores.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="The model's name on the hub.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence, such as mit.")] = None,
    note: Annotated[str, typer.Option(help="A paragraph for the model card.")] = "",
    device: Device = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write SAEs, centroids, steerer and scores to a folder that can be published."""
    check_free(out, overwrite, BUNDLE)
    examples = None
    if csv is not None:
        if prompt is None or label is None:
            raise ValueError("--csv needs --prompt and --label: name the columns")
        examples = labelled_examples(csv, prompt, response, label, bloom)
    table = None if evaluation is None else pd.read_csv(evaluation)
    centroids = None if targets is None else sqs.CentroidTargets.load(targets)
    given = None if steerer is None else sqs.steering.load_steerer(steerer, follow_references=True)
    host = load_host(model, device, dtype)
    encoders = load_saes(saes, host)
    made = None
    if given is not None:
        centroids = given.targets if centroids is None else centroids
        made = steerer_from_settings(steerer_settings(given), encoders, centroids)
    sqs.save_bundle(
        out,
        host,
        encoders,
        targets=centroids,
        steerer=made,
        examples=examples,
        evaluation=table,
        model_name=model_name,
        license=license,
        note=note,
        overwrite=overwrite,
    )
    typer.echo(f"wrote {out}: look at its README.md, then push it")


def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="USER/REPOSITORY on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it private; if it is there, it must be.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, and show what would be sent.")
    ] = False,
) -> None:
    """Upload a bundle to Hugging Face's hub, in one commit."""
    sent = sqs.hub.push_to_hub(folder, repo_id, private=private, revision=revision, dry_run=dry_run)
    show(pd.DataFrame({"file": list(sent.files), "bytes": list(sent.files.values())}))
    what = "would send" if dry_run else "sent"
    typer.echo(f"{what} {len(sent.files)} files, {sent.n_bytes:,} bytes, to {repo_id}")
    if sent.url is not None:
        typer.echo(sent.url)


def registry_entry(
    folder: Folder,
    release: Annotated[str, typer.Option("--release", help="Name of the release in SAELens.")],
    repo_id: Annotated[str, typer.Option("--repo-id", help="USER/REPOSITORY on the hub.")],
    neuronpedia: Annotated[
        list[str] | None,
        typer.Option("--neuronpedia", help="ID=NEURONPEDIA_ID of an SAE; may be repeated."),
    ] = None,
) -> None:
    """Print the block of a bundle for SAELens's pretrained_saes.yaml."""
    known = {}
    for pair in neuronpedia or []:
        name, equals, there = pair.partition("=")
        if not (name and equals and there):
            raise ValueError(f"--neuronpedia {pair!r} is not allowed: give ID=NEURONPEDIA_ID")
        known[name] = there
    typer.echo(
        sqs.hub.registry_entry(folder, release=release, repo_id=repo_id, neuronpedia=known),
        nl=False,
    )
