"""The studies of the exercise task: which methods are measured, with which settings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import sae_query_steer as sqs
from experiments.exercise.task import Encoders, Task, layer_of
from experiments.follow_up import FOLLOW_UP
from sae_query_steer.compare.attention_methods import attention_bias_method, attention_method
from sae_query_steer.compare.exercise_demo import CENTROID, MEAN
from sae_query_steer.compare.interchange import interchange_methods
from sae_query_steer.compare.learned import MOVE, POINT, SCOPE
from sae_query_steer.compare.methods import (
    DESCENTS,
    Descent,
    Method,
    SteeringCase,
    decoder_rows_methods,
    descent_methods,
    intervention_methods,
    mean_difference_methods,
    prompt_methods,
    random_methods,
)
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.sites import query_sites

Job = tuple[dict[str, Any], Callable[[], Method | Sequence[Method]], float]
"""What is measured, how the method is made, and its strength; of several methods one and its
strength are chosen on validation topics, see `Task.chosen`."""

PENALTY = 0.1
"""l1 of sparse targets without a limit on the number of latents."""

LONG = {"n_updates": 120, "learning_rate": 0.02}
"""Updates after which the loss of sparse moves has stopped falling, which 40 are not."""


def moves(
    task: Task, name: str, encoders: Encoders, budget: float = 0.5, **learning: Any
) -> Method:
    """Return learned moves as a method."""
    targets = task.learned(name, encoders, budget=budget, **learning)
    scope = learning.get("scope", SCOPE)
    return learned_method(name, encoders, targets, MOVE, budget, scope)


def learned_method(
    name: str, encoders: Encoders, targets: Any, descent: Descent, budget: float, scope: Any = SCOPE
) -> Method:
    """Return a descent on targets as a method at strength 1, or the step size of the descent."""
    (method,) = descent_methods(
        name,
        encoders,
        {"learned": targets},
        [descent],
        layers=[[layer_of(hook_name) for hook_name in encoders]],
        scopes=[scope],
        max_relative_change=budget,
    )
    return method


def methods(task: Task) -> Iterator[Job]:
    """The main table: every method at its setting."""
    n = task.args.n_main

    def job(name: str, make: Callable[[], Method], strength: float = 1.0) -> Job:
        setting = {"study": "methods", "method": name, "strength": strength, "n": n}
        return setting, make, strength

    plain = {m.name: m for m in prompt_methods(task.opened, shots=(2,), separator="<|im_end|>\n")}
    for kind in ("trained", "random", "permuted"):
        yield job(
            f"moves, {kind}", lambda kind=kind: moves(task, kind, task.dictionary(kind), l1=PENALTY)
        )
    yield job("moves, dense", lambda: moves(task, "dense", task.dictionary("dense")))
    yield job("unsteered", lambda: plain["unsteered"])
    yield job("instruction", lambda: plain["instruction"])
    for kind in ("trained", "random"):
        yield job(
            f"moves, {kind}, at most 8 a head",
            lambda kind=kind: moves(task, f"{kind}-8", task.dictionary(kind), l1=0.02, n_latents=8),
        )
    yield job("residual offset", lambda: moves(task, "residual-20", residual_site(task), 0.25))
    yield job("points, trained", lambda: points(task), POINT.step_sizes[0])
    yield job(
        "moves, dense, one layer",
        lambda: moves(task, "dense-21", task.dictionary("dense", task.layers(0.7, 0.73)), 1.0),
    )
    yield job("few-shot (k=2)", lambda: plain["few-shot (k=2)"])
    if task.classes == Task.classes:  # levels have verbs
        for strength in (4.0, 8.0):
            yield job("logit bias", logit_bias_method, strength)
    yield job(
        "moves, dense, classes shuffled",
        lambda: moves(task, "dense-shuffled", task.dictionary("dense"), shuffled=True),
    )


def logit_bias_method() -> Method:
    """Return a constant on the logits of the verbs of the target at the first answer token."""
    words = {str(level): list(level.verbs) for level in sqs.BloomLevel}
    return Method(
        name="logit bias",
        steerer=lambda cases, strength: sqs.baselines.LogitBias(
            words, target=[case.target for case in cases], bias=strength
        ),
    )


def points(task: Task) -> Method:
    """Return learned points as a method."""
    saes = task.dictionary("trained")
    targets = task.learned("points", saes, start=task.centroids(saes))
    return learned_method("points", saes, targets, POINT, 0.5)


NUMBERS = ("n_latents", "n_latents_total")
"""Limits of `TargetLearner` on the number of latents."""


def sparsity(task: Task) -> Iterator[Job]:
    """Success against the number of latents of a head, and in all, for each dictionary."""
    limits = ((2, 32), (1, 8), (4, 2), (8, 16), (16, 4), (32, 1))  # of a head, in all
    for limit, n in [(k, n) for both in limits for k, n in zip(NUMBERS, both, strict=True)]:
        for kind in ("trained", "random", "permuted"):
            name = f"{kind}-{n}" + ("-in-all" if limit == "n_latents_total" else "")
            yield (
                {"study": "sparsity", "dictionary": kind, limit: n}
                | {"split": "test", "n": task.args.n_study},
                lambda kind=kind, name=name, limit=limit, n=n: sparse(task, name, kind, limit, n),
                1.0,
            )


def sparse(
    task: Task,
    name: str,
    kind: str,
    limit: str,
    n: int,
    *,
    seed: int = 0,
    layers: Sequence[int] = (),
    **learning: Any,
) -> Method:
    """Return moves of at most n latents of a head or in all."""
    a_head = n if limit == "n_latents" else 1
    rate = 0.05 * (64 / a_head) ** 0.5  # so that few latents reach the budget as well
    learning = {"l1": 0.02, "learning_rate": rate, limit: n} | learning
    return moves(task, name, task.dictionary(kind, layers, seed), **learning)


def seeds(task: Task) -> Iterator[Job]:
    """The dictionaries at 4 latents a head, of other seeds."""
    for seed in (1, 2):
        for kind in ("trained", "random", "permuted"):
            yield (
                {"study": "seeds", "dictionary": kind, "seed": seed, "n": task.args.n_study},
                lambda kind=kind, seed=seed: sparse(
                    task, f"{kind}-4-seed{seed}", kind, "n_latents", 4, seed=seed
                ),
                1.0,
            )


def scopes(task: Task) -> Iterator[Job]:
    """Moves at every token of the prompt and the response, not from the last prompt token on."""
    for kind in ("dense", "trained"):
        yield (
            {"study": "scopes", "dictionary": kind, "scope": "all", "n": task.args.n_study},
            lambda kind=kind: moves(
                task,
                f"{kind}-all-tokens",
                task.dictionary(kind),
                scope=sqs.scopes.EveryPosition(),
                l1=PENALTY if kind == "trained" else 0.0,
            ),
            1.0,
        )


def sparse_or_dense(task: Task, name: str, kind: str, *, seed: int = 0, **learning: Any) -> Method:
    """Return dense moves, or moves of at most 4 latents a head without a penalty."""
    name += f"-seed{seed}" * bool(seed)
    if kind == "dense":
        return moves(task, f"dense-{name}", task.dictionary(kind), **learning)
    learning = {"l1": 0.0, "seed": seed} | learning
    return sparse(task, f"{kind}-4-{name}", kind, "n_latents", 4, **learning)


SEEDS = (0, 1, 2)


def told_seed(seed: int) -> dict[str, int]:
    """Return the seed of a setting; empty for seed 0."""
    return {"seed": seed} if seed else {}


def norms(task: Task) -> Iterator[Job]:
    """Success against the norm of the change; without a penalty all changes reach the limit."""
    for budget in (0.4, 0.25, 0.8):
        for kind in ("trained", "random", "permuted", "dense"):
            yield (
                {"study": "norms", "dictionary": kind, "budget": budget, "n": task.args.n_study},
                lambda kind=kind, budget=budget: sparse_or_dense(
                    task, f"budget{budget}", kind, budget=budget
                ),
                1.0,
            )


def topics(task: Task) -> Iterator[Job]:
    """Success against the number of topics that targets are learned from."""
    for seed, n in product(SEEDS, (2, 5, 10)):
        for kind in ("trained", "random", "permuted", "sampled", *["dense"] * (not seed)):
            yield (
                {"study": "topics", "dictionary": kind, "topics": n, "n": task.args.n_study}
                | told_seed(seed),
                partial(sparse_or_dense, task, f"topics{n}", kind, seed=seed, topics=n),
                1.0,
            )


def noise(task: Task) -> Iterator[Job]:
    """Success against the share of examples with a wrong class, which the seed draws too."""
    for wrong, seed in product((0.3, 0.1, 0.0), SEEDS):
        dense = ["dense"] * bool(wrong or not seed)  # which has no seed but that of the labels
        for kind in ("trained", "random", "permuted", "sampled", *dense):
            learning = {"seed": seed, "wrong": wrong, "label_seed": seed}
            yield (
                {"study": "noise", "dictionary": kind, "wrong": wrong, "n": task.args.n_study}
                | told_seed(seed),
                partial(sparse_or_dense, task, f"wrong{wrong}", kind, **learning),
                1.0,
            )


def mixtures(task: Task) -> Iterator[Job]:
    """Moves towards two classes at once, at some weights: which class texts are of."""
    pair = [str(name) for name in task.classes[-2:]]
    for kind in ("trained", "random", "dense"):
        for weights in ((0.5, 0.5), (1.0, 1.0), (1.0, 0.5), (0.5, 1.0)):
            mixed = dict(zip(pair, weights, strict=True))

            def make(kind: str = kind, mixed: dict[str, float] = mixed) -> Method:
                found = sparse_or_dense(task, "wrong0.0", kind)

                def steerer(cases: Sequence[SteeringCase], strength: float) -> Any:
                    assert found.steerer is not None
                    return replace(found.steerer(cases, strength), target=[mixed] * len(cases))

                return replace(found, steerer=steerer)

            setting = {"study": "mixtures", "dictionary": kind, "target": mixed}
            yield setting | {"n": task.args.n_study}, make, 1.0


FACTORS: Sequence[dict[str, Any]] = (
    *[{"k": k} for k in (4, 64)],
    *[{"d_sae_per_head": d} for d in (64, 1024)],
    {"training_tokens": 10_240},
    *[{"lr": lr} for lr in (3e-4, 3e-3)],
    *[{"learning_rate": rate} for rate in (0.1, 0.4)],
    *[{"n_updates": n} for n in (5, 60)],
    *[{"n_steps": n, "step_size": size} for n, size in ((1, 0.9), (3, 0.3), (20, 0.05), (3, 1.0))],
)
"""One change each of the trained SAE's moves with 4 latents a head: of the SAEs (k, latents a head,
tokens, learning rate; else 16, 256, 40,960 and 1e-3), of the learner (learning rate and updates;
else 0.2 and `--n-updates`), or points of all latents in place of moves, by steps of the squared
distance."""


def factors(task: Task) -> Iterator[Job]:
    """Each choice of the method on its own, and SAEs of other texts, with three seeds."""
    changes = [(change, change) for change in FACTORS]
    changes += [({"texts": Path(file).stem}, {"texts": file}) for file in task.args.texts]
    for seed, (told, change) in product(SEEDS, changes):
        name = "-".join(f"{key}{value}" for key, value in told.items()) + f"-seed{seed}"
        yield (
            {"study": "factors", **told, "n": task.args.n_study} | told_seed(seed),
            partial(changed, task, f"changed-{name}", seed, change),
            1.0,
        )


def changed(task: Task, name: str, seed: int, change: dict[str, Any]) -> Method:
    """Return the moves of the trained SAE with one change; see `FACTORS`."""
    own = {key: value for key, value in change.items() if key in ("learning_rate", "n_updates")}
    steps = {key: value for key, value in change.items() if key in ("n_steps", "step_size")}
    of_saes = {key: value for key, value in change.items() if key not in own | steps}
    saes = task.saes(seed, task.run, **of_saes)
    if not steps:
        learning = {"learning_rate": 0.2, "l1": 0.0, "n_latents": 4} | own
        return moves(task, name, saes, **learning)
    descent = replace(POINT, n_steps=steps["n_steps"], step_sizes=(steps["step_size"],))
    start = task.centroids(saes)
    found = task.learned(name, saes, start=start, descent=descent)
    return learned_method("points", saes, found, descent, 0.5)


def wordings(task: Task) -> Iterator[Job]:
    """Moves of `Forms` that are learned from several wordings, tested in yet another one.

    Those learned from one wording are in the study `methods`.
    """
    for draws in (3, 2):
        for kind in ("dense", "trained", "random"):
            yield (
                {"study": "wordings", "dictionary": kind, "wordings": draws}
                | {"n": task.args.n_study},
                lambda kind=kind, draws=draws: moves(
                    task,
                    f"{kind}-wordings{draws}",
                    task.dictionary(kind),
                    draws=draws,
                    l1=0.0 if kind == "dense" else PENALTY,
                ),
                1.0,
            )
        yield (
            {"study": "wordings", "dictionary": "residual", "wordings": draws}
            | {"n": task.args.n_study},
            lambda draws=draws: moves(
                task, f"residual-wordings{draws}", residual_site(task), 0.25, draws=draws
            ),
            1.0,
        )
    for n in (4, 64, 8):
        for kind in ("trained", "random", "permuted"):
            yield (
                {"study": "wordings", "dictionary": kind, "wordings": 3, "n_latents": n}
                | {"n": task.args.n_study},
                lambda kind=kind, n=n: sparse(
                    task, f"{kind}-{n}-wordings3", kind, "n_latents", n, draws=3
                ),
                1.0,
            )


def layers(task: Task) -> Iterator[Job]:
    """Success of each layer alone, dense, on validation topics and test topics."""
    n_layers = int(task.model.cfg.n_layers)
    for layer in sorted(range(n_layers), key=lambda layer: (layer % 3, layer)):
        for split in ("validation", "test"):
            yield (
                {"study": "layers", "layer": layer, "split": split, "n": 60},
                lambda layer=layer: moves(
                    task, f"dense-{layer}", task.dictionary("dense", [layer]), 1.0
                ),
                1.0,
            )


def runs(task: Task) -> Iterator[Job]:
    """Success of five layers in a row, and of more, dense, at half of the norm."""
    last = int(task.model.cfg.n_layers) - 1
    fives = [(first, first + 4) for first in range(3, last - 3, 5)]
    for first, end in (*fives, (8, 17), (13, 22), (8, 22), (3, 27)):
        layers = range(first, end + 1)
        for split in ("validation", "test"):
            yield (
                {"study": "runs", "layers": f"{first}-{end}", "split": split}
                | {"n": task.args.n_study},
                lambda name=f"dense-{first}-{end}", layers=layers: moves(
                    task, name, task.dictionary("dense", layers)
                ),
                1.0,
            )
    for end in (17, 22):
        yield (
            {"study": "runs", "layers": f"8-{end}", "scope": "all", "split": "test"}
            | {"n": task.args.n_study},
            lambda end=end: moves(
                task,
                f"dense-8-{end}-all-tokens",
                task.dictionary("dense", range(8, end + 1)),
                scope=sqs.scopes.EveryPosition(),
            ),
            1.0,
        )


def wide(task: Task) -> Iterator[Job]:
    """Dictionaries at equal sparsity and norm at fifteen layers and every token, and controls."""
    n = task.args.n_study

    def job(name: str, kind: str, **learning: Any) -> Job:
        setting = {"study": "wide", "method": name, "n": n}
        learning = {"scope": sqs.scopes.EveryPosition()} | learning
        folder = "wide-" + name.replace(", ", "-").replace(" ", "-")
        if "n_latents" in learning:
            learning |= {"n": learning.pop("n_latents"), "layers": task.wide, "l1": 0.0}
            return setting, partial(sparse, task, folder, kind, "n_latents", **learning), 1.0
        make = partial(moves, task, folder, **learning)
        return setting, lambda: make(task.dictionary(kind, task.wide)), 1.0

    plain = {m.name: m for m in prompt_methods(task.opened, shots=())}
    yield job("trained, 8 a head", "trained", n_latents=8)
    yield job("dense", "dense")
    for kind in ("permuted", "random"):
        yield job(f"{kind}, 8 a head", kind, n_latents=8)
    for name in ("instruction", "unsteered"):
        setting = {"study": "wide", "method": name, "n": n}
        yield setting, lambda name=name: plain[name], 1.0
    for kind in ("trained", "random"):
        yield job(f"{kind}, l1", kind, l1=PENALTY)
    for strength in (1.0, 0.75, 0.5, 0.25):  # success against the norm
        for kind, penalty in (("trained", PENALTY), ("random", PENALTY), ("dense", 0.0)):
            setting, make, _ = job(f"{kind}, 120 updates", kind, l1=penalty, **LONG)
            yield setting | ({} if strength == 1 else {"strength": strength}), make, strength
    for kind in ("trained", "random", "permuted"):
        yield job(f"{kind}, 8 a head, 120 updates", kind, n_latents=8, **LONG)
    for size in (1, 2, 4, 32):
        # a head's change is about the same however few latents it has
        rate = LONG["learning_rate"] * max(1.0, (8 / size) ** 0.5)
        for kind in ("trained", "random", "permuted", "sampled"):
            learning = {"n_latents": size, **LONG, "learning_rate": rate}
            yield job(f"{kind}, {size} a head, 120 updates", kind, **learning)
    for seed in (1, 2):
        for kind in ("trained", "random"):
            learning = {"n_latents": 1, **LONG, "learning_rate": LONG["learning_rate"] * 8**0.5}
            yield job(f"{kind}, 1 a head, 120 updates, seed {seed}", kind, seed=seed, **learning)
    yield job("dense, classes shuffled", "dense", shuffled=True)


def weak(task: Task) -> Iterator[Job]:
    """Methods that take targets from queries as they are, and controls."""
    n = task.args.n_study
    descents = {"centroids": ("trained", CENTROID), "mean difference": ("dense", MEAN)}
    for name, (kind, descent) in descents.items():
        for strength in descent.step_sizes:

            def make(kind: str = kind, descent: Descent = descent, name: str = name) -> Method:
                encoders = task.dictionary(kind)
                found = task.centroids(encoders)
                return learned_method(name, encoders, found, descent, 0.5, LAST)

            yield {"study": "weak", "method": name, "strength": strength, "n": n}, make, strength
    (patch,) = interchange_methods(task.model, [task.run])
    yield {"study": "weak", "method": patch.name, "n": n}, lambda: patch, patch.strengths[0]
    yield (
        {"study": "weak", "method": "random offset of the norm of dense moves", "n": n},
        lambda: random_methods(moves(task, "dense", task.dictionary("dense")), [0])[0],
        1.0,
    )
    for layer in (14, 20, 24):
        for budget in (0.125, 0.25, 0.5):
            yield (
                {
                    "study": "residual",
                    "layer": layer,
                    "budget": budget,
                    "split": "validation",
                    "n": 60,
                },
                lambda layer=layer, budget=budget: moves(
                    task, f"residual-{layer}-{budget}", residual_site(task, layer), budget
                ),
                1.0,
            )


def residual_site(task: Task, layer: int | None = None) -> Encoders:
    """Return an identity encoder of the residual stream after a layer, two thirds up by default."""
    layer = task.layers(0.67, 0.67)[0] if layer is None else layer
    encoder = sqs.sae.IdentityEncoder(n_heads=1, d_head=int(task.model.cfg.d_model))
    return {f"blocks.{layer}.hook_resid_post": encoder}


LAST = sqs.scopes.LastPromptToken()
EVERY = sqs.scopes.EveryPosition()


def rivals(task: Task) -> Iterator[Job]:
    """Every method at the layers, tokens and strength that serve it best on validation topics."""
    plain = {m.name: m for m in prompt_methods(task.opened, shots=(2,), separator="<|im_end|>\n")}
    wide = task.wide
    saes, dense = (partial(task.dictionary, kind, wide) for kind in ("trained", "dense"))
    of_descent = {descent.name: descent for descent in DESCENTS}
    scopes = [LAST, EVERY]
    choices = {"span": scope_name(LAST), "layers": [wide], "centroids": "requested"}

    def learned(kind: str, name: str, **learning: Any) -> Method:
        encoders = task.dictionary(kind, wide)
        return replace(
            moves(task, f"wide-{name}", encoders, scope=EVERY, **learning),
            strengths=(0.7, 1.0, 1.3),
        )

    def centroids(encoders: Encoders, name: str) -> list[Method]:
        found = {scope_name(LAST): task.centroids(encoders)}
        own = [of_descent[name]]
        return descent_methods("centroids", encoders, found, own, layers=[wide], scopes=scopes)

    def follow_up() -> list[Method]:
        layer = task.layers(0.5, 0.5)
        found = task.saes(0, layer, sae=sqs.sae.Standard(d_sae_per_head=256))
        for sae in found.values():
            sae.fold_W_dec_norm()
        targets = {scope_name(LAST): task.centroids(found)}
        own = {"layers": [layer], "scopes": scopes}
        return descent_methods("follow-up", found, targets, [FOLLOW_UP], **own)

    def means(*points: str, layers: Sequence[Sequence[int]] = (wide,)) -> list[Method]:
        every = sorted({layer for some in layers for layer in some})
        found = [sqs.baselines.class_means(task.model, task.requested, every, at=p) for p in points]
        at = [SCOPE, EVERY] if points == ("hook_resid_post",) else scopes
        own = choices | {"layers": layers}
        return [m for scope in at for m in mean_difference_methods(*found, **own, scope=scope)]

    def scored(m: int) -> Method:
        name = f"wide-trained-scores-{m}"
        found = moves(task, name, saes(), scope=EVERY, n_latents=m, by_output_score=True)
        return replace(found, strengths=(0.25, 0.5, 1.0, 2.0))

    def residual(scope: Any, name: str, **learning: Any) -> Method:
        method = moves(task, name, residual_site(task), 0.25, scope=scope, **learning)
        return replace(method, strengths=(0.7, 1.0, 1.3))

    def probed() -> list[Method]:
        found = sqs.baselines.probe_heads(task.model, task.requested, range(task.n_layers))
        own = {k: v for k, v in choices.items() if k != "layers"}
        return intervention_methods(found, scope=SCOPE, **own)

    def rows() -> list[Method]:
        found = saes()
        targets = task.centroids(found)
        own = [decoder_rows_methods(found, targets, **choices, scope=scope) for scope in scopes]
        return [method for some in own for method in some]

    made: dict[str, Callable[[], Sequence[Method]]] = {
        "unsteered": lambda: [plain["unsteered"]],
        "instruction": lambda: [plain["instruction"]],
        "learned moves, dense": lambda: [learned("dense", "dense")],
        "centroids, trained SAE, squared distance": lambda: centroids(saes(), "squared distance"),
        "centroids, trained SAE, prototype": lambda: centroids(saes(), "prototype"),
        "centroids, dense, squared distance": lambda: centroids(dense(), "squared distance"),
        "the settings of arXiv 2605.23040": follow_up,
        "mean difference of queries": lambda: means("attn.hook_q"),
        "mean difference of queries and values (DISCO)": lambda: means(
            "attn.hook_q", "attn.hook_v"
        ),
        "mean difference of the residual stream (CAA)": lambda: means(
            "hook_resid_post", layers=[task.layers(part, part) for part in (0.4, 0.53, 0.67)]
        ),
        "head outputs (ITI)": probed,
        "decoder rows (m=4)": rows,
        "latents of the highest output score (m=4, m=16)": lambda: [scored(4), scored(16)],
        "learned offset of the residual stream": lambda: [
            residual(SCOPE, "residual-20"),
            residual(EVERY, "residual-20-every"),
        ],
        "few-shot (k=2)": lambda: [plain["few-shot (k=2)"]],
        "logit bias": lambda: [replace(logit_bias_method(), strengths=(4.0, 8.0))],
        "learned moves, trained SAE": lambda: [learned("trained", "trained-l1", l1=PENALTY)],
        "learned moves, random rows": lambda: [learned("random", "random-l1", l1=PENALTY)],
        **{
            f"learned moves, {name}, 120 updates": lambda kind=kind, l1=l1: [
                learned(kind, f"{kind}-120-updates", l1=l1, **LONG)
            ]
            for name, kind, l1 in (
                ("trained SAE", "trained", PENALTY),
                ("random rows", "random", PENALTY),
                ("dense", "dense", 0.0),
            )
        },
        "learned offset of the residual stream, 120 updates": lambda: [
            residual(EVERY, "residual-20-every-120-updates", **LONG)
        ],
        "interchange": lambda: interchange_methods(task.model, [wide]),
        "random offset of the norm of dense moves": lambda: random_methods(
            learned("dense", "dense"), [0]
        ),
    }
    for name, make in made.items():
        yield {"study": "rivals", "method": name, "n": task.args.n_rivals}, make, 0.0


def attention(task: Task) -> Iterator[Job]:
    """Attention targets and their rivals on prompts that list the actions of all levels."""
    n = task.args.n_attention
    later = range(int(task.model.cfg.n_layers) // 2, int(task.model.cfg.n_layers))
    dense, sae = task.dictionary("dense", later), task.dictionary("trained")
    plain = {m.name: m for m in prompt_methods(task.opened, shots=())}
    for method, strengths in (
        (attention_method("attention, dense", dense), (0.25, 0.35)),
        (
            attention_method("attention, dense, layers of the SAEs", task.dictionary("dense")),
            (0.25,),
        ),
        (attention_method("attention, trained SAE", sae), (0.25, 0.5)),
        (
            attention_bias_method("attention bias", query_sites(task.model, later)),
            (2.0, 4.0, 6.0, 8.0),
        ),
        (plain["unsteered"], (0.0,)),
        (plain["instruction"], (0.0,)),
    ):
        for strength in strengths:
            yield (
                {
                    "study": "attention",
                    "method": method.name,
                    "strength": strength,
                    "n": n,
                    "tasks": ["listed", "listed redirected"],
                },
                lambda method=method: method,
                strength,
            )


def prepare(task: Task) -> Iterator[Job]:
    """Only make the examples, the judge and the SAEs."""
    task.saes()
    return iter(())


STUDIES = {
    s.__name__: s
    for s in (
        prepare,
        methods,
        sparsity,
        seeds,
        scopes,
        norms,
        topics,
        noise,
        mixtures,
        factors,
        wordings,
        layers,
        runs,
        wide,
        rivals,
        weak,
        attention,
    )
}
