"""The rules and prompts of benchmarks/stories.py: labels are what they say they are."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def classes() -> ModuleType:
    """The module of the rules, read by its path: benchmarks are no package."""
    path = FOLDER / "stories_classes.py"
    if not path.exists():
        pytest.skip("benchmarks are not part of an installed package")
    spec = importlib.util.spec_from_file_location("stories_classes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stories_classes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PROMPT = "Once there was a girl named Lily. She saw a big dragon with Tim."
CASES = [
    ("dialogue", ' Tim said, "Hello!" She ran.', "dialogue"),
    ("dialogue", ' She ran. Tim said, "Hello!"', "narration"),
    ("dialogue", ' "Go!" said Tim.', "dialogue"),
    ("dialogue", " ", None),
    ("opener", " Lily's mom came.", "name"),
    ("opener", "\nShe was happy.", "pronoun"),
    ("opener", ' "We go," said Tim.', "pronoun"),
    ("opener", " Once Lily came.", "other"),
    ("trouble", " But they ran.", "trouble"),
    ("trouble", " They ran. It was sad.", "none"),
    ("trouble", " A button fell.", "trouble"),
    ("trouble", " The knot was a button.", "none"),
    ("gender", " The other gave him her ball.", "he"),
    ("gender", " The hero ran to her.", "she"),
    ("gender", " They ran. He fell.", None),
]


@pytest.mark.parametrize(("rule", "text", "label"), CASES)
def test_a_rule_reads_the_next_sentence_alone(classes, rule, text, label) -> None:
    assert getattr(classes, rule)(PROMPT, text) == label


def test_the_class_is_the_word_that_comes_first_or_is_completed(classes) -> None:
    first = classes.which_first("Lily", "Tim")
    assert first("", "Timmy met Lily and Tim") == "Lily"
    assert first("", "Timmy") is None
    rest = classes.completes("Max", "Sue", 1)
    assert [rest("", text) for text in ("ax ran", "ue ran", "axe", "om")] == [
        "Max",
        "Sue",
        None,
        None,
    ]


def test_stories_are_cut_at_ends_of_sentences_outside_quotes(classes) -> None:
    story = 'Tim ran. He said, "Stop. Go!" Then he fell. The end.'
    heads = [story[:end] for end in classes.cuts(story)]
    assert heads == [
        "Tim ran.",
        'Tim ran. He said, "Stop. Go!"',
        'Tim ran. He said, "Stop. Go!" Then he fell.',
        story,
    ]


def test_a_cut_leaves_the_sentence_that_follows_as_it_stands(classes) -> None:
    story = "Tim ran. He fell.\nThen he cried. The end."
    pairs = {pair for seed in range(20) for pair in classes.cut([story], seed)}
    assert pairs == {
        ("Tim ran. He fell.", "\nThen he cried."),
        ("Tim ran. He fell.\nThen he cried.", " The end."),
    }
    assert classes.cut([story], 0, longest=10) == []
    assert classes.cut(["No end"], 0) == []


def test_a_name_is_cut_off_only_after_both_were_named(classes) -> None:
    story = "Once Lily ran. Lily met Tim. They saw Lily."
    assert classes.before_names([story], "Lily", "Tim", 0) == [
        ("Once Lily ran. Lily met Tim. They saw", " Lily")
    ]
    assert classes.before_names(["Once Lily met Tim."], "Lily", "Tim", 0) == []


def test_paired_prompts_are_different_pairs_with_one_prompt_of_each_class(classes) -> None:
    for name, (_, rule) in classes.PAIRED.items():
        pairs = classes.paired(name, 40, seed=3)
        assert pairs == classes.paired(name, 40, seed=3) != classes.paired(name, 40, seed=4)
        assert len({kind for pair in pairs for kind in pair}) == 2
        prompts = [prompt for pair in pairs for prompt in pair.values()]
        assert len(set(prompts)) == len(prompts)
        assert callable(rule)


def test_prompts_of_begun_words_differ_in_their_last_letter_alone(classes) -> None:
    for name in ("begun name", "begun thing"):
        for pair in classes.paired(name, 20, seed=0):
            (first, one), (second, other) = pair.items()
            assert one[:-1] == other[:-1]
            assert (one[-1], other[-1]) == (first[0], second[0])
            assert first in one and second in one
            rule = classes.PAIRED[name][1]
            assert rule(one, first[1:] + " ran") == first
            assert rule(one, second[1:] + " ran") == second
            assert rule(one, "zz") is rule(one, "") is None
