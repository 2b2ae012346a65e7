"""Make 60 mistakes of a user, one after the other, and print what each is told as a table.

    python -m experiments.mistakes

The model is the embedded tutor. A line that begins with `$` is a command, run in this process; two
of them run again in a process of their own, for the time. What a line raises or warns of is shown;
a line that does neither says nothing.
"""

import io
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from shlex import split
from typing import Any

import pandas as pd

import sae_query_steer as sqs
from sae_query_steer.cli.main import run
from sae_query_steer.storage.markdown import markdown_table

SLOW = 2.0
"""Seconds after which an answer is late."""

SHOWN = 200
"""Characters of a message in the table."""

MISTAKES = r"""
sqs.query_sites(model, layers="1-3")
sqs.query_sites(model, 2)
sqs.query_sites(model, [1, 9])
sqs.query_sites(str(sqs.toy.TUTOR_FOLDER), [1])
sqs.CentroidTargetBuilder(model, saes).targets_
sqs.CentroidTargetBuilder(saes, model)
sqs.CentroidTargetBuilder(model, saes).fit(examples)
sqs.LatentGradientSteerer(targets, saes, **how)
sqs.LatentGradientSteerer(saes, sqs.CentroidTargetBuilder(model, saes), **how)
sqs.LatentGradientSteerer(saes, targets, **how | {"target": "Create"})
sqs.LatentGradientSteerer(saes, targets, **how | {"target": 2})
sqs.LatentGradientSteerer(saes, targets, **how | {"objective": sqs.SquaredDistance})
sqs.LatentGradientSteerer(saes, targets, **how | {"n_steps": "20"})
sqs.LatentGradientSteerer(saes, targets, **how, scope="last-prompt-token")
sqs.LatentGradientSteerer(saes, targets, **how, layers="1-2")
sqs.LatentGradientSteerer(saes, targets, **how, layers=[0])
sqs.LatentGradientSteerer(saes, targets, **how, heads={"1": [0]})
sqs.LatentGradientSteerer(saes, targets, **how, latents=[3, 5])
steered(schedule=lambda age: 1.0)
steered(gate=lambda z, goal: 0.5)
steered(layer=1)
steerer.apply("Lesson: how the wind moves the sea.")
steerer.apply(model)
with steerer.apply(model, record=True) as trace: pass; trace.summary()
with steerer.apply(added): added(tokens)
sqs.steering.JoinedSteerers([steerer, steerer])
with steerer.apply(float64): float64.generate([texts[0], "Lesson"], max_new_tokens=2, verbose=False)
weight_metrics(saes[name])
saes["blocks.9.attn.hook_q"]
sqs.diagnostics.moved_latents(trace, steerer)
sqs.diagnostics.separability(model, targets, tokenized)
sqs.diagnostics.interchange_effect(model, [1, 2], tokenized)
sqs.diagnostics.achieved_effect(model, targets, tokenized)
sqs.diagnostics.evaluate_saes(model, saes, "one long text")
sqs.diagnostics.evaluate_saes(model, saes, texts, n_token=100)
sqs.compare.continuations(model, "one prompt", max_new_tokens=3)
sqs.TrainingConfig(sae=topk, training_tokens="100k")
sqs.TrainingConfig(sae=sqs.sae.TopK, training_tokens=1000)
sqs.sae.TopK(d_sae_per_head=16)
sqs.train_query_saes(model, texts, [1, 2], config)
sqs.load_model(str(sqs.toy.TUTOR_FOLDER), dtype="float61")
sqs.load_model(str(sqs.toy.TUTOR_FOLDER), device="gpu")
sqs.load_model(str(sqs.toy.TUTOR_FOLDER), device="cuda")
sqs.load_model("runs/my-llama")
sqs.load_model(folder / "saes")
sqs.QuerySAEs.load(folder / "nowhere")
sqs.CentroidTargets.load(folder / "saes")
sqs.read_examples(folder / "texts.csv", prompt="prompt", label="label")
sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, by_id))
sqs.tokenize_examples(examples, model)
sqs.tokenize_examples(model, texts)
sqs.tokenize_examples(bare, examples)
$ train --model runs/my-llama --texts ./texts.csv --text prompt --layers 1 --out ./new --training-tokens 9999 topk --sae.d-sae-per-head 64
$ train --model ./tutor --texts ./texts.csv --text prompt --layers 3-1 --out ./new --training-tokens 9999 topk --sae.d-sae-per-head 64
$ targets --model ./tutor --saes ./tutor --csv ./texts.csv --prompt prompt --label Label --out ./new
$ targets --model ./tutor --saes ./saes --csv ./texts.csv --prompt prompt --label id --out ./new
$ steer --model ./tutor --saes ./saes --targets ./targets --target creat --prompt Hello
$ sites --model ./tutor --saes ./saes --csv ./texts.csv --prompt prompt --label Label --device gpu
"""  # noqa: E501
"""What is run, one mistake a line."""

TIMED = (
    "targets --model ./tutor --saes ./saes --csv ./absent.csv --prompt prompt --label Label "
    "--out ./new",
    "steer --model runs/my-llama --saes ./saes --targets ./targets --target create --prompt Hello",
)
"""Commands that are run in a process of their own."""


def told(code: str, names: dict[str, Any]) -> tuple[str, str, float]:
    """Return the kind and text of what a line of code raises or warns of, and the seconds."""
    written = io.StringIO()
    start = time.perf_counter()
    with (
        warnings.catch_warnings(record=True) as seen,
        redirect_stdout(written),
        redirect_stderr(written),
    ):
        warnings.simplefilter("always")
        try:
            if code.startswith("$"):
                run(words(code[1:], names["folder"]))
            else:
                exec(code, dict(names))
            kind, text = "none", ""
        except SystemExit:
            kind, text = "SystemExit", written.getvalue()
        except Exception as error:
            kind, text = type(error).__name__, str(error)
    seconds = time.perf_counter() - start
    if kind == "none" and (own := [w for w in seen if "sae_query_steer" in w.category.__module__]):
        kind, text = own[0].category.__name__, str(own[0].message)
    return kind, " ".join(text.replace("│", " ").split())[:SHOWN], seconds


def words(command: str, folder: Path) -> list[str]:
    """Return the words of a command, paths such as ./saes in the folder."""
    return [str(folder / word) if word.startswith("./") else word for word in split(command)]


def prepared(folder: Path) -> dict[str, Any]:
    """Return the names that the mistakes use."""
    import torch
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from sae_lens.evals import get_featurewise_weight_based_metrics

    model = sqs.load_tutor()
    examples = sqs.toy.TutorCorpus("train", seed=0).examples(60)
    texts = [example.prompt + example.response for example in examples]
    table = pd.DataFrame({"prompt": [example.prompt for example in examples]})
    table["Label"] = [str(example.label) for example in examples]
    table["id"] = range(len(table))
    (folder / "tutor").symlink_to(sqs.toy.TUTOR_FOLDER)
    table.to_csv(folder / "texts.csv", index=False)
    sites = sqs.query_sites(model, [1, 2])
    topk = sqs.sae.TopK(d_sae_per_head=64, k=8)
    config = sqs.TrainingConfig(sae=topk, training_tokens=4096)
    saes = sqs.train_query_saes(model, texts, sites, config, out=folder / "saes")
    tokenized = sqs.tokenize_examples(model, examples)
    targets = sqs.CentroidTargetBuilder(model, saes).fit(tokenized)
    targets.save(folder / "targets")
    how = {"target": "create", "objective": sqs.SquaredDistance(), "n_steps": 1, "step_size": 0.5}
    steerer = sqs.LatentGradientSteerer(saes, targets, **how)
    tokens = model.to_tokens(examples[0].prompt)
    with steerer.apply(model, record=True, prompt_lengths=tokens.shape[1]) as trace:
        model(tokens)

    def steered(**settings: Any) -> None:
        steerer = sqs.LatentGradientSteerer(saes, targets, **how, **settings)
        with steerer.apply(model):
            model.generate(tokens, max_new_tokens=2, verbose=False)

    added: Any = SAETransformerBridge.boot_transformers(str(sqs.toy.TUTOR_FOLDER), device="cpu")
    by_id = sqs.read_examples(folder / "texts.csv", prompt="prompt", label="id")
    float64 = sqs.load_model(sqs.toy.TUTOR_FOLDER, dtype="float64", device="cpu")
    bare = sqs.load_tutor()
    bare.tokenizer = None
    name = sites[0].hook_name
    added.add_sae(saes[name])
    return {
        **{"sqs": sqs, "torch": torch, "folder": folder, "name": name, "how": how, "topk": topk},
        **{"model": model, "bare": bare, "added": added, "examples": examples, "texts": texts},
        **{
            "by_id": by_id,
            "float64": float64,
            "config": config,
            "sites": sites,
            "saes": saes,
            "targets": targets,
            "trace": trace,
        },
        **{"tokenized": tokenized, "steerer": steerer, "steered": steered, "tokens": tokens},
        "weight_metrics": get_featurewise_weight_based_metrics,
    }


def main() -> None:
    """Print the table, and the mistakes that were answered late."""
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = prepared(folder)
        for code in MISTAKES.strip().splitlines():
            rows.append([code, *told(code, names)])
        for command in TIMED:
            start = time.perf_counter()
            entry = [sys.executable, "-c", "from sae_query_steer.cli.main import main; main()"]
            done = subprocess.run(
                [*entry, *words(command, folder)],
                capture_output=True,
                text=True,
                check=False,
            )
            last = " ".join(done.stderr.split())[:SHOWN]
            seconds = time.perf_counter() - start
            rows.append([f"$ {command} (new process)", f"exit {done.returncode}", last, seconds])
        table = pd.DataFrame(rows, columns=["mistake", "exception", "message", "seconds"])
        table["message"] = [text.replace(temporary, "...") for text in table["message"]]
    sys.stdout.write(markdown_table(table, digits=2) + "\n\n")
    late = table[table["seconds"] > SLOW]["mistake"].tolist()
    silent = table[table["exception"] == "none"]["mistake"].tolist()
    sys.stdout.write(f"{len(table)} mistakes; later than {SLOW:g} s: {late}; silent: {silent}\n")


if __name__ == "__main__":
    main()
