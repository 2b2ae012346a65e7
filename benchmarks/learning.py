"""Seconds of learning targets of two classes from ten topics on SmolLM2, both in one batch.

    python -m benchmarks.learning [--quick] [--json FILE] [--rounds N] [--threads N]
                                  [--backend bridge|hooked]

The other side runs all layers at every update, ours those from the first steered one on where the
backend can start there; `equal` says that both learned the same. Reading the prompts is counted in,
writing the examples is not. --quick learns at layer 20 alone, from four topics, in 10 updates.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import sae_query_steer as sqs
from benchmarks.rounds import faster, seconds_of, show
from sae_query_steer.compare.exercise_task import exercise_examples
from sae_query_steer.compare.learned import MOVE, SCOPE
from sae_query_steer.learning import no_moves
from sae_query_steer.models.prefix import PrefixedRows

CLASSES = ("analyze", "create")
LAYERS = {"layer 20": [20], "layers 18 to 22": [18, 19, 20, 21, 22]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer topics, updates and rounds")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--backend", choices=["bridge", "hooked"], default="bridge")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = sqs.load_smollm2(backend=args.backend)
    n_topics, n_updates = (4, 10) if args.quick else (10, 60)
    opened, requested = (
        sqs.tokenize_examples(model, [e for e in some if e.label in CLASSES])
        for some in exercise_examples(model, n_topics, seed=0)
    )

    def learn(layers: list[int]) -> Any:
        encoders = sqs.sae.identity_encoders(sqs.query_sites(model, layers))
        recipe = sqs.LatentGradientSteerer(
            encoders,
            no_moves(model, encoders, CLASSES),
            target="create",
            objective=MOVE.objective,
            n_steps=MOVE.n_steps,
            step_size=MOVE.step_sizes[0],
            max_relative_change=0.5,
            scope=SCOPE,
        )
        learner = sqs.TargetLearner(model, recipe, n_updates=n_updates, patience=n_updates)
        return learner.fit(opened, counterparts=requested)

    def whole(layers: list[int]) -> Any:
        with patch.object(PrefixedRows, "unchanged", lambda *_: None):
            return learn(layers)

    table = []
    for name, layers in list(LAYERS.items())[: 1 if args.quick else None]:
        found: dict[str, Any] = {}

        def ours(layers: list[int] = layers, found: dict[str, Any] = found) -> None:
            found["ours"] = learn(layers).means

        def other(layers: list[int] = layers, found: dict[str, Any] = found) -> None:
            found["other"] = whole(layers).means

        rounds = args.rounds or (1 if args.quick else 3)
        seconds = seconds_of(ours, other, rounds, warm_up=False)
        pairs = zip(*(means.values() for means in found.values()), strict=True)
        equal = all(torch.equal(*pair) for pair in pairs)
        table.append(faster(f"two classes, {n_topics} topics, {name}", seconds, equal=equal))
    show(table, args.json)


if __name__ == "__main__":
    main()
