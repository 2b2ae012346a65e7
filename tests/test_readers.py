"""Readers: one meaning of columns, templates and filters, whatever the file."""

import inspect
import json
from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.examples import LabelledExample, check_classes
from sae_query_steer.data.readers import (
    examples_from_csv,
    examples_from_dataset,
    examples_from_jsonl,
    texts_from_file,
)
from sae_query_steer.data.tokenized import tokenize_examples

ROWS = [
    {"q": "Why?", "a": "Because, it is.", "level": "Analysis", "lang": "english"},
    {"q": "Wer?", "a": "Ich.", "level": "Knowledge", "lang": "german"},
    {"q": "NA", "a": "null", "level": "Synthesis", "lang": "english"},
]


def write_csv(path, rows):
    lines = [",".join(rows[0])] + [",".join(f'"{cell}"' for cell in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(params=["csv", "jsonl", "dataset"])
def read(request, tmp_path):
    """A function that reads rows through one of the three readers."""
    match request.param:
        case "csv":
            return lambda rows, **how: examples_from_csv(write_csv(tmp_path / "x", rows), **how)
        case "jsonl":
            return lambda rows, **how: examples_from_jsonl(write_jsonl(tmp_path / "x", rows), **how)
        case _:
            return lambda rows, **how: examples_from_dataset(Dataset.from_list(rows), **how)


def test_columns_become_prompt_response_and_label(read):
    assert read(ROWS, prompt="q", response="a", label="level") == [
        LabelledExample(prompt="Why?", response="Because, it is.", label="Analysis"),
        LabelledExample(prompt="Wer?", response="Ich.", label="Knowledge"),
        LabelledExample(prompt="NA", response="null", label="Synthesis"),
    ]


def test_templates_and_parsed_labels(read):
    first = read(
        ROWS,
        prompt="Q: {q} {{{lang}}}\nA:",
        response=" {a}",
        label="level",
        parse_label=BloomLevel.parse,
    )[0]
    assert first.prompt == "Q: Why? {english}\nA:"
    assert first.response == " Because, it is."
    assert first.label == "analyze"
    assert type(first.label) is str


def test_without_a_response_column_responses_are_empty(read):
    assert {each.response for each in read(ROWS, prompt="q", label="level")} == {""}


def test_where_keeps_the_rows_whose_columns_have_the_values(read):
    kept = read(ROWS, prompt="q", label="level", where={"lang": "english"})
    assert [each.prompt for each in kept] == ["Why?", "NA"]
    kept = read(ROWS, prompt="q", label="level", where={"lang": "english", "q": "NA"})
    assert [each.prompt for each in kept] == ["NA"]


def test_where_that_keeps_nothing_is_refused(read):
    with pytest.raises(
        ValueError, match=r"gives no examples: of its 3 rows where=\{'lang': 'dutch'\} keeps none$"
    ):
        read(ROWS, prompt="q", label="level", where={"lang": "dutch"})


@pytest.mark.parametrize(
    "how",
    [
        {"prompt": "x", "label": "level"},
        {"prompt": "{q} {x}", "label": "level"},
        {"prompt": "q", "label": "x"},
        {"prompt": "q", "label": "level", "response": "x"},
        {"prompt": "q", "label": "level", "where": {"x": "1"}},
    ],
)
def test_an_absent_column_is_refused_with_those_there_are(read, how):
    with pytest.raises(
        ValueError,
        match=r"there is no column 'x'; the columns are \['q', 'a', 'level', 'lang'\]$",
    ):
        read(ROWS, **how)


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize("column", ["q", "a", "level"])
def test_a_blank_cell_is_refused_with_row_and_column(read, column: str, blank: str):
    rows = [ROWS[0], ROWS[1] | {column: blank}]
    with pytest.raises(
        ValueError,
        match=rf", (row|line) [12]: column '{column}' is blank; fill it in, or leave such rows out",
    ):
        read(rows, prompt="Q {q}", response="a", label="level")


def test_a_blank_cell_in_a_row_that_is_left_out_is_no_error(read):
    rows = [ROWS[0], ROWS[1] | {"q": "", "level": ""}]
    kept = read(rows, prompt="q", label="level", where={"lang": "english"})
    assert [each.prompt for each in kept] == ["Why?"]


def test_a_label_that_parse_label_refuses_is_named_with_its_row_and_column(read):
    rows = [ROWS[0], ROWS[1] | {"level": "wisdom"}]
    with pytest.raises(
        ValueError,
        match=r", (row|line) [12], column 'level': parse_label refused: .*'wisdom'",
    ):
        read(rows, prompt="q", label="level", parse_label=BloomLevel.parse)
    with pytest.raises(ValueError, match=r"column 'level': parse_label refused: 'wisdom'$"):
        read(rows, prompt="q", label="level", parse_label={"Analysis": "x"}.__getitem__)


def test_rows_count_from_one_in_a_csv_and_from_zero_in_a_data_set(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"q": ""}]
    with pytest.raises(ValueError, match=r"^\S*x\.csv, row 2: column 'q' is blank"):
        examples_from_csv(write_csv(tmp_path / "x.csv", rows), prompt="q", label="level")
    with pytest.raises(ValueError, match=r"^the data set, row 1: column 'q' is blank"):
        examples_from_dataset(Dataset.from_list(rows), prompt="q", label="level")


def test_lines_of_jsonl_count_from_one_blank_ones_included(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"q": "a", "level": "b"}\n\n{"q": "", "level": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^\S*x\.jsonl, line 4: column 'q' is blank"):
        examples_from_jsonl(path, prompt="q", label="level")


@pytest.mark.parametrize("template", ["{q", "q}{"])
def test_a_template_that_can_not_be_read_is_refused(read, template: str):
    with pytest.raises(ValueError, match=r"^the template '.*' can't be read: .*[{}]"):
        read(ROWS, prompt=template, label="level")


@pytest.mark.parametrize("template", ["{q!r}", "{q:>9}"])
def test_a_template_that_formats_a_column_is_refused(read, template: str):
    with pytest.raises(ValueError, match=r"^the template '.*' formats a column: write \{column\} "):
        read(ROWS, prompt=template, label="level")


def test_a_template_takes_columns_with_spaces_and_dots(tmp_path):
    path = write_csv(tmp_path / "x.csv", [{"BT LEVEL": "b", "q.text": "a"}])
    (only,) = examples_from_csv(path, prompt="{q.text}/{BT LEVEL}", label="BT LEVEL")
    assert only.prompt == "a/b"


@pytest.mark.parametrize("reader", [examples_from_csv, examples_from_jsonl])
def test_an_absent_file_is_refused(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^there is no file '.*none\.x': look at the path"):
        reader(tmp_path / "none.x", prompt="q", label="level")


@pytest.mark.parametrize("reader", [examples_from_csv, examples_from_jsonl])
def test_an_empty_file_is_refused(reader, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match=r"x gives no examples: of its 0 rows"):
        reader(str(tmp_path / "x"), prompt="q", label="level")


def test_a_csv_with_a_header_and_no_rows_is_refused(tmp_path):
    (tmp_path / "x").write_text("q,level\n")
    with pytest.raises(ValueError, match=r"x gives no examples: of its 0 rows"):
        examples_from_csv(tmp_path / "x", prompt="q", label="level")


def test_a_csv_whose_rows_are_longer_than_its_header_is_refused(tmp_path):
    (tmp_path / "x").write_text("q,level\nWhy?,a,b\nWho?,c,d\n")
    with pytest.raises(ValueError, match=r"rows have more cells than the header's \['q', 'level'"):
        examples_from_csv(tmp_path / "x", prompt="q", label="level")


def test_a_line_that_is_no_json_is_refused_with_its_number(tmp_path):
    (tmp_path / "x").write_text('{"q": "a", "level": "b"}\n{"q": \n')
    with pytest.raises(ValueError, match=r"x, line 2 is no JSON: .*; put one whole object on a"):
        examples_from_jsonl(tmp_path / "x", prompt="q", label="level")


def test_a_line_that_is_no_object_is_refused_with_its_number(tmp_path):
    (tmp_path / "x").write_text('["a", "b"]\n')
    with pytest.raises(ValueError, match=r"x, line 1 is a JSON list: put one object on a line"):
        examples_from_jsonl(tmp_path / "x", prompt="q", label="level")


def test_a_missing_value_is_a_blank_cell():
    dataset = Dataset.from_list([{"q": "a", "level": "b"}, {"q": None, "level": "b"}])
    with pytest.raises(ValueError, match=r"row 1: column 'q' is blank"):
        examples_from_dataset(dataset, prompt="q", label="level")


def test_numbers_are_read_as_text_and_class_labels_can_be_named():
    features = Features({"q": Value("int64"), "level": ClassLabel(names=["low", "high"])})
    dataset = Dataset.from_dict({"q": [7, 8], "level": [1, 0]}, features=features)
    plain = examples_from_dataset(dataset, prompt="q", label="level", where={"q": "7"})
    assert plain == [LabelledExample(prompt="7", label="1")]
    named = examples_from_dataset(
        dataset.with_format("torch"),
        prompt="q",
        label="level",
        parse_label=lambda cell: features["level"].int2str(int(cell)),
    )
    assert [each.label for each in named] == ["high", "low"]


def test_a_nested_cell_is_refused():
    dataset = Dataset.from_list([{"q": ["a", "b"], "level": "b"}])
    with pytest.raises(ValueError, match=r"column 'q' holds a list, but only text and numbers"):
        examples_from_dataset(dataset, prompt="q", label="level")


def test_a_data_set_of_several_splits_is_refused_with_the_remedy():
    splits = DatasetDict({"train": Dataset.from_list(ROWS)})
    # Past the run-time type check that only the tests switch on, as a user would call it.
    read = inspect.unwrap(examples_from_dataset)
    with pytest.raises(TypeError, match=r"^dataset is a DatasetDict: give a datasets\.Dataset"):
        read(splits, prompt="q", label="level")  # pyright: ignore[reportArgumentType]


def test_yahya_2012_gives_a_hundred_questions_of_each_level(shared_data):
    path = shared_data / "bloom_yahya2012" / "yahya-2012.csv"
    if not path.is_file():
        pytest.skip("needs yahya-2012.csv in ../shared/data/bloom_yahya2012, absent here")
    examples = examples_from_csv(
        path, prompt="QUESTION", label="BT LEVEL", parse_label=BloomLevel.parse
    )
    counts = check_classes(each.label for each in examples)
    assert list(counts.items()) == [(level.value, 100) for level in BloomLevel]


def test_feedback_saf_is_read_and_tokenised_as_a_whole(shared_data, stories_tokenizer):
    path = shared_data / "feedback_saf" / "saf.jsonl"
    if not path.is_file():
        pytest.skip("needs saf.jsonl in ../shared/data/feedback_saf, absent here")
    examples = examples_from_jsonl(
        path,
        prompt="Question: {question}\nFeedback:\n",
        response="{response_feedback}",
        label="verification_feedback",
        where={"lang": "english"},
    )
    assert len(examples) == 2112
    model = SimpleNamespace(tokenizer=stories_tokenizer, cfg=SimpleNamespace(n_ctx=512))
    tokens = tokenize_examples(model, examples[:50])
    for each, text in zip(tokens, examples, strict=False):
        response = stories_tokenizer.decode(each.tokens[each.prompt_length :])
        assert response == text.response


def test_texts_of_a_csv_are_a_column_or_a_template(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("a,b\nx,y\nz,w\n")
    assert texts_from_file(path, text="b") == ["y", "w"]
    assert texts_from_file(path, text="{a} and {b}") == ["x and y", "z and w"]
    with pytest.raises(ValueError, match="row 1: there is no column 'text'"):
        texts_from_file(path)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has no rows"):
        texts_from_file(path, text="a")


def test_texts_of_every_kind_of_file(tmp_path):
    texts = ["one two", "three"]
    data = Dataset.from_dict({"text": texts})
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n\n{"text": "three"}\n')
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "folder")
    (tmp_path / "a.txt").write_text("one two\n\n\n\nthree")
    for name in ("a.jsonl", "a.parquet", "folder", "a.txt"):
        assert texts_from_file(tmp_path / name) == texts
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]: give the folder of one"):
        texts_from_file(tmp_path / "splits")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        texts_from_file(tmp_path / "none.csv")
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is of kind '.pkl': give .csv, .jsonl, .parquet or .txt"):
        texts_from_file(tmp_path / "a.pkl")
