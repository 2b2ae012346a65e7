"""Names of the working tree, under which settings are written."""

# ruff: noqa: F403, F405
from typing import Any

from sae_lens import SAE

import sae_query_steer as sqs
import sae_query_steer.config as config_module
from sae_query_steer.baselines import decoder_rows as DecoderRowsSteerer
from sae_query_steer.baselines import few_shot_prompt
from sae_query_steer.baselines import mean_difference as ResidualMeanDifference
from sae_query_steer.baselines import random_direction as RandomDirectionSteerer
from sae_query_steer.compare import (
    Descent,
    RuleJudge,
    TextScorer,
    cases_of,
    compare_methods,
    descent_methods,
    mean_difference_methods,
    prompt_methods,
)
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.token_rows import token_rows
from sae_query_steer.descent.control import *
from sae_query_steer.descent.objectives import *
from sae_query_steer.diagnostics import (
    evaluate_saes,
    moved_latents,
    site_verdicts,
    top_tokens,
)
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.scopes import *
from sae_query_steer.sites import query_sites
from sae_query_steer.steering import JoinedSteerers, LatentGradientSteerer, attached_saes
from sae_query_steer.steering import partial_steerer as PartialSteerer

__all__ = [
    "DecoderRowsSteerer",
    "JoinedSteerers",
    "LabelledExample",
    "PartialSteerer",
    "RandomDirectionSteerer",
    "ResidualMeanDifference",
    "attached_saes",
    "evaluate_saes",
    "few_shot_prompt",
    "identity_encoders",
    "mean_difference",
    "moved_latents",
    "query_sites",
    "site_verdicts",
    "token_rows",
    "top_activating_texts",
]


def top_activating_texts(model, saes, texts, hook_name, head, *, k, context):
    found = top_tokens(model, {hook_name: saes[hook_name]}, texts, k=k, heads=[head])
    return found.table(hook_name, head, context=context)


ARCHITECTURES = {
    "topk": config_module.TopK,
    "batchtopk": config_module.BatchTopK,
    "standard": config_module.Standard,
    "jumprelu": config_module.JumpReLU,
    "gated": config_module.Gated,
    "matryoshka": config_module.MatryoshkaBatchTopK,
    "kl_sparse": config_module.KLSparse,
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
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in sae[1].items()}
    config = config_module.TrainingConfig(sae=ARCHITECTURES[sae[0]](**settings), **how)
    return sqs.train_query_saes(model, texts, sites, config)


def tokenized(model: Any, examples: Any, span: Any = None) -> Any:
    """Return tokenised examples."""
    return sqs.tokenize_examples(model, examples, span=span)


def centroid_targets(model: Any, saes: Any, examples: Any, span: Any) -> Any:
    """Return centroids of labelled examples."""
    return sqs.CentroidTargetBuilder(model, saes).fit(tokenized(model, examples, span))


def mean_difference(_sites: Any, targets: Any, *, strength: float, **changes: Any) -> Any:
    """Return what adds a multiple of the class's mean query minus the mean over the classes."""
    n = len(targets.classes)
    own = strength * (n - 1) / n  # of the difference to the mean of the others
    return sqs.baselines.mean_difference(targets, strength=own, **changes)


def residual_means(model: Any, examples: Any, layers: Any) -> Any:
    """Return mean residual streams of labelled examples."""
    return sqs.baselines.class_means(model, tokenized(model, examples), layers)


def residual_values(means: Any) -> dict[str, Any]:
    """Return the means by layer."""
    return {f"mean {name.split('.')[1]}": mean[:, 0] for name, mean in means.means.items()}


def separability(model: Any, saes: Any, examples: Any, *, span: Any = None) -> Any:
    """Return the table of `separability`."""
    return sqs.diagnostics.separability(model, saes, tokenized(model, examples, span))


def interchange_effect(model: Any, sites: Any, examples: Any, **options: Any) -> Any:
    """Return the table of `interchange_effect`."""
    if "counterparts" in options:
        options["counterparts"] = tokenized(model, options["counterparts"])
    return sqs.diagnostics.interchange_effect(model, sites, tokenized(model, examples), **options)


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
    steerer = LatentGradientSteerer(
        saes,
        targets,
        target=targets.classes[0],
        objective=objective or SquaredDistance(),
        n_steps=n_steps,
        step_size=step_size,
    )
    return sqs.diagnostics.achieved_effect(model, steerer, tokenized(model, examples), **options)


def sweep_tables(names: Any) -> dict[str, Any]:
    """Return the tables of a small comparison on the tutor."""
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
        *mean_difference_methods(names.residual, span="last prompt token", layers=[[1]]),
    ]
    found = compare_methods(*scorers, methods, control_seeds=(0,))
    return {"rows": found.rows, "curves": found.curves, "texts": found.texts}
