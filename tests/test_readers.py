"""Readers: the same columns, templates and filters for every kind of file and dataset."""

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.data.examples import LabelledExample, check_classes
from sae_query_steer.data.files import check_columns, read_rows
from sae_query_steer.data.readers import read_examples, read_texts
from sae_query_steer.data.tokenized import tokenize_example

ROWS = [
    {"q": "Why?", "a": "Because, it\nis.", "level": "Analysis", "lang": "english"},
    {"q": "Wer?", "a": "Ich.", "level": "Knowledge", "lang": "german"},
    {"q": "NA", "a": "null", "level": "None", "lang": "english"},
]
KINDS = ("csv", "jsonl", "parquet", "folder")


def write(kind, folder, rows):
    path = folder / f"x.{kind}"
    match kind:
        case "csv":
            lines = [
                ",".join(f'"{cell}"' for cell in cells) for cells in (r.values() for r in rows)
            ]
            path.write_text("\n".join([",".join(rows[0]), *lines, ""]), encoding="utf-8-sig")
        case "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
        case "parquet":
            Dataset.from_list(rows).to_parquet(path)
        case _:
            Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.fixture(params=[*KINDS, "dataset", "stream"])
def read(request, tmp_path):
    """A function that reads rows from one kind of source."""
    match request.param:
        case "dataset":
            return lambda rows, **how: read_examples(Dataset.from_list(rows), **how)
        case "stream":
            return lambda rows, **how: read_examples(
                Dataset.from_list(rows).to_iterable_dataset(), **how
            )
        case kind:
            return lambda rows, **how: read_examples(write(kind, tmp_path, rows), **how)


def test_columns_become_prompt_response_and_label_to_the_letter(read):
    assert read(ROWS, prompt="q", response="a", label="level") == [
        LabelledExample(prompt="Why?", response="Because, it\nis.", label="Analysis"),
        LabelledExample(prompt="Wer?", response="Ich.", label="Knowledge"),
        LabelledExample(prompt="NA", response="null", label="None"),
    ]


def test_templates_filters_and_parsed_labels(read):
    first, last = read(
        ROWS,
        prompt="Q: {q} {{{lang}}}\nA:",
        label="level",
        parse_label={"Analysis": "analyze", "None": "none"}.__getitem__,
        where={"lang": "english"},
    )
    assert first == LabelledExample(prompt="Q: Why? {english}\nA:", label="analyze")
    assert type(first.label) is str
    assert last.prompt == "Q: NA {english}\nA:"
    with pytest.raises(ValueError, match=r"where=\{'lang': 'dutch'\} keeps 0 of 3 rows"):
        read(ROWS, prompt="q", label="level", where={"lang": "dutch"})


@pytest.mark.parametrize(
    "how",
    [
        {"prompt": "{q} {x}"},
        {"label": "x"},
        {"response": "x"},
        {"where": {"x": "1"}},
    ],
)
def test_an_absent_column_is_refused_with_those_there_are(read, how):
    with pytest.raises(
        ValueError, match=r"no column 'x': the columns are \['q', 'a', 'level', 'lang'\]"
    ):
        read(ROWS, **{"prompt": "q", "label": "level", **how})


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize("column", ["q", "a", "level"])
def test_a_blank_cell_is_refused_with_row_and_column(read, column: str, blank: str):
    rows = [ROWS[0], ROWS[1] | {column: blank}]
    how = {"prompt": "Q {q}", "response": "a", "label": "level"}
    with pytest.raises(ValueError, match=rf", (row|line) [12]: column '{column}' is blank"):
        read(rows, **how)
    assert len(read(rows, **how, where={"lang": "english"})) == 1


def test_a_label_that_parse_label_refuses_is_named_with_its_row_and_column(read):
    rows = [ROWS[0], ROWS[1] | {"level": "wisdom"}]
    for parse in (BloomLevel.parse, {"Analysis": "x"}.__getitem__):
        with pytest.raises(
            ValueError, match=r", (row|line) [12], column 'level': parse_label refused: .*wisdom"
        ):
            read(rows, prompt="q", label="level", parse_label=parse)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{q", "can't be read"),
        ("q}{", "can't be read"),
        ("{q!r}", "formats"),
        ("{q:>9}", "formats"),
    ],
)
def test_a_template_that_is_no_plain_template_is_refused(read, template: str, why: str):
    with pytest.raises(ValueError, match=rf"^the template '.*' {why}"):
        read(ROWS, prompt=template, label="level")


def test_rows_of_files_count_from_one_and_of_datasets_from_zero(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"q": ""}]
    for kind, place in (("csv", "row 2"), ("parquet", "row 2"), ("jsonl", "line 2")):
        with pytest.raises(ValueError, match=rf"^\S*x\.{kind}, {place}: column 'q' is blank"):
            read_examples(write(kind, tmp_path, rows), prompt="q", label="level")
    with pytest.raises(ValueError, match=r"^the dataset, row 1: column 'q' is blank"):
        read_examples(Dataset.from_list(rows), prompt="q", label="level")
    (tmp_path / "x.jsonl").write_text('\n{"q": "a", "b": "b"}\n\n{"q": "", "b": "b"}\n')
    with pytest.raises(ValueError, match=r"^\S*x\.jsonl, line 4: column 'q' is blank"):
        read_examples(tmp_path / "x.jsonl", prompt="q", label="b")


def test_a_template_takes_columns_with_spaces_and_dots(tmp_path):
    path = write("csv", tmp_path, [{"BT LEVEL": "b", "q.text": "a"}])
    (only,) = read_examples(path, prompt="{q.text}/{BT LEVEL}", label="BT LEVEL")
    assert only.prompt == "a/b"


def test_a_text_longer_than_a_block_of_the_parser_is_read(tmp_path):
    long = "word, " * 500_000
    path = write("csv", tmp_path, [{"q": "short", "level": "a"}, {"q": long, "level": "b"}])
    assert read_examples(path, prompt="q", label="level")[1].prompt == long


def test_files_without_rows_are_refused(tmp_path):
    for name, text in (("x.csv", ""), ("x.csv", "q,level\n"), ("x.jsonl", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} gives no examples: .* keeps 0 of 0 rows"):
            read_examples(str(tmp_path / name), prompt="q", label="level")
    with pytest.raises(FileNotFoundError, match=r"^no file '.*none\.csv'"):
        read_examples(tmp_path / "none.csv", prompt="q", label="level")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("x.csv", "q,level\nWhy?,a,b\n", "x.csv, row 1 must have 2 cells .*, got 3"),
        ("x.csv", "q,level\nWhy?,a\nWho?\n", "x.csv, row 2 must have 2 cells .*, got 1"),
        ("x.csv", 'q,level\n"Why?",a\n"Who?,b\n', "x.csv, line 3, is no CSV: .* close every"),
        ("x.csv", 'q,level\n"Say "hi"!",a\n', "x.csv, line 2, is no CSV: .* inside one twice"),
        ("x.csv", "q,q\nWhy?,a\n", "the column 'q' is there twice"),
        ("x.jsonl", '{"q": "a", "level": "b"}\n{"q": \n', "line 2 must be a JSON object: .*"),
        ("x.jsonl", '["a", "b"]\n', "line 1 must be a JSON object, got list"),
        ("x.pkl", "", r"must be one of .csv, .tsv, .jsonl, .parquet, .txt or .*, got '.pkl'"),
    ],
)
def test_malformed_files_are_refused_with_the_row(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=why):
        read_examples(tmp_path / name, prompt="q", label="level")


def test_missing_nested_and_typed_values(tmp_path):
    dataset = Dataset.from_list([{"q": "a", "level": "b"}, {"q": None, "level": "b"}])
    with pytest.raises(ValueError, match=r"row 1: column 'q' is blank"):
        read_examples(dataset, prompt="q", label="level")
    dataset = Dataset.from_list([{"q": ["a", "b"], "level": "b"}])
    with pytest.raises(ValueError, match=r"column 'q' must hold text or finite numbers, got list"):
        read_examples(dataset, prompt="q", label="level")
    features = Features({"q": Value("int64"), "level": ClassLabel(names=["low", "high"])})
    dataset = Dataset.from_dict({"q": [7, 8], "level": [1, 0]}, features=features)
    for source in (dataset, dataset.with_format("torch"), dataset.to_iterable_dataset()):
        named = read_examples(source, prompt="q", label="level", where={"level": "high"})
        assert named == [LabelledExample(prompt="7", label="high")]
    dataset.to_parquet(tmp_path / "x.parquet")
    dataset.save_to_disk(tmp_path / "folder")
    for source in (tmp_path / "x.parquet", tmp_path / "folder"):
        named = read_examples(source, prompt="q", label="level")
        assert [each.label for each in named] == ["high", "low"]


MISSING = {"null": None, "NaN": float("nan"), "NA": pd.NA, "NaT": pd.NaT, "white": " \t"}


@pytest.mark.parametrize("missing", MISSING)
def test_a_missing_value_is_blank_and_skipped_on_request(missing):
    frame = pd.DataFrame({"q": ["one", MISSING[missing], "nan"], "n": [1, 2, 3]}, dtype=object)
    with pytest.raises(ValueError, match="row 1: column 'q' is blank.*skip_blank=True"):
        read_examples(frame, prompt="q", label="n")
    found = read_examples(frame, prompt="q", label="n", skip_blank=True)
    assert [(each.prompt, each.label) for each in found] == [("one", "1"), ("nan", "3")]


def test_nulls_and_numbers_of_files_are_neither_words_nor_decimals(tmp_path):
    pd.DataFrame({"q": ["a", None, "b"], "n": [1, 2, None]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"q": "a", "n": 1.0}\n{"q": NaN, "n": 2}\n{"q": "b"}\n')
    for path in (tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        found = read_examples(
            path, prompt="q", label="n", skip_blank=True, where=lambda row: "n" in row
        )
        assert [(each.prompt, each.label) for each in found] == [("a", "1")]
    (tmp_path / "x.jsonl").write_text('{"q": 1e999, "n": 1}\n')
    with pytest.raises(ValueError, match="must hold text or finite numbers, got inf"):
        read_examples(tmp_path / "x.jsonl", prompt="q", label="n")


def test_a_header_with_another_separator_is_told_so(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("q;level\na, b;create\n")
    with pytest.raises(ValueError, match=r"has one column, 'q;level'; .* \(--sep\), .* be ';'"):
        read_examples(path, prompt="q", label="level")
    (found,) = read_examples(path, prompt="q", label="level", sep=";")
    assert (found.prompt, found.label) == ("a, b", "create")
    (found,) = read_texts(path, text="q;level", sep="|")
    assert found == "a, b;create"


def test_all_blank_rows_are_named_at_once_up_to_ten(tmp_path):
    rows = [ROWS[0] | {"q": ""}] * 12
    with pytest.raises(ValueError) as caught:
        read_examples(write("csv", tmp_path, rows), prompt="q", label="level")
    lines = str(caught.value).splitlines()
    assert [f", row {n}: " in line for n, line in enumerate(lines[:10], start=1)] == [True] * 10
    assert lines[10] == "and 2 more"
    assert lines[11:] == [line for line in lines if "skip_blank=True (--skip-blank)" in line]
    assert len(lines) == 12, "the remedy is told once"


def test_labels_are_stripped_and_normalised_and_near_equal_ones_refused():
    accents = {"q": ["a", "b"], "level": [" e\u0301te ", "\u00e9te"]}
    found = read_examples(pd.DataFrame(accents), prompt="q", label="level")
    assert {each.label for each in found} == {"\u00e9te"}
    for other in ("Apply", "ap  ply"):
        rows = pd.DataFrame(
            {"q": ["a", "b"], "level": ["ap ply" if " " in other else "apply", other]}
        )
        with pytest.raises(
            ValueError, match=rf"and '{other}' \(row 1\) differ only in case or white space"
        ):
            read_examples(rows, prompt="q", label="level")
    lower = read_examples(rows, prompt="q", label="level", parse_label=lambda cell: "x")
    assert len(lower) == 2


def test_blank_cells_and_near_equal_labels_are_named_at_once_by_row(tmp_path):
    rows = [{"q": "a", "level": "x"}, {"q": " ", "level": "x"}, {"q": "b", "level": "X"}]
    path = write("csv", tmp_path, rows)
    said = r"row 2: column 'q' is blank.*\n.*labels 'x' \(row 1\) and 'X' \(row 3\) differ"
    with pytest.raises(ValueError, match=said):
        read_examples(path, prompt="q", label="level")
    merged = read_examples(path, prompt="q", label="level", skip_blank=True, merge_labels=True)
    assert [(one.label, one.place) for one in merged] == [("x", "row 1"), ("x", "row 3")]


def test_classes_with_too_few_examples_are_left_out():
    rows = pd.DataFrame({"q": ["a", "b", "c"], "level": ["x", "y", "x"]})
    found = read_examples(rows, prompt="q", label="level", min_class_size=2)
    assert [(one.prompt, one.place) for one in found] == [("a", "row 0"), ("c", "row 2")]
    with pytest.raises(ValueError, match="min_class_size=3 leaves no class: .*'x': 2"):
        read_examples(rows, prompt="q", label="level", min_class_size=3)


def test_white_space_around_prompts_is_kept_or_stripped():
    rows = pd.DataFrame({"q": [" a "], "level": ["x"]})
    assert read_examples(rows, prompt="q", label="level")[0].prompt == " a "
    assert read_examples(rows, prompt="q", label="level", strip=True)[0].prompt == "a"


def test_frames_of_polars_are_read():
    class Frame:
        def iter_rows(self, *, named):
            assert named
            return iter([{"q": "a", "level": "x"}])

    assert read_examples(Frame(), prompt="q", label="level")[0].prompt == "a"


@pytest.mark.parametrize("name", ["x.CSV", "x.tsv", "x.csv"])
def test_suffixes_separators_and_encodings(tmp_path, name):
    sep = {"x.tsv": "\t", "x.csv": ";"}.get(name)
    given = sep if name == "x.csv" else None
    text = f"q{sep or ','}level\nCaf\u00e9{sep or ','}x\n"
    for encoding in ("utf-8", "utf-8-sig", "latin-1", "utf-16"):
        (tmp_path / name).write_text(text, encoding=encoding)
        read = "utf-8" if encoding == "utf-8-sig" else encoding
        found = read_examples(tmp_path / name, prompt="q", label="level", encoding=read, sep=given)
        assert found[0].prompt == "Caf\u00e9"
        check_columns(tmp_path / name, ["q", "level"], encoding=read, sep=given)
        if encoding in ("latin-1", "utf-16"):
            with pytest.raises(ValueError, match=rf"{name} must be text in utf-8.*encoding="):
                read_examples(tmp_path / name, prompt="q", label="level", sep=given)
    for suffix, line in ((".jsonl", '{"text": "Caf\u00e9"}'), (".txt", "Caf\u00e9")):
        (tmp_path / f"x{suffix}").write_text(line, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"x{suffix} must be text in utf-8"):
            read_texts(tmp_path / f"x{suffix}")
        assert read_texts(tmp_path / f"x{suffix}", encoding="latin-1") == ["Caf\u00e9"]


def test_what_is_no_file_of_text_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="is a pipe"):
        read_examples(tmp_path / "x.csv", prompt="q", label="level")
    for name, text, why in (
        ("a.jsonl", '{"q": 1, "q": 2}', "line 1 must be a JSON object: the key 'q' is there twice"),
        ("b.jsonl", '{"q": ' + "[" * 100_000, "line 1 must be a JSON object: .*recursion"),
        ("c.jsonl", '{"q": "\\ud800", "level": "x"}', "column 'q' is no valid Unicode"),
        ("d.parquet", "PAR1", "not a Parquet file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=why):
            read_examples(tmp_path / name, prompt="q", label="level")


def test_a_small_parquet_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    rows = pd.DataFrame({"q": ["a" * 100_000] * 2, "level": ["x"] * 2})
    rows.to_parquet(tmp_path / "big.parquet", compression="zstd")
    assert len(read_examples(tmp_path / "big.parquet", prompt="q", label="level")) == 2
    monkeypatch.setattr("sae_query_steer.data.files.MAX_BYTES", 50_000)
    assert (tmp_path / "big.parquet").stat().st_size < 50_000
    with pytest.raises(ValueError, match="would take .* unpacked, more than .*: read it in parts"):
        read_examples(tmp_path / "big.parquet", prompt="q", label="level")


def test_a_column_in_another_case_is_suggested(tmp_path):
    path = write("csv", tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"no column 'Q'.*; did you mean 'q'\?"):
        check_columns(path, ["Q"])


def test_several_splits_are_refused_with_the_remedy(tmp_path):
    splits = DatasetDict({"train": Dataset.from_list(ROWS)})
    splits.save_to_disk(tmp_path / "splits")
    # Past the run-time type check that only the tests switch on, as a user would call it.
    read = inspect.unwrap(read_examples)
    for source in (splits, tmp_path / "splits"):
        with pytest.raises(TypeError, match=r"one split .*, got DatasetDict of .*\['train'\]"):
            read(source, prompt="q", label="level")


def test_texts_are_a_column_or_a_template_or_plain_text(tmp_path):
    rows = [{"text": "one two", "b": "x"}, {"text": "three", "b": "y"}]
    for kind in KINDS:
        path = write(kind, tmp_path, rows)
        assert read_texts(path) == ["one two", "three"]
        assert read_texts(path, text="{b}: {text}") == ["x: one two", "y: three"]
    assert read_texts(Dataset.from_list(rows).to_iterable_dataset().take(1)) == ["one two"]
    (tmp_path / "a.txt").write_text("one two\n\n\n\nthree")
    assert read_texts(tmp_path / "a.txt") == ["one two", "three"]
    with pytest.raises(ValueError, match="row 1: no column 'x'"):
        read_texts(tmp_path / "x.csv", text="x")
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="has no rows"):
        read_texts(tmp_path / "x.csv", text="a")


def test_blank_texts_are_refused_with_a_remedy_that_is_there(tmp_path):
    path = write("csv", tmp_path, [{"q": "a", "level": "x"}, {"q": " ", "level": "x"}])
    with pytest.raises(ValueError, match=r"row 2: column 'q' is blank; .* skip_blank=True"):
        read_texts(path, text="q")
    assert read_texts(path, text="q", skip_blank=True) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_checked_from_the_header(tmp_path, kind):
    path = write(kind, tmp_path, ROWS)
    check_columns(path, ["q", "{a} {lang}", None])
    with pytest.raises(ValueError, match=r"x.* no column 'x': the columns are \['q', 'a'"):
        check_columns(path, ["q", "{a} {x}"])
    (tmp_path / "a.txt").write_text("text")
    check_columns(tmp_path / "a.txt", ["text"])
    with pytest.raises(FileNotFoundError, match="no file"):
        check_columns(tmp_path / "none.csv", ["q"])


@pytest.mark.slow
def test_headers_and_rows_are_read_without_slow_imports(tmp_path):
    path = write("csv", tmp_path, ROWS)
    code = (
        "import sys; from sae_query_steer.data.files import check_columns, read_rows\n"
        f"check_columns({str(path)!r}, ['q']); list(read_rows({str(path)!r}))\n"
        "slow = {'torch', 'datasets', 'transformers', 'sae_lens', 'pandas'} & sys.modules.keys()\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(list(read_rows(path))) == 3


def test_yahya_2012_gives_a_hundred_questions_of_each_level(shared_data):
    path = shared_data / "bloom_yahya2012" / "yahya-2012.csv"
    if not path.is_file():
        pytest.skip("needs yahya-2012.csv in ../shared/data/bloom_yahya2012, absent here")
    examples = read_examples(
        path, prompt="QUESTION", label="BT LEVEL", parse_label=BloomLevel.parse
    )
    counts = check_classes(each.label for each in examples)
    assert list(counts.items()) == [(level.value, 100) for level in BloomLevel]


def test_feedback_saf_is_read_and_tokenised_as_a_whole(shared_data, stories_tokenizer):
    path = shared_data / "feedback_saf" / "saf.jsonl"
    if not path.is_file():
        pytest.skip("needs saf.jsonl in ../shared/data/feedback_saf, absent here")
    examples = read_examples(
        path,
        prompt="Question: {question}\nFeedback:\n",
        response="{response_feedback}",
        label="verification_feedback",
        where={"lang": "english"},
    )
    assert len(examples) == 2112
    model = SimpleNamespace(tokenizer=stories_tokenizer, cfg=SimpleNamespace())
    for text in examples[:50]:
        each = tokenize_example(model, text)
        assert stories_tokenizer.decode(each.tokens[each.prompt_length :]) == text.response
