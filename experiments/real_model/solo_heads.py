"""Are the SAEs of one run over all heads as good as SAELens's own solo runs, on a real model?

    python -m experiments.real_model.solo_heads --data DIR --out DIR [--heads 0:1,2:5,4:3]

DIR holds stories260K/ (a Hugging Face folder: 5 layers of 8 heads of 8), bloom_yahya2012/,
feedback_saf/ and text_openstax_psychology/. One run of ours trains the SAEs of all 40 heads. Of
three heads, SAELens's runner trains an SAE each, on the same token rows with the same settings,
twice: from a decoder bias of zero, as it does by itself, and from the mean query, as ours does. A
second run of ours with the next seed shows how far chance alone carries two equal trainings apart.

All are scored by `evaluate_saes` on documents that were held out: the SAE of a solo run takes the
place of its head among ours, and that head alone is replaced in the model. Compared are, without
--heads, the first, the middle and the last layer, of each the head with the widest gap on training
text: what the model loses when the head's mean query replaces its query (ce_mean - ce_clean, in
nats). The choice knows no SAE. On the held-out text that gap is what "CE recovered"
(ce_score_mean) divides by, so where it is small, CE recovered is noise. "KL recovered"
(kl_score_mean) has no such weakness. Without a gap CE recovered is NaN. --out gets the table as
compared.csv, the rest as solo_heads.json.
"""

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from torch import Tensor

import sae_query_steer as sqs
from sae_query_steer.data.token_rows import token_rows
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.loading import model_name
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.markdown import markdown_table
from sae_query_steer.storage.records import write_json
from sae_query_steer.training.reconstruction import reconstruction_metrics

HELD_OUT = 5
"""Every fifth document is held out."""

GAP_ROWS = 64
"""Rows of training text by which heads are chosen."""

OURS, ALONE, FROM_MEAN = "ours", "SAELens", "SAELens, from the mean"
OTHER_SEED = "ours, next seed"

SCORES = {
    "EV": "explained_variance",
    "CE recovered": "ce_score_mean",
    "KL recovered": "kl_score_mean",
}
"""What is compared, by the name that the tables give it."""


def main() -> None:
    """Train both sides, score them and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with the real data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--heads", type=given, help="layer:head,... to compare; default: see above")
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens")
    parser.add_argument("--eval-tokens", type=int, default=32_768, help="tokens held out")
    parser.add_argument("--d-sae", type=int, default=64, help="latents of each head")
    parser.add_argument("--k", type=int, default=4, help="latents of a head that may fire")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of both sides")
    parser.add_argument("--batch", type=int, default=512, help="tokens of a training step")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = sqs.load_model(str(args.data / "stories260K"), device="cpu")
    rows, held_out = split(model, documents(args.data), args.seed)
    held_out = held_out[: args.eval_tokens // held_out.shape[1]]
    heads = args.heads or widest_gaps(model, rows[:GAP_ROWS])

    warm = argparse.Namespace(**vars(args) | {"tokens": 8 * args.batch})  # not measured
    saelens(model, rows, *next(iter(heads.items())), warm, from_mean=False)
    ours(model, rows, None, warm, args.seed)
    seconds: dict[str, float] = {}
    with timed(seconds, OURS):
        together = ours(model, rows, None, args, args.seed)
    sides: dict[str, Mapping[str, Any]] = {OURS: together}
    for name in (ALONE, FROM_MEAN):
        with timed(seconds, name):
            solo = [
                saelens(model, rows, layer, head, args, from_mean=name == FROM_MEAN)
                for layer, head in heads.items()
            ]
        sides[name] = in_place(together, solo)
    with timed(seconds, OTHER_SEED):
        sides[OTHER_SEED] = ours(model, rows, list(heads), args, args.seed + 1)
    with timed(seconds, "scores"):
        every = explained_variance(model, together, held_out)
        n, chosen = held_out.numel(), {layer: [head] for layer, head in heads.items()}
        found = {
            name: sqs.diagnostics.evaluate_saes(model, saes, held_out, n_tokens=n, heads=chosen)
            for name, saes in sides.items()
        }
    mine = found.pop(OURS)
    compared = pd.concat([beside(name, mine, other) for name, other in found.items()])

    for scores in ("EV|CE|gap", "KL"):
        print(f"{markdown(compared.filter(regex=f'^(other|layer|head|{scores})'))}\n")
    print(
        f"EV of ours over all {len(every)} heads, held out: mean {fmean(every):.3f}, "
        f"least {min(every):.3f}, largest {max(every):.3f}"
    )
    print(
        f"seconds: ours, all {len(every)} heads in one run: {seconds[OURS]:.1f}; "
        f"SAELens, {len(heads)} solo runs: {seconds[ALONE]:.1f}"
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    packages = ("torch", "transformer-lens", "sae-lens", "transformers", "sae-query-steer")
    report = {
        "settings": settings | {"heads": [f"{layer}:{head}" for layer, head in heads.items()]},
        "tokens": {"training text": rows.numel(), "held out and scored": n},
        "explained variance of ours": every,
        "seconds": seconds,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
    with new_folder(args.out, overwrite=args.overwrite, holding="solo_heads.json") as out:
        compared.to_csv(out / "compared.csv", index=False)
        write_json(out / "solo_heads.json", report)


def documents(data: Path) -> list[str]:
    """Return the distinct documents: exam questions, feedback on answers, textbook paragraphs.

    The feedback goes without its question: 22 questions would stand on both sides of the split.
    """
    questions = pd.read_csv(data / "bloom_yahya2012" / "yahya-2012.csv")["QUESTION"]
    feedback = pd.read_json(data / "feedback_saf" / "saf.jsonl", lines=True)
    feedback = feedback.loc[feedback["lang"] == "english", "response_feedback"]
    book = (data / "text_openstax_psychology" / "text.txt").read_text(encoding="utf-8")
    texts = [*questions, *feedback, *book.splitlines()]
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def split(model: Any, texts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """Return the token rows of the training part and of the part held out, in random order."""
    texts = random.Random(seed).sample(texts, len(texts))
    training = [text for place, text in enumerate(texts) if place % HELD_OUT]
    return token_rows(model, training), token_rows(model, texts[::HELD_OUT])


def given(heads: str) -> dict[int, int]:
    """Return the head of each layer in "layer:head,..."."""
    pairs = (one.split(":") for one in heads.split(","))
    return {int(layer): int(head) for layer, head in pairs}


def widest_gaps(model: Any, rows: Tensor) -> dict[int, int]:
    """Return the head with the widest gap in the first, the middle and the last layer."""
    sites = sqs.query_sites(model)
    encoders = sqs.sae.identity_encoders([sites[0], sites[len(sites) // 2], sites[-1]])
    every = range(sites[0].n_heads)
    found = sqs.diagnostics.evaluate_saes(model, encoders, rows, n_tokens=rows.numel(), heads=every)
    widest = found.loc[(found["ce_mean"] - found["ce_clean"]).groupby(found["layer"]).idxmax()]
    return dict(zip(widest["layer"].tolist(), widest["head"].tolist(), strict=True))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a `with` block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def ours(
    model: Any, rows: Tensor, layers: Sequence[int] | None, args: argparse.Namespace, seed: int
) -> sqs.QuerySAEs:
    """Train the SAEs of all heads of some layers, None for all, in one run."""
    return sqs.train_query_saes(
        model,
        rows,
        sqs.query_sites(model, layers),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=args.d_sae, k=args.k),
            training_tokens=args.tokens,
            train_batch_size_tokens=args.batch,
            lr=args.lr,
            prepend_bos=False,
            metric_tokens=0,
            seed=seed,
        ),
    )


def saelens(
    model: Any, rows: Tensor, layer: int, head: int, args: argparse.Namespace, *, from_mean: bool
) -> SAE[Any]:
    """Train the SAE of one head by SAELens's runner, and read what it saved."""
    (site,) = sqs.query_sites(model, [layer])
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=site.d_head, d_sae=args.d_sae, k=args.k),
            model_name=model_name(model),
            hook_name=site.hook_name,
            hook_head_index=head,
            streaming=False,
            prepend_bos=False,
            context_size=rows.shape[1],
            training_tokens=args.tokens,
            train_batch_size_tokens=args.batch,
            store_batch_size_prompts=16,
            n_batches_in_buffer=64,
            lr=args.lr,
            checkpoint_path=None,
            output_path=folder,
            device=str(model.cfg.device),
            logger=LoggingConfig(log_to_wandb=False),
        )
        runner = LanguageModelSAETrainingRunner(
            config,
            override_dataset=Dataset.from_dict({"tokens": rows.tolist()}),
            override_model=model,
        )
        if from_mean:
            first = runner.activations_store.next_batch()
            runner.sae.b_dec.data.copy_(first.flatten(0, -2).mean(0))
        runner.run()
        return SAE.load_from_disk(folder)


def in_place(saes: Mapping[str, Any], solo: Sequence[SAE[Any]]) -> dict[str, Any]:
    """Return query-head SAEs in which the SAE of a solo run stands for its head."""
    joined = dict(saes)
    for one in solo:
        name, head = one.cfg.metadata.hook_name, one.cfg.metadata.hook_head_index
        parts = sqs.sae.split_heads(saes[name])
        parts[head] = one
        joined[name] = sqs.sae.join_heads(parts)
    return joined


def explained_variance(model: Any, saes: sqs.QuerySAEs, rows: Tensor) -> list[float]:
    """Return the explained variance of every head, for which the model need run only once."""
    batches = (
        {name: queries.flatten(0, 1).flatten(1) for name, queries in found.items()}
        for found in (read_activations(model, part.long(), list(saes)) for part in rows.split(16))
    )
    found = reconstruction_metrics(saes, batches)
    return found["explained_variance"].tolist()


def beside(name: str, ours: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each head: its scores on another side beside ours."""
    table = {"other": name, "layer": ours["layer"], "head": ours["head"]}
    for score, column in SCORES.items():
        table[f"{score} ours"], table[f"{score} other"] = ours[column], other[column]
        table[f"{score} difference"] = ours[column] - other[column]
    # Of the model and its mean query, so the same on all sides.
    table["gap"] = ours["ce_mean"] - ours["ce_clean"]
    table["KL of the mean query"] = ours["kl_mean"]
    return pd.DataFrame(table)


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, differences with their sign."""
    signed = {n: table[n].map("{:+.4f}".format) for n in table.columns if "difference" in n}
    return markdown_table(table.assign(**signed), digits=4)


if __name__ == "__main__":
    main()
