"""The report on labelled examples before any work."""

import warnings

import pandas as pd
import pytest
from test_data import example, model_with, word_tokenizer

import sae_query_steer as sqs
from sae_query_steer.diagnostics.text_report import example_report


@pytest.fixture
def given():
    return [
        example("red moon", " blue", label="a"),
        example("red moon", " blue", label="b"),
        example("blue red ", label="b", place="row 3"),
        example("red foo", "bar", label="a"),  # the unknown token swallows the boundary
        example(" ".join(["red"] * 9), label="b"),
    ]


def test_every_finding_has_its_number_and_first_example(given):
    model = model_with(word_tokenizer(bos_token="<s>"), n_ctx=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = example_report(model, given)
    found = {row["finding"]: (row["n"], row["first"]) for row in table.to_dict("records")}
    assert found == {
        "examples": (5, "example 0"),
        "class a": (2, "example 0"),
        "class b": (3, "example 1"),
        "duplicate text": (2, "example 0"),
        "text with several labels": (2, "example 0"),
        "prompt ends in white space": (1, "row 3"),
        "longer than the context": (1, "example 4"),
        "no exact boundary between prompt and response": (1, "example 3"),
        "span falls on 'moon'": (2, "example 0"),
        "span falls on 'red'": (1, "row 3"),
    }


def test_rows_that_were_left_out_and_words_for_nothing_are_counted():
    rows = pd.DataFrame(
        {
            "q": ["red", "blue", "", "moon", "red moon", "green"],
            "level": ["a", "NA", "a", "b", "a", "a"],
            "lang": [*["en"] * 5, "de"],
        }
    )
    examples = sqs.read_examples(
        rows, prompt="q", label="level", where={"lang": "en"}, skip_blank=True
    )
    table = example_report(model_with(word_tokenizer(bos_token="<s>")), examples)
    found = {row["finding"]: (row["n"], row["first"]) for row in table.to_dict("records")}
    assert found["left out: where"] == (1, "")
    assert found["left out: blank cell"] == (1, "")
    assert found["prompt or label is a word for nothing"] == (1, "row 1")
    large = sqs.read_examples(
        rows, prompt="q", label="level", skip_blank=True, min_class_size=2, where={"lang": "en"}
    )
    assert large.left_out == {"where": 1, "blank cell": 1, "class too small": 2}


def test_examples_without_a_token_in_the_span_are_counted(given):
    model = model_with(word_tokenizer(bos_token="<s>"), n_ctx=8)
    table = sqs.diagnostics.example_report(
        model, given[:1] + given[2:3], span=sqs.scopes.ResponseTokens()
    )
    found = {row["finding"]: (row["n"], row["first"]) for row in table.to_dict("records")}
    assert found["no token in the span"] == (1, "row 3")
    assert found["class a (too few: 1)"] == (1, "example 0")
    assert found["span falls on 'blue'"] == (1, "example 0")
