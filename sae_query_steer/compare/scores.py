"""Scores of texts and ratings: variety, AxBench's score and table, wins, paired differences."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from sae_query_steer.arguments import check_number
from sae_query_steer.data.examples import ordered_classes

Scores: TypeAlias = Sequence[float | int] | np.ndarray | pd.Series
"""One number for each row."""


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words divided by the number of all n-grams.

    The n-grams of all texts are counted together; none spans two texts. Words are runs of letters,
    digits and apostrophes in lower case. Compare texts of about the same number and length only:
    the share falls with the number of words.

    Args:
        texts: a list of texts.
        n: words of an n-gram, 1 or more.

    Returns:
        0 to 1; NaN if no text has n words.

    Source: distinct-n, a measure of diversity; lower case and the words are our choice.
    """
    check_number("n", n, whole=True, least=1)
    words = [re.findall(r"\w+(?:['’]\w+)*", text.lower()) for text in texts]
    grams = [tuple(own[i : i + n]) for own in words for i in range(len(own) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def axbench_score(concept: float | int, instruct: float | int, fluency: float | int) -> float:
    """Return AxBench's score of a text, 0 to 2: the harmonic mean of three ratings.

    0 if any rating is 0, else 3 / (1/concept + 1/instruct + 1/fluency).

    Args:
        concept: whether the concept is in the text: 0, 1 or 2, as the others.
        instruct: whether the text is related to the instruction.
        fluency: whether the text is fluent.

    Raises:
        ValueError: a rating that is not 0, 1 or 2.

    Source: AxBench, arXiv 2501.17148.
    """
    ratings = (concept, instruct, fluency)
    if not set(ratings) <= {0, 1, 2}:
        raise ValueError(f"concept, instruct and fluency must be 0, 1 or 2, got {ratings}")
    return 0.0 if 0 in ratings else 3 / (1 / concept + 1 / instruct + 1 / fluency)


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
        ValueError: not one finite score of each for each row.

    Source: AxBench, arXiv 2501.17148.
    """
    a, b = _paired(ours, baseline)
    return float(np.mean(np.where(np.abs(a - b) < 1e-6, 0.5, a > b)))


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
    a: Scores, b: Scores, *, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0
) -> PairedDifference:
    """Return the mean of a - b over rows, with a paired bootstrap interval (BCa).

    If all differences are equal the interval is undefined, and the point is returned.

    Args:
        a: one score for each row.
        b: the other method's scores of the same rows, in the same order.
        confidence: coverage of the interval, between 0 and 1.
        n_resamples: bootstrap resamples.
        seed: of the resamples; no other random state is touched.

    Raises:
        ValueError: not one finite score of each for each row, or a confidence out of range.

    Source: `scipy.stats.bootstrap`; the degenerate case is our choice.
    """
    a, b = _paired(a, b)
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
        batch=max(1, 2**22 // len(a)),
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return PairedDifference(mean=mean, low=float(found.low), high=float(found.high), n=len(a))


def _paired(a: Scores, b: Scores) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or not len(a) or not np.isfinite([a, b]).all():
        raise ValueError(
            "both must be lists with a finite score for each row, got shapes "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    return a, b


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one method wrote for one prompt, steered towards one concept."""

    method: str
    """Name of the method; its columns begin with it."""

    concept: str
    """The target."""

    input_id: int
    """Index of the prompt among those of the concept, from 0 without gaps; the same for all
    methods. AxBench chooses a factor on the lower half of the indices and reports the upper."""

    prompt: str
    """The instruction as a person gave it, without target or chat template."""

    text: str
    """What was generated, without the prompt."""

    factor: float | None = None
    """The multiplier that is swept. None for a method without one, such as the unsteered model:
    its text then stands at every factor."""

    strength: float | None = None
    """Strength in the method's own unit. None means the factor, or 0 without."""

    perplexity: float | None = None
    """As AxBench's: the unsteered model's, of prompt and text together."""

    model_input: str | None = None
    """The prompt as the model read it, chat template included. None means the prompt itself."""

    steered_input: str | None = None
    """The same with AxBench's instruction to write about the concept; None without one."""


def axbench_table(
    generations: Sequence[Generation], *, dataset_name: str = "custom"
) -> pd.DataFrame:
    """Return generations as AxBench's wide table: a row for each concept, prompt and factor.

    Args:
        generations: in any order.
        dataset_name: of the prompts. AxBench inverts ratings for names of suppression data sets.

    Returns:
        By concept (Bloom's levels in their order, others by name), prompt and factor in ascending
        order, with the columns dataset_name; concept_id; input_concept; input_id; factor;
        original_prompt; steered_input; input; and for each method M, in the order of their first
        generations, M_steered_generation, M_perplexity and M_strength. `input` is what a steered
        model was given and `steered_input` what a prompted one was.

    Raises:
        ValueError: no generations, two of one method for the same concept, prompt and factor,
            methods that disagree on a prompt, or a method that lacks a row.

    Source: the columns are those of stanfordnlp/axbench, as its evaluators read them.
    """
    if not generations:
        raise ValueError("generations must hold at least one, got []")
    given = pd.DataFrame([vars(generation) for generation in generations])
    numbers = ["factor", "strength", "perplexity"]
    given[numbers] = given[numbers].astype(float)
    given["strength"] = given["strength"].fillna(given["factor"]).fillna(0.0)
    place, texts = ["concept", "input_id"], ["prompt", "steered_input", "model_input"]
    prompts = given.groupby(place)
    if (differing := (prompts[texts].nunique() > 1).any(axis=1)).any():
        raise ValueError(
            "prompt, steered_input and model_input must be the same for all methods, got others "
            f"for concept and input_id {differing[differing].index.tolist()}"
        )
    swept = prompts["factor"].agg(lambda some: sorted(set(some.dropna())) or [0.0])
    at = [(g.concept, g.input_id) for g in generations]
    factors = zip(given["factor"], at, strict=True)
    given["factor"] = [swept[here] if pd.isna(own) else [own] for own, here in factors]
    cells = given.explode("factor").set_index([*place, "factor"])
    table = prompts[texts].first().loc[[key[:2] for key in cells.index.unique()]]
    table.index = cells.index.unique()
    for method, own in cells.groupby("method", sort=False):
        if own.index.has_duplicates or len(own) < len(table):
            raise ValueError(
                f"{method} must have one generation for each of the {len(table)} combinations of "
                f"concept, prompt and factor, got {len(own)}: factor=None stands for all factors"
            )
        named = {"text": "steered_generation", "perplexity": "perplexity", "strength": "strength"}
        columns = {name: f"{method}_{shown}" for name, shown in named.items()}
        table = table.join(own[list(columns)].rename(columns=columns))
    table = table.reset_index()
    order = ordered_classes(table["concept"])
    table.insert(0, "dataset_name", dataset_name)
    table.insert(1, "concept_id", table["concept"].map(order.index))
    table["model_input"] = table["model_input"].fillna(table["prompt"])
    names = {"concept": "input_concept", "prompt": "original_prompt", "model_input": "input"}
    table = table.rename(columns=names).sort_values(["concept_id", "input_id", "factor"])
    return table.reset_index(drop=True)
