"""The gridworld: routes are the best there are, texts tell all, and the simulator judges."""

import dataclasses
import json
import random
import re
from collections import Counter
from functools import partial
from itertools import combinations, product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_query_steer as sqs
from sae_query_steer.toy.gridworld import training
from sae_query_steer.toy.gridworld.batches import HIDING_SHARE, ROWS, grid_batch
from sae_query_steer.toy.gridworld.corpus import GridCorpus, cell_name, moves_in
from sae_query_steer.toy.gridworld.grid import (
    MOVES,
    Grid,
    Walk,
    draw_grid,
    safest_route,
    shortest_route,
    simulate,
)
from sae_query_steer.toy.gridworld.judge import walk_class, walked
from sae_query_steer.toy.gridworld.tokenizer import grid_tokenizer
from sae_query_steer.toy.gridworld.training import GridTraining, obedience, train_gridworld
from sae_query_steer.toy.gridworld.words import (
    COLOURS,
    GREETINGS,
    NAMES,
    OPENERS,
    READ_OUTS,
    REQUESTS,
    Aim,
)
from sae_query_steer.toy.row_batches import NO_LOSS
from sae_query_steer.toy.tiny_llama import feedback_loss, new_llama
from sae_query_steer.toy.word_tokens import SPECIAL

SPLITS = ("train", "validation", "test")
AIMS = list(Aim)
PAD = SPECIAL.index("<pad>")
GRID = re.compile(r"Grid: (\d) by \d, from (\w\d) to (\w\d), hazards at ([^.]+)\.")
ROUTE = re.compile(r"(\d+) steps? and (\d+) hazards? along (\w+) ([^;.]+)[;.]")
SENTENCES = {
    f"{opener} {core}.": (opener, core, aim)
    for aim in AIMS
    for opener in OPENERS
    for core in REQUESTS[aim]
}
TINY = {"n_steps": 2, "max_steps": 2, "d_model": 16, "n_layers": 3, "n_heads": 2, "d_mlp": 16}


def small_grids(n: int) -> list[Grid]:
    """Grids of 4 by 4 with any hazards at all: often none is needed, or none can be avoided."""
    draw = random.Random(4)
    cells = list(product(range(4), repeat=2))
    drawn = (draw.sample(cells, 2 + draw.randrange(12)) for _ in range(n))
    return [Grid(size=4, start=s, goal=g, hazards=frozenset(h)) for s, g, *h in drawn]


def simple_walks(grid: Grid) -> list[Walk]:
    """All walks to the goal that pass no cell twice, in the slowest way there is."""
    found = []

    def go_on(cell, seen, hazards, steps):
        if cell == grid.goal:
            found.append(Walk(reached=True, n_hazards=hazards, n_steps=steps))
            return
        for column, row in ((0, 1), (0, -1), (-1, 0), (1, 0)):
            there = (cell[0] + column, cell[1] + row)
            if there not in seen and 0 <= min(there) and max(there) < grid.size:
                go_on(there, seen | {there}, hazards + (there in grid.hazards), steps + 1)

    go_on(grid.start, {grid.start}, 0, 0)
    return found


def cell_of(name: str) -> tuple[int, int]:
    return "abcde".index(name[0]), int(name[1]) - 1


def request_in(text: str) -> tuple[str, str, Aim] | None:
    return next((request for said, request in SENTENCES.items() if said in text), None)


# Theorems: routes and walks.


def test_no_walk_is_shorter_than_the_shortest_route_or_safer_than_the_safest():
    kinds = Counter()
    for grid in small_grids(200):
        walks = simple_walks(grid)
        short, safe = simulate(grid, shortest_route(grid)), simulate(grid, safest_route(grid))
        assert (short.n_steps, short.n_hazards) == min((w.n_steps, w.n_hazards) for w in walks)
        assert (safe.n_hazards, safe.n_steps) == min((w.n_hazards, w.n_steps) for w in walks)
        assert short.reached
        assert safe.reached
        kinds[short == safe, safe.n_hazards > 0] += 1
    assert len(kinds) == 4, "the two agree or not, with a hazard that can be avoided or not"


def test_on_a_drawn_grid_every_shortest_route_meets_a_hazard_and_a_longer_one_meets_none():
    draw = random.Random(1)
    for _ in range(40):
        grid = draw_grid(draw, size=4)
        walks = simple_walks(grid)
        fewest = min(walk.n_steps for walk in walks)
        assert all(walk.n_hazards for walk in walks if walk.n_steps == fewest)
        assert any(walk.n_hazards == 0 for walk in walks)


def test_the_two_routes_of_a_drawn_grid_part_at_once_and_meet_at_the_goal():
    draw = random.Random(2)
    for _ in range(80):
        grid = draw_grid(draw, max_steps=6)
        short, safe = shortest_route(grid), safest_route(grid)
        assert len(short) < len(safe) <= 6
        assert set(grid.cells(short)) & set(grid.cells(safe)) == {grid.goal}
        assert short[0] != safe[0]


def test_what_is_drawn_depends_on_the_seed_alone():
    assert draw_grid(random.Random(7)) == draw_grid(random.Random(7))
    assert len({draw_grid(random.Random(seed)) for seed in range(30)}) == 30


def test_a_walk_counts_every_step_onto_a_hazard_and_ends_where_the_moves_end():
    grid = Grid(size=3, start=(0, 0), goal=(2, 0), hazards=frozenset({(1, 0)}))
    assert simulate(grid, ["right", "right"]) == Walk(reached=True, n_hazards=1, n_steps=2)
    around = ["up", "right", "right", "down"]
    assert simulate(grid, around) == Walk(reached=True, n_hazards=0, n_steps=4)
    passing = ["right", "right", "left"]
    assert simulate(grid, passing) == Walk(reached=False, n_hazards=2, n_steps=3)
    assert simulate(grid, []) == Walk(reached=False, n_hazards=0, n_steps=0)


def test_a_move_off_the_grid_is_a_step_that_leads_nowhere():
    grid = Grid(size=3, start=(0, 0), goal=(2, 2), hazards=frozenset())
    assert grid.cells(["left", "down", "up", "up", "up"]) == [
        (0, 0),
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 2),
    ]
    assert simulate(grid, ["left", "down"]).n_steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 2}, "size=2 is not allowed: give 3 to 26"),
        ({"goal": (4, 0)}, r"cell \(4, 0\) is not on the grid: columns and rows go from 0 to 3"),
        ({"hazards": frozenset({(0, -1)})}, r"cell \(0, -1\) is not on the grid"),
        ({"goal": (0, 0)}, "have to be two cells, and no hazards"),
        ({"hazards": frozenset({(3, 3)})}, "have to be two cells, and no hazards"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, message):
    right = {"size": 4, "start": (0, 0), "goal": (3, 3), "hazards": frozenset({(1, 1)})}
    Grid(**right)
    with pytest.raises(ValueError, match=message):
        Grid(**{**right, **changes})


def test_so_few_steps_that_no_way_round_a_hazard_is_short_enough_are_refused():
    with pytest.raises(
        ValueError, match="max_steps=3 is not allowed: a way round a hazard takes 4"
    ):
        draw_grid(random.Random(0), max_steps=3)


# The corpus.


def test_a_prompt_tells_all_of_the_grid_and_of_what_is_met_on_its_routes():
    corpus = GridCorpus("test", seed=1)
    for i in range(60):
        prompt = corpus.prompt(AIMS[i % 2])
        size, start, goal, hazards = GRID.search(prompt.text).groups()
        grid = Grid(
            size=int(size),
            start=cell_of(start),
            goal=cell_of(goal),
            hazards=frozenset(map(cell_of, hazards.split(", "))),
        )
        assert grid == prompt.grid
        shown = ROUTE.findall(prompt.text)
        assert len(shown) == 2
        for (steps, met, colour, said), aim in zip(shown, prompt.routes, strict=True):
            moves = moves_in(said.split())
            assert [cell_of(name) for name in said.split()[1::2]] == grid.cells(moves)
            expected = Walk(reached=True, n_hazards=int(met), n_steps=int(steps))
            assert simulate(grid, moves) == expected
            assert prompt.response(aim) == f" {colour} {said}."


def test_the_response_takes_the_route_of_the_aim_which_the_judge_finds_by_walking():
    corpus = GridCorpus("validation", seed=2)
    for i in range(40):
        prompt = corpus.prompt(AIMS[i // 2 % 2])
        assert walk_class(prompt, prompt.response(AIMS[i % 2])) == AIMS[i % 2]
        example = corpus.example(AIMS[i % 2])
        assert example.label == AIMS[i % 2]


def test_a_prompt_asks_for_its_aim_and_names_none():
    corpus = GridCorpus("train", seed=3)
    for i in range(60):
        prompt = corpus.prompt(AIMS[i % 2])
        _, _, aim = request_in(prompt.text)
        assert aim == prompt.requested == AIMS[i % 2]
        assert not set(re.findall("[a-z]+", prompt.text)) & {"safe", "safest", "short", "shortest"}
        opened = corpus.prompt(None)
        assert opened.requested is None
        assert not any(opener in opened.text for opener in OPENERS)


def test_no_request_shares_a_word_with_what_is_seen_along_a_route_or_with_the_other_aim():
    telling = {"step", "steps", "hazard", "hazards", "along", *COLOURS, *MOVES}
    words = {aim: set(" ".join(REQUESTS[aim]).split()) for aim in AIMS}
    assert not set().union(*words.values(), " ".join(OPENERS).split()) & telling
    common = words[Aim.SAFE] & words[Aim.SHORT]
    for aim in AIMS:
        assert len(set(REQUESTS[aim])) == 8
        assert all(set(core.split()) - common for core in REQUESTS[aim])
    for kind in (COLOURS, GREETINGS, NAMES, OPENERS, READ_OUTS):
        assert len(set(kind)) == len(kind)


def test_neither_place_nor_colour_of_a_route_tells_its_aim_nor_the_request_where_it_stands():
    corpus, first, asked, slots, colours = GridCorpus("train", seed=4), Counter(), 0, Counter(), {}
    for i in range(300):
        prompt = corpus.prompt(AIMS[i % 2])
        first[next(iter(prompt.routes))] += 1
        asked += next(iter(prompt.routes)) == prompt.requested
        for aim, route in prompt.routes.items():
            colours.setdefault(route.colour, Counter())[aim] += 1
        lines = prompt.text.splitlines()
        slots[prompt.requested, next(i for i, line in enumerate(lines) if request_in(line))] += 1
    assert first[Aim.SAFE] == pytest.approx(150, abs=40)
    assert asked == pytest.approx(150, abs=40)
    assert set(slots) == set(product(AIMS, range(3)))
    assert min(slots.values()) > 30
    assert set(colours) == set(COLOURS)
    assert all(min(counts[aim] for aim in AIMS) > 5 for counts in colours.values())


def test_splits_share_no_grid_and_no_phrasing_of_a_request():
    found = {}
    for split in SPLITS:
        corpus = GridCorpus(split, seed=5)
        texts = [corpus.prompt(AIMS[i % 2]).text for i in range(60)]
        texts += [corpus.example(AIMS[i % 2]).prompt for i in range(10)]
        found[split] = {GRID.search(t).group() for t in texts}, {request_in(t) for t in texts}
        assert len(found[split][0]) > 50
        assert min(Counter(aim for _, _, aim in found[split][1]).values()) >= 6
    for one, other in combinations(SPLITS, 2):
        for mine, theirs in zip(found[one], found[other], strict=True):
            assert not mine & theirs


def test_another_request_changes_nothing_but_the_request():
    corpus = GridCorpus("test", seed=6)
    for i in range(30):
        prompt, aim = corpus.prompt(AIMS[i % 2]), AIMS[1 - i % 2]
        other = corpus.request(aim)
        changed = prompt.with_request(aim, other)
        assert changed.text == prompt.text.replace(prompt.request, other)
        assert changed.requested == aim
        opened = changed.with_request(None)
        assert opened.text == prompt.text.replace(prompt.request + "\n", "")
        assert opened.with_request(prompt.requested, prompt.request) == prompt


@pytest.mark.parametrize("given", [(Aim.SAFE, ""), (None, "Hurry.")])
def test_an_aim_without_words_or_words_without_an_aim_are_refused(given):
    with pytest.raises(ValueError, match="do not go together: give both"):
        GridCorpus("test", seed=1).prompt(None).with_request(*given)


def test_an_unknown_aim_is_refused():
    with pytest.raises(ValueError, match="aim='fast' is not allowed: give one of safe, short"):
        GridCorpus("test", seed=1).prompt("fast")


def test_the_same_seed_gives_the_same_texts_and_another_seed_others():
    def texts(seed):
        corpus = GridCorpus("train", seed=seed)
        return [*corpus.examples(10, open_share=0.5), *(corpus.drill(aim) for aim in AIMS)]

    assert texts(1) == texts(1)
    assert not {e.prompt for e in texts(1)} & {e.prompt for e in texts(2)}


def test_examples_go_through_the_aims_in_turn_and_leave_as_many_open_as_they_should():
    examples = GridCorpus("train", seed=3).examples(100, open_share=0.4)
    assert [example.label for example in examples] == AIMS * 50
    assert sum(request_in(e.prompt) is None for e in examples) == pytest.approx(40, abs=16)


def test_a_drill_shows_the_routes_alone_and_a_cued_one_ends_in_the_hazards_of_its_route():
    corpus = GridCorpus("train", seed=8)
    for i in range(40):
        drill = corpus.drill(AIMS[i % 2])
        assert "Grid:" not in drill.prompt
        assert request_in(drill.prompt)[2] == drill.label == AIMS[i % 2]
        cued = corpus.drill(AIMS[i % 2], cued=True)
        assert request_in(cued.prompt) is None
        cue = re.search(r" take (\d)$", cued.prompt)[1]
        assert (cue == "0") == (AIMS[i % 2] == Aim.SAFE)
        taken = {f" {colour} {said}.": met for _, met, colour, said in ROUTE.findall(cued.prompt)}
        assert taken[cued.response] == cue


# The judge.


def test_the_judge_walks_and_asks_neither_colour_nor_cells_nor_what_follows_the_full_stop():
    prompt = GridCorpus("test", seed=9).prompt(Aim.SAFE)
    for aim, route in prompt.routes.items():
        moves = " ".join(route.moves)
        assert walk_class(prompt, moves) == aim
        assert walk_class(prompt, f" mauve {moves}. And then up up up.") == aim
        assert walk_class(prompt, f" {moves} {moves}.") is None
        assert walk_class(prompt, " ".join(route.moves[:-1])) is None
        assert walked(prompt, moves).n_steps == len(route.moves)
    assert walk_class(prompt, "") is None


def test_a_safe_way_round_is_safe_and_a_long_way_through_hazards_is_nothing():
    prompt = GridCorpus("test", seed=9).prompt(None)
    grid = Grid(size=5, start=(0, 0), goal=(2, 0), hazards=frozenset({(1, 0)}))
    prompt = dataclasses.replace(prompt, grid=grid)
    assert walk_class(prompt, "up up right right down down") == Aim.SAFE
    assert walk_class(prompt, "right right") == Aim.SHORT
    assert walk_class(prompt, "right left right right") is None
    assert walk_class(prompt, "left right right") is None


# Tokens and batches.


@pytest.fixture(scope="module")
def tokenizer():
    return grid_tokenizer()


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_is_known_to_the_tokenizer_and_comes_back_exactly(tokenizer, split):
    corpus = GridCorpus(split, seed=12)
    for i in range(40):
        example = corpus.example(AIMS[i % 2], open_share=0.3)
        drill = corpus.drill(AIMS[i % 2], cued=i % 3 == 0)
        for each in (example, drill):
            ids = tokenizer(each.prompt + each.response, add_special_tokens=False)["input_ids"]
            assert min(ids) >= len(SPECIAL), tokenizer.convert_ids_to_tokens(ids)
            assert tokenizer.decode(ids) == each.prompt + each.response
            found = sqs.tokenize_example(each, tokenizer)
            assert tokenizer.decode(found.tokens[found.prompt_length :]) == each.response


def test_a_colour_a_move_and_a_cell_are_one_token_each(tokenizer):
    pieces = tokenizer.tokenize(" red up b3 right c3.")
    assert pieces == [" red", " up", " b3", " right", " c3", "."]
    assert cell_name((1, 2)) == "b3"


@pytest.mark.parametrize("kind", ROWS)
def test_a_batch_is_a_function_of_its_arguments_alone(tokenizer, kind):
    def made(step):
        return grid_batch(kind, tokenizer, seed=3, step=step, open_share=0.5, look_layer=1)

    first = made(5)
    random.seed(99)
    again = made(5)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.labels, again.labels)
    assert first.tokens.shape != made(6).tokens.shape or (first.tokens != made(6).tokens).any()
    assert len(first.tokens) == ROWS[kind]


@pytest.mark.parametrize("kind", ["cues", "drills", "texts"])
def test_what_is_learned_is_the_response_and_the_colour_decides(tokenizer, kind):
    batch = grid_batch(kind, tokenizer, seed=0, step=1, open_share=0.3, look_layer=2)
    for tokens, labels, decisions in zip(batch.tokens, batch.labels, batch.decisions, strict=True):
        text = tokenizer.decode(tokens[tokens != PAD])
        said = tokenizer.decode(labels[labels != NO_LOSS])
        assert text.endswith(said)
        assert f"along{said.removesuffix('.</s>')}" in text
        assert tokenizer.decode(tokens[decisions]).strip() in COLOURS
        assert said.startswith(tokenizer.decode(tokens[decisions]))


def hiding_batch(tokenizer, *, look_layer):
    batches = (
        grid_batch("texts", tokenizer, seed=0, step=s, open_share=0.3, look_layer=look_layer)
        for s in range(20)
    )
    return next(batch for batch in batches if batch.visible is not None)


def test_only_the_read_out_brings_routes_and_request_together(tokenizer):
    batch = hiding_batch(tokenizer, look_layer=None)
    assert batch.later == ()
    asked = 0
    for row in range(0, len(batch.tokens), 6):
        pieces = [tokenizer.decode([token]) for token in batch.tokens[row]]
        text = "".join(pieces)
        starts = [len("".join(pieces[:i])) for i in range(len(pieces))]
        begin = text.index("Routes:")
        shown = [begin <= start <= text.index(".", begin) for start in starts]
        request = request_in(text)
        asked += request is not None
        wanted = [False] * len(pieces)
        if request is not None:
            begin = text.index(" ".join(request[:2]) + ".")
            wanted = [begin <= start <= text.index(".", begin) for start in starts]
        read_out = int(batch.decisions[row].nonzero()) - 1
        assert pieces[read_out] == " take"
        for i, j in product(range(len(pieces)), repeat=2):
            if shown[i]:
                allowed = shown[j] or j == 0
            elif i > read_out:
                allowed = not wanted[j]
            else:
                allowed = not shown[j] or i == read_out
            assert bool(batch.visible[row, i, j]) == (j <= i and allowed), (row, i, j)
    assert asked


@pytest.mark.parametrize("layer", [1, 3])
def test_the_read_out_reads_the_request_then_looks_once_and_then_sees_neither(tokenizer, layer):
    batch = hiding_batch(tokenizer, look_layer=layer)
    anywhere = hiding_batch(tokenizer, look_layer=None).visible
    masks = [batch.visible, *batch.later]
    assert len(masks) == layer + 2
    asked_rows = 0
    for row in range(0, len(batch.tokens), 4):
        words = tokenizer.convert_ids_to_tokens(batch.tokens[row].tolist())
        stops = [i for i, word in enumerate(words) if word == "."]
        begin = words.index("Routes")
        shown = list(range(begin, min(i for i in stops if i > begin) + 1))
        request = request_in(tokenizer.decode(batch.tokens[row]))
        asked = []
        if request is not None:
            begin = words.index(request[0].split()[0])
            asked = list(range(begin, min(i for i in stops if i > begin) + 1))
            asked_rows += 1
        read_out = int(batch.decisions[row].nonzero()) - 1
        others = [i for i in range(read_out) if i not in asked]
        for i, mask in enumerate(masks):
            assert mask[row, read_out, shown].all() == mask[row, read_out, shown].any()
            assert bool(mask[row, read_out, shown].all()) == (i == layer)
            if asked:
                assert bool(mask[row, read_out, asked].all()) == (i < layer)
                assert not mask[row][others][:, asked].any(), "no other token passes it on"
            after = slice(read_out + 1, None)
            assert torch.equal(mask[row, after], anywhere[row, after])
            assert not (mask & ~anywhere).any()
            assert mask.diagonal(dim1=1, dim2=2).all()
    assert asked_rows > 2


def test_a_mask_of_a_later_layer_changes_what_that_layer_and_those_after_attend_to(tokenizer):
    batch = hiding_batch(tokenizer, look_layer=1)
    model = new_llama(len(tokenizer), seed=0, d_model=16, n_layers=4, n_heads=2, d_mlp=16).train(
        False
    )
    model.set_attn_implementation("eager")
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    feedback_loss(model, batch, 1.0)
    masks = [batch.visible, *batch.later]
    assert len(masks) == 3
    for i, pattern in enumerate(seen):
        assert not pattern.masked_select(~masks[min(i, 2)][:, None]).any()
        assert (pattern.masked_select(masks[min(i, 2)][:, None]) > 0).all()
    assert len(seen) == 4
    feedback_loss(model, hiding_batch(tokenizer, look_layer=None), 1.0)
    assert not seen[-1].masked_select(~batch.visible[:, None]).all(), "nothing is left behind"
    hooks = [len(layer._forward_pre_hooks) for layer in model.model.layers]
    assert hooks == [0, 0, 0, 0]


def test_routes_are_hidden_in_most_batches_and_in_no_copies(tokenizer, monkeypatch):
    monkeypatch.setitem(ROWS, "drills", 4)
    hiding = [
        grid_batch("drills", tokenizer, seed=0, step=step, open_share=0.0, look_layer=2).visible
        is not None
        for step in range(12)
    ]
    assert sum(hiding) / 12 == pytest.approx(HIDING_SHARE, abs=0.25)
    copies = grid_batch("copies", tokenizer, seed=0, step=0, open_share=0.0, look_layer=2)
    assert copies.visible is None
    assert copies.later == ()
    assert not copies.decisions.any()


# Training.


def test_a_training_of_a_few_steps_writes_a_model_that_loads_and_says_how_well_it_does(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "obedience", partial(obedience, n=4))
    for kind in ROWS:
        monkeypatch.setitem(ROWS, kind, 4)
    out, state = tmp_path / "model", torch.get_rng_state()
    card = train_gridworld(out, GridTraining(**TINY))
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((out / "gridworld.json").read_text()) == card
    assert [stage["steps"] for stage in card["stages"]] == [2, 2, 2, 2]
    assert card["n"] == 4
    assert set(card["open"]) == set(AIMS)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == card["n_parameters"]
    assert AutoTokenizer.from_pretrained(out).get_vocab() == grid_tokenizer().get_vocab()
    with pytest.raises(FileExistsError, match="exists: give another folder"):
        train_gridworld(out, GridTraining(**TINY))
    again = train_gridworld(out, GridTraining(**TINY), overwrite=True)
    assert again == card
    assert sqs.load_model(str(out)).cfg.n_layers == 3


def test_obedience_counts_walks_by_what_was_asked(tokenizer, monkeypatch):
    def always_safe(model, tokenizer, prompts, *, max_new_tokens):
        del model, tokenizer, max_new_tokens
        routes = (ROUTE.findall(prompt) for prompt in prompts)
        return [next(f" {c} {said}." for _, met, c, said in r if met == "0") for r in routes]

    monkeypatch.setattr(training, "greedy_texts", always_safe)
    found = obedience(None, tokenizer, n=20)
    assert found["obeyed"] == 0.5
    assert found["asked_safe"] == found["asked_short"] == found["open"] == {"safe": 1, "short": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 0}, "n_steps=0 is not allowed: give 1 or more"),
        ({"open_share": 1.5}, "open_share=1.5 is not allowed: give a share, 0 to 1"),
        ({"lr": 0.0}, "lr=0.0 is not allowed: give a number above 0"),
        ({"d_model": 21}, "d_model=21 is not allowed: rotary heads need .* a multiple of 2"),
        ({"look_layer": 4}, "look_layer=4 is not allowed: give 1 to 3, .*, or None"),
        ({"look_layer": 0}, "look_layer=0 is not allowed: give 1 to 3, .*, or None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GridTraining(**changes)


def test_the_learning_rate_warms_up_and_falls_to_a_fiftieth():
    settings = GridTraining(lr=1.0, n_steps=100)
    assert settings.lr_at(0, 0) == pytest.approx(0.01)
    assert settings.lr_at(500, 0) == 1.0
    assert settings.lr_at(600, 99) == pytest.approx(0.02)
