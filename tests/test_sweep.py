"""The sweep: cases, the log it goes on from, and what it compares."""

import csv
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from markupsafe import Markup

import sae_query_steer as sqs
from sae_query_steer.compare.comparison import compare_methods, outcome_row
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.judges import RuleJudge
from sae_query_steer.compare.likelihoods import divergences
from sae_query_steer.compare.log import ComparisonLog
from sae_query_steer.compare.methods import (
    Descent,
    SteeringCase,
    cases_of,
    descent_methods,
    prompt_methods,
    random_methods,
)
from sae_query_steer.compare.report import (
    compare_into,
    comparison_html,
    verdict,
    write_comparison,
)
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.compare.scores import distinct_n
from sae_query_steer.models.launch import Ranks
from sae_query_steer.storage.folders import locked

CLASSES = ("apply", "create", "remember")


def first_letter(_prompt: str, text: str) -> str | None:
    """A rule for random texts: the class goes by the first word's number."""
    words = text.split()
    return CLASSES[int(words[0][1:]) % 3] if words and words[0][1:].isdigit() else None


@pytest.fixture
def scorers(tiny_models, examples, tmp_path):
    """Make scorers of validation and test cases that share a log."""

    def make(log="log.jsonl", model="bridge", **settings):
        kept = ComparisonLog(tmp_path / log, {"model": model}) if log else None
        parts = {"validation": examples[:24], "test": examples[24:]}
        return {
            split: TextScorer(
                tiny_models[model],
                {"redirect": cases_of(some, 9)},
                RuleJudge(first_letter, CLASSES),
                max_new_tokens=4,
                split=split,
                log=kept,
                **settings,
            )
            for split, some in parts.items()
        }

    return make


@pytest.fixture
def methods(saes, targets, examples):
    descents = (
        Descent(
            name="distance", objective=sqs.SquaredDistance(), n_steps=1, step_sizes=(0.5, 1.0, 30.0)
        ),
    )
    steered = descent_methods(
        "SAE descent", saes, {"last prompt token": targets}, descents, layers=[[0], [2], [0, 2]]
    )
    return [*prompt_methods(examples, shots=(1,)), *steered]


def labelled(counts: dict[str, int]) -> list[sqs.LabelledExample]:
    return [
        sqs.LabelledExample(prompt=f"{label} {i}", label=label)
        for label, n in counts.items()
        for i in range(n)
    ]


def test_cases_lead_to_every_other_class_and_each_pair_of_prompt_and_target_comes_once():
    cases = cases_of(labelled({"a": 5, "b": 5, "c": 5, "d": 5}), 60)
    assert all(c.prompt.startswith(c.source) and c.source != c.target for c in cases)
    assert set(Counter((c.source, c.target) for c in cases).values()) == {5}
    assert set(Counter((c.prompt, c.target) for c in cases).values()) == {1}
    assert len({c.prompt for c in cases[:20]}) == 20, "no prompt twice before all were used"


def test_more_cases_than_there_are_and_a_single_class_are_refused():
    some = labelled({"a": 2, "b": 3})
    assert len(cases_of(some, 5)) == 5
    with pytest.raises(ValueError, match="n cases must be a whole number >= 1 and <= 5, got 6"):
        cases_of(some, 6)
    with pytest.raises(ValueError, match=r"the labels name 1 class\(es\), \['a'\]"):
        cases_of(labelled({"a": 4}), 1)


def test_a_sweep_compares_every_method_on_the_test_cases_at_its_own_strength(scorers, methods):
    found = compare_methods(**scorers(), methods=methods, control_seeds=(0, 1))
    assert found.rows["method"].tolist() == [
        *("unsteered", "instruction", "few-shot (k=1)"),
        *["SAE descent"] * 3,
        *("random direction (seed 0)", "random direction (seed 1)"),
    ]
    assert found.rows["layers"].tolist()[3:6] == ["0", "2", "0,2"]
    bare = found.rows.iloc[0]
    assert bare["perplexity_ratio"] == pytest.approx(1.0)
    for _, row in found.rows[found.rows["method"] == "SAE descent"].iterrows():
        curve = found.curves[found.curves["layers"] == row["layers"]]
        assert row["step_size"] in curve["step_size"].tolist()
        fluent = curve[curve["perplexity_ratio"] <= 1.5]
        best = fluent["success"].max() if len(fluent) else None
        at = curve.set_index("step_size").loc[row["step_size"]]
        assert best is None or at["success"] == best
    assert len(found.texts) == 9 * len(found.rows)
    shares = (found.texts["judged"] == found.texts["target"]).groupby(found.texts["method"]).mean()
    assert shares["unsteered"] == bare["target_rate"]


def test_the_verdict_names_the_judges_accuracy_and_is_none_where_the_judge_may_guess(
    scorers, methods
):
    unknown = compare_methods(**scorers(), methods=methods[:4])
    assert unknown.judge == {}
    sentences = verdict(unknown)
    assert sentences.startswith("Judge: accuracy unknown")
    assert "Success, redirect, n = 9: unsteered" in sentences
    guess = {"accuracy": 1 / 3, "n": 6.0, "chance": 1 / 3, "majority": 1 / 3}
    said = verdict(replace(unknown, judge=guess))
    assert said == (
        "Judge: accuracy 0.33 [0.10, 0.70], n = 6, chance 0.33. No verdict: the judge's interval "
        "is not above chance, so its target rates mean nothing. Give it more labelled texts, or "
        "use another judge."
    )
    assert Markup.escape(said) in comparison_html(replace(unknown, judge=guess))
    good = verdict(replace(unknown, judge=guess | {"accuracy": 1.0}))
    assert good.startswith("Judge: accuracy 1.00 [0.61, 1.00], n = 6, chance 0.33. Success,")
    assert "better than random directions; more cases narrow them" in good


def test_a_sweep_that_goes_on_from_its_log_writes_no_text_again_and_finds_the_same(
    scorers, methods, monkeypatch
):
    methods = methods[:4]
    whole = compare_methods(**scorers(), methods=methods)
    path = scorers()["test"].log.path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])  # stopped while it wrote
    again = compare_methods(**scorers(), methods=methods)
    for name in ("rows", "curves", "texts"):
        assert getattr(whole, name).equals(getattr(again, name))
    assert path.read_text() == "".join(lines)
    monkeypatch.setattr(
        "sae_query_steer.compare.scorer.continuations", lambda *_a, **_k: pytest.fail()
    )
    assert compare_methods(**scorers(), methods=methods).rows.equals(whole.rows)


def test_a_case_is_the_same_whatever_batch_it_is_in_and_sampled_by_its_own_seed(scorers, methods):
    sampled = {"temperature": 1.0, "seed": 3}
    texts = [
        compare_methods(**scorers(log=None, batch_size=size, **sampled), methods=methods[:4]).texts
        for size in (9, 4)
    ]
    assert texts[0].equals(texts[1])
    greedy = compare_methods(**scorers(log=None), methods=methods[:1]).texts
    assert not greedy["text"].equals(texts[0]["text"][: len(greedy)])


def test_the_log_of_another_sweep_is_refused_with_both_sides(scorers, methods, tmp_path):
    compare_methods(**scorers(), methods=methods[:1])
    with pytest.raises(ValueError, match="another comparison .model='bridge' there, 'hooked' here"):
        scorers(model="hooked")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="is no log of a comparison"):
        ComparisonLog(tmp_path / "other.jsonl", {})


def test_ranks_write_a_log_each_and_read_those_of_all(tmp_path):
    path, settings = tmp_path / "log.jsonl", {"seed": 0}
    logs = [ComparisonLog(path, settings, rank=rank) for rank in (1, 0, 2)]
    for n, log in enumerate(logs):
        log.add({"n": n}, {"rate": n / 2})
    assert [len(log) for log in logs] == [1, 1, 1]
    with (tmp_path / "log-2.jsonl").open("ab") as file:
        file.write(b'{"key": ')  # rank 2 writes at this moment
    logs[1].read_others()
    assert [logs[1].get({"n": n}) for n in range(3)] == [{"rate": n / 2} for n in range(3)]
    assert (tmp_path / "log-2.jsonl").read_bytes().endswith(b'{"key": ')
    (tmp_path / "log-old.jsonl").write_text("notes\n")
    del log, logs
    assert len(ComparisonLog(path, settings)) == 3  # one process continues the run of three


def test_several_processes_need_a_log(scorers, methods):
    with pytest.raises(ValueError, match="scorers must have a log for 2 processes, got None"):
        compare_methods(**scorers(log=None), methods=methods[:1], ranks=Ranks(0, 2))


def test_a_log_loses_no_outcome_to_a_line_that_is_cut_or_damaged(tmp_path, monkeypatch):
    path, settings = tmp_path / "log.jsonl", {"seed": 0}
    log = ComparisonLog(path, settings)
    log.add({"n": 1}, {"rate": 0.5})
    head, first = path.read_bytes().splitlines(keepends=True)
    for cut in (b"", head[:20]):  # not even the head is whole
        path.write_bytes(cut)
        assert len(ComparisonLog(path, settings)) == 0
        assert path.read_bytes() == head
    path.write_bytes(head + first + first[:9])
    log = ComparisonLog(path, settings)
    log.add({"n": 2}, {"rate": 1.0})
    path.write_bytes(path.read_bytes().replace(first, b"{nonsense\n" + first))
    with pytest.warns(UserWarning, match="has 1 damaged line"):
        log = ComparisonLog(path, settings)
    assert [log.get({"n": n}) for n in (1, 2)] == [{"rate": 0.5}, {"rate": 1.0}]
    with path.open("ab") as file:
        file.write(first[:9])  # a write that failed half-way
    log.add({"n": 3}, {"rate": 0.25})
    with pytest.warns(UserWarning, match="has 2 damaged line"):
        assert ComparisonLog(path, settings).get({"n": 3}) == {"rate": 0.25}
    for other in (b"notes without an end of line", b'{"a": 1}\nand more'):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="is no log of a comparison"):
            ComparisonLog(path, settings)
        assert path.read_bytes() == other
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="is no log of a comparison"):
        ComparisonLog(path, settings)


def test_what_one_comparison_writes_is_refused_to_another_until_it_ends(tmp_path):
    path, out = tmp_path / "log.jsonl", tmp_path / "out"
    log = ComparisonLog(path, {})
    with ThreadPoolExecutor() as other:
        with pytest.raises(BlockingIOError, match="log.jsonl is being written by another"):
            other.submit(ComparisonLog, path, {}).result()
        with locked(out), pytest.raises(BlockingIOError, match="out is being written by another"):
            other.submit(compare_into, out, pytest.fail).result()
    del log
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_holds_a_line_for_each_outcome_that_json_alone_can_read(scorers, methods):
    compare_methods(**scorers(), methods=methods[:1])
    head, *lines = map(json.loads, scorers()["test"].log.path.read_text().splitlines())
    assert head["settings"] == {"model": "bridge"}
    assert [line["key"]["split"] for line in lines] == ["test"]
    assert all(len(line["outcome"]["texts"]) == 9 for line in lines)


def test_texts_of_a_comparison_are_no_formulas_in_a_spreadsheet(scorers, methods, tmp_path):
    found = compare_methods(**scorers(), methods=methods[:1])
    texts = found.texts.assign(text='=HYPERLINK("http://x")')
    write_comparison(replace(found, texts=texts), tmp_path / "out")
    with (tmp_path / "out" / "texts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["text"] for row in rows} == {'\'=HYPERLINK("http://x")'}


def test_a_request_is_used_where_the_cases_have_one(tiny_models):
    case = SteeringCase(prompt="w1 w2", target="create", requesting="w9 w1 w2")
    bare, request = prompt_methods([], shots=())
    assert request.prompts([case]) == ["w9 w1 w2"]
    assert bare.prompts is None


def test_what_cannot_be_compared_is_refused(scorers, methods):
    with pytest.raises(ValueError, match=r"methods must hold at least one"):
        compare_methods(**scorers(), methods=[])
    made = scorers()
    made["test"].cases = {"open": made["test"].cases["redirect"]}
    with pytest.raises(ValueError, match="same tasks, got .'redirect'. and .'open'"):
        compare_methods(**made, methods=methods)
    with pytest.raises(ValueError, match="got unsteered"):
        random_methods(methods[0], [0])


def test_source_rate_and_specificity_are_told_where_cases_know_source_and_request(
    tiny_models, methods
):
    cases = [
        SteeringCase(prompt=f"w{i} w2", target="create", source="apply", requesting=f"w9 w{i} w2")
        for i in range(20, 25)
    ]
    open_cases = [SteeringCase(prompt=case.prompt, target="create") for case in cases]
    scorer = TextScorer(
        tiny_models["bridge"],
        {"redirect": cases, "open": open_cases},
        RuleJudge(first_letter, CLASSES),
        max_new_tokens=4,
        split="test",
        measures_specificity=True,
        batch_size=3,
    )
    bare = scorer.score(methods[0], 0.0, ["redirect", "open"])
    assert bare["redirect"].specificity is None
    assert bare["redirect"].source == [judged == "apply" for judged in bare["redirect"].judged]
    assert bare["open"].source is None
    descent = methods[-1]
    steered = scorer.score(descent, 1.0, ["redirect", "open"])
    assert steered["open"].specificity is None, "no prompt requests the target"
    prompts = [case.requesting for case in cases]
    own = continuations(tiny_models["bridge"], prompts, max_new_tokens=4).tokens
    expected = divergences(tiny_models["bridge"], prompts, own, descent.steerer(cases, 1.0))
    assert steered["redirect"].specificity == pytest.approx(sum(expected) / 5, rel=1e-4)
    row = outcome_row("redirect", descent, steered["redirect"])
    assert row["specificity"] == steered["redirect"].specificity > 0
    assert row["distinct_1"] == distinct_n(steered["redirect"].texts, 1)
