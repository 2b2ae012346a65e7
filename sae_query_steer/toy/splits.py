"""Which combinations of words are for training, and which are held out."""

import zlib
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "validation", "test"]
"""What is of one split is in no other."""


def split_of(*words: str) -> Split:
    """Return the split that a combination of words belongs to: 3 of 5 train, 1 each of the others.

    It depends on the words alone, not on a seed.
    """
    bucket = zlib.crc32(" ".join(words).encode()) % 5
    return "validation" if bucket == 3 else "test" if bucket == 4 else "train"
