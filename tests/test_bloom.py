import json
import pickle
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_query_steer.bloom import BloomLevel

IN_ORDER = ["remember", "understand", "apply", "analyze", "evaluate", "create"]


def test_the_levels_come_in_the_order_of_the_revised_taxonomy():
    assert list(BloomLevel) == IN_ORDER
    assert [level.order for level in BloomLevel] == [1, 2, 3, 4, 5, 6]


def test_a_level_is_its_lower_case_verb():
    assert BloomLevel.ANALYZE == "analyze"
    assert f"{BloomLevel.ANALYZE}" == "analyze"
    assert BloomLevel("analyze") is BloomLevel.ANALYZE
    assert {"analyze": 1}[BloomLevel.ANALYZE] == 1


def test_a_level_survives_json_and_pickle():
    assert json.loads(json.dumps([*BloomLevel])) == IN_ORDER
    for level in BloomLevel:
        assert pickle.loads(pickle.dumps(level)) is level


def test_every_level_has_eight_to_twelve_verbs_and_shares_none():
    for level in BloomLevel:
        assert 8 <= len(level.verbs) <= 12
    counts = Counter(verb for level in BloomLevel for verb in level.verbs)
    assert max(counts.values()) == 1
    assert all(verb == verb.strip().lower() and " " not in verb for verb in counts)


@pytest.mark.parametrize(
    ("names", "level"),
    [
        ("remember Remembering Knowledge", BloomLevel.REMEMBER),
        ("understand Understanding Comprehension", BloomLevel.UNDERSTAND),
        ("apply Applying Application", BloomLevel.APPLY),
        ("analyze analyse Analyzing Analysing Analysis", BloomLevel.ANALYZE),
        ("evaluate Evaluating Evaluation", BloomLevel.EVALUATE),
        ("create Creating Creation Synthesis", BloomLevel.CREATE),
    ],
)
def test_revised_names_and_those_of_1956_mean_their_level(names: str, level: BloomLevel):
    for name in names.split():
        assert BloomLevel.parse(name) is level


def test_the_top_two_levels_of_1956_change_places():
    old = ["Knowledge", "Comprehension", "Application", "Analysis", "Synthesis", "Evaluation"]
    assert [BloomLevel.parse(name).order for name in old] == [1, 2, 3, 4, 6, 5]


@given(
    st.sampled_from(["remember", "analysing", "Comprehension", "synthesis"]),
    st.text(" \t\n", max_size=3),
    st.sampled_from([str.upper, str.lower, str.title, str.swapcase]),
)
def test_case_and_surrounding_space_do_not_matter(name, space, change):
    assert BloomLevel.parse(space + change(name) + space) is BloomLevel.parse(name)


def test_parsing_a_level_returns_it():
    for level in BloomLevel:
        assert BloomLevel.parse(level) is level


@pytest.mark.parametrize("text", ["wisdom", "", "analyzes", "remember understand"])
def test_an_unknown_name_is_refused_with_what_is_allowed_and_the_remedy(text: str):
    with pytest.raises(ValueError, match=f"'{text}'.*remember, understand.*Knowledge"):
        BloomLevel.parse(text)


def test_every_label_of_yahya_2012_means_a_level(shared_data):
    path = shared_data / "bloom_yahya2012" / "yahya-2012.csv"
    if not path.is_file():
        pytest.skip("needs yahya-2012.csv in ../shared/data/bloom_yahya2012, absent here")
    labels = pd.read_csv(path, dtype=str)["BT LEVEL"]
    assert Counter(map(BloomLevel.parse, labels)) == {level: 100 for level in BloomLevel}
