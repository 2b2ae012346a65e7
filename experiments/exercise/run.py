"""What the SAE contributes to learned targets on a real instruct model, with its controls.

    python -m experiments.exercise.run sparsity --out runs/exercise
    python -m experiments.exercise.run norms --out runs/exercise
    python -m experiments.exercise.run topics --out runs/exercise
    python -m experiments.exercise.run layers --out runs/exercise

Each learns targets of the six levels from the model's own answers of the split "train" and scores
them on test topics. A row of results.jsonl is written as soon as it is measured; a stopped run goes
on with the next. SAEs, judge and examples are made once.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import sae_query_steer as sqs
from sae_query_steer.compare.exercise_demo import MOVE, SCOPE
from sae_query_steer.compare.exercise_judges import fit_exercise_judge, verb_judge
from sae_query_steer.compare.exercise_task import (
    MAX_NEW_TOKENS,
    exercise_cases,
    exercise_examples,
)
from sae_query_steer.compare.methods import descent_methods
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.learning import TargetLearner, no_moves

LEVELS = list(sqs.BloomLevel)
LAYERS = range(18, 23)


class Measuring:
    """The task on one model, and the file of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.known = [json.loads(line)["setting"] for line in lines]
        self.model = sqs.load_model(args.model)
        opened, requested = self.examples_of("train", args.n_train, 16)
        self.examples, self.requested = (
            cut(sqs.tokenize_examples(self.model, some), args.n_answer)
            for some in (opened, requested)
        )
        self.texts = [e.prompt + e.response for e in opened + requested]
        judged = (self.examples_of("judge", args.n_judge, MAX_NEW_TOKENS)[1],)
        judged += (self.examples_of("validation", 10, MAX_NEW_TOKENS)[1],)
        self.judge = fit_exercise_judge(*judged)
        print(json.dumps({"judge": self.judge.held_out}), flush=True)
        self.scorer = TextScorer(
            self.model,
            {
                task: exercise_cases(self.model, task, "test", args.n_test, seed=1)
                for task in ("open", "redirected")
            },
            self.judge,
            max_new_tokens=MAX_NEW_TOKENS,
            split="test",
            batch_size=72,
        )

    def examples_of(self, split: Any, n: int, n_tokens: int) -> tuple[list[Any], list[Any]]:
        """Return open and requesting prompts with the model's answers, which are written once."""
        file = self.out / f"{split}.json"
        if not file.exists():
            made = exercise_examples(self.model, n, seed=0, split=split, max_new_tokens=n_tokens)
            kept = [[(e.prompt, e.response, str(e.label)) for e in some] for some in made]
            file.write_text(json.dumps(kept))
        opened, requested = (
            [sqs.LabelledExample(prompt=p, response=r, label=k) for p, r, k in some]
            for some in json.loads(file.read_text())
        )
        return opened, requested

    def saes(self, seed: int = 0) -> dict[str, Any]:
        """Return the trained SAEs of the run of layers, made once for each seed."""
        folder = self.out / f"saes-{seed}"
        if folder.exists():
            return dict(sqs.QuerySAEs.load(folder))
        found = sqs.train_query_saes(
            self.model,
            self.texts,
            sqs.query_sites(self.model, LAYERS),
            sqs.TrainingConfig(
                sae=sqs.sae.TopK(d_sae_per_head=256, k=16),
                training_tokens=self.args.training_tokens,
                train_batch_size_tokens=512,
                metric_tokens=4096,
                seed=seed,
            ),
        )
        found.save(folder)
        print(found.metrics.groupby("layer").mean().to_string(), flush=True)
        return dict(found)

    def dense(self, layers: Any = LAYERS) -> dict[str, Any]:
        """Return identity encoders of some layers."""
        return dict(sqs.sae.identity_encoders(sqs.query_sites(self.model, layers)))

    def measure(
        self,
        setting: dict[str, Any],
        encoders: Callable[[], Mapping[str, Any]],
        *,
        budget: float = 0.5,
        topics: int | None = None,
        **learning: Any,
    ) -> None:
        """Learn moves with a setting, score them, and write a row."""
        if setting in self.known:
            return
        begun = time.monotonic()
        chosen = encoders()
        recipe = sqs.LatentGradientSteerer(
            chosen,
            no_moves(self.model, chosen, LEVELS),
            target=LEVELS[0],
            objective=MOVE.objective,
            n_steps=1,
            step_size=1.0,
            max_relative_change=budget,
            scope=SCOPE,
        )
        n_topics = len(self.examples) // 6
        kept = range(6 * round(0.75 * n_topics), 6 * n_topics)
        first = 6 * round(0.75 * n_topics if topics is None else topics)
        indices = [*range(first), *kept]
        learner = TargetLearner(self.model, recipe, n_updates=self.args.n_updates, **learning)
        learned = learner.fit(
            self.examples.subset(indices),
            counterparts=self.requested.subset(indices),
            held_out=range(first, len(indices)),
        )
        learned_in = time.monotonic() - begun
        (method,) = descent_methods(
            "learned moves",
            chosen,
            {"learned": learned},
            [replace(MOVE, step_sizes=(1.0,))],
            layers=[[int(name.split(".")[1]) for name in chosen]],
            scopes=[SCOPE],
            max_relative_change=budget,
        )
        active = [(mean != 0).sum(-1).float() for mean in learned.means.values()]
        row: dict[str, Any] = {
            "setting": setting,
            "kl_removed": sum(learned.share_removed.values()) / 6,
            "latents_a_head": float(torch.cat(active, dim=1).mean()),
            "latents_in_all": float(torch.cat(active, dim=1).sum(1).mean()),
        }
        rule = verb_judge()
        for task, found in self.scorer.score(method, 1.0, ["open", "redirected"]).items():
            first_verbs = rule([c.prompt for c in found.cases], list(found.texts))
            row |= {
                f"{task}": found.success_rate,
                f"{task}_by_class": {
                    level: sum(
                        s
                        for s, c in zip(found.success, found.cases, strict=True)
                        if c.target == level
                    )
                    / sum(c.target == level for c in found.cases)
                    for level in LEVELS
                },
                f"{task}_rule": sum(
                    v == c.target for v, c in zip(first_verbs, found.cases, strict=True)
                )
                / len(found.cases),
                f"{task}_perplexity_ratio": found.perplexity_ratio,
                f"{task}_change": found.delta_q_ratio,
                f"{task}_success": [int(s) for s in found.success],
            }
        row |= {"learned_in": learned_in, "seconds": time.monotonic() - begun}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: v for k, v in row.items() if not isinstance(v, (list, dict)) or k == "setting"}
        print(json.dumps(shown), flush=True)


def cut(examples: Any, n_tokens: int) -> Any:
    """Return examples with the first tokens of their responses."""
    some = [replace(e, tokens=e.tokens[: e.prompt_length + n_tokens]) for e in examples]
    return replace(examples, examples=some)


def dictionaries(task: Measuring) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """Yield the trained SAE and its controls, by name."""
    yield "trained", task.saes
    for kind in ("random", "permuted"):
        yield kind, lambda kind=kind: sqs.baselines.control_dictionaries(task.saes(), kind)


def sparsity(task: Measuring) -> None:
    """Success against the number of latents of a head, for each dictionary."""
    for n in (None, 8, 4, 16, 2, 32, 1):
        for name, encoders in dictionaries(task):
            setting = {"study": "sparsity", "dictionary": name, "n_latents": n}
            task.measure(setting, encoders, l1=0.1 if n is None else 0.02, n_latents=n)


def norms(task: Measuring) -> None:
    """Success against the norm of the change, sparse and dense."""
    for budget in (0.5, 0.25, 0.125, 1.0):
        for name, encoders in (("trained", task.saes), ("dense", task.dense)):
            l1 = 0.1 if name == "trained" else 0.0
            setting = {"study": "norms", "dictionary": name, "budget": budget}
            task.measure(setting, encoders, budget=budget, l1=l1)


def topics(task: Measuring) -> None:
    """Success against the number of topics that targets are learned from."""
    for n in (2, 5, 10):
        for name, encoders in (("trained", task.saes), ("dense", task.dense)):
            setting = {"study": "topics", "dictionary": name, "topics": n}
            task.measure(setting, encoders, topics=n, l1=0.1 if name == "trained" else 0.0)


def layers(task: Measuring) -> None:
    """Success of each layer alone, dense."""
    n = int(task.model.cfg.n_layers)
    order = sorted(range(n), key=lambda layer: (layer % 3, layer))
    for layer in order:
        setting = {"study": "layers", "dictionary": "dense", "layer": layer}
        task.measure(setting, lambda layer=layer: task.dense([layer]), budget=1.0)


def residual(task: Measuring) -> None:
    """Offsets of the residual stream after one layer, learned likewise."""
    for layer in (14, 20):
        encoder = sqs.sae.IdentityEncoder(n_heads=1, d_head=int(task.model.cfg.d_model))
        found = {f"blocks.{layer}.hook_resid_post": encoder}
        for budget in (0.25, 0.5):
            task.measure(
                {"study": "residual", "dictionary": "dense", "layer": layer, "budget": budget},
                lambda found=found: found,
                budget=budget,
            )


STUDIES = {study.__name__: study for study in (sparsity, norms, topics, layers, residual)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--n-train", type=int, default=20, help="topics")
    parser.add_argument("--n-judge", type=int, default=40, help="topics")
    parser.add_argument("--n-test", type=int, default=720, help="cases of each task")
    parser.add_argument("--n-answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--n-updates", type=int, default=60)
    parser.add_argument("--training-tokens", type=int, default=40_960)
    given = parser.parse_args()
    measuring = Measuring(given)
    for chosen in given.studies:
        STUDIES[chosen](measuring)
