"""Scores of texts and ratings, and AxBench's table, against hand-made counts and AxBench's uses."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_query_steer.compare.scores import (
    Generation,
    axbench_score,
    axbench_table,
    distinct_n,
    paired_difference,
    win_rate,
)

# --- distinct-n


def test_distinct_n_counts_different_n_grams_over_all_texts_together():
    texts = ["The cat saw the cat.", "the dog saw"]
    assert distinct_n(texts, 1) == 4 / 8  # the cat saw dog
    assert distinct_n(texts, 2) == 5 / 6  # the-cat twice, none across the texts
    assert distinct_n(texts, 3) == 4 / 4


def test_case_and_punctuation_make_no_word_different_and_an_apostrophe_stays_inside():
    assert distinct_n(["Stop, stop! STOP?"], 1) == 1 / 3
    assert distinct_n(["don't don t"], 1) == 1.0


def test_repeating_the_texts_divides_distinct_n():
    texts = ["one two three four", "five six seven"]
    assert distinct_n(texts, 2) == 1.0
    assert distinct_n(texts * 4, 2) == 0.25


def test_texts_shorter_than_n_give_no_n_grams():
    assert distinct_n(["one", "two words", ""], 2) == 1.0
    assert math.isnan(distinct_n(["one", ""], 2))
    assert math.isnan(distinct_n([], 1))


@pytest.mark.parametrize("n", [0, -1])
def test_an_n_below_one_is_refused(n):
    with pytest.raises(ValueError, match=f"n must be a whole number >= 1, got {n}"):
        distinct_n(["a b"], n)


# --- AxBench's score


def test_the_score_is_zero_where_any_rating_is_and_else_the_harmonic_mean():
    for c in (0, 1, 2):
        for i in (0, 1, 2):
            for f in (0, 1, 2):
                want = 0.0 if c * i * f == 0 else 3 * c * i * f / (i * f + c * f + c * i)
                assert axbench_score(c, i, f) == pytest.approx(want)
    assert axbench_score(2, 2, 2) == 2.0
    assert axbench_score(1, 2, 2) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "ratings, name",
    [((3, 1, 1), "must be 0, 1 or 2, got (3, 1, 1)"), ((1, -1, 1), "-1"), ((1, 1, 1.5), "1.5")],
)
def test_a_rating_that_is_none_is_refused(ratings, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        axbench_score(*ratings)


# --- win rate


def test_a_win_counts_one_a_tie_half_and_a_loss_nothing():
    assert win_rate([1, 2, 0, 1], [0, 1, 2, 1]) == (2 + 0.5) / 4


def test_scores_that_differ_by_less_than_a_millionth_are_a_tie():
    assert win_rate([0.9e-6, 0.5e-6], [0, 0]) == 0.5
    assert win_rate([2e-6], [0]) == 1.0
    assert win_rate([-2e-6], [0]) == 0.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_the_win_rates_of_both_sides_add_up_to_one(pairs):
    a, b = zip(*pairs, strict=True)
    assert win_rate(a, b) + win_rate(b, a) == pytest.approx(1)
    assert win_rate(a, a) == 0.5


@pytest.mark.parametrize("score", [win_rate, paired_difference])
@pytest.mark.parametrize(
    "a, b",
    [
        ([1.0, 2.0], [1.0]),
        ([], []),
        ([1.0, float("nan")], [1.0, 1.0]),
        ([1.0, 1.0], [float("inf"), 1.0]),
        (np.ones((2, 1)), [1.0, 2.0]),
    ],
)
def test_rows_that_do_not_pair_are_refused(score, a, b):
    shapes = f"got shapes {list(np.shape(a))} and {list(np.shape(b))}"
    with pytest.raises(ValueError, match=re.escape(shapes)):
        score(a, b)


# --- paired difference


def test_equal_differences_give_a_point_and_no_warning():
    found = paired_difference([0.3, 0.2, 7.7], [0.2, 0.1, 7.6])
    assert found.mean == pytest.approx(0.1)
    assert found.low == found.high == found.mean
    assert found.n == 3
    same = paired_difference([1, 2], [1, 2])
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_what_makes_a_row_hard_for_both_cancels():
    rng = np.random.default_rng(3)
    hard, gain = 100 * rng.normal(size=60), 1 + 0.1 * rng.normal(size=60)
    found = paired_difference(hard + gain, hard)
    assert found.mean == pytest.approx(gain.mean())
    # Unpaired, the interval would be some seventy wide.
    half = 1.96 * gain.std() / math.sqrt(60)
    assert found.low == pytest.approx(gain.mean() - half, abs=0.3 * half)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.3 * half)


def test_the_sign_is_first_minus_second_and_turning_them_round_turns_the_interval():
    rng = np.random.default_rng(4)
    a, b = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.mean > 0
    assert other.mean == pytest.approx(-one.mean)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=0.05)


def test_less_confidence_gives_a_narrower_interval():
    a, b = np.arange(30) % 4, np.arange(30) % 3
    wide, narrow = paired_difference(a, b), paired_difference(a, b, confidence=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_the_interval_depends_on_the_seed_alone_and_leaves_the_global_state():
    a, b = np.arange(9) % 4, np.arange(9) % 3
    before = np.random.get_state()[1:]
    one = paired_difference(a, b, seed=5)
    np.testing.assert_equal(np.random.get_state()[1:], before)
    assert paired_difference(a, b, seed=5) == one
    assert paired_difference(a, b, seed=6) != one


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        found = paired_difference(rng.exponential(1, 40), np.zeros(40), n_resamples=500)
        hits += found.low <= 1 <= found.high
    # 4 standard errors below 0.95; an interval of half the confidence would hold it 0.5 often.
    assert 0.89 <= hits / 300 <= 0.99


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=9))
def test_the_interval_of_few_ratings_is_finite_and_in_their_range(pairs):
    a, b = zip(*pairs, strict=True)
    found = paired_difference(a, b, n_resamples=200)
    differences = [x - y for x, y in pairs]
    assert min(differences) <= found.low <= found.high <= max(differences)


def test_lists_arrays_and_columns_of_a_table_give_the_same():
    a, b = [1, 0, 2, 2], [0.5, 1.0, 0.0, 2.0]
    for kind in (np.array, pd.Series):
        assert win_rate(kind(a), kind(b)) == win_rate(a, b) == 2.5 / 4
        assert paired_difference(kind(a), kind(b)) == paired_difference(a, b)


# --- AxBench's table


def made(method="ours", concept="create", input_id=0, **changes) -> Generation:
    given = {"prompt": f"{concept} {input_id}?", "text": f"{method} on {concept} {input_id}"}
    return Generation(method=method, concept=concept, input_id=input_id, **{**given, **changes})


def test_the_table_has_a_row_for_each_concept_prompt_and_factor_and_columns_for_each_method():
    generations = [
        made(method, concept, i, factor=factor, text=f"{method} {concept} {i} {factor}")
        for method in ("ours", "dense")
        for factor in (2.0, 0.5)
        for i in (1, 0)
        for concept in ("create", "apply")
    ]
    table = axbench_table(generations, dataset_name="tutor")
    assert list(table.columns) == [
        *("dataset_name", "concept_id", "input_concept", "input_id", "factor"),
        *("original_prompt", "steered_input", "input"),
        *("ours_steered_generation", "ours_perplexity", "ours_strength"),
        *("dense_steered_generation", "dense_perplexity", "dense_strength"),
    ]
    places = [(c, i, f) for c in (0, 1) for i in (0, 1) for f in (0.5, 2.0)]
    assert list(zip(table.concept_id, table.input_id, table.factor, strict=True)) == places
    assert set(table.dataset_name) == {"tutor"}
    for row in table.to_dict("records"):
        assert row["input_concept"] == ("apply", "create")[row["concept_id"]]  # Bloom's order
        for method in ("ours", "dense"):
            place = f"{row['input_concept']} {row['input_id']} {row['factor']}"
            assert row[f"{method}_steered_generation"] == f"{method} {place}"
            assert row[f"{method}_strength"] == row["factor"]
            assert math.isnan(row[f"{method}_perplexity"])
        assert row["original_prompt"] == row["input"]
        assert row["steered_input"] is None


def test_a_method_without_a_factor_stands_at_every_factor_with_strength_zero():
    steered = [made(factor=f, text=str(f), strength=10 * f) for f in (1.0, 3.0)]
    table = axbench_table([made("unsteered", perplexity=7.0), *steered])
    assert table["unsteered_steered_generation"].tolist() == ["unsteered on create 0"] * 2
    assert table["unsteered_perplexity"].tolist() == [7.0, 7.0]
    assert table["unsteered_strength"].tolist() == [0.0, 0.0]
    assert table["ours_strength"].tolist() == [10.0, 30.0]
    alone = axbench_table([made("unsteered")])
    assert alone.factor.tolist() == [0.0]


def test_inputs_are_those_of_any_method_that_tells_them():
    told = made("instruction", model_input="<user> create 0?", steered_input="<user> do it")
    table = axbench_table([made(factor=1.0), told])
    assert table.input.tolist() == ["<user> create 0?"]
    assert table.steered_input.tolist() == ["<user> do it"]
    assert table.original_prompt.tolist() == ["create 0?"]


def test_a_perplexity_that_was_not_measured_is_missing():
    table = axbench_table([made(perplexity=3.0), made(input_id=1)])
    np.testing.assert_equal(table["ours_perplexity"].tolist(), [3.0, float("nan")])


def test_axbench_s_own_uses_of_the_table_work(tmp_path):
    """By concept, the half of the prompts, the mean by factor, the best, and back from Parquet."""
    generations = [
        made("ours", "x", i, factor=f, perplexity=1 + f) for i in range(6) for f in (1.0, 2.0)
    ]
    axbench_table(generations).to_parquet(tmp_path / "steering_data.parquet")
    table = pd.read_parquet(tmp_path / "steering_data.parquet")
    for _, group in table.groupby("concept_id"):
        n = group["input_id"].max() + 1
        chosen = group[group["input_id"] < n - round(n * 0.5)]
        assert chosen["input_id"].nunique() == 3
        by_factor = chosen.groupby("factor")
        assert by_factor["ours_perplexity"].mean().tolist() == [2.0, 3.0]
        assert by_factor["ours_strength"].mean().tolist() == [1.0, 2.0]


def test_a_gap_is_refused():
    generations = [made(factor=1.0), made(factor=2.0), made("dense", factor=1.0)]
    message = "dense must have one generation for each of the 2 combinations"
    with pytest.raises(ValueError, match=message):
        axbench_table(generations)


@pytest.mark.parametrize(
    "generations, message",
    [
        ([], "generations must hold at least one"),
        ([made(), made(text="b")], "ours must have one generation for each of the 1"),
        ([made(factor=1.0), made()], "ours must have one generation"),
        ([made(), made("b", prompt="another")], "must be the same for all methods"),
        (
            [made(steered_input="x"), made("b", steered_input="y")],
            "must be the same for all methods, got others for concept and input_id [('create', 0)]",
        ),
    ],
)
def test_generations_that_make_no_table_are_refused(generations, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        axbench_table(generations)
