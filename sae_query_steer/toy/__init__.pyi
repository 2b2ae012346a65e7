from .corpus import TutorCorpus as TutorCorpus
from .corpus import TutorPrompt as TutorPrompt
from .judges import restated_level as restated_level
from .judges import verb_level as verb_level
from .pretrained import NULL_TUTOR_FOLDER as NULL_TUTOR_FOLDER
from .pretrained import TUTOR_FOLDER as TUTOR_FOLDER
from .pretrained import load_tutor as load_tutor
