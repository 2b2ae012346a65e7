"""Progress of long work: bars, and numbers for a tracker."""

from collections.abc import Callable, Mapping
from functools import partial

from tqdm.auto import tqdm

SECONDS = 2.0
"""Between two updates of a bar, and before its first: short work shows none."""

progress_bar = partial(tqdm, mininterval=SECONDS, delay=SECONDS)

OnMetrics = Callable[[Mapping[str, float]], object]
"""Called with numbers by name, "step" among them, while something is trained."""
