"""Does query steering change which walk a model takes through a grid with walls?

    python -m experiments.gridworld.run --out DIR [--n 240]

Trains the gridworld's model into DIR/model (a model that lies there is not trained again) and, with
--free, one of the same texts whose training left open which layer chooses the route, into DIR/free.
For each it prints as Markdown: how often requests are obeyed; the interchange effect of each layer,
for queries of other prompts and of the same prompts with another request; in how many validation
cases real queries that are patched in there redirect the walk; and how the walks of the test cases
go, by simulation, before and after steering. The descents steer the one layer at which real queries
do most, that of the follow-up the middle layer as well, with strengths that are chosen on the
validation cases. A row is --n cases, as many for each target and source if --n is a multiple of
six.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sae_query_steer as sqs
from experiments.follow_up import FOLLOW_UP
from experiments.gridworld import (
    Aim,
    GridCorpus,
    GridTraining,
    grid_cases,
    train_gridworld,
    walk_judge,
    walk_scores,
)
from experiments.gridworld.cases import TASKS
from experiments.gridworld.training import MAX_NEW_TOKENS
from sae_query_steer.compare import (
    DESCENTS,
    Comparison,
    TextScorer,
    compare_methods,
    descent_methods,
    interchange_methods,
    prompt_methods,
)
from sae_query_steer.storage.markdown import markdown_table
from sae_query_steer.storage.records import read_json

FREE: dict[str, Any] = {"n_heads": 4, "look_layer": None}
"""Settings of a model whose training leaves open which layer, and which head, chooses the route."""


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--free", action="store_true", help="also a model with no fixed layer")
    parser.add_argument("--n", type=int, default=240, help="cases of each row")
    parser.add_argument("--n-validation", type=int, default=60, help="cases to choose strengths on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    settings = {"model": GridTraining(seed=args.seed)}
    if args.free:
        settings["free"] = GridTraining(seed=args.seed, **FREE)
    for name, training in settings.items():
        start = time.perf_counter()
        if not (args.out / name).exists():
            train_gridworld(args.out / name, training)
            print(f"trained in {time.perf_counter() - start:.0f} s")
        compare(args.out / name, args)
        print(f"\n{time.perf_counter() - start:.0f} s in all")


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Print the tables of one model."""
    card = read_json(folder / "gridworld.json")
    print(f"\n{folder.name}: {card['n_parameters']} parameters, n {card['n']}\n")
    asked = pd.DataFrame(card["walks"]).T
    print(markdown_table(asked.reset_index(names="prompts"), digits=3), flush=True)

    model = sqs.load_model(str(folder), device="cpu")
    sites = sqs.query_sites(model)
    examples = GridCorpus("train", seed=args.seed + 1).examples(300)
    opened = GridCorpus("train", seed=args.seed + 2).examples(300, open_share=1.0)
    seen = [e.prompt + e.response for e in examples + opened]

    def trained(sites: Any, sae: Any) -> Any:
        config = sqs.TrainingConfig(sae=sae, training_tokens=100_000, seed=args.seed)
        return sqs.train_query_saes(model, seen, sites, config)

    saes = trained(sites, sqs.sae.TopK(d_sae_per_head=64, k=8))
    dense = sqs.sae.identity_encoders(sites)
    pairs: list[Any] = grid_cases("redirect", "validation", 240, seed=args.seed)
    asking, others = (
        sqs.tokenize_examples(
            model, [sqs.LabelledExample(prompt=prompt, label=aim) for prompt, aim in some]
        )
        for some in (
            [(case.prompt, case.source) for case in pairs],
            [(case.requesting, case.target) for case in pairs],
        )
    )
    for name, counterparts in (("other prompts", None), ("the same prompts", others)):
        effect = sqs.diagnostics.interchange_effect(
            model,
            sites,
            asking,
            n_pairs=240,
            per_head=False,
            seed=args.seed,
            counterparts=counterparts,
        )
        effect = sqs.diagnostics.site_verdicts(effect).drop(columns="head")
        print(f"\nqueries of {name}\n\n{markdown_table(effect, digits=3)}", flush=True)

    choosing = scorer(model, "validation", args.n_validation, args.seed)
    layers = [site.layer for site in sites]
    patched: list[dict[str, Any]] = [
        {"layer": layer}
        | {task: o.success_rate for task, o in choosing.score(patch, 0.0, TASKS).items()}
        for layer, patch in zip(
            layers, interchange_methods(model, [[layer] for layer in layers]), strict=True
        )
    ]
    print(f"\n{markdown_table(pd.DataFrame(patched), digits=2)}")
    best = max(patched, key=lambda row: row["redirect"])["layer"]
    print(f"\nsteered: layer {best}", flush=True)

    methods = prompt_methods(opened, seed=args.seed, shots=(2,))
    methods += interchange_methods(model, [[best], layers])
    chosen = [site for site in sites if site.layer in {best, len(sites) // 2}]
    relu = trained(chosen, sqs.sae.Standard(d_sae_per_head=256))
    for sae in relu.values():
        sae.fold_W_dec_norm()
    of = {descent.name: descent for descent in DESCENTS}
    labelled = sqs.tokenize_examples(model, examples)
    for name, encoders, descents, steered in (
        ("dense descent", dense, [of["squared distance"]], [best]),
        ("SAE descent", saes, [of["prototype"], of["squared distance"]], [best]),
        ("follow-up", relu, [FOLLOW_UP], [site.layer for site in chosen]),
    ):
        found = sqs.CentroidTargetBuilder(model, encoders).fit(labelled)
        for layer in steered:
            methods += descent_methods(
                name, encoders, {"last prompt token": found}, descents, layers=[[layer]]
            )
    test = scorer(model, "test", args.n, args.seed + 1)
    print(f"\n{markdown_table(rows(test, compare_methods(choosing, test, methods)), digits=2)}")


def scorer(model: Any, split: Any, n: int, seed: int) -> TextScorer:
    """Return the scorer of some cases of both tasks."""
    cases = {task: grid_cases(task, split, n, seed=seed) for task in TASKS}
    judge = walk_judge([case for some in cases.values() for case in some])
    return TextScorer(
        model, cases, judge, max_new_tokens=MAX_NEW_TOKENS, split=split, batch_size=120
    )


def rows(scorer: TextScorer, result: Comparison) -> pd.DataFrame:
    """Return the table of the test cases: by target, success (steps beside a wall, steps)."""
    found = []
    texts = iter(result.texts["text"])
    for told in result.rows.to_dict("records"):
        cases: Any = scorer.cases[told["task"]]
        written = [next(texts) for _ in cases]
        name = [told["method"]]
        if isinstance(told["objective"], str):
            name.append(f"{told['objective']} ({told['step_size']:g})")
        if told["layers"]:
            name.append(f"layer {told['layers']}")
        low, high = told["success_low"], told["success_high"]
        row: dict[str, Any] = {"prompts": told["task"], "method": ", ".join(name)}
        row["success"] = f"{told['success']:.2f} [{low:.2f}, {high:.2f}]"
        for aim in Aim:
            own = [i for i, case in enumerate(cases) if case.target == aim]
            score = walk_scores([cases[i] for i in own], [written[i] for i in own])
            walked = f"{score['by_wall']:.2f}, {score['steps']:.2f}"
            row[f"to {aim}"] = f"{score['success']:.2f} ({walked})"
        row["reached"] = walk_scores(cases, written)["reached"]
        row["perplexity ratio"] = told["perplexity_ratio"]
        row["change of q"] = told["delta_q_ratio"]
        found.append(row)
    return pd.DataFrame(found)


if __name__ == "__main__":
    main()
