"""The tutor: a small language model whose feedback has a level that a query chooses."""

from sae_query_steer.toy.tutor.corpus import TutorCorpus, TutorPrompt
from sae_query_steer.toy.tutor.demo import run_demo
from sae_query_steer.toy.tutor.judges import LevelClassifier, restated_level, verb_level
from sae_query_steer.toy.tutor.pretrained import (
    NULL_TUTOR_FOLDER,
    TUTOR_FOLDER,
    load_tutor,
)
from sae_query_steer.toy.tutor.report import write_report
from sae_query_steer.toy.tutor.results import DemoResult
from sae_query_steer.toy.tutor.settings import FULL, QUICK, DemoSettings
from sae_query_steer.toy.tutor.training import TutorTraining, train_tutor

__all__ = [
    "FULL",
    "NULL_TUTOR_FOLDER",
    "QUICK",
    "TUTOR_FOLDER",
    "DemoResult",
    "DemoSettings",
    "LevelClassifier",
    "TutorCorpus",
    "TutorPrompt",
    "TutorTraining",
    "load_tutor",
    "restated_level",
    "run_demo",
    "train_tutor",
    "verb_level",
    "write_report",
]
