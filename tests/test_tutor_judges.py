"""The judges of feedback: the rule, by hand-written cases, and the classifier, on unseen texts."""

from collections import Counter

import pytest
from threadpoolctl import threadpool_limits

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.toy.tutor.corpus import TutorCorpus
from sae_query_steer.toy.tutor.judges import (
    LevelClassifier,
    first_sentence,
    restated_level,
    shuffled,
    verb_level,
    verb_repeating,
)

LEVELS = list(BloomLevel)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads of the regression that wait for each other on a busy machine cost 10 x more."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def classifier() -> LevelClassifier:
    """One of a quarter of the texts that the default reads."""
    return LevelClassifier(n_per_level=100)


@pytest.fixture(scope="module")
def unseen():
    """Thirty feedbacks of each level of the split "test", with their labels."""
    examples = TutorCorpus("test", seed=21).examples(180, open_share=0.5)
    return [e.response for e in examples], [e.label for e in examples]


@pytest.mark.parametrize("level", LEVELS)
def test_the_note_that_the_first_sentence_restates_word_for_word_tells_the_level(level):
    prompt = TutorCorpus("test", seed=2).prompt(None)
    note = prompt.notes[level]
    other = prompt.notes[LEVELS[(level.order + 1) % 6]]
    said = f" {note.noun} and {note.second_verb} them."
    assert restated_level(said, prompt) == level
    follows = f"{other.noun} and {other.second_verb} them. What are the roots called?"
    assert restated_level(f"{said} {follows}", prompt) == level
    assert restated_level(said.removesuffix("."), prompt) == level


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


def test_without_notes_nothing_is_restated():
    corpus = TutorCorpus("test", seed=2, notes=False)
    prompt = corpus.prompt(BloomLevel.APPLY)
    assert restated_level(corpus.feedback(prompt, BloomLevel.APPLY), prompt) is None


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


def test_the_first_sentence_ends_at_the_first_full_stop():
    assert first_sentence("  compare the root. Which?") == "compare the root"
    assert first_sentence("compare the root") == "compare the root"
    assert first_sentence(". compare") == ""


def test_right_feedback_is_at_its_level_for_every_judge(classifier):
    corpus = TutorCorpus("test", seed=9)
    prompts = [corpus.prompt(LEVELS[i % 6]) for i in range(60)]
    said = [corpus.feedback(prompt, prompt.requested) for prompt in prompts]
    wanted = [prompt.requested for prompt in prompts]
    assert [restated_level(t, p) for t, p in zip(said, prompts, strict=True)] == wanted
    assert [verb_level(text) for text in said] == wanted
    assert classifier.levels(said) == wanted


def test_the_classifier_tells_unseen_feedback_from_text_that_is_none(classifier):
    found = classifier.held_out_accuracy(n_per_level=50)
    assert set(found) == {"feedback", "shuffled", "verb_repeating"}
    assert found["feedback"] >= 0.97
    assert found["shuffled"] >= 0.95
    assert found["verb_repeating"] >= 0.95


def test_the_held_out_accuracy_is_a_count_on_the_split_validation(classifier):
    examples = TutorCorpus("validation", seed=4).examples(90, open_share=1.0)
    right = 0
    for example in examples:
        right += classifier.levels([example.response]) == [example.label]
    found = classifier.held_out_accuracy(n_per_level=15, seed=4)
    assert found["feedback"] == pytest.approx(right / 90)


def test_a_classifier_of_few_texts_does_worse_and_says_so():
    few, more = (LevelClassifier(n_per_level=n).held_out_accuracy(n_per_level=20) for n in (2, 8))
    assert few["feedback"] < more["feedback"] < 0.97


def test_the_order_and_the_company_of_feedback_do_not_matter(classifier, unseen):
    texts, labels = unseen
    judged = classifier.levels(texts)
    assert judged == labels
    assert classifier.levels(texts[::-1]) == judged[::-1]
    assert classifier.levels(texts[7:8]) == judged[7:8]
    assert all(isinstance(level, BloomLevel) for level in judged)


def test_text_that_is_no_feedback_has_no_level(classifier):
    assert classifier.levels([]) == []
    assert classifier.levels(["", " ", "\n", "the the the", "w1 w20"]) == [None] * 5


def test_feedback_without_notes_is_told_as_well(classifier):
    examples = TutorCorpus("test", seed=3, notes=False).examples(120)
    judged = classifier.levels([example.response for example in examples])
    right = sum(a == e.label for a, e in zip(judged, examples, strict=True))
    assert right / 120 >= 0.97


def test_the_same_seed_makes_the_same_judge(unseen):
    odd = [f"{text} {other}" for text, other in zip(unseen[0], unseen[0][1:], strict=False)]
    first, again = (LevelClassifier(n_per_level=5, seed=3).levels(odd) for _ in range(2))
    assert first == again
    assert first != LevelClassifier(n_per_level=5, seed=4).levels(odd)


def test_shuffled_text_holds_the_same_words_in_another_order(unseen):
    texts, labels = unseen
    made = shuffled(texts, labels, 3)
    for text, other in zip(texts, made, strict=True):
        assert Counter(text.split()) == Counter(other.split())
    assert sum(a.split() != b.split() for a, b in zip(texts, made, strict=True)) >= 178
    assert made == shuffled(texts, labels, 3)
    assert made != shuffled(texts, labels, 4)


def test_verb_repeating_text_is_as_long_and_says_verbs_of_its_level_alone(unseen):
    texts, labels = unseen
    made = verb_repeating(texts, labels, 3)
    for text, label, other in zip(texts, labels, made, strict=True):
        assert other.endswith(".")
        words = other.removesuffix(".").split()
        assert len(words) == len(text.split())
        assert set(words) <= set(BloomLevel(label).verbs)
        assert len(set(words)) > 1
    assert made == verb_repeating(texts, labels, 3)
    assert made != verb_repeating(texts, labels, 4)
