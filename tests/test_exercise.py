"""The exercise task: its splits, cases, examples and judges."""

import json
import re
from importlib.resources import files
from itertools import combinations, product

import pandas as pd
import pytest
import torch
from conftest import HOSTS
from recipe_models import write_bytes
from test_distributed import in_processes

import sae_query_steer as sqs
from sae_query_steer.compare import exercise_demo
from sae_query_steer.compare.exercise_judges import (
    fit_exercise_judge,
    verb_choice,
    verb_judge,
    without_verbs,
)
from sae_query_steer.compare.exercise_task import (
    BEGUN,
    SPLITS,
    TASKS,
    exercise_cases,
    exercise_examples,
)
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.likelihoods import negative_log_likelihoods
from sae_query_steer.compare.methods import Method
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.data.prompts import bos_id, tokenizer_of
from sae_query_steer.data.token_rows import token_rows
from sae_query_steer.learning import TargetLearner
from sae_query_steer.models.launch import launched

DATA = json.loads(files("sae_query_steer.compare").joinpath("exercise.json").read_text())
LEVELS = list(sqs.BloomLevel)
CHATML = (
    "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


@pytest.fixture(scope="module")
def chats(tiny_folder):
    """The tiny model on both hosts, with a chat template that begins with BOS."""
    models = {name: sqs.load_model(tiny_folder, device="cpu", backend=name) for name in HOSTS}
    for model in models.values():
        tokenizer_of(model).chat_template = CHATML
    return models


@pytest.fixture(params=HOSTS)
def chat(request, chats):
    return chats[request.param]


def topics(split: str) -> list[str]:
    return [topic for field in DATA[split]["topics"].values() for topic in field]


def words(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]+", text.lower())} - {"the", "of", "and"}


# --- the data


def test_there_are_enough_topics_of_all_fields_in_each_split():
    counts = {split: len(topics(split)) for split in SPLITS}
    assert counts == {"train": 20, "validation": 60, "test": 120, "judge": 40}
    fields = [list(DATA[split]["topics"]) for split in SPLITS]
    assert len(fields[0]) == 10
    assert all(own == fields[0] for own in fields)


def test_no_two_topics_are_the_same_but_for_plural_or_a_word_less():
    every = [words(topic) for split in SPLITS for topic in topics(split)]
    assert not [pair for pair in combinations(every, 2) if pair[0] <= pair[1] or pair[1] <= pair[0]]


def test_no_template_and_no_action_is_in_two_splits():
    templates = [part for split in SPLITS for pair in DATA[split]["templates"] for part in pair]
    actions = [a for split in SPLITS for some in DATA[split]["actions"].values() for a in some]
    for some in (templates, actions):
        assert len(set(some)) == len(some)
    assert all(len(DATA[split]["templates"]) >= 2 for split in SPLITS)


def verbs_of(level: str, *splits: str) -> set[str]:
    actions = " ".join(action for split in splits for action in DATA[split]["actions"][level])
    return {word for word in actions.split() if word in sqs.BloomLevel(level).verbs}


@pytest.mark.parametrize("level", LEVELS)
def test_half_of_a_levels_verbs_are_in_no_training_action(level):
    assert 0 < 2 * len(verbs_of(level, "train")) <= len(verbs_of(level, *SPLITS[:3]))


@pytest.mark.parametrize("level, split", list(product(LEVELS, SPLITS)))
def test_each_action_has_a_verb_of_its_level_and_begins_with_no_other(level, split):
    for action in DATA[split]["actions"][level]:
        assert verb_judge()([""], [action]) == [level], action


# --- cases


@pytest.mark.parametrize("task", TASKS)
def test_cases_are_balanced_and_have_each_topic_once_for_a_level(chat, task):
    cases = exercise_cases(chat, task, "validation", 360, seed=1)
    assert len({(case.target, case.topic) for case in cases}) == 360
    assert len({case.topic for case in cases[:60]}) == 60
    for level in LEVELS:
        own = [case for case in cases if case.target == level]
        assert sum(case.begun for case in own) == 30
        sources = [case.source for case in own]
        assert level not in sources
        if task.endswith("redirected"):
            assert {sources.count(other) for other in LEVELS if other != level} == {12}
        else:
            assert set(sources) == {None}


def test_prompts_of_the_tasks_differ_in_what_they_request(chat):
    found = {task: exercise_cases(chat, task, "test", 12, seed=3) for task in TASKS}
    actions = DATA["test"]["actions"]
    for i, case in enumerate(found["open"]):
        own = {task: found[task][i] for task in TASKS}
        assert len({(c.topic, c.template, c.requesting) for c in own.values()}) == 1
        assert case.template.format(topic=case.topic) in case.prompt
        assert case.phrase in str(case.requesting)
        assert case.phrase in actions[case.target]
        named = {
            task: [[a for a in actions[level] if a in c.prompt] for level in LEVELS]
            for task, c in own.items()
        }
        place = LEVELS.index(sqs.BloomLevel(own["redirected"].source))
        assert named["open"] == [[]] * 6
        assert [len(some) for some in named["redirected"]] == [i == place for i in range(6)]
        assert [len(some) for some in named["listed"]] == [1] * 6
        assert [len(some) for some in named["listed redirected"]] == [
            1 + (i == place) for i in range(6)
        ]
        assert own["listed"].prompt.count(case.phrase) == 1
        for prompt in [case.requesting, *(c.prompt for c in own.values())]:
            assert prompt.startswith("<s>")
            assert prompt.endswith(BEGUN) == case.begun


def test_the_seed_decides_the_cases_and_a_smaller_number_is_their_beginning(chat):
    cases = exercise_cases(chat, "open", "train", 120, seed=0)
    assert exercise_cases(chat, "open", "train", 30, seed=0) == cases[:30]
    assert exercise_cases(chat, "open", "train", 30, seed=1) != cases[:30]


def test_topics_of_a_split_are_put_in_the_wording_of_another(chat):
    cases = exercise_cases(chat, "redirected", "test", 24, seed=0, wording="train")
    train = exercise_cases(chat, "redirected", "train", 120, seed=0)
    assert [c.topic for c in cases] == [
        c.topic for c in exercise_cases(chat, "redirected", "test", 24, seed=0)
    ]
    assert {c.template for c in cases} <= {c.template for c in train}
    assert {c.phrase for c in cases} <= {c.phrase for c in train}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"wording": "tests"}, "wording must be one of .* got 'tests'"),
        ({"task": "opened"}, "task must be one of .* got 'opened'"),
        ({"split": "spare"}, "split must be one of .* got 'spare'"),
        ({"n": 121}, "n cases must be a whole number >= 1 and <= 120, got 121"),
        ({"n_topics": 21}, "n_topics must be a whole number >= 1 and <= 20, got 21"),
    ],
)
def test_what_is_not_in_the_data_is_refused(chat, untyped, given, message):
    wanted = {"task": "open", "split": "train", "n": 6, "seed": 0} | given
    with pytest.raises(ValueError, match=message):
        exercise_cases(chat, **wanted)


# --- rendered prompts


def test_a_rendered_prompt_is_continued_and_read_with_one_bos(chat):
    text = f"<s> w1 w2 {BEGUN}"
    without = text.removeprefix("<s> ")
    ours = continuations(chat, [text], max_new_tokens=4)
    assert torch.equal(ours.tokens[0], continuations(chat, [without], max_new_tokens=4).tokens[0])
    tokens = [torch.tensor([9, 12])]
    assert negative_log_likelihoods(chat, [text], tokens) == pytest.approx(
        negative_log_likelihoods(chat, [without], tokens), rel=1e-5
    )
    read = [sqs.LabelledExample(prompt=prompt, label="a") for prompt in (text, without)]
    rows = sqs.tokenize_examples(chat, read)
    assert rows.prepend_bos
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    with pytest.raises(ValueError, match="all prompts or none must begin with '<s>', got 1 of 2"):
        continuations(chat, [text, without], max_new_tokens=4)


def test_training_rows_of_rendered_prompts_have_one_bos(chat):
    rows = [token_rows(chat, [text], concat_sequences=False) for text in ("<s> w1", "w1")]
    assert torch.equal(*rows)
    assert (rows[0] == bos_id(chat)).sum() == 1


def test_a_scorer_compares_rendered_cases(chat):
    cases = {task: exercise_cases(chat, task, "validation", 6, seed=0) for task in TASKS[:2]}
    scorer = TextScorer(chat, cases, verb_judge(), max_new_tokens=3, split="validation")
    found = scorer.score(Method(name="unsteered"), 0.0, TASKS[:2])
    alone = continuations(chat, [cases["open"][1].prompt], max_new_tokens=3).texts
    assert found["open"].texts[1] == alone[0]
    assert found["redirected"].perplexity_ratio_original == pytest.approx(1.0, rel=1e-4)
    asking = Method(name="instruction", prompts=lambda cases: [str(c.requesting) for c in cases])
    asked = scorer.score(asking, 0.0, TASKS[:2])
    assert asked["open"].perplexity_ratio == pytest.approx(1.0, rel=1e-4)
    assert asked["open"].texts == asked["redirected"].texts


# --- examples


def test_examples_are_aligned_and_answered_by_the_model(chat):
    opened, requested = exercise_examples(chat, 2, seed=0, max_new_tokens=3)
    cases = exercise_cases(chat, "open", "train", 12, seed=0, n_topics=2)
    assert len({case.topic for case in cases}) == 2
    assert [e.prompt for e in opened] == [case.prompt for case in cases]
    assert [e.prompt for e in requested] == [case.requesting for case in cases]
    for some in (opened, requested):
        assert [e.label for e in some] == [case.target for case in cases]
    written = continuations(chat, [e.prompt for e in requested], max_new_tokens=3).texts
    assert [e.response for e in opened] == [e.response for e in requested] == written


# --- judges


def test_the_rule_goes_by_the_first_verb_in_any_form():
    rule = verb_judge()
    texts = [" be comparing two maps", "Here: **List** and compare", "plants", "They justified it"]
    assert rule([""] * 4, texts) == ["analyze", "remember", None, "evaluate"]
    assert rule([""] * 2, ["planning a trip", "He classifies bees"]) == ["create", "understand"]


def test_first_words_and_verbs_are_masked():
    text = " design a new toy car, and then Designing or COMPARED things; a user lists it."
    assert without_verbs(text) == "car, and then  or  things; a user  it."
    assert without_verbs("one two three four five") == "five"
    assert without_verbs("one two") == "."
    for level in LEVELS:
        for verb in level.verbs:
            assert without_verbs(f"a b c d {verb} {verb}s x") == "x"


THINGS = ["bees", "rivers", "maps", "jazz", "bread", "atoms", "tides", "chess"]
TAILS = ("facts and dates", "why it works", "the sum of it", "how both differ", "why it is best",
         "a new kind of it")  # fmt: skip


def answers(verbs: str, some: list[str]) -> list[sqs.LabelledExample]:
    return [
        sqs.LabelledExample(
            prompt="p", response=f" {verb} one two three {tail} {thing} ok", label=level
        )
        for level, verb, tail in zip(LEVELS, verbs.split(), TAILS, strict=True)
        for thing in some
    ]


def test_the_judge_reads_what_stands_after_the_verbs():
    verbs = "list explain solve compare judge design"
    judge = fit_exercise_judge(answers(verbs, THINGS), answers(verbs, ["frogs", "soup"]))
    assert judge.held_out["accuracy"] == 1
    assert {name: judge.held_out[name] for name in LEVELS} == dict.fromkeys(LEVELS, 1.0)
    wrong = answers("design judge compare solve explain list", ["frogs"])
    texts = [e.response for e in wrong]
    assert judge([""] * 6, texts) == LEVELS
    assert verb_judge()([""] * 6, texts) == LEVELS[::-1]
    # What the prompt began is the exercise's own: of four first words two are left to take away.
    begun = [text.replace("one two ", "") for text in texts]
    assert judge([BEGUN] * 6, begun) == LEVELS


def test_success_on_untrained_verbs_and_the_commonest_first_word_are_told():
    trained = [sqs.LabelledExample(prompt="Design it.", response=" Inventing it", label="create")]
    texts = ["design a car", "invents a car", "Devise a car", "devise a bus"]
    rows = pd.DataFrame({"target": "create", "text": texts, "success": [True, True, False, True]})
    (found,) = verb_choice(rows, trained).to_dict("records")
    assert found == {
        "target": "create",
        "n": 4,
        "success": 0.75,
        "n_untrained": 2,
        "success_untrained": 0.5,
        "first_word": "devise",
        "first_word_share": 0.5,
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sae_query_steer.learning.learner.LearningWarning")
def test_every_method_of_the_demo_runs_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    model = sqs.load_model(write_bytes(tmp_path / "model"), device="cpu")
    monkeypatch.setattr(exercise_demo, "exercise_judge", lambda *_, **__: verb_judge())
    sizes = {"n_train": 4, "n_validation": 6, "n_test": 6, "n_updates": 2}
    settings = sqs.compare.ExerciseSettings(
        **sizes, training_tokens=2048, d_sae_per_head=8, k=2, layers=(0, 1), every_method=True
    )
    monkeypatch.setattr(exercise_demo.exercise_task, "MAX_NEW_TOKENS", 3)
    log = tmp_path / "demo.unfinished" / "log.jsonl"
    found = sqs.compare.run_exercise_demo(model, settings=settings, log=log)

    def run():
        given = {"settings": settings, "log": tmp_path / "ranks" / "log.jsonl"}
        with launched() as ranks:
            shared = sqs.compare.run_exercise_demo(model, **given, ranks=ranks)
        pd.testing.assert_frame_equal(shared.rows, found.rows, rtol=1e-3)

    assert in_processes(2, run) == ["", ""]
    assert set(found.rows["task"]) == set(TASKS)
    learned = found.rows[found.rows["method"].str.startswith("learned moves")]
    assert len(learned) == 6 and (learned["delta_q_ratio"] <= 0.5001).all()
    listed = found.rows[found.rows["task"] == "listed"]["method"]
    assert {"attention, dense", "attention, SAE", "attention bias", "instruction"} <= set(listed)
    monkeypatch.setattr(TargetLearner, "fit", None)  # a second run reads what the first has kept
    again = sqs.compare.run_exercise_demo(model, settings=settings, log=log)
    pd.testing.assert_frame_equal(again.rows, found.rows)
