"""The tasks of the studies: examples, judge, SAEs and learned targets, made once in a folder."""

import argparse
import copy
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import sae_query_steer as sqs
from sae_query_steer.compare.comparison import MAX_PERPLEXITY_RATIO, strength_curves
from sae_query_steer.compare.exercise_judges import fit_exercise_judge, verb_judge
from sae_query_steer.compare.exercise_task import (
    MAX_NEW_TOKENS,
    exercise_cases,
    exercise_examples,
)
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.learned import MOVE, POINT, SCOPE
from sae_query_steer.compare.methods import Descent, Method, SteeringCase
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.data.prompts import chat_prompt
from sae_query_steer.learning import TargetLearner, no_moves
from sae_query_steer.models.activations import read_activations
from sae_query_steer.sae.core import with_weights
from sae_query_steer.scopes.joins import scope_name

Encoders = Mapping[str, Any]
TOP_K = sqs.sae.TopK(d_sae_per_head=256, k=16)


class Task:
    """The exercise task on one model, and the folder of what was made for it."""

    classes: Sequence[str] = tuple(sqs.BloomLevel)
    tasks: Sequence[str] = ("open", "open, trained wording", "redirected, trained wording")
    """With the "trained wording" the templates and actions are those of the split "train"; the
    topics are always those of the split."""

    from_counterparts = True
    """Whether targets are learned from prompts that request the class, or from its responses."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out)
        (self.out / "targets").mkdir(parents=True, exist_ok=True)
        precision = args.matmul_precision
        torch.set_float32_matmul_precision(precision)
        self.told = {} if precision == "highest" else {"matmul_precision": precision}
        self.model = sqs.load_model(args.model)
        self.n_layers = int(self.model.cfg.n_layers)
        self.run, self.wide = self.layers(0.6, 0.77), self.layers(0.27, 0.77)
        self.saes = cache(self._saes)
        self.opened, requested = self.examples_of("train", args.n_train)
        self.drawn = cache(self._drawn)
        self.examples, self.requested = self.drawn(1)
        self.texts = [e.prompt + e.response for e in self.opened + requested]
        self.judge = self.fitted_judge()
        self.rows: dict[Any, Any] = {}
        self.rule = verb_judge()
        self.scorer = cache(self._scorer)
        self.limits = cache(self._limits)

    def layers(self, first: float, end: float) -> tuple[int, ...]:
        """Return the layers between two shares of the depth, one at least."""
        start = round(first * self.n_layers)
        return tuple(range(start, max(start + 1, round(end * self.n_layers))))

    def fitted_judge(self) -> Any:
        """Return the judge, trained on the model's own answers of the split "judge"."""
        judging = [self.examples_of("judge", self.args.n_judge, seed)[1] for seed in (0, 1)]
        held_out = self.examples_of("validation", self.args.n_judge // 2)[1]
        return fit_exercise_judge(judging[0] + judging[1], held_out)

    def examples_of(self, split: Any, n: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
        """Return open and requesting prompts with the model's answers, which are written once."""
        file = self.out / f"{split}{seed}.json"
        if not file.exists():
            made = self.made_examples(split, n, seed)
            kept = [[(e.prompt, e.response, str(e.label)) for e in some] for some in made]
            part = file.with_suffix(f".{os.getpid()}")  # another worker may write it too
            part.write_text(json.dumps(kept))
            part.replace(file)
        opened, requested = (
            [sqs.LabelledExample(prompt=p, response=r, label=k) for p, r, k in some]
            for some in json.loads(file.read_text())
        )
        return opened, requested

    def made_examples(self, split: Any, n: int, seed: int) -> tuple[list[Any], list[Any]]:
        """Return open and requesting prompts of n topics with the model's answers."""
        return exercise_examples(
            self.model, n, seed=seed, split=split, max_new_tokens=MAX_NEW_TOKENS
        )

    def _drawn(self, draws: int) -> list[Any]:
        """Return tokenised open and requesting prompts to learn from, topic by topic."""
        parts = [self.examples_of("train", self.args.n_train, seed) for seed in range(draws)]
        each, found = len(self.classes), []
        for side in zip(*parts, strict=True):  # open, then requesting
            by_topic = [[some[i : i + each] for i in range(0, len(some), each)] for some in side]
            some = [e for topic in zip(*by_topic, strict=True) for one in topic for e in one]
            read = sqs.tokenize_examples(self.model, some)
            found.append(read.with_responses_of(self.args.n_answer))
        return found

    def cases(self, task: str, split: Any, n: int) -> Sequence[SteeringCase]:
        """Return the first n cases of a split."""
        name: Any
        wording: Any
        name, _, wording = task.partition(", ")
        wording = "train" if wording else None
        return exercise_cases(self.model, name, split, n, seed=1, wording=wording)

    def _saes(
        self,
        seed: int = 0,
        layers: Sequence[int] = (),
        *,
        sae: Any = None,
        texts: str | None = None,
        **changes: Any,
    ) -> Encoders:
        """Return the trained SAEs of a run of layers, made once for each seed.

        Args:
            seed: of the training.
            layers: empty means `run`.
            sae: another kind of SAE than TopK.
            texts: a file to train on instead of the task's prompts and answers.
            changes: of TopK's settings (k, d_sae_per_head) and of `TrainingConfig`.
        """
        layers = layers or self.run
        told = changes | ({} if texts is None else {"texts": Path(texts).stem})
        kind = "" if sae is None else f"{type(sae).__name__.lower()}-"
        kind += "".join(f"{name}{value}-" for name, value in told.items())
        folder = self.out / f"saes-{kind}{layers[0]}-{layers[-1]}-seed{seed}"
        if not folder.exists():
            sizes = {name: changes.pop(name) for name in ("k", "d_sae_per_head") if name in changes}
            config = {
                "sae": replace(TOP_K, **sizes) if sae is None else sae,
                "training_tokens": self.args.training_tokens,
                "train_batch_size_tokens": 512,
                "metric_tokens": 4096,
                "seed": seed,
            }
            found = sqs.train_query_saes(
                self.model,
                self.texts if texts is None else sqs.read_texts(texts),
                sqs.query_sites(self.model, layers),
                sqs.TrainingConfig(**config | changes),
            )
            found.save(folder)
        return dict(sqs.QuerySAEs.load(folder))

    def dictionary(self, kind: Any, layers: Sequence[int] = (), seed: int = 0) -> Encoders:
        """Return trained SAEs, a control of them, or dense encoders, of some layers.

        Controls are those of `control_dictionaries`, and "sampled": see `sampled_rows`.
        """
        layers = layers or self.run
        if kind == "dense":
            return dict(sqs.sae.identity_encoders(sqs.query_sites(self.model, layers)))
        found = self.saes(seed, self.run if set(layers) <= set(self.run) else tuple(layers))
        if kind == "sampled":
            found = self.sampled_rows(found, seed)
        elif kind != "trained":
            found = sqs.baselines.control_dictionaries(found, kind, seed=seed)
        return {name: sae for name, sae in found.items() if layer_of(name) in layers}

    def sampled_rows(self, saes: Encoders, seed: int) -> Encoders:
        """Return SAEs whose decoder rows are queries of tokens drawn from the task's texts.

        The mean query of the head is taken off, and rows have the norms of the trained ones: what
        a dictionary has without training. The encoder is their transpose.
        """
        draw = random.Random(seed)
        tokenizer = self.model.tokenizer
        ids = [tokenizer(text)["input_ids"][:64] for text in draw.choices(self.texts, k=64)]
        alike = len(os.path.commonprefix(ids))  # the template: its queries are the same each time
        rows = [torch.tensor([one]) for one in ids]
        read = [read_activations(self.model, row, list(saes)) for row in rows]
        found = {}
        for name, sae in saes.items():
            queries = torch.cat([one[name][0, alike:] for one in read])  # [token head d_head]
            weights = {key: value.clone() for key, value in sae.state_dict().items()}
            n_rows = weights["W_dec"].shape[1]
            chosen = queries[draw.sample(range(len(queries)), n_rows)]
            drawn = (chosen - queries.mean(0)).transpose(0, 1).to(weights["W_dec"])
            norms = weights["W_dec"].norm(dim=-1, keepdim=True)
            weights["W_dec"] = (drawn * norms / drawn.norm(dim=-1, keepdim=True)).contiguous()
            weights["W_enc"] = weights["W_dec"].mT.contiguous()
            config = copy.deepcopy(sae.cfg)
            found[name] = with_weights(type(sae), config, weights, sae.W_dec.device)
        return found

    def learned(
        self,
        name: str,
        encoders: Encoders,
        *,
        budget: float = 0.5,
        topics: int | None = None,
        start: Any = None,
        scope: Any = SCOPE,
        shuffled: bool = False,
        wrong: float = 0.0,
        label_seed: int = 0,
        draws: int = 1,
        by_output_score: bool = False,
        descent: Descent | None = None,
        **learning: Any,
    ) -> Any:
        """Return learned moves, or points from centroids to start from; learned once.

        Args:
            name: of the folder that keeps them.
            encoders: SAEs or identity encoders.
            budget: ||change|| / ||activation|| at most.
            topics: learn from this many topics; None means three quarters of all. The last quarter
                chooses the update in any case.
            start: centroids of points.
            scope: the tokens that are changed.
            shuffled: give each example the class of another one: a control of capacity.
            wrong: probability that an example, held out or not, gets the class after its own.
            label_seed: seed of the draw of wrong labels.
            draws: learn from so many prompts of each topic and class; see `made_examples`.
            by_output_score: one gradient, no updates; see `TargetLearner.fit_output_scores`.
            descent: the steps towards points; None means `POINT`.
            learning: of `TargetLearner`.
        """
        folder = self.out / "targets" / name
        if folder.exists():
            return sqs.LearnedTargets.load(folder)
        descent = MOVE if start is None else descent or POINT
        recipe = sqs.LatentGradientSteerer(
            encoders,
            no_moves(self.model, encoders, self.classes) if start is None else start,
            target=self.classes[0],
            objective=descent.objective,
            n_steps=descent.n_steps,
            step_size=descent.step_sizes[0],
            max_relative_change=budget,
            scope=scope,
        )
        examples, requested = self.drawn(draws)
        each = len(self.classes) * draws
        n_topics = len(examples) // each
        n_learned = round(0.75 * n_topics)
        first = each * (n_learned if topics is None else topics)
        indices = [*range(first), *range(each * n_learned, each * n_topics)]
        some = [examples.subset(indices), requested.subset(indices)]
        if shuffled:
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
            labels = [some[0][i].label for i in order.tolist()]
            some = [relabelled(examples, labels) for examples in some]
        if wrong:
            draw = torch.rand(len(indices), generator=torch.Generator().manual_seed(label_seed))
            names, labels = list(map(str, self.classes)), [str(e.label) for e in some[0]]
            after = {name: names[i - len(names) + 1] for i, name in enumerate(names)}
            labels = [after[k] if x < wrong else k for k, x in zip(labels, draw, strict=True)]
            some = [relabelled(examples, labels) for examples in some]
        learning = {"n_updates": self.args.n_updates, "every": 10} | learning
        learner = TargetLearner(self.model, recipe, **learning)
        given: Any = {"held_out": range(first, len(indices))}
        if self.from_counterparts:
            given["counterparts"] = some[1]
        key = (topics, scope_name(scope), shuffled, wrong, label_seed, draws)
        if key not in self.rows:  # the prompts run once for all targets
            self.rows = {key: learner.rows(some[0], **given)}
        fit = learner.fit_output_scores if by_output_score else learner.fit
        found = fit(some[0], **given, rows=self.rows[key])
        found.save(folder)
        return found

    def centroids(self, encoders: Encoders) -> Any:
        """Return centroids of the prompts that request each level."""
        return sqs.CentroidTargetBuilder(self.model, encoders).fit(self.requested)

    def _scorer(self, split: Any, n: int, tasks: tuple[str, ...]) -> TextScorer:
        """Return the scorer of the first n cases of some tasks of a split."""
        return TextScorer(
            self.model,
            {task: self.cases(task, split, n) for task in tasks},
            self.judge,
            max_new_tokens=MAX_NEW_TOKENS,
            split=split,
            batch_size=60,
            measures_original=False,
            cache_bytes=int(self.args.cache_gb * 2**30),
        )

    def chosen(
        self, methods: Sequence[Method], tasks: Sequence[str]
    ) -> dict[str, tuple[Method, float, list[dict[str, Any]]]]:
        """Return which method, at which strength, does best on validation topics, by task.

        Of those with a perplexity ratio of at most 1.5, or that of unsteered texts if it is higher:
        they do not answer the request that the ratio is measured with. Of equals the most fluent:
        strengths of several methods can't be compared. With it what all did.
        """
        if len(methods) == 1 and len(methods[0].strengths) == 1:
            return {task: (methods[0], float(methods[0].strengths[0]), []) for task in tasks}
        scorer = self.scorer("validation", self.args.n_validation, tuple(tasks))
        curves = strength_curves(scorer, methods)
        found = {}
        for task, limit in self.limits(tuple(tasks)).items():
            outcomes = [(m, o) for m, c in zip(methods, curves, strict=True) for o in c[task]]
            fluent = [pair for pair in outcomes if pair[1].perplexity_ratio <= limit]
            method, best = (
                max(fluent, key=lambda pair: (pair[1].success_rate, -pair[1].perplexity_ratio))
                if fluent
                else min(outcomes, key=lambda pair: pair[1].perplexity_ratio)
            )
            curve = [
                {"scope": m.scope, "layers": m.layers, "strength": o.strength}
                | {"success": o.success_rate, "perplexity_ratio": o.perplexity_ratio}
                for m, o in outcomes
            ]
            found[task] = (method, best.strength, curve)
        return found

    def _limits(self, tasks: tuple[str, ...]) -> dict[str, float]:
        """Return the highest perplexity ratio of what is chosen, by task."""
        scorer = self.scorer("validation", self.args.n_validation, tasks)
        plain = scorer.score(Method(name="unsteered"), 0.0, tasks)
        return {t: max(MAX_PERPLEXITY_RATIO, o.perplexity_ratio) for t, o in plain.items()}

    def scored(
        self,
        method: Method,
        strength: float,
        split: Any,
        n: int,
        task: str,
        tasks: Sequence[str],
    ) -> dict[str, Any]:
        """Return the scores of a method on one of some tasks."""
        scorer = self.scorer(split, n, tuple(tasks))
        found = scorer.score(method, strength, [task])[task]
        verbs = self.rule([c.prompt for c in found.cases], list(found.texts))
        return {
            "success": found.success_rate,
            "rule": sum(map(str.__eq__, map(str, verbs), (c.target for c in found.cases))) / n,
            "perplexity_ratio": found.perplexity_ratio,
            "change": found.delta_q_ratio,
            "each": [int(s) for s in found.success],
            "texts": list(found.texts),
        }


class Forms(Task):
    """Three other classes on the same model: a text is a list, a story or a letter."""

    classes = ("list", "story", "letter")
    tasks = ("open", "open, trained wording")
    asks: Mapping[str, tuple[str, Sequence[str]]] = {
        "train": (
            "Write about {}.",
            (
                "Write it as bullet points.",
                "Tell it as a story that begins with Once upon a time.",
                "Make it a letter that begins with Dear.",
            ),
        ),
        "judge": (
            "I would like to read about {}.",
            (
                "Answer with a numbered list.",
                "Write it as a story that begins with Once upon a time.",
                "Write it as a letter to a friend.",
            ),
        ),
        "validation": (
            "Please inform me about {}.",
            (
                "Give me a list of points.",
                "Make it a story that begins with Once upon a time.",
                "Begin with Dear and write me a letter.",
            ),
        ),
        "test": (
            "What can you say about {}?",
            (
                "Give a list of five points.",
                "Begin with Once upon a time and tell a story.",
                "Write a letter to a friend that begins with Dear.",
            ),
        ),
    }
    """Opening of a prompt and requests of the classes, by split."""

    def made_examples(self, split: Any, n: int, seed: int) -> tuple[list[Any], list[Any]]:
        """Return prompts with answers; those of seed 1 and 2 are in the wording of other splits."""
        wording = split if seed == 0 else ("judge", "validation")[seed - 1]
        cases = self._cases(wording, split, 3 * n)
        asked = [str(case.requesting) for case in cases]
        texts = continuations(self.model, asked, max_new_tokens=MAX_NEW_TOKENS, batch_size=60).texts
        opened, requested = (
            [
                sqs.LabelledExample(prompt=prompt, response=text, label=case.target)
                for prompt, text, case in zip(prompts, texts, cases, strict=True)
            ]
            for prompts in ([case.prompt for case in cases], asked)
        )
        return opened, requested

    def cases(self, task: str, split: Any, n: int) -> Sequence[SteeringCase]:
        """Return the first cases of a split, n in all."""
        return self._cases("train" if "trained" in task else split, split, n)

    def _cases(self, wording: str, split: Any, n: int) -> Sequence[SteeringCase]:
        exercises = exercise_cases(self.model, "open", split, 6 * (n // 3), seed=1)
        topics = list(dict.fromkeys(case.topic for case in exercises))[: n // 3]
        tokenizer = self.model.tokenizer
        opening, requests = self.asks[wording]
        return [
            SteeringCase(
                prompt=chat_prompt(opening.format(topic), tokenizer),
                target=name,
                requesting=chat_prompt(f"{opening.format(topic)} {request}", tokenizer),
            )
            for topic in topics
            for name, request in zip(self.classes, requests, strict=True)
        ]

    def fitted_judge(self) -> Any:
        return sqs.compare.ClassifierJudge.fit(self.examples_of("judge", self.args.n_judge)[1])


class Openings(Forms):
    """Classes without a meaning: the answer begins with "The", "In" or "A".

    Targets are learned from responses, which the model goes on with after these words: no request
    stands for a class. Success is the first word.
    """

    classes = ("the", "in", "a")

    from_counterparts = False

    def made_examples(self, split: Any, n: int, seed: int) -> tuple[list[Any], list[Any]]:
        """Return prompts with answers that begin with the word of their class, twice."""
        del seed
        cases = self._cases(split, split, 3 * n)
        words = [case.target.capitalize() for case in cases]
        begun = [case.prompt + word for case, word in zip(cases, words, strict=True)]
        texts = continuations(self.model, begun, max_new_tokens=MAX_NEW_TOKENS, batch_size=60).texts
        made = [
            sqs.LabelledExample(prompt=case.prompt, response=word + text, label=case.target)
            for case, word, text in zip(cases, words, texts, strict=True)
        ]
        return made, made

    def _cases(self, wording: str, split: Any, n: int) -> Sequence[SteeringCase]:
        cases = super()._cases(wording, split, n)
        return [
            replace(case, target=self.classes[i % 3], requesting=None)
            for i, case in enumerate(cases)
        ]

    def fitted_judge(self) -> Any:
        def rule(prompt: str, text: str) -> str | None:
            del prompt
            first = text.split(maxsplit=1)[:1]
            return first[0].lower() if first and first[0].lower() in self.classes else None

        return sqs.compare.RuleJudge(rule, self.classes)


def layer_of(hook_name: str) -> int:
    """Return the layer of a hook name."""
    return int(hook_name.split(".")[1])


def relabelled(examples: Any, labels: Sequence[str]) -> Any:
    """Return examples with other labels."""
    some = [replace(e, label=label) for e, label in zip(examples, labels, strict=True)]
    return replace(examples, examples=some)


def task_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of a task; the description is a docstring's first line."""
    parser = argparse.ArgumentParser(description=str(doc).split("\n", 1)[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--n-train", type=int, default=20, help="topics")
    parser.add_argument("--n-judge", type=int, default=40, help="topics")
    parser.add_argument("--n-answer", type=int, default=14, help="tokens of an answer")
    parser.add_argument("--n-updates", type=int, default=40)
    parser.add_argument("--training-tokens", type=int, default=40_960)
    parser.add_argument("--cache-gb", type=float, default=5.0)
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "medium"),
        default="highest",
        help="of torch.set_float32_matmul_precision; medium multiplies in bfloat16, twice as fast "
        "on CPUs that can; it is told with each row, and targets of another precision are refused",
    )
    return parser
