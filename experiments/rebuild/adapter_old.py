"""Names of the old code, commit cac4d35, under which settings are written."""

from typing import Any

from sae_lens import SAE
from sae_query_steer.evaluation.added_methods import residual_methods
from sae_query_steer.evaluation.cases import cases_of
from sae_query_steer.evaluation.descents import Descent
from sae_query_steer.evaluation.judges import RuleJudge
from sae_query_steer.evaluation.sweep import descent_methods, prompt_methods, run_sweep
from sae_query_steer.evaluation.text_scorer import TextScorer
from sae_query_steer.hosts.models import tokenizer_of
from sae_query_steer.token_rows import token_rows

from sae_query_steer import *  # noqa: F403
from sae_query_steer import (
    CentroidTargetBuilder,
    QueryHeadBatchTopKTrainingSAEConfig,
    QueryHeadGatedTrainingSAEConfig,
    QueryHeadJumpReLUTrainingSAEConfig,
    QueryHeadKLSparseTrainingSAEConfig,
    QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
    QueryHeadStandardTrainingSAEConfig,
    QueryHeadTopKTrainingSAEConfig,
    QuerySAEs,
    SquaredDistance,
    train_query_saes,
)

__all__ = ["token_rows"]

Config = {
    "topk": QueryHeadTopKTrainingSAEConfig,
    "batchtopk": QueryHeadBatchTopKTrainingSAEConfig,
    "standard": QueryHeadStandardTrainingSAEConfig,
    "jumprelu": QueryHeadJumpReLUTrainingSAEConfig,
    "gated": QueryHeadGatedTrainingSAEConfig,
    "matryoshka": QueryHeadMatryoshkaBatchTopKTrainingSAEConfig,
    "kl_sparse": QueryHeadKLSparseTrainingSAEConfig,
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
    config = Config[sae[0]](**sae[1])
    return train_query_saes(model, texts, sites, sae=config, **how)


def centroid_targets(model: Any, saes: Any, examples: Any, span: Any) -> Any:
    """Return centroids of labelled examples."""
    return CentroidTargetBuilder(model, saes, span=span).fit(examples)


def tokenized(model: Any, examples: Any) -> Any:
    """Return tokenised examples."""
    from sae_query_steer import tokenize_examples

    return tokenize_examples(examples, tokenizer_of(model))


def residual_values(means: Any) -> dict[str, Any]:
    """Return the means by layer."""
    return {f"mean {layer}": mean for layer, mean in means.means.items()}


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
    found = run_sweep(*scorers, methods, control_seeds=(0,))
    return {"rows": found.rows, "curves": found.curves, "texts": found.texts}
