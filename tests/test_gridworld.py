"""The gridworld: its grids, the judge of walks, its requests and cases."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from experiments.gridworld import (
    Aim,
    Grid,
    GridCorpus,
    draw_grid,
    grid_cases,
    routes,
    simulate,
    walk_class,
    walk_judge,
    walk_scores,
)
from experiments.gridworld.corpus import cells_in
from experiments.gridworld.grid import MAX_STEPS
from experiments.gridworld.tokenizer import grid_tokenizer
from experiments.gridworld.training import MAX_NEW_TOKENS
from experiments.gridworld.words import REQUESTS

# Start b3, goal d3, a wall below the cell between: the long route passes below the wall.
GRID = Grid(size=5, start=(1, 2), goal=(3, 2), walls=frozenset({(2, 1)}))


@pytest.mark.parametrize("size", [5, 6])
def test_routes_of_a_drawn_grid_are_each_of_one_aim_and_share_no_cell(size):
    draw = random.Random(0)
    for _ in range(100):
        grid, found = draw_grid(draw, size=size)
        assert found == routes(grid)
        walks = {aim: simulate(grid, cells) for aim, cells in found.items()}
        assert all(walk.reached and not walk.revisits for walk in walks.values())
        assert [walks[aim].n_by_wall > 0 for aim in Aim] == [False, True, True]
        assert walks[Aim.SHORT].n_steps < walks[Aim.SAFE].n_steps < walks[Aim.LONG].n_steps
        assert walks[Aim.LONG].n_steps <= MAX_STEPS
        inside = [cell for cells in found.values() for cell in cells[:-1]]
        assert len(set(inside)) == len(inside)
        assert not set(inside) & {grid.start, grid.goal, *grid.walls}


def test_a_grid_on_which_a_route_would_have_two_aims_has_no_routes():
    assert routes(GRID) is not None
    # A short route that is safe too, and a long one that is.
    assert routes(Grid(size=5, start=(1, 2), goal=(3, 2), walls=frozenset({(0, 0)}))) is None
    assert routes(Grid(size=6, start=(4, 0), goal=(1, 3), walls=frozenset({(2, 2)}))) is None
    with pytest.raises(ValueError, match="max_steps=5"):
        draw_grid(random.Random(0), max_steps=5)


def test_a_wall_is_not_entered_and_counts_from_the_cells_beside_it():
    into_wall = simulate(GRID, cells_in("c3 c2"))
    assert (into_wall.n_by_wall, into_wall.revisits, into_wall.reached) == (2, True, False)
    assert simulate(GRID, cells_in("c3 d3")).n_by_wall == 1
    assert simulate(GRID, cells_in("b4 c4 d4 d3")).n_by_wall == 0


def test_a_step_off_the_grid_or_to_a_cell_that_is_not_next_leads_nowhere():
    assert not simulate(GRID, cells_in("d3")).reached
    walk = simulate(GRID, cells_in("a3 z9 b3 c3 d3"))
    assert (walk.reached, walk.n_steps, walk.revisits) == (True, 5, True)


@pytest.mark.parametrize(
    ("cells", "aim"),
    [
        ("c3 d3", Aim.SHORT),
        ("b4 c4 d4 d3", Aim.SAFE),
        ("b4 b5 c5 d5 d4 d3", Aim.SAFE),
        ("b2 b1 c1 d1 d2 d3", Aim.LONG),
        ("c3 c4 d4 d3", None),  # beside a wall, and too few steps to be long
        ("c3 b3 c3 b3 c3 d3", None),  # long but for cells that it visits again
        ("b2 c2 b1 c1 d1 d2 d3", None),  # against the wall
        ("b2 b1 c1 d1 d2", None),  # ends before the goal
        ("", None),
    ],
)
def test_a_walk_is_judged_by_simulation(cells, aim):
    prompt, found = GridCorpus("train", seed=0).prompt(None), routes(GRID)
    assert found is not None
    own = {name: replace(route, cells=found[name]) for name, route in prompt.routes.items()}
    prompt = replace(prompt, grid=GRID, routes=own)
    assert walk_class(prompt, f" red {cells}. b3") == aim


def test_every_response_is_of_its_aim_and_fits_the_tokens():
    corpus, tokenizer = GridCorpus("test", seed=0), grid_tokenizer()
    for _ in range(50):
        prompt = corpus.prompt(None)
        for aim in Aim:
            text = prompt.response(aim)
            ids = tokenizer(text)["input_ids"]
            assert walk_class(prompt, text) == aim
            assert tokenizer.unk_token_id not in tokenizer(prompt.text)["input_ids"] + ids
            assert len(ids) < MAX_NEW_TOKENS  # the end is one more


def test_requests_share_no_word_with_what_is_observed_and_name_no_aim():
    corpus = GridCorpus("train", seed=0)
    for _ in range(20):
        prompt = corpus.prompt(None)
        observed = {
            word
            for route in prompt.routes.values()
            for word in re.findall("[a-z]+", route.observed(prompt.grid))
        }
        for texts in REQUESTS.values():
            assert not (observed | set(Aim)) & set(" ".join(texts).split())
    assert len({core for texts in REQUESTS.values() for core in texts}) == 8 * len(Aim)


def test_cases_have_every_target_and_every_other_source_equally_often():
    pairs = len(Aim) * (len(Aim) - 1)
    redirected = grid_cases("redirect", "test", 2 * pairs, seed=0)
    counts = Counter((case.source, case.target) for case in redirected)
    assert counts == {(a, b): 2 for a in Aim for b in Aim if a != b}
    assert all(case.asked.requested == case.source for case in redirected)
    opened = grid_cases("open", "test", pairs, seed=0)
    assert Counter(case.target for case in opened) == dict.fromkeys(Aim, pairs // len(Aim))
    assert {case.source for case in opened} == {None}


def test_scores_of_walks_that_take_the_source_s_route_or_the_target_s():
    cases = grid_cases("redirect", "test", 6, seed=1)
    kept = walk_scores(cases, [case.asked.response(Aim(case.source or "")) for case in cases])
    steered = walk_scores(cases, [case.asked.response(Aim(case.target)) for case in cases])
    assert (kept["success"], steered["success"], steered["reached"]) == (0, 1, 1)
    judge = walk_judge(cases)
    assert {str(label) for label in judge.classes} == set(Aim)
    texts = [case.asked.response(Aim(case.target)) for case in cases]
    assert list(judge([c.prompt for c in cases], texts)) == [case.target for case in cases]
