"""Evaluation: texts generated with and without a steer, what they score, and who says so."""

from sae_query_steer.evaluation.added_methods import decoder_rows_methods, residual_methods
from sae_query_steer.evaluation.axbench import Generation, axbench_table
from sae_query_steer.evaluation.cases import SteeringCase, cases_of
from sae_query_steer.evaluation.classifier_judge import ClassifierJudge
from sae_query_steer.evaluation.comparison import Method, Outcome
from sae_query_steer.evaluation.descents import DESCENTS, Descent
from sae_query_steer.evaluation.endpoint import ChatEndpoint
from sae_query_steer.evaluation.generation import continuations
from sae_query_steer.evaluation.judges import Judge, LanguageModelJudge, RuleJudge
from sae_query_steer.evaluation.latent_ablation import LatentAblation, latent_ablations
from sae_query_steer.evaluation.query_patch import interchange_methods
from sae_query_steer.evaluation.sampling import seeded_sampling
from sae_query_steer.evaluation.scores import (
    PairedDifference,
    axbench_score,
    distinct_n,
    paired_difference,
    win_rate,
)
from sae_query_steer.evaluation.sweep import (
    SweepResult,
    descent_methods,
    prompt_methods,
    random_methods,
    run_sweep,
)
from sae_query_steer.evaluation.sweep_log import SweepLog
from sae_query_steer.evaluation.sweep_report import write_sweep
from sae_query_steer.evaluation.text_scorer import TextScorer

__all__ = [
    "DESCENTS",
    "ChatEndpoint",
    "ClassifierJudge",
    "Descent",
    "Generation",
    "Judge",
    "LanguageModelJudge",
    "LatentAblation",
    "Method",
    "Outcome",
    "PairedDifference",
    "RuleJudge",
    "SteeringCase",
    "SweepLog",
    "SweepResult",
    "TextScorer",
    "axbench_score",
    "axbench_table",
    "cases_of",
    "continuations",
    "decoder_rows_methods",
    "descent_methods",
    "distinct_n",
    "interchange_methods",
    "latent_ablations",
    "paired_difference",
    "prompt_methods",
    "random_methods",
    "residual_methods",
    "run_sweep",
    "seeded_sampling",
    "win_rate",
    "write_sweep",
]
