"""What the commands share: their options, the names of spans and objectives, and checks."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import sae_query_steer as sqs
from sae_query_steer import config
from sae_query_steer.scopes.positions import Span
from sae_query_steer.storage.folders import check_replaceable

SPANS: dict[str, Callable[[], Span]] = {
    "last-prompt-token": sqs.LastPromptToken,
    "response": sqs.scopes.ResponseTokens,
    "last-response-token": sqs.scopes.LastResponseToken,
    "every": sqs.scopes.EveryPosition,
    "last-prompt-token+response": lambda: sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
}

OBJECTIVES: dict[str, Callable[[], sqs.objectives.Objective]] = {
    "prototype": sqs.PrototypeLogLikelihood,
    "distance": sqs.SquaredDistance,
    "contrast": sqs.objectives.CentroidContrast,
    "cosine": sqs.objectives.CosineSimilarity,
    "gaussian": sqs.objectives.GaussianLogLikelihood,
}

ARCHITECTURES: dict[str, Callable[[int, int, float], config.Architecture]] = {
    "topk": lambda d_sae, k, _: config.TopK(d_sae_per_head=d_sae, k=k),
    "batchtopk": lambda d_sae, k, _: config.BatchTopK(d_sae_per_head=d_sae, k=k),
    "matryoshka-batchtopk": lambda d_sae, k, _: config.MatryoshkaBatchTopK(
        d_sae_per_head=d_sae, k=k, matryoshka_widths=(d_sae // 4, d_sae // 2, d_sae)
    ),
    "standard": lambda d_sae, _, weight: config.Standard(
        d_sae_per_head=d_sae, l1_coefficient=weight
    ),
    "gated": lambda d_sae, _, weight: config.Gated(d_sae_per_head=d_sae, l1_coefficient=weight),
    "jumprelu": lambda d_sae, _, weight: config.JumpReLU(
        d_sae_per_head=d_sae, l0_coefficient=weight
    ),
    "kl-sparse": lambda d_sae, _, weight: config.KLSparse(
        d_sae_per_head=d_sae, kl_coefficient=weight
    ),
}
"""Training configs by name, from latents of a head, k, and the weight of the penalty."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Model = Annotated[
    str, typer.Option("--model", help="Hugging Face model folder, or a name on its hub.")
]
Device = Annotated[str | None, typer.Option(help="Where to run; TransformerLens chooses if unset.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Number format of the model's weights: " + ", ".join(DTYPES))
]
Layers = Annotated[str, typer.Option(help="Layers, such as 1,2 or 8-20 or all.")]
Csv = Annotated[Path, typer.Option("--csv", help="Labelled texts, one a row.")]
Prompt = Annotated[
    str, typer.Option(help="Column of the prompt, or a template such as 'Q: {question} A:'.")
]
Response = Annotated[str | None, typer.Option(help="Column or template of the response, if any.")]
Label = Annotated[str, typer.Option(help="Column of the class.")]
Bloom = Annotated[
    bool, typer.Option("--bloom", help="Read the labels as Bloom levels, 1956 names too.")
]
SpanName = Annotated[str, typer.Option(help="Where centroids are taken: " + ", ".join(SPANS))]
Chat = Annotated[bool, typer.Option("--chat-template", help="Use the tokenizer's chat template.")]
Bos = Annotated[bool, typer.Option("--bos/--no-bos", help="Begin every prompt with BOS.")]
Saes = Annotated[Path, typer.Option("--saes", help="Folder that `train` wrote.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run of the same settings, if there is.")
]

LOG = "log.jsonl"
"""What a comparison that was stopped goes on from, in the folder beside its output."""


def labelled_examples(
    csv: Path, prompt: str, response: str | None, label: str, bloom: bool
) -> list[sqs.LabelledExample]:
    """Return the examples of a CSV, Bloom levels parsed where they are meant."""
    parse = sqs.BloomLevel.parse if bloom else str
    return sqs.read_examples(csv, prompt=prompt, response=response, label=label, parse_label=parse)


def layer_list(layers: str) -> list[int] | None:
    """Return the layers that a text such as "1,2" or "8-20" names; None for "all"."""
    if layers == "all":
        return None
    chosen: list[int] = []
    for part in layers.split(","):
        first, _, last = part.strip().partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ValueError(
                f"--layers {layers!r} is not allowed: give all, or such as 1,2 or 8-20"
            )
        if last and int(last) < int(first):
            raise ValueError(f"--layers {layers!r} runs backwards: write {last}-{first}")
        chosen += range(int(first), int(last or first) + 1)
    return chosen


def named(choices: dict[str, Any], name: str, option: str) -> Any:
    """Return what a name stands for."""
    if name not in choices:
        raise ValueError(f"{option} {name!r} is not allowed: choose from {', '.join(choices)}")
    return choices[name]


def check_free(out: Path, overwrite: bool, holding: str) -> None:
    """Raise unless a folder may be written, before any work starts."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or --overwrite")
    check_replaceable(out, overwrite=overwrite, holding=holding)


def unfinished_beside(out: Path, resume: bool) -> Path:
    """Return the folder beside an output for what a comparison keeps until it is done.

    Raises:
        FileExistsError: it is there, and the run is not meant to go on with it.
    """
    unfinished = out.with_name(f"{out.name}.unfinished")
    if unfinished.exists() and not resume:
        raise FileExistsError(
            f"{unfinished} holds a run that was stopped: go on with --resume, or delete it"
        )
    return unfinished


def load_host(model: str, device: str | None, dtype: str) -> Any:
    """Return the model of a command."""
    return sqs.load_model(model, device=device, dtype=named(DTYPES, dtype, "--dtype"))


def load_saes(folder: Path, host: Any) -> sqs.QuerySAEs:
    """Return the SAEs of a folder, on the model's device."""
    if not (folder / "query_saes.json").is_file():
        raise FileNotFoundError(f"--saes {folder} is no folder that `train` wrote")
    return sqs.QuerySAEs.load(folder, device=str(host.cfg.device))


def show(table: pd.DataFrame) -> None:
    """Print a table, numbers with three digits."""
    with pd.option_context("display.width", 160, "display.max_columns", None):
        typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
