"""Names of the working tree, under which settings are written."""

import inspect
from typing import Any

from sae_lens import SAE

import sae_query_steer as sqs
import sae_query_steer.config as config_module
from sae_query_steer import *  # noqa: F403
from sae_query_steer import (
    QuerySAEs,
    SquaredDistance,
)
from sae_query_steer.compare.cases import cases_of
from sae_query_steer.compare.comparison import compare_methods
from sae_query_steer.compare.descents import Descent
from sae_query_steer.compare.judges import RuleJudge
from sae_query_steer.compare.methods import descent_methods, prompt_methods, residual_methods
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.data.token_rows import token_rows

__all__ = ["token_rows"]

ARCHITECTURES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "standard": "Standard",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "matryoshka": "MatryoshkaBatchTopK",
    "kl_sparse": "KLSparse",
}


def make_saes(given: dict[str, Any]) -> QuerySAEs:
    """Return SAEs from config and weights by hook name."""
    saes = {}
    for name, (cfg, weights) in given.items():
        saes[name] = SAE.from_dict(dict(cfg))
        saes[name].load_state_dict(weights)
        saes[name].requires_grad_(False).eval()
    return QuerySAEs(saes)


def train(model: Any, texts: Any, sites: Any, sae: tuple[str, dict], **how: Any) -> Any:
    """Return SAEs of an architecture with its settings."""
    name = ARCHITECTURES[sae[0]]
    if "config" not in inspect.signature(sqs.train_query_saes).parameters:
        own = getattr(sqs, f"QueryHead{name}TrainingSAEConfig")(**sae[1])
        return sqs.train_query_saes(model, texts, sites, sae=own, **how)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in sae[1].items()}
    config = config_module.TrainingConfig(sae=getattr(config_module, name)(**settings), **how)
    return sqs.train_query_saes(model, texts, sites, config)


def tokenized(model: Any, examples: Any, span: Any = None) -> Any:
    """Return tokenised examples."""
    return sqs.tokenize_examples(model, examples, span=span)


def _takes_span(function: Any) -> bool:
    return "span" in inspect.signature(function).parameters


def centroid_targets(model: Any, saes: Any, examples: Any, span: Any) -> Any:
    """Return centroids of labelled examples."""
    if _takes_span(sqs.CentroidTargetBuilder):
        return sqs.CentroidTargetBuilder(model, saes, span=span).fit(examples)
    return sqs.CentroidTargetBuilder(model, saes).fit(tokenized(model, examples, span))


def _of_tokenized(function: Any, before: int) -> Any:
    """Return a function that tokenises its argument after `before` others, and counterparts."""
    if _takes_span(function):
        return function

    def called(model: Any, *given: Any, span: Any = None, **options: Any) -> Any:
        own = [*given]
        own[before - 1] = tokenized(model, own[before - 1], span)
        if "counterparts" in options:
            options["counterparts"] = tokenized(model, options["counterparts"], span)
        return function(model, *own, **options)

    return called


separability = _of_tokenized(sqs.separability, 2)
interchange_effect = _of_tokenized(sqs.interchange_effect, 2)
residual_means = _of_tokenized(sqs.baselines.residual_means, 1)


def achieved_effect(
    model: Any,
    saes: Any,
    targets: Any,
    examples: Any,
    *,
    objective: Any = None,
    n_steps: int = 1,
    step_size: float = 1.0,
    **options: Any,
) -> Any:
    """Return the effect of a steerer of these settings."""
    how = {"n_steps": n_steps, "step_size": step_size, "objective": objective or SquaredDistance()}
    steerer = sqs.LatentGradientSteerer(saes, targets, target=targets.classes[0], **how)
    return _of_tokenized(sqs.achieved_effect, 2)(model, steerer, examples, **options)


def _named(new: str, old: str) -> Any:
    return getattr(sqs, new if new in sqs.__all__ else old)


DecoderRowsSteerer = _named("decoder_rows", "DecoderRowsSteerer")
RandomDirectionSteerer = _named("random_direction", "RandomDirectionSteerer")
ResidualMeanDifference = _named("residual_mean_difference", "ResidualMeanDifference")
PartialSteerer = _named("partial_steerer", "PartialSteerer")


def sweep_tables(names: Any) -> dict[str, Any]:
    """Return the tables of a small sweep on the tutor."""
    levels = (names.a, names.b, names.c)

    def rule(_prompt: str, text: str) -> str:
        return levels[len(text) % 3]

    some = [e for e in names.examples if e.label in levels]
    scorers = [
        TextScorer(
            names.model,
            {"redirect": cases_of(part, 4)},
            RuleJudge(rule, levels),
            max_new_tokens=4,
            split=split,
        )
        for split, part in (("validation", some[:9]), ("test", some[9:]))
    ]
    descents = (
        Descent(name="distance", objective=SquaredDistance(), n_steps=1, step_sizes=(0.5, 1.0)),
    )
    methods = [
        *prompt_methods(some, shots=(1,)),
        *descent_methods(
            "SAE descent",
            names.saes("topk"),
            {"last prompt token": names.targets("topk")},
            descents,
            layers=[[1], [1, 2]],
        ),
        *residual_methods(names.residual, span="last prompt token", layers=[[1]]),
    ]
    found = compare_methods(*scorers, methods, control_seeds=(0,))
    return {"rows": found.rows, "curves": found.curves, "texts": found.texts}
