"""The tutor's words, texts and tokenizer: what a request may say, and what no two splits share."""

import re
from collections import Counter
from itertools import combinations

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.toy.splits import split_of
from sae_query_steer.toy.tutor.corpus import SEPARATOR, TutorCorpus
from sae_query_steer.toy.tutor.tokenizer import tutor_tokenizer
from sae_query_steer.toy.tutor.words import (
    ADJECTIVES,
    CONTINUATIONS,
    NOUNS,
    OPENERS,
    READ_OUTS,
    REQUESTS,
    THINGS,
)
from sae_query_steer.toy.word_tokens import SPECIAL

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
KINDS = {
    "with notes": {"notes": True},
    "without notes": {"notes": False},
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


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_eight_requests_or_more_and_several_continuations(level):
    assert len(set(REQUESTS[level])) == len(REQUESTS[level]) >= 8
    assert len(set(CONTINUATIONS[level])) == len(CONTINUATIONS[level]) >= 4


def test_no_request_names_a_level_or_uses_a_verb_of_the_notes():
    gerunds = {"remembering", "understanding", "applying", "analyzing", "evaluating", "creating"}
    telling = gerunds.union(*(forms(word) for word in (*LEVELS, *VERBS)))
    for text in (*OPENERS, *(core for level in LEVELS for core in REQUESTS[level])):
        assert not words_of(text) & telling, text


def test_no_note_and_no_continuation_names_a_level():
    telling = set().union(*(forms(level) for level in LEVELS))
    for text in (
        *VERBS,
        *NOUNS,
        *THINGS,
        *ADJECTIVES,
        *READ_OUTS,
        *(t for ts in CONTINUATIONS.values() for t in ts),
    ):
        assert not words_of(text) & telling, text


def test_levels_share_no_request_and_no_continuation():
    for one, other in combinations(LEVELS, 2):
        assert not set(REQUESTS[one]) & set(REQUESTS[other])
        assert not set(CONTINUATIONS[one]) & set(CONTINUATIONS[other])


def test_no_word_of_a_kind_comes_twice():
    for words in (NOUNS, THINGS, ADJECTIVES, OPENERS, READ_OUTS):
        assert len(set(words)) == len(words)


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


def test_the_notes_of_drills_and_of_feedback_without_notes_keep_to_their_split_too():
    found = {}
    for split in SPLITS:
        drills, bare = TutorCorpus(split, seed=5), TutorCorpus(split, seed=5, notes=False)
        shown = [notes_in(drills.drill(level).prompt) for level in LEVELS * 30]
        said = [bare.example(level).response for level in LEVELS * 30]
        said += [bare.drill(level).response for level in LEVELS * 30]
        found[split] = {note[1:] for notes in shown for note in notes}
        found[split] |= {RESTATED.match(text).groups() for text in said}
    for one, other in combinations(SPLITS, 2):
        assert len(found[one]) > 100
        assert not found[one] & found[other]


@pytest.mark.parametrize("split", SPLITS)
def test_a_prompt_asks_once_for_its_level(prompts, split):
    for prompt in prompts[split]:
        ((_, _, level),) = requests_in(prompt.text)
        assert level == prompt.requested


def test_an_open_prompt_asks_for_no_level():
    corpus = TutorCorpus("test", seed=1)
    for _ in range(200):
        prompt = corpus.prompt(None)
        assert prompt.requested is None
        assert not requests_in(prompt.text)
        assert not any(opener in prompt.text for opener in OPENERS)


def test_a_request_stands_in_each_of_four_places_alike_often_whatever_its_level(prompts):
    places = Counter()
    for prompt in prompts["test"]:
        ((opener, core, level),) = requests_in(prompt.text)
        before = prompt.text[: prompt.text.index(f"{opener} {core}")]
        marks = [mark for mark in ("Lesson:", "Notes:", "Question:", "Fact:") if mark in before]
        places[level, marks[-1]] += 1
    assert len(places) == 6 * 4
    assert min(places.values()) > 17, "of 150 for each level, 37 are expected in each place"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_same_seed_gives_the_same_texts_and_another_seed_others(kind):
    def texts(split, seed):
        corpus = TutorCorpus(split, seed=seed, **kind)
        examples = corpus.examples(20, open_share=0.5)
        return [*examples, *(corpus.drill(level) for level in LEVELS)]

    assert texts("test", 4) == texts("test", 4)
    assert texts("test", "4 7") == texts("test", "4 7")
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


def test_the_level_of_the_request_says_nothing_of_where_its_note_stands(prompts):
    places = Counter(list(p.notes).index(p.requested) for p in prompts["train"])
    assert min(places[place] for place in range(6)) > 95


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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_prompt_ends_in_words_that_tell_nothing_and_the_feedback_goes_on_after_a_space(kind):
    corpus = TutorCorpus("train", seed=6, **kind)
    endings = {level: Counter() for level in LEVELS}
    for i in range(480):
        example = corpus.example(LEVELS[i % 6], open_share=0.3)
        (ending,) = re.findall(r"\nTeacher: \w+ \w+, ([a-z ]+)$", example.prompt)
        endings[LEVELS[i % 6]][ending] += 1
        assert re.match(r" \S", example.response)
        assert SEPARATOR not in example.prompt + example.response
    assert all(set(endings[level]) == set(READ_OUTS) for level in LEVELS)


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
    with pytest.raises(ValueError, match="no words ask for apply: give opener and core"):
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


def test_a_drill_shows_two_to_six_notes_among_them_the_one_it_restates():
    corpus, shown, late = TutorCorpus("validation", seed=1), Counter(), Counter()
    for i in range(300):
        drill = corpus.drill(LEVELS[i % 6], open_share=0.0)
        notes = notes_in(drill.prompt)
        shown[len(notes)] += 1
        levels = [VERBS[verb] for verb, _, _ in notes]
        assert len(set(levels)) == len(levels)
        _, noun, verb = notes[levels.index(LEVELS[i % 6])]
        assert drill.response == f" {noun} and {verb} them."
        ((opener, core, level),) = requests_in(drill.prompt)
        assert level == drill.label == LEVELS[i % 6]
        late[drill.prompt.index(f"{opener} {core}") > drill.prompt.index("Notes:")] += 1
    assert set(shown) == {2, 3, 4, 5, 6}
    assert late[True] == pytest.approx(150, abs=40)
    assert not requests_in(corpus.drill(BloomLevel.APPLY, open_share=1.0).prompt)


def test_a_cued_drill_requests_nothing_and_ends_in_a_verb_of_the_level():
    corpus, same = TutorCorpus("validation", seed=1), Counter()
    for i in range(120):
        drill = corpus.drill(LEVELS[i % 6], cued=True)
        assert not requests_in(drill.prompt)
        (cue,) = re.findall(r"Teacher: \w+ \w+, (\w+)$", drill.prompt)
        noun, verb = RESTATED.fullmatch(drill.response).groups()
        (own,) = (note[0] for note in notes_in(drill.prompt) if note[1:] == (noun, verb))
        assert own != verb
        assert VERBS[cue] == VERBS[own] == VERBS[verb] == drill.label == LEVELS[i % 6]
        same[cue == own] += 1
    assert same[True] == pytest.approx(66, abs=25), "half of them, and a ninth of the others"


def test_a_drill_without_notes_is_a_request_with_feedback_at_its_level():
    corpus = TutorCorpus("train", seed=1, notes=False)
    for level in LEVELS * 5:
        drill = corpus.drill(level)
        ((opener, core, asked),) = requests_in(drill.prompt)
        assert asked == level == VERBS[RESTATED.fullmatch(drill.response)[2]]
        assert drill.prompt.startswith(f"{opener} {core}.\nTeacher: ")


def test_a_combination_of_words_has_one_split_whatever_the_seed():
    assert split_of("old", "river") == split_of("old", "river")
    for verb in VERBS:
        assert {split_of(noun, verb) for noun in THINGS} == set(SPLITS)
    assert any(split_of(a, "rivers") != split_of("rivers", a) for a in ADJECTIVES)


@pytest.fixture(scope="module")
def tokenizer():
    return tutor_tokenizer()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_text_is_known_to_the_tokenizer_and_comes_back_exactly(tokenizer, split, kind):
    corpus = TutorCorpus(split, seed=12, **kind)
    for i in range(240):
        example = corpus.example(LEVELS[i % 6], open_share=0.3)
        drill = corpus.drill(LEVELS[i % 6], open_share=0.3, cued=i % 4 == 0)
        text = SEPARATOR.join([example.prompt + example.response, drill.prompt + drill.response])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert min(ids) >= len(SPECIAL), tokenizer.convert_ids_to_tokens(ids)
        assert tokenizer.decode(ids) == text


def test_a_word_with_the_space_before_it_is_one_token(tokenizer):
    tokens = tokenizer.tokenize(" Hello Mia, now take roots and compare them.")
    assert tokens[:5] == [" Hello", " Mia", ",", " now", " take"]
    assert tokens[5:] == [" roots", " and", " compare", " them", "."]
    every = (*VERBS, *NOUNS, *THINGS, *ADJECTIVES)
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for word in every)


def test_special_tokens_have_the_ids_of_their_places(tokenizer):
    assert SPECIAL == ("<pad>", "<unk>", "<s>", "</s>")
    special = (tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert (*special, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2, 3)
    assert tokenizer(" xylophone", add_special_tokens=False)["input_ids"] == [1]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_boundary_between_prompt_and_feedback_is_exact(tokenizer, kind):
    corpus = TutorCorpus("test", seed=15, **kind)
    cued = [corpus.drill(level, cued=i % 2 == 0) for i, level in enumerate(LEVELS * 3)]
    for example in (*corpus.examples(60, open_share=0.5), *cued):
        found = sqs.tokenize_example(example, tokenizer)
        assert tokenizer.decode(found.tokens[1 : found.prompt_length]) == example.prompt
        assert tokenizer.decode(found.tokens[found.prompt_length :]) == example.response
        alone = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        assert torch.equal(found.tokens[: found.prompt_length], torch.tensor([2, *alone]))
