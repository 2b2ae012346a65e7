"""`trial`, `sweep` and `demo`: comparisons of ways to steer."""

import shlex
import sys
import webbrowser
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import sae_query_steer as sqs
from sae_query_steer.cli.options import (
    FLAT,
    Examples,
    ModelWithSAEs,
    Output,
    SmallModel,
    SpanName,
    index_list,
    say,
    show,
    span_of,
)
from sae_query_steer.config import TrialSettings
from sae_query_steer.data.examples import split_after_words


def sweep(
    *,
    model: ModelWithSAEs,
    examples: Examples,
    output: Output,
    layers: str = "all",
    scope: SpanName = "last-prompt-token",
    objectives: str = "all",
    n_cases: int = 60,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    seed: int = 0,
    resume: bool = False,
    first_words: int = 4,
) -> None:
    """Compare many ways of steering, layer by layer, on your model and your labelled texts.

    The texts are split by class: 2/5 give the centroids, 1/5 trains the judge, 1/5 chooses each
    method's strength, and 1/5 gives the table. Generated texts are logged as they come.

    Several processes share the methods:
    torchrun --nproc-per-node N --no-python sae-query-steer sweep ...

    Args:
        model: the language model and its SAEs.
        examples: the examples.
        output: the folder of tables and report.
        layers: Layers, such as 1,2 or 8-20 or all.
        scope: Tokens at which queries are changed.
        objectives: Names of descents with commas between, or all.
        n_cases: Cases of validation and of test each.
        max_new_tokens: Tokens to generate.
        temperature: Of sampling, seeded row by row; greedy if unset.
        seed: Random seed.
        resume: Continue a stopped run with the same settings.
        first_words: Without --response: words of a text that are its prompt.
    """
    chosen = index_list(layers)
    _check_long(examples)
    known = {descent.name: descent for descent in sqs.compare.DESCENTS}
    names = list(known) if objectives == "all" else objectives.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--objectives must be all, or some of {list(known)}, got {unknown}")

    from sae_query_steer.models.launch import Ranks, launched

    def compare(log: Path, ranks: Ranks) -> "sqs.compare.Comparison":
        labelled = _with_responses(examples, first_words)
        loaded, saes = model.load_both()
        labelled = examples.fitting(loaded, labelled)
        stored = _stored(examples, first_words) | {"saes": str(model.saes)}
        return sqs.compare.compare_on_texts(
            loaded,
            saes,
            labelled,
            layers=chosen,
            span=span_of(examples.span),
            scope=span_of(scope),
            descents=[known[name] for name in known if name in names],
            n_cases=n_cases,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat_template=examples.turns,
            seed=seed,
            settings=stored | {"model": model.model, "dtype": model.dtype},
            log=log,
            ranks=ranks,
        )

    again = {"resume": resume, "overwrite": output.overwrite}
    with launched() as ranks:
        run = partial(compare, ranks=ranks)
        _show(sqs.compare.compare_into(output.out, run, **again, ranks=ranks))
    say(f"wrote {output.out}")


def trial(
    *,
    model: SmallModel,
    examples: Examples,
    output: Output,
    settings: Annotated[TrialSettings, FLAT],
    layers: str = "middle",
    resume: bool = False,
    first_words: int = 4,
    browser: bool = True,
) -> None:
    """Find out in minutes whether a model can be steered to the classes of your texts.

    Checks the texts, trains SAEs on them, learns targets through the model, compares them with
    centroids, few-shot prompts and random directions on other texts, opens a page with the verdict,
    and writes the best steerer for the command steer. The texts are split as for sweep.

    Args:
        model: the language model.
        examples: the examples.
        output: the folder of report, SAEs and steerer.
        settings: sizes and seed.
        layers: Layers that are steered together, such as 8-20; middle is 27 to 77 % of the depth.
        resume: Continue a stopped run with the same settings.
        first_words: Without --response: words of a text that are its prompt.
        browser: Open the page when it is written.
    """
    chosen = None if layers == "middle" else index_list(layers)
    _check_long(examples)
    labelled = _with_responses(examples, first_words)

    def compare(log: Path) -> "sqs.compare.Comparison":
        loaded = model.load()
        fitting = examples.fitting(loaded, labelled)
        seconds = sqs.compare.trial_seconds(loaded, fitting, settings, examples.turns)
        say(f"\nThis takes about {max(1, round(seconds / 60))} min on this machine.\n")
        return sqs.compare.try_on_texts(
            loaded,
            fitting,
            layers=chosen,
            span=span_of(examples.span),
            settings=settings,
            chat_template=examples.turns,
            told=_stored(examples, first_words) | {"model": model.model, "dtype": model.dtype},
            log=log,
        )

    found = sqs.compare.compare_into(output.out, compare, resume=resume, overwrite=output.overwrite)
    _show(found)
    page = output.out / "report.html"
    say(f"wrote {page}\n\nThe steerer that did best on validation, on a prompt of yours:")
    steerer, target = str(output.out / "steerer"), labelled[0].label
    command = ["sae-query-steer", "steer", "--model", model.model, "--steerer", steerer]
    say(shlex.join([*command, "--target", target, "--prompt", "..."]))
    if browser and sys.stdout.isatty():
        webbrowser.open(page.resolve().as_uri())


def _check_long(examples: Examples) -> None:
    if examples.long.startswith("cut"):
        raise ValueError(f"--long must be refuse or drop in a comparison, got {examples.long}")


def _with_responses(examples: Examples, first_words: int) -> "list[sqs.LabelledExample]":
    """Return the examples; without a response the first words of each text are the prompt."""
    labelled = examples.read()
    if examples.response is not None:
        return labelled
    made = split_after_words(labelled, first_words)
    say(
        f"Without --response a text is continued: the first {first_words} words of "
        f"{examples.prompt!r} are the prompt, such as {made[0].prompt!r}, the rest is the response."
    )
    return made


def _stored(examples: Examples, first_words: int) -> dict[str, Any]:
    """Return what a report tells of the examples."""
    split = {} if examples.response is not None else {"first_words": first_words}
    return asdict(examples) | {"csv": str(examples.csv)} | split


def demo(
    *,
    out: Path = Path("runs/demo"),
    overwrite: bool = False,
    resume: bool = False,
    size: Literal["quick", "default", "full"] = "default",
    n_test: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    null: bool = False,
    model: str | None = None,
) -> None:
    """Steer a model's text to each of Bloom's levels, and compare ways to do it.

    The embedded tutor gives feedback. An instruct model (--model) writes exercises; targets are
    also learned through it; for SmolLM2 this takes many minutes on 2 cores, with --size full hours.
    Several processes share learning and the methods:
    torchrun --nproc-per-node N --no-python sae-query-steer demo ...

    Args:
        out: Folder for report.html and comparison.json.
        overwrite: Replace the output folder.
        resume: Continue a stopped run with the same settings.
        size: Quick is too small to tell methods apart; full has every method and layer.
        n_test: Test prompts of each row.
        seed: Random seed.
        device: Device to run on.
        null: Use the negative control, a tutor that no query can steer.
        model: An instruct model instead of the tutor: smollm2, a GGUF file, a folder or a hub name.
    """
    from sae_query_steer.compare.report import display_sites, samples
    from sae_query_steer.models.launch import Ranks, launched

    if null and model is not None:
        raise ValueError(f"--null must not be given with --model, got --model {model}")
    changed = {"seed": seed} | ({} if n_test is None else {"n_test": n_test})

    def compare(log: Path, ranks: Ranks) -> "sqs.compare.Comparison":
        given: dict[str, Any] = {"log": log, "ranks": ranks}
        if model is None:
            settings = replace(sqs.compare.DEMO_SIZES[size], **changed)
            tutor = sqs.load_tutor(notes=not null, device=device)
            return sqs.compare.run_demo(tutor, notes=not null, settings=settings, **given)
        settings = replace(sqs.compare.EXERCISE_SIZES[size], **changed)
        loaded = sqs.load_model(model, device=device)
        return sqs.compare.run_exercise_demo(loaded, settings=settings, **given)

    again = {"resume": resume, "overwrite": overwrite}
    with launched() as ranks:
        found = sqs.compare.compare_into(out, partial(compare, ranks=ranks), **again, ranks=ranks)
    if found.sites is not None:
        show(display_sites(found.sites))
    for sample in samples(found):
        say(f"\n{sample['prompt']} ... ({sample['title']})")
        for name, text, _ in sample["texts"].head(12).itertuples(index=False, name=None):
            say(f"  {name}: {text.strip()}")
    _show(found)
    say(f"wrote {out / 'report.html'}")


def _show(found: "sqs.compare.Comparison") -> None:
    from sae_query_steer.compare.report import display_rows, verdict

    say(f"\n{verdict(found)}\n")
    show(display_rows(found))
    judge = ", ".join(f"{name} {share:.3f}" for name, share in found.judge.items())
    say(f"\njudge: {judge}")
