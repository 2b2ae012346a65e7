"""`train`: SAEs of all heads of some layers, in one process or in several."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

import tyro

import sae_query_steer as sqs
from sae_query_steer.cli.options import FLAT, Model, Output, Texts, index_list, say, show
from sae_query_steer.config import ARCHITECTURES, TrainingConfig


def _subcommand(architecture: type) -> object:
    name = architecture.name.removeprefix("query_head_").replace("_", "-")
    return Annotated[architecture, tyro.conf.subcommand(name, prefix_name=False)]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainingConfig):
    """Settings of the run."""

    sae: Union[tuple(map(_subcommand, ARCHITECTURES))]  # noqa: UP007  # pyright: ignore
    """Architecture of the SAEs and its settings."""


def train(
    *,
    model: Model,
    texts: Texts,
    output: Output,
    config: Annotated[TrainOptions, FLAT],
    layers: str,
    start: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    flops: float | None = None,
) -> None:
    """Train SAEs on the queries of all heads of some layers; curves.html shows the run.

    Several processes share the layers:
    torchrun --nproc-per-node N --no-python sae-query-steer train ...

    Args:
        model: the language model.
        texts: the texts.
        output: the folder of SAEs.
        config: settings of the run.
        layers: Layers, such as 1,2 or 8-20 or all.
        start: Folder of SAEs from whose weights training starts.
        resume: Continue a stopped run with the same settings.
        dry_run: Show what the run needs; reads the model's config only, and writes nothing.
        flops: With --dry-run: operations a second of a forward pass, for the time.
    """
    if flops is not None and not dry_run:
        raise ValueError("--flops must be given with --dry-run only: add it, or leave --flops out")
    if not resume:
        output.check("query_saes.json")
    chosen = index_list(layers)
    documents = texts.read()
    if dry_run:
        return _show_needs(model, config, chosen, documents, flops)
    import pandas as pd

    from sae_query_steer.training.train import METRICS, train_on_ranks

    begun = None if start is None else sqs.QuerySAEs.load(start)
    loaded = model.load()
    again = {"resume": resume, "overwrite": output.overwrite, "start": begun}
    sites = sqs.query_sites(loaded, chosen)
    saes = train_on_ranks(loaded, documents, sites, config, out=output.out, **again)
    if saes.measured:
        show(saes.metrics)
    if os.environ.get("RANK", "0") == "0" and (file := output.out / METRICS).is_file():
        curves = sqs.plots.plot_metrics(pd.read_json(file, lines=True))
        curves.write_html(output.out / "curves.html")
    say(f"wrote {output.out}")


def _show_needs(
    model: Model,
    config: TrainingConfig,
    layers: list[int] | None,
    documents: list[str],
    flops: float | None,
) -> None:
    import torch

    from sae_query_steer.models.shapes import model_shape
    from sae_query_steer.training.estimate import estimate_training

    shape = model_shape(model.model)
    sites = shape.sites(layers)
    item = getattr(torch, model.dtype).itemsize
    needs = estimate_training(shape, sites, config, model_item=item)
    lines = {
        "model": f"{shape.n_parameters:,} weights, {shape.n_layers} layers",
        "queries of a layer": f"{shape.n_heads} heads of {shape.d_head}",
        "KV cache": f"{shape.key_value_numbers:,} numbers a token",
        "sites": f"layers {', '.join(str(site.layer) for site in sites)}",
        "texts": f"{len(documents):,}, {sum(map(len, documents)):,} characters",
        "tokens": f"{needs.tokens:,} in {config.n_steps:,} steps",
        "memory of the model": _gib(needs.model_bytes),
        "memory of the SAEs": f"{_gib(needs.training_bytes)} with gradients and Adam",
        "memory of queries": f"{_gib(needs.buffer_bytes)} to be shuffled",
        "disk": f"{_gib(needs.disk_bytes)} during the run, {_gib(needs.saved_bytes)} after",
        "operations a token": f"{needs.model_flops:.3g} model, {needs.sae_flops:.3g} SAEs",
    }
    if flops is not None:
        lines["time, extrapolated"] = f"{needs.seconds(flops) / 3600:.2g} h at {flops:.3g} a second"
    say("\n".join(f"{what:<21}{value}" for what, value in lines.items()))


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
