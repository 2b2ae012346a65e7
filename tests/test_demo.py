"""The demo as a whole, small, on random models with the tutor's tokenizer."""

import re
from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
import torch
from command_line import invoke
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sae_query_steer as sqs
from sae_query_steer import compare
from sae_query_steer.compare import (
    ComparisonLog,
    DemoSettings,
    run_demo,
    tutor_task,
    write_comparison,
)
from sae_query_steer.compare.demo import chosen_layers
from sae_query_steer.compare.methods import STRENGTHS
from sae_query_steer.compare.report import (
    comparison_html,
    display_rows,
    row_names,
    verdict,
)
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.toy import TUTOR_FOLDER, TutorCorpus, pretrained

# What a random model writes is noise: these tests are of the pipeline alone.
SMALL = DemoSettings(
    n_train=60, n_validation=6, n_test=12, n_pairs=6, training_tokens=4096, d_sae_per_head=16, k=4
)


def make_tutor(folder, *, notes=True):
    """A random model of two layers with the tutor's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TUTOR_FOLDER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "tutor.json", {"settings": {"notes": notes}})


@pytest.fixture(scope="module", autouse=True)
def short():
    """Four tokens of each text, which random models never end; few strengths, one judge."""
    few = [replace(descent, step_sizes=descent.step_sizes[:2]) for descent in compare.DESCENTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_query_steer.compare.demo.DESCENTS", few)
        patch.setattr("sae_query_steer.compare.methods.STRENGTHS", STRENGTHS[:2])
        patch.setattr(tutor_task, "MAX_NEW_TOKENS", 4)
        patch.setattr(tutor_task, "level_judge", cache(tutor_task.level_judge))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutor") / "tutor"
    make_tutor(folder)
    return folder


def with_texts(patch, *, notes=True):
    """Put texts of the corpus in the place of what the model writes on open prompts."""
    opened = TutorCorpus("train", seed=9, notes=notes).examples(60, open_share=1.0)
    patch.setattr(tutor_task, "training_examples", lambda *_, **__: (opened, opened))


@pytest.fixture(scope="module")
def demo(folder):
    with pytest.MonkeyPatch.context() as patch:
        with_texts(patch)
        return run_demo(sqs.load_model(str(folder), device="cpu"), settings=SMALL)


@pytest.mark.slow
def test_every_task_has_every_row(demo):
    assert demo.settings["n_test"] == 12
    for task in ("open", "redirect"):
        rows = demo.rows[demo.rows["task"] == task]
        assert rows["method"].value_counts().to_dict() == {
            **dict.fromkeys(("unsteered", "instruction", "few-shot (k=2)", "interchange"), 1),
            **{"mean difference": 1, "dense descent": 4, "SAE descent": 5},
            "random direction (seed 0)": 1,
        }
        assert (rows["n"] == SMALL.n_test).all()
        assert rows["success"].between(0, 1).all()
        assert (rows[rows["scope"].notna()]["delta_q_ratio"] > 0).all()
        assert rows["delta_q_ratio"].isna().sum() == 3
    bare = demo.rows[demo.rows["method"] == "unsteered"]
    assert bare["perplexity_ratio_original"].to_numpy() == pytest.approx(1)
    asked = demo.rows[demo.rows["method"] == "instruction"]
    assert asked["perplexity_ratio"].to_numpy() == pytest.approx(1)
    assert demo.judge["accuracy"] >= 0.95


@pytest.mark.slow
def test_a_random_direction_is_as_long_as_the_descent_it_is_the_control_of(demo):
    random = demo.rows[demo.rows["method"] == "random direction (seed 0)"]
    best = demo.rows[demo.rows["objective"].notna()]
    for task, length in zip(random["task"], random["delta_q_ratio"], strict=True):
        lengths = best[best["task"] == task]["delta_q_ratio"].to_numpy()
        assert length == pytest.approx(lengths[abs(lengths - length).argmin()], rel=1e-4)


@pytest.mark.slow
def test_the_report_holds_every_row_escapes_texts_and_opens_offline(demo, tmp_path):
    texts = demo.texts.assign(text="<script>alert(1)</script>")
    page = comparison_html(replace(demo, texts=texts))
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    for name in row_names(demo.rows, demo.rows):
        assert name in page
    assert verdict(demo)[:40] in page
    assert len(display_rows(demo)) == len(demo.rows)
    write_comparison(demo, tmp_path / "out")
    assert read_json(tmp_path / "out" / "comparison.json")["settings"]["notes"] is True
    with pytest.raises(FileExistsError, match="exists"):
        write_comparison(demo, tmp_path / "out")


@pytest.mark.slow
def test_a_tutor_that_restates_nothing_on_open_prompts_is_refused(folder):
    with pytest.raises(ValueError, match="must restate two notes or more of each level"):
        run_demo(sqs.load_model(str(folder), device="cpu"), settings=SMALL)


@pytest.mark.slow
def test_the_full_comparison_has_every_method_every_layer_and_three_controls(folder, monkeypatch):
    with_texts(monkeypatch)
    monkeypatch.setattr("sae_query_steer.compare.demo.chosen_layers", lambda table: (1,))
    settings = replace(SMALL, n_test=6, every_method=True)
    full = run_demo(sqs.load_model(str(folder), device="cpu"), settings=settings)
    rows = full.rows[full.rows["task"] == "redirect"]
    names = row_names(rows, full.rows)
    assert len(set(names)) == len(names), "no two rows have the same name"
    counts = rows["method"].value_counts()
    assert counts[["decoder rows (m=4)", "residual mean difference"]].tolist() == [2, 4]
    assert counts[["interchange", "mean difference", "SAE descent"]].tolist() == [2, 3, 8]
    assert sum(rows["method"].str.startswith("random direction")) == 3
    assert sum(rows["method"].str.startswith("few-shot")) == 3


@pytest.mark.slow
def test_a_stopped_demo_continues_to_the_same_numbers(folder, demo, monkeypatch):
    with_texts(monkeypatch)
    log = folder.parent / "log.jsonl"
    model = sqs.load_model(str(folder), device="cpu")
    add = ComparisonLog.add

    def stop_after_twelve(self, key, outcome):
        if len(self) == 12:
            raise KeyboardInterrupt
        add(self, key, outcome)

    monkeypatch.setattr(ComparisonLog, "add", stop_after_twelve)
    with pytest.raises(KeyboardInterrupt):
        run_demo(model, settings=SMALL, log=log)
    monkeypatch.setattr(ComparisonLog, "add", add)
    again = run_demo(model, settings=SMALL, log=log)
    for name in ("rows", "sites", "texts"):
        first, second = getattr(demo, name), getattr(again, name)
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    with pytest.raises(ValueError, match="another comparison .n_test=12 there, 6 here"):
        run_demo(model, settings=replace(SMALL, n_test=6), log=log)


def test_only_layers_that_the_verdict_recommends_are_steered():
    table = pd.DataFrame(
        {
            "layer": [0, 1, 2, 3],
            "steer_here": [False, True, True, False],
            "moved": [0.9, 0.8, 0.3, 0.02],
            "moved_control": [0.0, 0.1, 0.1, 0.01],
        }
    )
    assert chosen_layers(table) == (1, 2)
    assert chosen_layers(table.assign(steer_here=False)) == (0,), "where most is moved"


def test_settings_too_small_are_refused():
    with pytest.raises(ValueError, match="n_test must be a whole number >= 6, got 2"):
        DemoSettings(n_test=2)


def test_the_command_refuses_before_it_works(tmp_path):
    result = invoke(["demo", "--n-test", "1", "--out", tmp_path / "out"])
    assert "n_test must be a whole number >= 6, got 1" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_writes_a_report_of_a_tutor_without_notes(tmp_path, monkeypatch):
    null = tmp_path / "null"
    make_tutor(null, notes=False)
    monkeypatch.setitem(compare.DEMO_SIZES, "quick", replace(SMALL, n_test=6))
    with_texts(monkeypatch, notes=False)
    out = tmp_path / "out"
    monkeypatch.setattr(pretrained, "NULL_TUTOR_FOLDER", null)
    arguments = ["demo", "--null", "--size", "quick", "--out", str(out)]
    result = invoke(arguments, catch=False)
    assert result.exit_code == 0
    assert f"wrote {out / 'report.html'}" in result.output
    rows = pd.read_csv(out / "table.csv")
    assert rows["grounded"].isna().all()
    assert (rows["success"] == rows["target_rate"]).all()
