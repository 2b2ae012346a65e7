"""Scores of generated texts and of ratings: variety, AxBench's score, wins, paired differences."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

Scores: TypeAlias = Sequence[float | int] | np.ndarray | pd.Series
"""One number for each row."""

_TIE = 1e-6
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_FLOATS_AT_ONCE = 2**22


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words over that of all n-grams, 0 to 1.

    The n-grams of all texts are counted together; none reaches across two texts. Words are runs of
    letters, digits and apostrophes in lower case. Compare texts of about the same number and length
    only: the share falls with the number of words.

    Args:
        texts: any; one with fewer than n words has no n-grams.
        n: words of an n-gram, 1 or more.

    Returns:
        The share; NaN where no text has n words.

    Raises:
        ValueError: an n below 1, or one text instead of a list of texts.

    Source: distinct-n, a measure of diversity; lower case and the words are our choice.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more words, got {n}")
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list, such as [text], got {texts[:20]!r}...")
    grams = []
    for text in texts:
        words = _WORD.findall(text.lower())
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def axbench_score(concept: float | int, instruct: float | int, fluency: float | int) -> float:
    """Return AxBench's score of a text: the harmonic mean of three ratings, each 0, 1 or 2.

    0 if any rating is 0, else 3 / (1/concept + 1/instruct + 1/fluency).

    Args:
        concept: whether the concept is in the text.
        instruct: whether the text is related to the instruction.
        fluency: whether the text is fluent.

    Returns:
        From 0 to 2.

    Raises:
        ValueError: a rating that is not 0, 1 or 2.

    Source: AxBench, arXiv 2501.17148.
    """
    for name, rating in (("concept", concept), ("instruct", instruct), ("fluency", fluency)):
        if rating not in (0, 1, 2):
            raise ValueError(f"{name} must be 0, 1 or 2, got {rating!r}")
    if 0 in (concept, instruct, fluency):
        return 0.0
    return 3 / (1 / concept + 1 / instruct + 1 / fluency)


def win_rate(ours: Scores, baseline: Scores) -> float:
    """Return how often our score is above the baseline's of the same row; a tie counts 1/2.

    AxBench's paper compares mean scores by concept: give one mean for each concept to compare with
    its figures. (The `win_rate` of its code counts a tie as nothing.)

    Args:
        ours: one score for each row.
        baseline: the baseline's scores of the same rows, in the same order.

    Returns:
        (wins + ties / 2) / rows; scores that differ by less than 1e-6 are a tie.

    Raises:
        ValueError: not one score of each for each row, no rows, or a score that is not finite.

    Source: AxBench, arXiv 2501.17148.
    """
    a, b = _paired(ours, baseline, "ours", "baseline")
    return float(np.mean(np.where(np.abs(a - b) < _TIE, 0.5, a > b)))


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean difference of two scores of the same rows, with an interval."""

    mean: float
    """Of the differences, first minus second."""

    low: float
    high: float
    n: int
    """Rows."""


def paired_difference(
    a: Scores,
    b: Scores,
    *,
    confidence: float = 0.95,
    n_resamples: int = 9999,
    seed: int = 0,
) -> PairedDifference:
    """Return the mean of a - b over rows, with a paired bootstrap interval (BCa).

    Where all differences are equal the interval is not defined, and the point is returned.

    Args:
        a: one score for each row.
        b: the other method's scores of the same rows, in the same order.
        confidence: coverage of the interval.
        n_resamples: bootstrap resamples, 100 or more.
        seed: of the resamples; no other random state is touched.

    Raises:
        ValueError: not one score of each for each row, fewer than two rows, a score that is not
            finite, a confidence that is not between 0 and 1, or fewer than 100 resamples.

    Source: `scipy.stats.bootstrap`; the degenerate case is our choice.
    """
    a, b = _paired(a, b, "a", "b")
    if len(a) < 2:
        raise ValueError("a and b must have 2 rows or more, got 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if n_resamples < 100:
        raise ValueError(f"n_resamples must be 100 or more, got {n_resamples}")
    differences = a - b
    mean = float(differences.mean())
    # Equal up to rounding: 0.3 - 0.2 is not 0.2 - 0.1.
    if np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs([a, b]).max())):
        return PairedDifference(mean=mean, low=mean, high=mean, n=len(a))
    found = bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=n_resamples,
        batch=max(1, _FLOATS_AT_ONCE // len(a)),
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return PairedDifference(mean=mean, low=float(found.low), high=float(found.high), n=len(a))


def _paired(a: Scores, b: Scores, *names: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.asarray(values, dtype=float) for values in (a, b)]
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 1:
            raise ValueError(f"{name} must be a list of scores, got shape {list(array.shape)}")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array))[0])
            raise ValueError(f"{name} must be finite in every row, got {array[row]} in row {row}")
    if len(arrays[0]) != len(arrays[1]) or len(arrays[0]) == 0:
        raise ValueError(
            f"{names[0]} and {names[1]} must have a score for each row, and one row or more, got "
            f"{len(arrays[0])} and {len(arrays[1])}"
        )
    return arrays[0], arrays[1]
