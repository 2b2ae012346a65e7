from .learner import LearningWarning as LearningWarning
from .learner import TargetLearner as TargetLearner
from .learner import no_moves as no_moves
