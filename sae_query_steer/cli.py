"""The command line: train SAEs, find centroids, look at sites, steer."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import sae_query_steer as sqs
from sae_query_steer.descent import check_strength
from sae_query_steer.positions import Span
from sae_query_steer.storage import check_replaceable, new_folder, write_json

app = typer.Typer(
    help="Steer language models by gradient descent on sparse features of attention queries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SPANS: dict[str, Callable[[], Span]] = {
    "last-prompt-token": sqs.LastPromptToken,
    "response": sqs.ResponseTokens,
    "last-response-token": sqs.LastResponseToken,
    "every": sqs.EveryPosition,
    "last-prompt-token+response": lambda: sqs.LastPromptToken() | sqs.ResponseTokens(),
}

OBJECTIVES: dict[str, Callable[[], sqs.Objective]] = {
    "prototype": sqs.PrototypeLogLikelihood,
    "distance": sqs.SquaredDistance,
    "contrast": sqs.CentroidContrast,
}

Model = Annotated[
    str, typer.Option("--model", help="Hugging Face model folder, or a name on its hub.")
]
Device = Annotated[str | None, typer.Option(help="Where to run; TransformerLens chooses if unset.")]
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


@app.command()
def train(
    model: Model,
    layers: Layers,
    out: Out,
    csv: Annotated[Path | None, typer.Option("--csv", help="CSV with a column of text.")] = None,
    text: Annotated[
        str, typer.Option("--text", help="Column of the CSV, or a template over its columns.")
    ] = "text",
    text_file: Annotated[
        Path | None, typer.Option("--text-file", help="Plain text; blank lines part documents.")
    ] = None,
    arch: Annotated[str, typer.Option(help="topk or standard.")] = "topk",
    d_sae: Annotated[int, typer.Option("--d-sae", help="Latents of each head.")] = 64,
    k: Annotated[int, typer.Option(help="topk: latents that may fire.")] = 8,
    l1: Annotated[float, typer.Option(help="standard: weight of the L1 penalty.")] = 1.0,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 500_000,
    context_size: Annotated[int | None, typer.Option(help="Tokens of a row; 128 if unset.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a training step.")] = 512,
    whole: Annotated[
        bool, typer.Option("--whole-documents", help="Keep documents whole, one a row.")
    ] = False,
    bos: Bos = True,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Train SAEs on the queries of all heads of some layers."""
    _check_free(out, overwrite, "query_saes.json")
    if (csv is None) == (text_file is None):
        raise ValueError("give the texts as --csv FILE or as --text-file FILE, one of the two")
    configs = {
        "topk": lambda: sqs.QueryHeadTopKTrainingSAEConfig(d_sae_per_head=d_sae, k=k),
        "standard": lambda: sqs.QueryHeadStandardTrainingSAEConfig(
            d_sae_per_head=d_sae, l1_coefficient=l1
        ),
    }
    config = _named(configs, arch, "--arch")()
    if csv is not None:
        texts = sqs.texts_from_csv(csv, text=text)
    else:
        assert text_file is not None
        paragraphs = text_file.read_text(encoding="utf-8").split("\n\n")
        texts = [paragraph for paragraph in paragraphs if paragraph.strip()]
    host = sqs.load_model(model, device=device)
    saes = sqs.train_query_saes(
        host,
        texts,
        sqs.query_sites(host, _layer_list(layers)),
        sae=config,
        training_tokens=tokens,
        context_size=context_size,
        concat_sequences=not whole,
        prepend_bos=bos,
        lr=lr,
        train_batch_size_tokens=batch_tokens,
        seed=seed,
    )
    saes.save(out, overwrite=overwrite)
    assert saes.metrics is not None
    _show(saes.metrics)
    typer.echo(f"wrote {out}")


@app.command()
def targets(
    model: Model,
    saes: Saes,
    csv: Csv,
    prompt: Prompt,
    label: Label,
    out: Out,
    response: Response = None,
    bloom: Bloom = False,
    span: SpanName = "last-prompt-token",
    bos: Bos = True,
    chat_template: Chat = False,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the centroid of each class of labelled texts in the latents."""
    _check_free(out, overwrite, "centroids.json")
    examples = _examples(csv, prompt, response, label, bloom)
    chosen = _named(SPANS, span, "--span")()
    host = sqs.load_model(model, device=device)
    encoders = _saes(saes, host)
    found = sqs.CentroidTargetBuilder(
        host, encoders, span=chosen, prepend_bos=bos, chat_template=chat_template
    ).fit(examples)
    found.save(out, overwrite=overwrite)
    _show(pd.DataFrame({"class": map(str, found.classes), "tokens": found.counts.tolist()}))
    typer.echo(f"wrote {out}")


@app.command()
def sites(
    model: Model,
    saes: Saes,
    csv: Csv,
    prompt: Prompt,
    label: Label,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the table as CSV.")] = None,
    response: Response = None,
    bloom: Bloom = False,
    span: SpanName = "last-prompt-token",
    pairs: Annotated[int, typer.Option(help="Pairs for the interchange effect.")] = 64,
    per_head: Annotated[
        bool, typer.Option("--per-head/--per-layer", help="Also look at every head alone.")
    ] = True,
    bos: Bos = True,
    chat_template: Chat = False,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Show where steering can work: separability and interchange effect of each site and head."""
    if out is not None:
        _check_free(out, overwrite, "sites.csv")
    examples = _examples(csv, prompt, response, label, bloom)
    chosen = _named(SPANS, span, "--span")()
    host = sqs.load_model(model, device=device)
    encoders = _saes(saes, host)
    shared: dict[str, Any] = {
        "span": chosen,
        "seed": seed,
        "prepend_bos": bos,
        "chat_template": chat_template,
    }
    apart = sqs.separability(host, encoders, examples, **shared)
    layers = [int(layer) for layer in apart["layer"].unique()]
    moved = sqs.interchange_effect(
        host,
        sqs.query_sites(host, layers),
        examples,
        n_pairs=pairs,
        per_head=per_head,
        **shared,
    )
    table = moved.merge(apart, on=["layer", "head"], how="left")
    _show(table)
    if out is not None:
        with new_folder(out, overwrite=overwrite, holding="sites.csv") as new:
            table.to_csv(new / "sites.csv", index=False)
        typer.echo(f"wrote {out}")


@app.command()
def steer(
    model: Model,
    saes: Saes,
    targets: Annotated[Path, typer.Option("--targets", help="Folder that `targets` wrote.")],
    target: Annotated[str, typer.Option(help="Class to steer towards.")],
    prompt: Annotated[str, typer.Option(help="The prompt.")],
    objective: Annotated[str, typer.Option(help=", ".join(OBJECTIVES))] = "prototype",
    steps: Annotated[int, typer.Option(help="Gradient steps at each position.")] = 20,
    step_size: Annotated[float, typer.Option(help="Size of a step.")] = 1.0,
    scope: Annotated[str, typer.Option(help="Where to steer; see --span of targets.")] = (
        "last-prompt-token"
    ),
    layers: Layers = "all",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    bos: Bos = True,
    chat_template: Chat = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for texts (JSON) and trace (CSV).")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Continue a prompt without and with steering, greedily, and show what the steer did."""
    if out is not None:
        _check_free(out, overwrite, "texts.json")
    if not prompt.strip():
        raise ValueError("--prompt is blank: give a text to go on from")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} is not allowed: give 1 or more")
    check_strength(steps, step_size)
    host = sqs.load_model(model, device=device)
    encoders = _saes(saes, host)
    steerer = sqs.LatentGradientSteerer(
        encoders,
        sqs.CentroidTargets.load(targets),
        target=target,
        objective=_named(OBJECTIVES, objective, "--objective")(),
        n_steps=steps,
        step_size=step_size,
        scope=_named(SPANS, scope, "--scope")(),
        layers=_layer_list(layers),
    )

    # Tokenised as `targets` tokenises, so that the steer meets the prompts it was made for.
    given = sqs.tokenize_example(
        sqs.LabelledExample(prompt=prompt, label="none"),
        host.tokenizer,
        prepend_bos=bos,
        chat_template=chat_template,
    ).tokens

    def generate() -> str:
        tokens = host.generate(
            given[None].to(host.cfg.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            verbose=False,
        )
        return str(host.tokenizer.decode(tokens[0], skip_special_tokens=True))

    plain = generate()
    with steerer.apply(host, record=True) as trace:
        steered = generate()
    table = trace.to_dataframe()
    typer.echo(f"unsteered: {plain}\n\nsteered towards {target}: {steered}\n")
    if steered == plain:
        typer.echo("The text is unchanged.\n")
    if len(table) == 0:
        typer.echo("No position was steered: the scope met none of the positions that were read.")
    else:
        _show(trace.summary())
    if out is not None:
        with new_folder(out, overwrite=overwrite, holding="texts.json") as new:
            table.to_csv(new / "trace.csv", index=False)
            write_json(
                new / "texts.json", {"prompt": prompt, "unsteered": plain, "steered": steered}
            )
        typer.echo(f"wrote {out}")


def main() -> None:
    """Run the command line; bad input ends it with one line and exit status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        # The first line says it; what Hugging Face adds is about its hub.
        typer.echo(f"sae-query-steer: {str(error).strip().splitlines()[0]}", err=True)
        raise SystemExit(2) from None


def _examples(
    csv: Path, prompt: str, response: str | None, label: str, bloom: bool
) -> list[sqs.LabelledExample]:
    parse = sqs.BloomLevel.parse if bloom else str
    return sqs.examples_from_csv(
        csv, prompt=prompt, response=response, label=label, parse_label=parse
    )


def _layer_list(layers: str) -> list[int] | None:
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


def _named(choices: dict[str, Any], name: str, option: str) -> Any:
    if name not in choices:
        raise ValueError(f"{option} {name!r} is not allowed: choose from {', '.join(choices)}")
    return choices[name]


def _check_free(out: Path, overwrite: bool, holding: str) -> None:
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or --overwrite")
    check_replaceable(out, overwrite=overwrite, holding=holding)


def _saes(folder: Path, host: Any) -> sqs.QuerySAEs:
    if not (folder / "query_saes.json").is_file():
        raise FileNotFoundError(f"--saes {folder} is no folder that `train` wrote")
    return sqs.QuerySAEs.load(folder, device=str(host.cfg.device))


def _show(table: pd.DataFrame) -> None:
    with pd.option_context("display.width", 160, "display.max_columns", None):
        typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
