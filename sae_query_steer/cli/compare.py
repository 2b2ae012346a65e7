"""`sweep` and `demo`: comparisons of ways to steer."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from sae_query_steer.cli.options import (
    Examples,
    Model,
    Output,
    SpanName,
    index_list,
    load_saes,
    say,
    show,
    span_of,
)


def sweep(
    *,
    model: Model,
    examples: Examples,
    output: Output,
    saes: Path,
    layers: str = "all",
    span: SpanName = "last-prompt-token",
    scope: SpanName = "last-prompt-token",
    objectives: str = "all",
    n_cases: int = 60,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    chat_template: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Compare ways of steering on your model and your labelled texts.

    The texts are split by class: 2/5 give the centroids, 1/5 trains the judge, 1/5 chooses each
    method's strength, and 1/5 gives the table. Generated texts are logged as they come.

    Args:
        model: the language model.
        examples: the examples; a response is required.
        output: the folder of tables and report.
        saes: Folder that `train` wrote.
        layers: Layers, such as 1,2 or 8-20 or all.
        span: Tokens at which centroids are computed.
        scope: Tokens at which queries are changed.
        objectives: Names of descents with commas between, or all.
        n_cases: Cases of validation and of test each.
        max_new_tokens: Tokens to generate.
        temperature: Of sampling, seeded row by row; greedy if unset.
        chat_template: Use the tokenizer's chat template.
        seed: Random seed.
        resume: Continue a stopped run with the same settings.
    """
    chosen = index_list(layers)
    if examples.response is None:
        raise ValueError("--response must be given: the column or template of the response")
    examples.check()
    from sae_query_steer.compare import DESCENTS, Comparison, compare_into, compare_on_texts
    from sae_query_steer.compare.report import display_rows, verdict
    from sae_query_steer.compare.scorer import check_writing

    known = {descent.name: descent for descent in DESCENTS}
    names = list(known) if objectives == "all" else objectives.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--objectives must be all, or some of {list(known)}, got {unknown}")
    check_writing(max_new_tokens, temperature)
    descents = [known[name] for name in known if name in names]

    def compare(log: Path) -> Comparison:
        labelled = examples.read()
        loaded = model.load()
        stored = asdict(examples) | {"csv": str(examples.csv), "saes": str(saes)}
        return compare_on_texts(
            loaded,
            load_saes(saes, loaded),
            labelled,
            layers=chosen,
            span=span_of(span),
            scope=span_of(scope),
            descents=descents,
            n_cases=n_cases,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat_template=chat_template,
            seed=seed,
            settings=stored | {"model": model.model, "dtype": model.dtype},
            log=log,
        )

    found = compare_into(output.out, compare, resume=resume, overwrite=output.overwrite)
    show(display_rows(found))
    say(f"{verdict(found)}\nwrote {output.out}")


def demo(
    *,
    out: Path = Path("runs/demo"),
    overwrite: bool = False,
    resume: bool = False,
    size: Literal["quick", "default", "full"] = "default",
    n_test: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    tutor: Path | None = None,
    null: bool = False,
) -> None:
    """Steer the embedded tutor's feedback to each of Bloom's levels, and compare ways to do it.

    Args:
        out: Folder for report.html and results.json.
        overwrite: Replace the output folder.
        resume: Continue a stopped run with the same settings.
        size: Quick is too small to tell methods apart; full has every method and layer.
        n_test: Test prompts of each row.
        seed: Random seed.
        device: Device to run on.
        tutor: Folder of another tutor.
        null: Use the negative control, a tutor that no query can steer.
    """
    if tutor is not None and null:
        raise ValueError("--tutor and --null can't be given together")
    from sae_query_steer.compare import (
        FULL,
        QUICK,
        Comparison,
        DemoSettings,
        compare_into,
        run_demo,
    )
    from sae_query_steer.compare.report import display_rows, display_sites, samples, verdict
    from sae_query_steer.models.loading import load_model
    from sae_query_steer.storage.records import read_json
    from sae_query_steer.toy import NULL_TUTOR_FOLDER, TUTOR_FOLDER

    settings = {"quick": QUICK, "default": DemoSettings(), "full": FULL}[size]
    settings = replace(settings, seed=seed)
    if n_test is not None:
        settings = replace(settings, n_test=n_test)
    folder = tutor or (NULL_TUTOR_FOLDER if null else TUTOR_FOLDER)
    if not (folder / "tutor.json").is_file():
        raise FileNotFoundError(f"--tutor {folder} has no tutor.json: give the folder of a tutor")
    notes = bool(read_json(folder / "tutor.json")["settings"]["notes"])

    def compare(log: Path) -> Comparison:
        model = load_model(str(folder), device=device)
        return run_demo(model, notes=notes, settings=settings, log=log)

    found = compare_into(out, compare, resume=resume, overwrite=overwrite)
    if found.sites is not None:
        show(display_sites(found.sites))
    show(display_rows(found))
    for sample in samples(found):
        say(f"\n{sample['prompt']} ... ({sample['title']})")
        for name, text, _ in sample["texts"].head(12).itertuples(index=False, name=None):
            say(f"  {name}: {text.strip()}")
    judge = ", ".join(f"{name} {share:.3f}" for name, share in found.judge.items())
    say(f"\njudge: {judge}\n\n{verdict(found)}\n\nwrote {out / 'report.html'}")
