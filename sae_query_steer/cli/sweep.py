"""`sweep`: which way of steering reaches the target class, on a model and texts of your own."""

from pathlib import Path
from typing import Annotated

import typer

from sae_query_steer.cli.options import (
    SPANS,
    Bloom,
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
    Resume,
    Saes,
    Seed,
    SpanName,
    labelled_examples,
    layer_list,
    load_host,
    load_saes,
    named,
    show,
)
from sae_query_steer.compare import DESCENTS, Comparison, compare_into, compare_on_texts
from sae_query_steer.compare.report import display_rows, verdict
from sae_query_steer.compare.scorer import check_writing


def sweep(
    model: Model,
    csv: Csv,
    prompt: Prompt,
    response: Annotated[str, typer.Option(help="Column or template of the response.")],
    label: Label,
    saes: Saes,
    out: Out,
    bloom: Bloom = False,
    layers: Layers = "all",
    span: SpanName = "last-prompt-token",
    scope: Annotated[str, typer.Option(help="Where to steer; as --span.")] = "last-prompt-token",
    objectives: Annotated[
        str, typer.Option(help="Of " + ", ".join(d.name for d in DESCENTS) + "; or all.")
    ] = "all",
    cases: Annotated[int, typer.Option(help="Cases of validation and of test each.")] = 60,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, seeded row by row; greedy if unset.")
    ] = None,
    chat_template: Chat = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare ways of steering on your model and your labelled texts.

    The texts are split by class: 2/5 make the centroids, 1/5 teaches the judge, 1/5 chooses each
    method's strength, and 1/5 is for the table. What was written is logged as it comes.
    """
    wanted = [d for d in DESCENTS if objectives == "all" or d.name in objectives.split(",")]
    unknown = set(objectives.split(",")) - {"all", *(d.name for d in DESCENTS)}
    if unknown or not wanted:
        raise ValueError(
            f"--objectives must be all, or some of {', '.join(d.name for d in DESCENTS)}, with "
            f"commas between, got {objectives!r}"
        )
    check_writing(max_new_tokens, temperature)
    where, at = named(SPANS, span, "--span")(), named(SPANS, scope, "--scope")()
    chosen = layer_list(layers)

    def compare(log: Path) -> Comparison:
        examples = labelled_examples(csv, prompt, response, label, bloom)
        host = load_host(model, device, dtype)
        return compare_on_texts(
            host,
            load_saes(saes, host),
            examples,
            layers=chosen,
            span=where,
            scope=at,
            descents=wanted,
            n_cases=cases,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat_template=chat_template,
            seed=seed,
            settings={
                "model": model,
                "csv": str(csv),
                "prompt": prompt,
                "response": response,
                "label": label,
                "bloom": bloom,
                "saes": str(saes),
                "dtype": dtype,
            },
            log=log,
        )

    found = compare_into(out, compare, resume=resume, overwrite=overwrite)
    show(display_rows(found))
    typer.echo(verdict(found))
    typer.echo(f"wrote {out}")
