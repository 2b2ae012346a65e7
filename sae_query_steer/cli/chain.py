"""`targets`, `sites` and `steer`: what follows `train`, on a model and texts of your own."""

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import sae_query_steer as sqs
from sae_query_steer.arguments import check_number
from sae_query_steer.cli.options import (
    OBJECTIVES,
    SPANS,
    Bloom,
    Bos,
    Chat,
    Csv,
    Device,
    Dtype,
    Label,
    Layers,
    Model,
    Out,
    Overwrite,
    Prompt,
    Response,
    Saes,
    Seed,
    SpanName,
    check_free,
    labelled_examples,
    layer_list,
    load_host,
    load_saes,
    named,
    show,
)
from sae_query_steer.data.tokenized import tokenize_example
from sae_query_steer.diagnostics.verdicts import closing_sentence
from sae_query_steer.models.loading import end_tokens
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import write_json

_ACHIEVED = ("class_effect", "class_effect_se", "moved", "moved_control")

_SHOWN = (
    *("layer", "head", "class_effect", "class_effect_se", "moved", "moved_control"),
    *("achieved_effect", "achieved_moved", "accuracy_latents", "accuracy_query"),
    *("accuracy_position", "accuracy_token", "chance", "verdict"),
)
"""What `sites` prints of its table; the file has all of it."""


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
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Find the centroid of each class of labelled texts in the latents."""
    check_free(out, overwrite, "centroids.json")
    examples = labelled_examples(csv, prompt, response, label, bloom)
    chosen = named(SPANS, span, "--span")()
    host = load_host(model, device, dtype)
    encoders = load_saes(saes, host)
    tokenized = sqs.tokenize_examples(
        host, examples, span=chosen, prepend_bos=bos, chat_template=chat_template
    )
    found = sqs.CentroidTargetBuilder(host, encoders).fit(tokenized)
    found.save(out, overwrite=overwrite)
    show(pd.DataFrame({"class": map(str, found.classes), "tokens": found.counts.tolist()}))
    typer.echo(f"wrote {out}")


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
    targets: Annotated[
        Path | None,
        typer.Option(
            "--targets", help="Folder that `targets` wrote: also steer each site to its centroids."
        ),
    ] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head/--per-layer", help="Also look at every head alone.")
    ] = True,
    bos: Bos = True,
    chat_template: Chat = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Say where steering can work: interchange effect and separability, and what follows."""
    if out is not None:
        check_free(out, overwrite, "sites.csv")
    centroids = None if targets is None else sqs.CentroidTargets.load(targets)
    examples = labelled_examples(csv, prompt, response, label, bloom)
    chosen = named(SPANS, span, "--span")()
    host = load_host(model, device, dtype)
    encoders = load_saes(saes, host)
    tokenized = sqs.tokenize_examples(
        host, examples, span=chosen, prepend_bos=bos, chat_template=chat_template
    )
    patched: dict[str, Any] = {"n_pairs": pairs, "per_head": per_head, "seed": seed}
    apart = sqs.separability(host, encoders, tokenized, seed=seed)
    layers = [int(layer) for layer in apart["layer"].unique()]
    moved = sqs.interchange_effect(
        host,
        sqs.query_sites(host, layers),
        tokenized,
        **patched,
    )
    table = moved.merge(apart, on=["layer", "head"], how="left")
    if centroids is not None:
        steerer = sqs.LatentGradientSteerer(
            encoders,
            centroids,
            target=centroids.classes[0],
            objective=sqs.SquaredDistance(),
            n_steps=1,
            step_size=1.0,
        )
        steered = sqs.achieved_effect(host, steerer, tokenized, **patched)
        names = {name: f"achieved_{name.removeprefix('class_')}" for name in _ACHIEVED}
        table = table.merge(
            pd.DataFrame(steered[["layer", "head", *_ACHIEVED]]).rename(columns=names),
            on=["layer", "head"],
        )
    table = sqs.diagnostics.site_verdicts(table)
    show(pd.DataFrame(table[[name for name in _SHOWN if name in table.columns]]))
    typer.echo(closing_sentence(table))
    if out is not None:
        with new_folder(out, overwrite=overwrite, holding="sites.csv") as new:
            table.to_csv(new / "sites.csv", index=False)
        typer.echo(f"wrote {out}")


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
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Continue a prompt without and with steering, greedily, and show what the steer did."""
    if out is not None:
        check_free(out, overwrite, "texts.json")
    if not prompt.strip():
        raise ValueError("--prompt is blank: give a text to go on from")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} is not allowed: give 1 or more")
    check_number("--steps", steps, whole=True, least=0)
    check_number("--step-size", step_size, least=0)
    host = load_host(model, device, dtype)
    encoders = load_saes(saes, host)
    steerer = sqs.LatentGradientSteerer(
        encoders,
        sqs.CentroidTargets.load(targets),
        target=target,
        objective=named(OBJECTIVES, objective, "--objective")(),
        n_steps=steps,
        step_size=step_size,
        scope=named(SPANS, scope, "--scope")(),
        layers=layer_list(layers),
    )

    # Tokenised as `targets` tokenises, so that the steer meets the prompts it was made for.
    given = tokenize_example(
        host,
        sqs.LabelledExample(prompt=prompt, label="none"),
        prepend_bos=bos,
        chat_template=chat_template,
    ).tokens

    def generate() -> str:
        tokens = host.generate(
            given[None].to(host.cfg.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_tokens(host) or None,
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
        show(trace.summary())
    if out is not None:
        with new_folder(out, overwrite=overwrite, holding="texts.json") as new:
            table.to_csv(new / "trace.csv", index=False)
            write_json(
                new / "texts.json", {"prompt": prompt, "unsteered": plain, "steered": steered}
            )
        typer.echo(f"wrote {out}")
