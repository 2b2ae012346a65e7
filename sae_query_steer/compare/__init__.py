"""Evaluation: texts generated with and without a steer, what they score, and who says so."""

from sae_query_steer.compare.added_methods import decoder_rows_methods, residual_methods
from sae_query_steer.compare.axbench import Generation, axbench_table
from sae_query_steer.compare.cases import SteeringCase, cases_of
from sae_query_steer.compare.classifier_judge import ClassifierJudge
from sae_query_steer.compare.comparison import Method, Outcome
from sae_query_steer.compare.demo import run_demo
from sae_query_steer.compare.demo_cases import tutor_cases
from sae_query_steer.compare.demo_report import write_report
from sae_query_steer.compare.demo_results import DemoResult
from sae_query_steer.compare.demo_settings import FULL, QUICK, DemoSettings
from sae_query_steer.compare.descents import DESCENTS, Descent
from sae_query_steer.compare.endpoint import ChatEndpoint
from sae_query_steer.compare.feedback_judge import level_judge
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.judges import Judge, LanguageModelJudge, RuleJudge
from sae_query_steer.compare.query_patch import interchange_methods
from sae_query_steer.compare.sampling import seeded_sampling
from sae_query_steer.compare.scores import (
    PairedDifference,
    axbench_score,
    distinct_n,
    paired_difference,
    win_rate,
)
from sae_query_steer.compare.sweep import (
    SweepResult,
    descent_methods,
    prompt_methods,
    random_methods,
    run_sweep,
)
from sae_query_steer.compare.sweep_log import SweepLog
from sae_query_steer.compare.sweep_report import write_sweep
from sae_query_steer.compare.text_scorer import TextScorer

__all__ = [
    "DESCENTS",
    "FULL",
    "QUICK",
    "ChatEndpoint",
    "DemoResult",
    "DemoSettings",
    "ClassifierJudge",
    "Descent",
    "Generation",
    "Judge",
    "LanguageModelJudge",
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
    "paired_difference",
    "prompt_methods",
    "random_methods",
    "residual_methods",
    "run_sweep",
    "seeded_sampling",
    "tutor_cases",
    "win_rate",
    "write_report",
    "write_sweep",
    "level_judge",
    "run_demo",
]
