"""The grid's end, the operating point, rows of the table and their names, and the tutor's cases."""

from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest

from sae_query_steer import BloomLevel
from sae_query_steer.compare.comparison import (
    Comparison,
    operating_point,
    outcome_row,
    strength_curves,
)
from sae_query_steer.compare.methods import Method, SteeringCase
from sae_query_steer.compare.report import row_names, verdict
from sae_query_steer.compare.scorer import Outcome, TextScorer
from sae_query_steer.compare.tutor_task import TASKS, note_judge, tutor_cases


def outcome(strength, target, ratio, *, success=None):
    """An outcome of 20 cases with a target rate and, with a grounding judge, a share of success."""
    n = 20
    taken_up = None if success is None else ["a" if i < success * n else None for i in range(n)]
    return Outcome(
        cases=[SteeringCase(prompt="p", target="a")] * n,
        strength=float(strength),
        texts=["text"] * n,
        judged=["a" if i < round(target * n) else None for i in range(n)],
        taken_up=taken_up,
        perplexity_ratio=float(ratio),
        perplexity_ratio_original=1.0,
        delta_q_ratio=0.5,
    )


def test_a_judge_that_forgets_a_text_is_refused():
    found = outcome(1, 0.5, 1.0)
    short = replace(found, judged=found.judged[1:])
    with pytest.raises(ValueError, match="for each of the 20 texts, got 19"):
        _ = short.target


class FakeScorer(TextScorer):
    """Answers from a table of strength to (target rate, perplexity ratio)."""

    def __init__(self, table):
        self.cases = dict.fromkeys(TASKS, ())
        self.table, self.asked = table, []

    def score_all(self, conditions, *, description):
        del description
        self.asked.append([strength for _, strength, _ in conditions])
        return [
            {task: outcome(strength, *self.table[strength]) for task in tasks}
            for _, strength, tasks in conditions
        ]


def curve(table):
    scorer = FakeScorer(table)
    (found,) = strength_curves(scorer, [Method(name="m", strengths=tuple(map(float, table)))])
    assert [[o.strength] for o in found["redirect"]] == scorer.asked
    return [o.strength for o in found["redirect"]]


def test_a_grid_ends_where_the_target_rate_has_fallen():
    assert curve({1: (0.5, 1.0), 2: (0.9, 1.1), 4: (0.8, 1.2), 8: (1.0, 1.0)}) == [1, 2, 4]


def test_a_small_fall_does_not_end_a_grid():
    assert curve({1: (0.9, 1.0), 2: (0.85, 1.1), 4: (0.95, 1.2)}) == [1, 2, 4]


def test_a_grid_ends_where_the_text_breaks():
    assert curve({1: (0.1, 1.0), 2: (0.2, 3.1), 4: (1.0, 1.0)}) == [1, 2]
    assert curve({1: (0.1, 1.0), 2: (0.2, 3.0), 4: (1.0, 1.0)}) == [1, 2, 4]


def test_the_next_strengths_of_all_methods_are_measured_together():
    table = {1.0: (0.5, 1.0), 2.0: (0.9, 1.1), 3.0: (0.1, 1.0), 4.0: (0.1, 1.0)}
    scorer, grids = FakeScorer(table), ((1.0, 2.0, 4.0), (2.0, 3.0, 4.0), (1.0,))
    found = strength_curves(scorer, [Method(name=str(g), strengths=g) for g in grids])
    assert scorer.asked == [[1.0, 2.0, 1.0], [2.0, 3.0], [4.0]]
    strengths = [[o.strength for o in curves["open"]] for curves in found]
    assert strengths == [[1.0, 2.0, 4.0], [2.0, 3.0], [1.0]]


def test_the_operating_point_is_the_most_successful_of_the_fluent():
    outcomes = [
        outcome(1, 0.9, 1.2, success=0.5),
        outcome(2, 0.8, 1.5, success=0.7),
        outcome(3, 1.0, 1.51, success=1.0),
    ]
    assert operating_point(outcomes).strength == 2


def test_of_equal_outcomes_the_weaker_is_chosen():
    assert operating_point([outcome(s, 0.8, 1.0) for s in (1, 2, 3)]).strength == 1


def test_without_a_fluent_strength_the_most_fluent_is_chosen():
    outcomes = [outcome(1, 0.1, 1.9), outcome(2, 0.5, 1.7), outcome(3, 0.9, 2.5)]
    assert operating_point(outcomes).strength == 2


def test_a_row_holds_the_shares_with_their_intervals():
    descent = Method(name="m", objective="prototype", n_steps=20, steerer=lambda cases, s: None)
    row = outcome_row("open", descent, outcome(0.2, 0.5, 1.1, success=0.25))
    assert (row["target_rate"], row["success"], row["grounded"]) == (0.5, 0.25, 0.25)
    assert row["ci_low"] == pytest.approx(0.2993, abs=1e-4)  # Wilson, 10 of 20
    assert row["ci_high"] == pytest.approx(0.7007, abs=1e-4)
    assert (row["step_size"], row["n_steps"], row["n"]) == (0.2, 20, 20)
    plain = outcome_row("open", Method(name="unsteered"), outcome(0.0, 0.5, 1.1))
    assert plain["step_size"] is plain["delta_q_ratio"] is plain["grounded"] is None


@pytest.mark.parametrize("task", TASKS)
def test_cases_meet_every_target_alike_often(task):
    cases = tutor_cases(task, "test", 60, seed=0)
    assert set(Counter(case.target for case in cases).values()) == {10}
    assert len({case.prompt for case in cases}) == 60
    for case in cases:
        assert case.prompt == case.asked.text
        assert case.source == case.asked.requested
        request = set(case.requesting.splitlines()) - set(case.prompt.splitlines())
        assert len(request) == 1, "the prompts differ in the request alone"
    if task == "open":
        assert {case.source for case in cases} == {None}
    else:
        pairs = Counter((case.source, case.target) for case in cases)
        assert set(pairs.values()) == {2}
        assert set(pairs) == {(a, b) for a in BloomLevel for b in BloomLevel if a != b}


def test_cases_repeat_with_their_seed():
    first, again, other = (tutor_cases("open", "test", 6, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert [c.prompt for c in first] != [c.prompt for c in other]


def test_a_text_takes_up_the_note_that_it_restates_word_for_word():
    cases = tutor_cases("redirect", "test", 12, seed=0)
    judge = note_judge(cases)
    prompts = [case.prompt for case in cases]
    said = [f" {case.asked.notes[case.target].restated}. And so on." for case in cases]
    assert judge(prompts, said) == [case.target for case in cases]
    assert judge(prompts, [text.replace(" and ", " or ") for text in said]) == [None] * 12
    assert judge(prompts, said[1:] + said[:1]) != [case.target for case in cases]
    assert note_judge(tutor_cases("open", "test", 6, seed=0, notes=False)) is None


def test_names_of_rows_hold_only_what_tells_the_rows_of_a_method_apart():
    def row(method, objective=None, layers="3"):
        parts = {"centroids": None, "span": "learned", "scope": None, "heads": "all"}
        return {"method": method, "objective": objective, "layers": layers, **parts}

    rows = pd.DataFrame(
        [
            row("unsteered", layers=""),
            row("moves", "fixed move"),
            row("descent", "contrast"),
            row("descent", "prototype"),
        ]
    )
    names = ["unsteered", "moves", "descent, contrast", "descent, prototype"]
    assert row_names(rows, rows) == names
    curves = pd.DataFrame([row("moves", "fixed move", "2"), row("moves", "fixed move", "3")])
    assert row_names(curves, rows) == ["moves, layer 2", "moves"]


@pytest.mark.parametrize("control", [0.2, 0.5])
def test_the_verdict_names_the_best_steer_and_says_if_chance_may_explain_it(control):
    def row(method, success, step_size=None):
        parts = dict.fromkeys(("objective", "centroids", "span", "scope"))
        rates = {"success": success, "success_low": success - 0.1, "success_high": success + 0.1}
        own = {"task": "open", "n": 60, "step_size": step_size, "perplexity_ratio": 1.2}
        return {"method": method, "layers": "3", "heads": "all", **parts, **rates, **own}

    rows = [row("moves", 0.6, 1.0), row("random direction (seed 0)", control)]
    judge = {"accuracy": 0.9, "n": 100.0, "chance": 0.5, "majority": 0.5}
    rows = pd.DataFrame(rows)
    found = Comparison(rows=rows, curves=rows, texts=rows, judge=judge, sites=None, settings={})
    said = verdict(found)
    assert "best steering 0.60 [0.50, 0.70] (moves; perplexity ratio 1.20)" in said
    assert said.endswith("more cases narrow them.") == (control == 0.5)
