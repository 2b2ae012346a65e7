"""`dashboard`: pages of what each latent fires at and looks for."""

from pathlib import Path
from typing import Annotated

import typer

import sae_query_steer as sqs
from sae_query_steer.cli.options import (
    Bos,
    Device,
    Dtype,
    Layers,
    Model,
    Out,
    Overwrite,
    Saes,
    check_free,
    layer_list,
    load_host,
    load_saes,
)
from sae_query_steer.dashboards.writing import INDEX, write_dashboards


def dashboard(
    model: Model,
    saes: Saes,
    texts: Annotated[
        Path, typer.Option(help="CSV, JSON lines, Parquet, plain text, or a data set's folder.")
    ],
    out: Out,
    text: Annotated[
        str, typer.Option("--text", help="Column of the text, or a template over columns.")
    ] = "text",
    targets: Annotated[
        Path | None,
        typer.Option("--targets", help="Folder that `targets` wrote: also show the classes."),
    ] = None,
    layers: Layers = "all",
    heads: Annotated[str, typer.Option(help="Heads, such as 0,2 or 0-7 or all.")] = "all",
    k: Annotated[int, typer.Option(help="Top texts of each latent.")] = 10,
    context: Annotated[int, typer.Option(help="Tokens on either side of a top token.")] = 12,
    attention: Annotated[
        int | None,
        typer.Option(help="Top tokens of each latent whose attention is looked at; 0 is none."),
    ] = None,
    keys: Annotated[int, typer.Option(help="Matching keys of each latent; 0 is none.")] = 8,
    tokens: Annotated[int | None, typer.Option(help="Tokens to read; all if unset.")] = None,
    neuronpedia: Annotated[
        bool, typer.Option("--neuronpedia", help="Also write SAEDashboard's batches of features.")
    ] = False,
    joined: Annotated[
        bool, typer.Option("--joined", help="Join documents into full rows; long ones are cut.")
    ] = False,
    context_size: Annotated[
        int | None,
        typer.Option(help="Tokens of a row; what the model reads if unset, 128 if joined."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward pass.")] = 16,
    bos: Bos = True,
    device: Device = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write a page for each site: what its latents fire at, look for and tell apart.

    Open the pages in a browser; they need no network.
    """
    check_free(out, overwrite, INDEX)
    documents = sqs.read_texts(texts, text=text)
    chosen = layer_list(layers)
    picked = None if heads == "all" else _head_list(heads)
    centroids = None if targets is None else sqs.CentroidTargets.load(targets)
    host = load_host(model, device, dtype)
    pages = write_dashboards(
        host,
        load_saes(saes, host),
        documents,
        out,
        targets=centroids,
        k=k,
        context=context,
        n_attention=attention,
        n_keys=keys,
        layers=chosen,
        heads=picked,
        n_tokens=tokens,
        concat_sequences=joined,
        context_size=context_size,
        neuronpedia=neuronpedia,
        overwrite=overwrite,
        batch_size=batch_size,
        prepend_bos=bos,
    )
    for page in pages.values():
        typer.echo(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _head_list(heads: str) -> list[int] | None:
    try:
        return layer_list(heads)
    except ValueError as error:
        raise ValueError(str(error).replace("--layers", "--heads")) from None
