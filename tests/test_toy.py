"""The tutor's texts, the rules that read its feedback, and the classifier that judges it."""

import re
from collections import Counter
from itertools import combinations

import pytest
from threadpoolctl import threadpool_limits

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.compare.tutor_task import level_judge
from sae_query_steer.toy.corpus import TutorCorpus, split_of
from sae_query_steer.toy.judges import restated_level, shuffled, verb_level, verb_repeating
from sae_query_steer.toy.words import CONTINUATIONS, OPENERS, REQUESTS, THINGS

SPLITS = ("train", "validation", "test")
LEVELS = list(BloomLevel)
VERBS = {verb: level for level in LEVELS for verb in level.verbs}
NOTE = re.compile(r"(\w+) (\w+) and (\w+) them")
RESTATED = re.compile(r" (\w+) and (\w+) them\.")
SENTENCES = {
    f"{opener} {core}.": (opener, core, level)
    for level in LEVELS
    for opener in OPENERS
    for core in REQUESTS[level]
}


def forms(verb: str) -> set[str]:
    """A verb and what it becomes: evaluate, evaluates, evaluated, evaluating."""
    stem = verb[:-1] if verb.endswith(("e", "y")) else verb
    doubled = verb + verb[-1]
    endings = [stem + e for e in ("ing", "ed", "es", "ied", "ies")]
    return {verb, verb + "s", verb + "ing", verb + "ed", *endings, doubled + "ing", doubled + "ed"}


def words_of(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def notes_in(text: str) -> list[tuple[str, str, str]]:
    """The notes as they stand in a text: (verb, noun, second verb)."""
    line = re.search(r"^Notes: (.+)\.$", text, re.MULTILINE)
    return [NOTE.fullmatch(part).groups() for part in line[1].split("; ")] if line else []


def requests_in(text: str) -> list[tuple[str, str, BloomLevel]]:
    """The opener, the request and its level, wherever in a text they stand."""
    return [request for sentence, request in SENTENCES.items() if sentence in text]


def lesson_in(text: str) -> tuple[str, str, str]:
    return re.search(r"^Lesson: how the (\w+) (\w+)s the (\w+)\.$", text, re.MULTILINE).groups()


def test_no_request_names_a_level_or_uses_a_verb_of_the_notes():
    gerunds = {"remembering", "understanding", "applying", "analyzing", "evaluating", "creating"}
    telling = gerunds.union(*(forms(word) for word in (*LEVELS, *VERBS)))
    for text in (*OPENERS, *(core for level in LEVELS for core in REQUESTS[level])):
        assert not words_of(text) & telling, text


def test_each_split_holds_requests_of_each_level_and_three_fifths_are_for_training():
    counts = Counter(
        (level, split_of(opener, core))
        for level in LEVELS
        for opener in OPENERS
        for core in REQUESTS[level]
    )
    assert min(counts[level, split] for level in LEVELS for split in SPLITS) >= 5
    pairs = Counter(split_of(noun, verb) for noun in THINGS for verb in VERBS)
    assert pairs["train"] / pairs.total() == pytest.approx(0.6, abs=0.04)
    assert pairs["test"] / pairs.total() == pytest.approx(0.2, abs=0.04)


@pytest.fixture(scope="module")
def prompts():
    """Nine hundred prompts of each split, 150 for each level."""
    made = {}
    for split in SPLITS:
        corpus = TutorCorpus(split, seed=5)
        made[split] = [corpus.prompt(LEVELS[i % 6]) for i in range(900)]
    return made


def test_splits_share_no_lesson_no_note_and_no_phrasing_of_a_request(prompts):
    found = {
        split: (
            {lesson_in(p.text) for p in prompts[split]},
            {note[1:] for p in prompts[split] for note in notes_in(p.text)},
            {request[:2] for p in prompts[split] for request in requests_in(p.text)},
        )
        for split in SPLITS
    }
    for kinds in found.values():
        assert min(map(len, kinds)) > 50
    for one, other in combinations(SPLITS, 2):
        for mine, theirs in zip(found[one], found[other], strict=True):
            assert not mine & theirs


def test_a_prompt_asks_once_for_its_level_and_an_open_prompt_for_none(prompts):
    for prompt in prompts["test"]:
        ((_, _, level),) = requests_in(prompt.text)
        assert level == prompt.requested
    corpus = TutorCorpus("test", seed=1)
    for _ in range(100):
        prompt = corpus.prompt(None)
        assert prompt.requested is None
        assert not any(opener in prompt.text for opener in OPENERS)


@pytest.mark.parametrize("notes", [True, False])
def test_the_same_seed_gives_the_same_texts_and_another_seed_others(notes):
    def texts(split, seed):
        return TutorCorpus(split, seed=seed, notes=notes).examples(20, open_share=0.5)

    assert texts("test", 4) == texts("test", 4)
    first = {example.prompt for example in texts("test", 4)}
    assert not first & {example.prompt for example in texts("test", 5)}
    assert not first & {example.prompt for example in texts("train", 4)}


def test_the_notes_are_one_for_each_level_that_share_no_word_in_every_order(prompts):
    places = {level: Counter() for level in LEVELS}
    for prompt in prompts["train"]:
        notes = notes_in(prompt.text)
        assert [str(note) for note in prompt.notes.values()] == [
            f"{verb} {noun} and {second} them" for verb, noun, second in notes
        ]
        levels = [VERBS[verb] for verb, _, _ in notes]
        assert levels == [VERBS[second] for _, _, second in notes]
        assert sorted(levels) == sorted(LEVELS)
        assert levels == list(prompt.notes)
        assert len({word for note in notes for word in note}) == 3 * 6
        for place, level in enumerate(levels):
            places[level][place] += 1
    for level in LEVELS:
        assert set(places[level]) == set(range(6))
        assert min(places[level].values()) > 95, "of 900, 150 are expected in each place"


def test_another_request_changes_nothing_but_the_request():
    corpus = TutorCorpus("validation", seed=3)
    for i in range(120):
        prompt, level = corpus.prompt(LEVELS[i % 6]), LEVELS[(i + 1 + i % 5) % 6]
        ((opener, core, _),) = requests_in(prompt.text)
        other_opener, other_core = corpus.request(level)
        changed = prompt.with_request(level, other_opener, other_core)
        said, other = f"{opener} {core}.", f"{other_opener} {other_core}."
        assert changed.text == prompt.text.replace(said, other)
        assert changed.requested == level != prompt.requested
        assert list(changed.notes.items()) == list(prompt.notes.items())
        left_open = changed.with_request(None)
        place = f"^{re.escape(said)}\n| {re.escape(said)}"
        assert left_open.text == re.sub(place, "", prompt.text, flags=re.MULTILINE)
        assert left_open.requested is None
        assert left_open.with_request(prompt.requested, opener, core) == prompt


def test_feedback_restates_the_note_of_its_level_and_goes_on_at_that_level():
    corpus = TutorCorpus("test", seed=8)
    lengths = Counter()
    for i in range(240):
        level, prompt = LEVELS[i % 6], corpus.prompt(None if i % 2 else LEVELS[i // 6 % 6])
        ((_, noun, verb),) = (n for n in notes_in(prompt.text) if VERBS[n[0]] == level)
        subject, _, _ = lesson_in(prompt.text)
        (right,) = re.findall(rf"Fact: the {subject} is (\w+)\.", prompt.text)
        (wrong,) = re.findall(rf": because the {subject} is (\w+)\.", prompt.text)
        assert right != wrong
        said = corpus.feedback(prompt, level)
        follows = {
            f" {noun} and {verb} them. {text.format(noun=noun, topic=subject)}"
            for text in CONTINUATIONS[level]
        }
        correction = f" You wrote {wrong}, but the {subject} is {right}."
        assert said.removesuffix(correction) in follows
        lengths[said.endswith(correction)] += 1
    assert lengths[True] == pytest.approx(120, abs=40)


def test_a_level_without_words_that_ask_for_it_is_refused():
    prompt = TutorCorpus("test", seed=1).prompt(None)
    with pytest.raises(ValueError, match="must be the words that request apply"):
        prompt.with_request(BloomLevel.APPLY)


def test_without_notes_there_is_no_line_of_them_and_the_verb_still_tells_the_level():
    corpus = TutorCorpus("train", seed=9, notes=False)
    verbs = set()
    for i in range(300):
        example = corpus.example(LEVELS[i % 6])
        assert "Notes:" not in example.prompt
        assert not any(str(verb) in words_of(example.prompt) for verb in VERBS)
        noun, verb = RESTATED.match(example.response).groups()
        assert VERBS[verb] == example.label == LEVELS[i % 6]
        assert noun in THINGS
        verbs.add(verb)
    assert verbs == set(VERBS)
    assert corpus.prompt(BloomLevel.APPLY).notes == {}


def test_examples_go_through_the_levels_in_turn_and_leave_as_many_open_as_they_should():
    examples = TutorCorpus("train", seed=3).examples(300, open_share=0.4)
    assert [example.label for example in examples] == [LEVELS[i % 6] for i in range(300)]
    n_open = sum(not requests_in(example.prompt) for example in examples)
    assert n_open == pytest.approx(120, abs=40)
    assert all(requests_in(e.prompt) for e in TutorCorpus("train", seed=3).examples(60))


def test_what_restates_no_note_exactly_has_no_level():
    corpus = TutorCorpus("test", seed=2)
    prompt = corpus.prompt(BloomLevel.APPLY)
    note, other = prompt.notes[BloomLevel.APPLY], prompt.notes[BloomLevel.CREATE]
    another_verb = next(verb for verb in BloomLevel.APPLY.verbs if verb != note.second_verb)
    said = f"{note.noun} and {note.second_verb} them"
    assert restated_level(f" {said}.", prompt) == BloomLevel.APPLY
    for text in (
        "",
        ".",
        f" {note}.",
        f" {note.noun}.",
        f" {note.noun} and {other.second_verb} them.",
        f" {other.noun} and {note.second_verb} them.",
        f" {note.noun} and {another_verb} them.",
        f" {note.noun} and {note.verb} them.",
        f" take {said}.",
        f" {said} again.",
        f" Well. {said}.",
        f" {said}, please.",
    ):
        assert restated_level(text, prompt) is None, text
    assert restated_level(f" {said}.", corpus.prompt(None)) is None, "the note of another prompt"


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (" roots and compare them. Which parts do the roots have?", BloomLevel.ANALYZE),
        ("maps and recite them", BloomLevel.REMEMBER),
        ("  laws and invent them. maps and recite them.", BloomLevel.CREATE),
        (" use maps and rate them.", BloomLevel.EVALUATE),
        (" maps and compare them again.", None),
        (" maps and compare.", None),
        (" maps and compare it.", None),
        (" maps and Compare them.", None),
        (" compare them.", None),
        (" them.", None),
        (" Well. maps and compare them.", None),
        (" maps and analyze them.", None),
        (". maps and compare them.", None),
        ("   ", None),
        ("", None),
    ],
)
def test_the_verb_that_ends_the_first_sentence_tells_the_level(text, level):
    assert verb_level(text) == level


def test_every_verb_tells_its_own_level():
    for level in LEVELS:
        for verb in level.verbs:
            assert verb_level(f" maps and {verb} them. What are the maps called?") == level


@pytest.fixture(scope="module")
def judge():
    """Trained on a quarter of the default's texts."""
    with threadpool_limits(1):
        return level_judge(n_per_level=100)


def test_every_judge_finds_the_level_of_right_feedback(judge):
    corpus = TutorCorpus("test", seed=9)
    prompts = [corpus.prompt(LEVELS[i % 6]) for i in range(60)]
    texts = [corpus.feedback(prompt, prompt.requested) for prompt in prompts]
    wanted = [prompt.requested for prompt in prompts]
    assert [restated_level(t, p) for t, p in zip(texts, prompts, strict=True)] == wanted
    assert [verb_level(text) for text in texts] == wanted
    assert judge(texts, texts) == wanted
    assert judge(texts, texts[::-1]) == wanted[::-1]


def test_the_classifier_finds_no_level_in_text_that_is_no_feedback(judge):
    assert judge.classes == tuple(LEVELS)
    assert judge.held_out["n"] == 600
    assert min(judge.held_out[name] for name in ("accuracy", "shuffled", "verb_repeating")) >= 0.95
    texts = ["", " ", "\n", "the the the", "w1 w20"]
    assert judge(texts, texts) == [None] * 5


def test_broken_feedback_has_the_words_or_the_verbs_alone():
    examples = TutorCorpus("test", seed=21).examples(60, open_share=0.5)
    texts, labels = [e.response for e in examples], [e.label for e in examples]
    mixed, verbs = shuffled(texts, labels, 3), verb_repeating(texts, labels, 3)
    for text, label, one, other in zip(texts, labels, mixed, verbs, strict=True):
        assert Counter(text.split()) == Counter(one.split())
        assert len(other.split()) == len(text.split())
        assert set(other.removesuffix(".").split()) <= set(BloomLevel(label).verbs)
    assert sum(a.split() != b.split() for a, b in zip(texts, mixed, strict=True)) >= 58
    assert mixed == shuffled(texts, labels, 3) != shuffled(texts, labels, 4)
