from . import control as control
from . import objectives as objectives
from .goals import Goal as Goal
from .loop import DescentResult as DescentResult
from .loop import descend as descend
