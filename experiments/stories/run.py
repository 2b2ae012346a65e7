"""Which classes of text do the queries of a real model carry, and can they be steered?

    python -m experiments.stories.run --data DIR --out DIR

DIR holds stories260K/ (a Hugging Face folder), bloom_yahya2012/ and feedback_mathdial/. The model
writes stories; rules label what follows a place in them (classes.py). For each labelling
the interchange effect says whether queries carry it, on some examples; the best site is looked at
again on others. Then real queries of the other class are patched in at all layers, and those
labellings that look best are steered (steering.py). At the end stand two studies of
separability alone: teacher moves and Bloom levels, which this model is too small to write.

A run that was stopped goes on where it was. Everything printed is in --out as CSV. Equal seeds give
equal numbers.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import norm

import sae_query_steer as sqs
from experiments.stories.classes import Candidate
from experiments.stories.steering import patched, scopes_of, scorer, steered
from experiments.stories.texts import all_candidates, counted, studies, written
from sae_query_steer.compare import ComparisonLog, TextScorer
from sae_query_steer.data.token_rows import token_rows
from sae_query_steer.models.activations import read_activations
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.positions import Span
from sae_query_steer.storage.folders import lock_for, new_file
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.training.reconstruction import reconstruction_metrics

D_SAE, K = 64, 8
"""Latents of a head, and how many fire."""
N_STEERED = 3
"""Candidates that are steered: dialogue, the best of the open ones, and the best of all."""


def main() -> None:
    """Run the steps that --out does not hold yet, and report all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with the real data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument("--stories", type=int, default=1000, help="stories to write")
    parser.add_argument("--tokens", type=int, default=300_000, help="SAE training tokens")
    parser.add_argument("--pairs", type=int, default=128, help="pairs of an interchange effect")
    parser.add_argument("--cases", type=int, default=150, help="prompts of a row, at most")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep = Kept(args.out, {n: getattr(args, n) for n in ("stories", "tokens", "pairs", "seed")})

    model = sqs.load_model(str(args.data / "stories260K"), device="cpu")
    texts = keep.texts("stories", lambda: written(model, args.stories, args.seed))
    candidates = all_candidates(model, texts, args.stories, args.seed)
    moves, bloom = studies(args.data)
    saes = trained(model, texts["open"], [e.prompt for e in moves + bloom], args, keep)

    keep.show("Examples", keep.table("examples", lambda: counted(candidates)))
    looked = [
        keep.table(f"sites {c.name}", lambda c=c: sites_table(model, saes, c, args))
        for c in candidates
    ]
    everything = pd.concat(looked, ignore_index=True)
    threshold = float(norm.isf(0.05 / len(everything)))
    best = keep.table("confirmed", lambda: confirmed(model, candidates, everything, args))
    keep.show("Layers, all heads, and the heads of each best layer: in CSV", best)
    print(
        f"{len(everything)} sites: z above {threshold:.2f} is wanted (Bonferroni, 5 %, one-sided)"
    )

    scorers = {c.name: scorers_of(model, c, args, keep.settings) for c in candidates}
    moved = [patched(model, c, scorers[c.name]["test"]) for c in candidates]
    keep.show("Real queries of the target class, all layers", shown(pd.concat(moved)))
    for candidate in to_steer(candidates, best):
        row = best[best["candidate"] == candidate.name].iloc[0]
        parts = scorers[candidate.name]
        for scope in scopes_of(candidate):
            title = f"Steering: {candidate.name}, {scope_name(scope)}"
            rows, curves = steered(model, saes, candidate, int(row["layer"]), parts, scope)
            keep.show(title, shown(rows))
            keep.table(f"{candidate.name} {scope_name(scope)} curves", lambda c=curves: c)
    for name, examples in (("teacher moves", moves), ("Bloom levels", bloom)):
        found = keep.table(f"study {name}", lambda e=examples: study(model, saes, e, args))
        keep.show(f"Separability alone: {name}", found)


class Kept:
    """A folder of results: each step is done once, and read when the run goes on."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        lock_for(self, folder)
        folder.mkdir(exist_ok=True)
        path = folder / "settings.json"
        if path.exists() and read_json(path) != settings:
            raise ValueError(
                f"{folder} holds a run with {read_json(path)}, not {settings}: give another --out"
            )
        write_json(path, settings)

    def table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return a table from its file, or make it and write the file."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            with new_file(path) as new:
                make().to_csv(new, index=False)
        return pd.read_csv(path)

    def texts(self, name: str, make: Callable[[], dict[str, list[str]]]) -> dict[str, list[str]]:
        """Return texts from their file, or make them and write the file."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            with new_file(path) as new:
                new.write_text(json.dumps(make()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def show(self, title: str, table: pd.DataFrame) -> None:
        """Print a table, and write it as CSV under its title."""
        name = re.sub("[^A-Za-z0-9]+", " ", title).strip()
        with new_file(self.folder / f"{name}.csv") as new:
            table.to_csv(new, index=False)
        print(f"\n{title}\n{table.round(3).to_string(index=False)}", flush=True)


def trained(
    model: Any, stories: list[str], others: list[str], args: argparse.Namespace, keep: Kept
) -> sqs.QuerySAEs:
    """Return SAEs of all heads, trained on stories and on the texts of the studies."""
    folder = args.out / "saes"
    if not folder.exists():
        sqs.train_query_saes(
            model,
            [story for i, story in enumerate(stories) if i % 10] + others,
            sqs.query_sites(model),
            sqs.TrainingConfig(
                sae=sqs.sae.TopK(d_sae_per_head=D_SAE, k=K),
                training_tokens=args.tokens,
                train_batch_size_tokens=1024,
                lr=1e-3,
                metric_tokens=0,
                seed=args.seed,
            ),
        ).save(folder)
    saes = sqs.QuerySAEs.load(folder)
    held_out = token_rows(model, stories[::10])
    batches = (
        {name: q.flatten(0, 1).flatten(1) for name, q in queries.items()}
        for part in held_out.split(16)
        for queries in [read_activations(model, part.long(), list(saes))]
    )
    scores = reconstruction_metrics(saes, batches)
    by_layer = scores.groupby("layer")[["explained_variance", "dead_share"]]
    keep.show("SAEs: stories held out", by_layer.agg(["mean", "min", "max"]).reset_index())
    return saes


def sites_table(
    model: Any, saes: sqs.QuerySAEs, candidate: Candidate, args: argparse.Namespace
) -> pd.DataFrame:
    """Return interchange effect and separability by layer, and by head of the best layer."""
    spans: dict[str, Span] = {"last prompt token": sqs.LastPromptToken()}
    if candidate.target is not None:  # several times as many tokens: of dialogue alone
        spans["response tokens"] = sqs.scopes.ResponseTokens()
    rows = []
    for name, span in spans.items():
        examples = sqs.tokenize_examples(model, candidate.parts["sites"], span=span)
        paired = {"seed": args.seed, "n_pairs": args.pairs}
        sites = sqs.query_sites(model)
        moved = sqs.diagnostics.interchange_effect(model, sites, examples, per_head=False, **paired)
        if name == "last prompt token":
            z = moved["class_effect"] / moved["class_effect_se"]
            best = int(moved["layer"].iloc[int(z.argmax())])
            alone = sqs.diagnostics.interchange_effect(model, [sites[best]], examples, **paired)
            moved = pd.concat([moved, alone[alone["head"] != "all"]])
        apart = sqs.diagnostics.separability(model, saes, examples, seed=args.seed)
        rows.append(moved.merge(apart, on=["layer", "head"]).assign(span=name))
    table = pd.concat(rows)
    table.insert(0, "candidate", candidate.name)
    table["z"] = table["class_effect"] / table["class_effect_se"]
    return table


def confirmed(
    model: Any, candidates: Sequence[Candidate], sites: pd.DataFrame, args: argparse.Namespace
) -> pd.DataFrame:
    """Return the best layer of each candidate, at the last prompt token, on other examples.

    The first effect chose the layer and is too large for that; the second did not.
    """
    rows = []
    for candidate in candidates:
        own = sites.query("candidate == @candidate.name and span == 'last prompt token'")
        row = own.query("head == 'all'").sort_values("z", ascending=False).iloc[0]
        heads = own.query("head != 'all'").sort_values("z", ascending=False)
        layer = int(row["layer"])
        again = sqs.diagnostics.interchange_effect(
            model,
            sqs.query_sites(model, [layer]),
            sqs.tokenize_examples(model, candidate.parts["confirm"]),
            n_pairs=args.pairs,
            per_head=False,
            seed=args.seed + 1,
        ).iloc[0]
        rows.append(
            {"candidate": candidate.name, "kind": candidate.kind, "layer": layer}
            | {"effect": row["class_effect"], "z": row["z"]}
            | {"effect again": again["class_effect"], "s.e.": again["class_effect_se"]}
            | {"z again": again["class_effect"] / again["class_effect_se"]}
            | {"share": again["toward_share"], "best head": heads["head"].iloc[0]}
            | {"its effect": heads["class_effect"].iloc[0], "its z": heads["z"].iloc[0]}
            | {"latents": row["accuracy_latents"], "raw q": row["accuracy_query"]}
            | {"position": row["accuracy_position"], "token": row["accuracy_token"]}
            | {"chance": row["chance"]}
        )
    return pd.DataFrame(rows)


def scorers_of(
    model: Any, candidate: Candidate, args: argparse.Namespace, settings: dict[str, Any]
) -> dict[str, TextScorer]:
    """Return what scores methods on the validation and on the test prompts of a candidate."""
    told = settings | {"cases": args.cases, "candidate": candidate.name}
    log = ComparisonLog(args.out / f"steering {candidate.name}.jsonl", told)
    sizes = {"validation": args.cases // 2, "test": args.cases}
    return {part: scorer(model, candidate, part, n, log, args.seed) for part, n in sizes.items()}


def to_steer(candidates: Sequence[Candidate], best: pd.DataFrame) -> list[Candidate]:
    """Return dialogue, the best other candidate of the model's own texts, and the best of all."""
    order = best.sort_values("effect again", ascending=False)
    own = [n for n in order[order["kind"] != "paired"]["candidate"] if n != "dialogue follows"]
    names = dict.fromkeys(["dialogue follows", own[0], *order["candidate"]])
    by_name = {candidate.name: candidate for candidate in candidates}
    return [by_name[name] for name in list(names)[:N_STEERED]]


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a table of outcomes that are printed."""
    ends = zip(rows["ci_low"], rows["ci_high"], strict=True)
    rows = rows.assign(interval=[f"{low:.2f} to {high:.2f}" for low, high in ends])
    names = {"task": "candidate", "method": "method", "layers": "layers", "objective": "objective",
             "scope": "scope", "step_size": "step", "delta_q_ratio": "change of q", "n": "n",
             "target_rate": "target rate", "interval": "95 %", "perplexity_ratio": "ppl ratio",
             "perplexity_ratio_original": "under own prompt"}  # fmt: skip
    return pd.DataFrame({new: rows[old] for old, new in names.items() if old in rows})


def study(
    model: Any, saes: sqs.QuerySAEs, examples: list[sqs.LabelledExample], args: argparse.Namespace
) -> pd.DataFrame:
    """Return by layer how well classes are told apart, over two spans.

    Over all tokens, of which there are many, every other text counts.
    """
    answered = [
        sqs.LabelledExample(prompt="Text:", response=f" {e.prompt}", label=e.label)
        for e in examples[::2]
    ]
    rows = []
    for name, span, some in (
        ("last prompt token", sqs.LastPromptToken(), examples),
        ("all tokens of the text", sqs.scopes.ResponseTokens(), answered),
    ):
        apart = sqs.diagnostics.separability(
            model, saes, sqs.tokenize_examples(model, some, span=span), seed=args.seed
        )
        by_head = apart.query("head != 'all'").sort_values("accuracy_latents", ascending=False)
        best = by_head.groupby("layer").first()
        found = apart.query("head == 'all'").set_index("layer", drop=False)
        columns = {
            "layer": found["layer"],
            "latents": found["accuracy_latents"],
            "raw q": found["accuracy_query"],
            "position": found["accuracy_position"],
            "token": found["accuracy_token"],
            "chance": found["chance"],
            "best head": best["head"],
            "its latents": best["accuracy_latents"],
            "tokens": found["n_test"],
        }
        rows.append(pd.DataFrame(columns).assign(span=name))
    return pd.concat(rows)


if __name__ == "__main__":
    main()
