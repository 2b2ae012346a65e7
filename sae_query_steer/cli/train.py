"""`train`: SAEs of all heads of some layers, by one process or by several."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import sae_query_steer as sqs
from sae_query_steer.cli.dry_run import say
from sae_query_steer.cli.options import (
    ARCHITECTURES,
    DTYPES,
    Bos,
    Device,
    Dtype,
    Layers,
    Model,
    Out,
    Overwrite,
    Resume,
    Seed,
    check_free,
    layer_list,
    load_host,
    named,
    show,
)
from sae_query_steer.config import TrainingConfig
from sae_query_steer.models.shapes import model_shape
from sae_query_steer.training.distributed import local_device, train_on_ranks
from sae_query_steer.training.estimate import estimate_training


def train(
    model: Model,
    layers: Layers,
    texts: Annotated[
        Path, typer.Option(help="CSV, JSON lines, Parquet, plain text, or a data set's folder.")
    ],
    out: Out,
    text: Annotated[
        str, typer.Option("--text", help="Column of the text, or a template over columns.")
    ] = "text",
    arch: Annotated[str, typer.Option(help=", ".join(ARCHITECTURES))] = "topk",
    d_sae: Annotated[int, typer.Option("--d-sae", help="Latents of each head.")] = 64,
    k: Annotated[int, typer.Option(help="...topk: latents that may fire.")] = 8,
    sparsity: Annotated[
        float, typer.Option(help="Others: weight of the penalty that makes latents sparse.")
    ] = 1.0,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale each head's queries to norm sqrt(d_head).")
    ] = False,
    tokens: Annotated[
        float, typer.Option(help="Tokens to train on, such as 500000 or 50e6.")
    ] = 500_000,
    context_size: Annotated[int | None, typer.Option(help="Tokens of a row; 128 if unset.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a training step.")] = 512,
    whole: Annotated[
        bool, typer.Option("--whole-documents", help="Keep documents whole, one a row.")
    ] = False,
    bos: Bos = True,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    autocast: Annotated[
        bool, typer.Option("--autocast", help="Mixed precision (bfloat16), model and SAEs.")
    ] = False,
    act_store_device: Annotated[
        str, typer.Option(help="Where queries wait for their step, such as cpu.")
    ] = "with_model",
    prefetch: Annotated[
        bool, typer.Option("--prefetch", help="Read the next queries while the SAEs train.")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 1000,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will take, and end.")
    ] = False,
    flops: Annotated[
        float | None,
        typer.Option(help="With --dry-run: operations a second of a forward pass; gives the time."),
    ] = None,
) -> None:
    """Train SAEs on the queries of all heads of some layers.

    A run that was stopped goes on with --resume. Several processes share the layers:
    torchrun --nproc-per-node N -m sae_query_steer train ...
    With --dry-run the model's config is read and none of its weights, and nothing is written.
    """
    if flops is not None and not dry_run:
        raise ValueError(f"--flops {flops} is for --dry-run: give both, or neither")
    check_free(out, overwrite or resume, "query_saes.json")
    if not (math.isfinite(tokens) and tokens == int(tokens)):
        raise ValueError(f"--tokens {tokens} is not allowed: give a whole number")
    sae = named(ARCHITECTURES, arch, "--arch")(d_sae, k, sparsity)
    if normalize:
        sae = replace(sae, normalize_activations="expected_average_only_in")
    config = TrainingConfig(
        sae=sae,
        training_tokens=int(tokens),
        checkpoint_every=checkpoint_every,
        context_size=context_size,
        concat_sequences=not whole,
        prepend_bos=bos,
        lr=lr,
        train_batch_size_tokens=batch_tokens,
        seed=seed,
        autocast=autocast,
        autocast_lm=autocast,
        act_store_device=act_store_device,
        prefetch=prefetch,
    )
    documents = sqs.read_texts(texts, text=text)
    if dry_run:
        shape = model_shape(model)
        sites = shape.sites(layer_list(layers))
        estimate = estimate_training(
            shape, sites, config, model_item=named(DTYPES, dtype, "--dtype").itemsize
        )
        say(shape, sites, estimate, documents, flops)
        return
    host = load_host(model, device or local_device(), dtype)
    saes = train_on_ranks(
        host,
        documents,
        sqs.query_sites(host, layer_list(layers)),
        config,
        out=out,
        resume=resume,
        overwrite=overwrite,
    )
    if saes.measured:
        show(saes.metrics)
    typer.echo(f"wrote {out}")
