"""Progress bars."""

from functools import partial

from tqdm.auto import tqdm

SECONDS = 2.0
"""Between two updates of a bar, and before its first: short work shows none."""

progress_bar = partial(tqdm, mininterval=SECONDS, delay=SECONDS)
