"""What the steer on the tutor depends on: a table for each choice that the paper leaves open.

    python -m experiments.tutor.ablations --out DIR [--tutor DIR] [--only sparsity heads ...]

Everything but the named choice is as in the demo: TopK SAEs of 64 latents a head, 8 firing, 100,000
tokens, centroids at the last prompt token of 300 prompts that request a level, squared distance in
one step, all heads of the steered layer. Each row's strength is chosen on validation prompts at a
perplexity ratio of 1.5 or less. What was written is logged: a run that was stopped goes on.
"""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import sae_query_steer as sqs
from sae_query_steer.compare import (
    DESCENTS,
    ComparisonLog,
    DemoSettings,
    Descent,
    Method,
    descent_methods,
    level_judge,
)
from sae_query_steer.compare.comparison import operating_point, strength_curves
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.compare.tutor_task import (
    MAX_NEW_TOKENS,
    TASKS,
    note_judge,
    training_examples,
    tutor_cases,
)
from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.storage.folders import new_file
from sae_query_steer.toy import TUTOR_FOLDER, TutorCorpus
from sae_query_steer.toy.corpus import Split

DISTANCE = replace(
    next(d for d in DESCENTS if d.name == "squared distance"), step_sizes=(0.5, 1.0, 2.0, 4.0)
)
PROTOTYPE = next(d for d in DESCENTS if d.name == "prototype")
SPANS = {
    "last prompt token": sqs.LastPromptToken(),
    "last 4 prompt tokens": sqs.scopes.LastPromptTokens(4),
    "prompt tokens": sqs.scopes.PromptTokens(),
    "first response token": sqs.scopes.FirstResponseTokens(1),
    "response tokens": sqs.scopes.ResponseTokens(),
}
SETTINGS = DemoSettings()


class Ablations:
    """Rows of the tables: each a method at its own strength, on the same prompts."""

    def __init__(self, tutor: Path, folder: Path, layer: int, n: int) -> None:
        self.model, self.layer = sqs.load_model(str(tutor), device="cpu"), layer
        model = self.model
        self._saes: dict[tuple[int, int, int], sqs.QuerySAEs] = {}
        self.sites = sqs.query_sites(model, [layer])
        self.requested, self.opened = training_examples(model, SETTINGS.n_train, seed=SETTINGS.seed)
        weights = hashlib.sha256((tutor / "model.safetensors").read_bytes()).hexdigest()
        log = ComparisonLog(folder / "log.jsonl", {"layer": layer, "n": n, "tutor": weights})
        classifier = level_judge()
        self.scorers = {}
        sizes: tuple[tuple[Split, int, int], ...] = (("validation", 36, 1), ("test", n, 2))
        for split, size, seed in sizes:
            cases = {task: tutor_cases(task, split, size, seed=seed) for task in TASKS}
            self.scorers[split] = TextScorer(
                model,
                cases,
                classifier,
                max_new_tokens=MAX_NEW_TOKENS,
                split=split,
                log=log,
                batch_size=120,
                grounding=note_judge([case for some in cases.values() for case in some]),
            )

    def saes(self, d_sae: int = 64, k: int = 8, tokens: int = 100_000) -> sqs.QuerySAEs:
        """Return SAEs of the steered layer."""
        if (d_sae, k, tokens) not in self._saes:
            self._saes[d_sae, k, tokens] = sqs.train_query_saes(
                self.model,
                [e.prompt + e.response for e in self.requested + self.opened],
                self.sites,
                sqs.TrainingConfig(
                    sae=sqs.sae.TopK(d_sae_per_head=d_sae, k=k),
                    training_tokens=tokens,
                    seed=SETTINGS.seed,
                ),
            )
        return self._saes[d_sae, k, tokens]

    def explained(self, saes: sqs.QuerySAEs) -> float:
        """Return the explained variance of the training tokens, mean over the heads."""
        return float(saes.metrics["explained_variance"].to_numpy().mean())

    def method(
        self,
        name: str,
        saes: sqs.QuerySAEs,
        descent: Descent = DISTANCE,
        *,
        span: str = "last prompt token",
        examples: Sequence[sqs.LabelledExample] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Method:
        """Return the demo's steer with something changed; the name says what."""
        chosen = self.requested if examples is None else examples
        targets = sqs.CentroidTargetBuilder(self.model, saes).fit(
            sqs.tokenize_examples(self.model, chosen, span=SPANS[span])
        )
        (method,) = descent_methods(
            name, saes, {span: targets}, [descent], layers=[[self.layer]], heads=[heads]
        )
        return method

    def row(self, method: Method) -> dict[str, object]:
        """Return a method's success on both tasks, each at its own strength."""
        points = {
            task: operating_point(curve).strength
            for task, curve in strength_curves(self.scorers["validation"], [method])[0].items()
        }
        row: dict[str, object] = {}
        for task, strength in points.items():
            found = self.scorers["test"].score(method, strength, [task])[task]
            low, high = wilson_interval(sum(found.success), len(found.success))
            row |= {
                task: f"{found.success_rate:.2f} [{low:.2f}, {high:.2f}]",
                f"{task}: strength": f"{strength:g}",
                f"{task}: ratio": f"{found.perplexity_ratio:.2f}",
            }
        return row

    def validation_success(self, method: Method) -> float:
        """Return the success on the validation cases at the best strength, mean over the tasks."""
        (curves,) = strength_curves(self.scorers["validation"], [method])
        return sum(operating_point(c).success_rate for c in curves.values()) / len(curves)

    def sparsity(self) -> Iterator[dict[str, object]]:
        """Latents that fire, of 64."""
        for k in (1, 2, 4, 8, 16, 32):
            saes = self.saes(k=k)
            told = {"k": k, "explained variance": f"{self.explained(saes):.3f}"}
            yield told | self.row(self.method(f"k={k}", saes))

    def dictionary(self) -> Iterator[dict[str, object]]:
        """Latents a head, 8 of which fire."""
        for d_sae in (16, 32, 64, 128, 256):
            saes = self.saes(d_sae=d_sae)
            told = {"d_sae_per_head": d_sae, "explained variance": f"{self.explained(saes):.3f}"}
            yield told | self.row(self.method(f"d_sae={d_sae}", saes))

    def tokens(self) -> Iterator[dict[str, object]]:
        """Tokens that the SAEs were trained on."""
        for tokens in (8_192, 16_384, 32_768, 100_000, 300_000):
            saes = self.saes(tokens=tokens)
            told = {"training tokens": tokens, "explained variance": f"{self.explained(saes):.3f}"}
            yield told | self.row(self.method(f"tokens={tokens}", saes))

    def steps(self) -> Iterator[dict[str, object]]:
        """Steps and step size of the descent on prototypes; nothing is chosen."""
        for n_steps in (1, 5, 20, 100):
            for step_size in (0.3, 1.0, 3.0, 10.0):
                descent = replace(PROTOTYPE, n_steps=n_steps, step_sizes=(step_size,))
                method = self.method(f"prototype, {n_steps} steps", self.saes(), descent)
                yield {"steps": n_steps, "step size": step_size} | self.row(method)

    def temperature(self) -> Iterator[dict[str, object]]:
        """Temperature of the prototypes' posterior."""
        for temperature in (0.1, 0.5, 1.0, 2.0, 10.0):
            objective = sqs.PrototypeLogLikelihood(temperature=temperature)
            descent = replace(PROTOTYPE, objective=objective)
            method = self.method(f"temperature={temperature}", self.saes(), descent)
            yield {"temperature": temperature} | self.row(method)

    def span(self) -> Iterator[dict[str, object]]:
        """Where the centroids are taken, and from which prompts."""
        for span in SPANS:
            for kind, examples in (("requested", self.requested), ("open", self.opened)):
                method = self.method(f"{kind} prompts", self.saes(), span=span, examples=examples)
                yield {"centroids over": span, "prompts": kind} | self.row(method)

    def examples(self) -> Iterator[dict[str, object]]:
        """Labelled prompts of each class, three draws of each number."""
        for n in (5, 20, 100, 500):
            for seed in (10, 11, 12) if n < 500 else (10,):
                some = TutorCorpus("train", seed=seed).examples(6 * n)
                method = self.method(f"{n} examples, draw {seed}", self.saes(), examples=some)
                yield {"examples a class": n, "draw": seed} | self.row(method)

    def heads(self) -> Iterator[dict[str, object]]:
        """Heads: all, one by one, and greedily, the one that helps most on validation first."""
        make = partial(self.method, "heads", self.saes())
        every = list(range(self.sites[0].n_heads))
        yield {"heads": "all"} | self.row(make())
        for head in every:
            yield {"heads": str(head)} | self.row(make(heads=[head]))
        chosen: list[int] = []
        while len(chosen) < len(every) - 1:
            rest = [head for head in every if head not in chosen]
            best = max(rest, key=lambda h: self.validation_success(make(heads=[*chosen, h])))
            chosen.append(best)
            if len(chosen) > 1:
                said = f"greedily: {', '.join(map(str, chosen))}"
                yield {"heads": said} | self.row(make(heads=list(chosen)))


TABLES = ("sparsity", "dictionary", "tokens", "steps", "temperature", "span", "examples", "heads")


def main() -> None:
    """Run the tables that were asked for, print them as Markdown and write them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and log")
    parser.add_argument("--tutor", type=Path, default=TUTOR_FOLDER, help="a tutor with notes")
    parser.add_argument("--layer", type=int, default=1, help="the layer to steer")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="which tables")
    parser.add_argument("--n", type=int, default=120, help="test prompts of each task")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ablations = Ablations(args.tutor, args.out, args.layer, args.n)
    for name in args.only:
        table = getattr(ablations, name)
        found = pd.DataFrame(table())
        with new_file(args.out / f"{name}.csv") as new:
            found.to_csv(new, index=False)
        print(f"\n### {name}\n{table.__doc__}\n")
        print("| " + " | ".join(found.columns) + " |\n|" + "---|" * len(found.columns))
        for row in found.astype(str).itertuples(index=False):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
