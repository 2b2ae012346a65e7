"""`sweep`: which way of steering reaches the target class, on a model and texts of your own."""

import shutil
from typing import Annotated, Any

import typer
from sklearn.model_selection import train_test_split

import sae_query_steer as sqs
from sae_query_steer.cli.options import (
    LOG,
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
    check_free,
    labelled_examples,
    layer_list,
    load_host,
    load_saes,
    named,
    show,
    unfinished_beside,
)
from sae_query_steer.compare import (
    DESCENTS,
    ClassifierJudge,
    SweepLog,
    TextScorer,
    cases_of,
    decoder_rows_methods,
    descent_methods,
    prompt_methods,
    residual_methods,
    run_sweep,
    write_sweep,
)
from sae_query_steer.compare.sweep_log import digest_of
from sae_query_steer.compare.sweep_report import RESULTS, display_rows, sweep_verdict
from sae_query_steer.compare.text_scorer import check_writing
from sae_query_steer.sites import ALL_HEADS


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
    check_free(out, overwrite, RESULTS)
    unfinished = unfinished_beside(out, resume)
    wanted = [d for d in DESCENTS if objectives == "all" or d.name in objectives.split(",")]
    unknown = set(objectives.split(",")) - {"all", *(d.name for d in DESCENTS)}
    if unknown or not wanted:
        raise ValueError(
            f"--objectives {objectives!r} is not allowed: give all, or some of "
            f"{', '.join(d.name for d in DESCENTS)}, with commas between"
        )
    check_writing(max_new_tokens, temperature)
    where, at = named(SPANS, span, "--span")(), named(SPANS, scope, "--scope")()
    examples = labelled_examples(csv, prompt, response, label, bloom)
    steering, judging, validation, test = _split(examples, seed)
    judge = ClassifierJudge.fit(judging, seed=seed)
    parts = {"validation": cases_of(validation, cases), "test": cases_of(test, cases)}
    host = load_host(model, device, dtype)
    encoders = load_saes(saes, host)
    sites = sqs.query_sites(host, layer_list(layers))
    chosen = {
        site.hook_name: encoders[site.hook_name] for site in sites if site.hook_name in encoders
    }
    if len(chosen) < len(sites):
        missing = [site.layer for site in sites if site.hook_name not in encoders]
        raise ValueError(
            f"--saes {saes} has no SAEs for the layers {missing}: train them, or name others"
        )
    settings: dict[str, Any] = {
        **{"model": model, "csv": str(csv), "prompt": prompt, "response": response},
        **{
            "label": label,
            "bloom": bloom,
            "saes": str(saes),
            "layers": [site.layer for site in sites],
        },
        **{"span": span, "scope": scope, "objectives": [d.name for d in wanted], "cases": cases},
        **{"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
        **{"chat_template": chat_template, "dtype": dtype},
    }
    read: dict[str, Any] = {"span": where, "chat_template": chat_template}
    looked_at = sqs.tokenize_examples(host, validation, **read)
    apart = sqs.separability(host, chosen, looked_at, seed=seed)
    moved = sqs.interchange_effect(host, sites, looked_at, per_head=False, seed=seed)
    table = sqs.site_verdicts(
        moved.merge(apart[apart["head"] == ALL_HEADS], on=["layer", "head"]).drop(columns="head")
    )
    methods = prompt_methods(steering, seed=seed)
    methods = [m for m in methods if m.name != "instruction"]  # no prompt requests a class here
    alone = [[site.layer] for site in sites]
    tokenized = sqs.tokenize_examples(host, steering, **read)
    made = []
    for name, own in (("dense descent", sqs.identity_encoders(sites)), ("SAE descent", chosen)):
        centroids = sqs.CentroidTargetBuilder(host, own).fit(tokenized)
        made.append(centroids)
        methods += descent_methods(
            name,
            own,
            {span: centroids},
            wanted,
            layers=alone,
            scopes=[at],
        )
        if own is chosen:
            methods += decoder_rows_methods(own, centroids, span=span, scope=at, layers=alone)
    means = sqs.residual_means(host, tokenized, [site.layer for site in sites])
    methods += residual_methods(means, span=span, scope=at, layers=alone)
    # What was logged holds for these texts, this model and these SAEs, wherever they lie.
    contents = digest_of(made, csv.read_bytes())
    log = SweepLog(unfinished / LOG, settings | {"contents": contents})
    scorers = {
        split: TextScorer(
            host,
            {"other class": some},
            judge,
            max_new_tokens=max_new_tokens,
            split=split,
            log=log,
            temperature=temperature,
            seed=seed + (split == "test"),
            chat_template=chat_template,
        )
        for split, some in parts.items()
    }
    result = run_sweep(scorers["validation"], scorers["test"], methods)
    write_sweep(
        result, out, settings=settings, judge=judge.held_out, sites=table, overwrite=overwrite
    )
    shutil.rmtree(unfinished)
    show(display_rows(result.rows))
    typer.echo(sweep_verdict(result))
    typer.echo(f"wrote {out}")


def _split(examples: list[sqs.LabelledExample], seed: int) -> tuple[list[sqs.LabelledExample], ...]:
    """Return examples for centroids, judge, validation and test, each class in all of them."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[str(example.label)] = counts.get(str(example.label), 0) + 1
    if min(counts.values(), default=0) < 20:
        raise ValueError(
            f"the classes have {counts} texts: a sweep splits them four ways and needs 20 or more "
            "of each"
        )

    def halves(some: list[sqs.LabelledExample], share: float) -> tuple[list, list]:
        labels = [str(example.label) for example in some]
        first, second = train_test_split(some, test_size=share, random_state=seed, stratify=labels)
        return list(first), list(second)

    steering, others = halves(examples, 0.6)
    judging, rest = halves(others, 2 / 3)
    return (steering, judging, *halves(rest, 0.5))
