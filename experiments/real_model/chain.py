"""The whole chain on a real pretrained model and real labelled texts, with the time of each step.

    python -m experiments.real_model.chain --data DIR --out DIR

DIR holds stories260K/ (a Hugging Face folder), bloom_yahya2012/yahya-2012.csv and
feedback_saf/saf.jsonl. Everything printed is also written to --out: tables as CSV, the rest as
chain.json. Equal seeds give equal numbers, times apart.
"""

import argparse
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sae_query_steer as sqs
from sae_query_steer.data.tokenized import tokenize_example
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import write_json

PROMPTS = (
    "Once upon a time, there was a little girl who",
    "Tom and Lily wanted to know why the",
    "The teacher said that",
)


def main() -> None:
    """Run the chain and report it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with the real data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--tokens", type=int, default=500_000, help="SAE training tokens")
    parser.add_argument("--d-sae", type=int, default=64, help="latents of each head")
    parser.add_argument("--k", type=int, default=8, help="latents of a head that may fire")
    parser.add_argument("--every", type=int, default=3, help="use every n-th feedback example")
    parser.add_argument("--pairs", type=int, default=192, help="pairs of the interchange effect")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    seconds: dict[str, float] = {}
    tables: dict[str, pd.DataFrame] = {}
    with timed("load the model", seconds):
        model = sqs.load_model(str(args.data / "stories260K"), device="cpu")
        sites = sqs.query_sites(model)
    with timed("read the texts", seconds):
        bloom = sqs.read_examples(
            args.data / "bloom_yahya2012" / "yahya-2012.csv",
            prompt="QUESTION",
            label="BT LEVEL",
            parse_label=sqs.BloomLevel.parse,
        )
        feedback = fitting(
            sqs.read_examples(
                args.data / "feedback_saf" / "saf.jsonl",
                prompt="Question: {question}\nFeedback:\n",
                response="response_feedback",
                label="verification_feedback",
                where={"lang": "english"},
            )[:: args.every],
            model,
        )
    with timed("train the SAEs", seconds):
        texts = [e.prompt for e in bloom] + [e.prompt + e.response for e in feedback]
        saes = sqs.train_query_saes(
            model,
            texts,
            sites,
            sqs.TrainingConfig(
                sae=sqs.sae.TopK(d_sae_per_head=args.d_sae, k=args.k),
                training_tokens=args.tokens,
                seed=args.seed,
            ),
        )
        tables["saes"] = saes.metrics
    tasks = {
        "bloom questions, last prompt token": (bloom, sqs.LastPromptToken()),
        "feedback verdicts, response tokens": (feedback, sqs.scopes.ResponseTokens()),
    }
    targets = {}
    for name, (labelled, span) in tasks.items():
        examples = sqs.tokenize_examples(model, labelled, span=span)
        with timed(f"centroids: {name}", seconds):
            targets[name] = sqs.CentroidTargetBuilder(model, saes).fit(examples)
        with timed(f"separability: {name}", seconds):
            apart = sqs.diagnostics.separability(model, saes, examples, seed=args.seed)
        with timed(f"interchange effect: {name}", seconds):
            moved = sqs.diagnostics.interchange_effect(
                model,
                sites,
                examples,
                n_pairs=args.pairs,
                # Over whole responses a patch costs a long forward pass: layers only.
                per_head=isinstance(span, sqs.LastPromptToken),
                seed=args.seed,
            )
        tables[f"sites: {name}"] = moved.merge(apart, on=["layer", "head"])
    texts_out, steering = {}, []
    with timed("steer and trace", seconds):
        centroids = targets["bloom questions, last prompt token"]
        for target in (sqs.BloomLevel.REMEMBER, sqs.BloomLevel.CREATE):
            steerer = sqs.LatentGradientSteerer(
                saes,
                centroids,
                target=target,
                objective=sqs.SquaredDistance(),
                n_steps=20,
                step_size=0.2,
                scope=sqs.LastPromptToken(),
            )
            with steerer.apply(model, record=True) as trace:
                texts_out[target.value] = [generate(model, prompt) for prompt in PROMPTS]
            steering.append(trace.summary().assign(target=target.value))
        texts_out["unsteered"] = [generate(model, prompt) for prompt in PROMPTS]
        tables["steering by layer"] = pd.concat(steering, ignore_index=True)

    tables["seconds"] = pd.DataFrame(
        {"step": list(seconds), "seconds": [round(s, 2) for s in seconds.values()]}
    )
    for name, table in tables.items():
        shown = table[table["head"] == "all"] if name.startswith("sites") else table
        print(f"\n{name}\n{shown.round(3).to_string(index=False)}")
    for label, continuations in texts_out.items():
        print(f"\n{label}")
        for text in continuations:
            print("  ", text.replace("\n", " "))
    with new_folder(args.out, overwrite=args.overwrite, holding="chain.json") as out:
        for name, table in tables.items():
            table.to_csv(out / f"{name.replace(':', '').replace(',', '')}.csv", index=False)
        write_json(out / "chain.json", report(args, seconds, texts_out))


def generate(model: Any, prompt: str) -> str:
    """Continue a prompt greedily."""
    return str(model.generate(prompt, max_new_tokens=30, do_sample=False, verbose=False))


def fitting(examples: list[sqs.LabelledExample], model: Any) -> list[sqs.LabelledExample]:
    """Keep the examples that the model's context of 512 tokens holds."""
    n_ctx = int(model.cfg.n_ctx)
    return [
        example for example in examples if len(tokenize_example(model, example).tokens) <= n_ctx
    ]


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long a step takes."""
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def report(
    args: argparse.Namespace, seconds: dict[str, float], texts: dict[str, list[str]]
) -> dict[str, Any]:
    """Return settings, times, texts and versions."""
    packages = ("torch", "transformer-lens", "sae-lens", "transformers", "sae-query-steer")
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in ("data", "out", "overwrite")
        },
        "seconds": seconds,
        "texts": texts,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


if __name__ == "__main__":
    main()
