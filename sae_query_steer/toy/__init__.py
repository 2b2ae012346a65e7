"""The tutor: a toy language model whose feedback has a Bloom level that one layer's queries select.

`load_tutor` returns the model; `TutorCorpus` generates its texts. `experiments/tutor` trained it.
"""

from sae_query_steer.toy.corpus import TutorCorpus, TutorPrompt
from sae_query_steer.toy.judges import restated_level, verb_level
from sae_query_steer.toy.pretrained import NULL_TUTOR_FOLDER, TUTOR_FOLDER, load_tutor

__all__ = [
    "NULL_TUTOR_FOLDER",
    "TUTOR_FOLDER",
    "TutorCorpus",
    "TutorPrompt",
    "load_tutor",
    "restated_level",
    "verb_level",
]
