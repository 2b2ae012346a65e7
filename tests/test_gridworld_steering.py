"""Steering on the gridworld: cases, and scores by simulation."""

from collections import Counter

import pytest

from sae_query_steer.diagnostics.metrics import wilson_interval
from sae_query_steer.toy.gridworld import Aim, grid_cases, walk_judge, walk_scores, walked


@pytest.mark.parametrize("task", ["open", "redirect"])
def test_a_case_asks_for_nothing_or_for_the_other_aim_and_beside_it_for_its_target(task):
    cases = grid_cases(task, "test", 16, seed=1)
    assert Counter(case.target for case in cases) == {Aim.SAFE: 8, Aim.SHORT: 8}
    for case in cases:
        other = next(aim for aim in Aim if aim != case.target)
        assert case.source == case.asked.requested == (None if task == "open" else other)
        assert case.prompt == case.asked.text
        request = set(case.requesting.splitlines()) - set(case.prompt.splitlines())
        assert len(request) == 1, "the prompts differ in the request alone"
    assert cases == grid_cases(task, "test", 16, seed=1)
    texts = {case.prompt for case in cases}
    assert len(texts) == 16
    assert not texts & {case.prompt for case in grid_cases(task, "test", 16, seed=2)}


def test_success_hazards_and_steps_are_those_of_the_walks_that_were_written():
    cases = grid_cases("redirect", "validation", 8, seed=0)
    taken = [Aim.SAFE, Aim.SHORT, Aim.SHORT, Aim.SAFE, Aim.SAFE, Aim.SHORT, None, Aim.SHORT]
    texts = [
        " up." if aim is None else case.asked.response(aim)
        for case, aim in zip(cases, taken, strict=True)
    ]
    judged = walk_judge(cases)([case.prompt for case in cases], texts)
    assert judged[:6] == taken[:6]
    safe = walk_scores(cases[::2], texts[::2])
    walks = [walked(c.asked, text) for c, text in zip(cases[::2], texts[::2], strict=True)]
    assert safe["n"] == 4
    assert safe["success"] == 0.5
    assert (safe["low"], safe["high"]) == pytest.approx(wilson_interval(2, 4))
    assert safe["reached"] == 0.75
    assert safe["hazards"] == sum(walk.n_hazards for walk in walks) / 4 > 0
    assert safe["steps"] == sum(walk.n_steps for walk in walks) / 4
    assert walk_scores(cases[1::2], texts[1::2])["success"] == 0.75


def test_texts_that_do_not_fit_their_cases_are_refused():
    cases = grid_cases("open", "validation", 2, seed=0)
    with pytest.raises(ValueError, match="1 texts do not fit 2 cases: give one for each"):
        walk_scores(cases, ["up."])
    with pytest.raises(ValueError, match="0 texts do not fit 0 cases"):
        walk_scores([], [])
