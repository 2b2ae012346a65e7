"""The demo as a whole, small, on tutors that have hardly been trained."""

import json
import re
from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import sae_query_steer as sqs
from sae_query_steer.cli import tutor as commands
from sae_query_steer.cli.main import app
from sae_query_steer.compare import DemoSettings, SweepLog, demo_cases, run_demo, write_report
from sae_query_steer.compare import demo as demo_module
from sae_query_steer.compare.demo_preparation import chosen_layers
from sae_query_steer.compare.demo_report import display_table, report_html, verdict
from sae_query_steer.compare.sweep_figures import layer_table
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.toy import TUTOR_FOLDER, TutorCorpus

ROW = {
    *("task", "method", "objective", "centroids", "span", "scope", "n_steps", "step_size"),
    *("delta_q_ratio", "n", "target_rate", "ci_low", "ci_high", "grounded", "success"),
    "perplexity_ratio",
}


# What a tutor that was hardly trained does is noise: these tests are of the chain alone.
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
    """Four tokens of each text, which hardly trained tutors never end; one judge for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_cases, "MAX_NEW_TOKENS", 4)
        patch.setattr(demo_module, "level_judge", cache(demo_module.level_judge))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tutor that has hardly been trained."""
    folder = tmp_path_factory.mktemp("tutor") / "tutor"
    make_tutor(folder)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    """Labelled texts as an able tutor would write them on open prompts."""
    return TutorCorpus("train", seed=9).examples(60, open_share=1.0)


@pytest.fixture(scope="module")
def demo(folder, opened):
    """The whole demo, with texts in the place of what the tutor writes on open prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "training_examples", lambda *args: (opened, opened))
        return run_demo(sqs.load_model(str(folder), device="cpu"), settings=SMALL)


def test_every_task_has_every_row(demo):
    for task in ("open", "redirect"):
        rows = demo.rows[demo.rows["task"] == task]
        assert len(rows) == 3 + 1 + 1 + (2 + 2) + (3 + 2) + 1
        assert (rows["n"] == SMALL.n_test).all()
        assert rows["success"].between(0, 1).all()
        assert (rows["ci_low"] <= rows["target_rate"]).all()
        steered = rows[rows["scope"].notna()]
        assert (steered["delta_q_ratio"] > 0).all()
        assert rows["delta_q_ratio"].isna().sum() == 3


def test_the_unsteered_tutor_is_as_fluent_as_itself(demo):
    rows = demo.rows[demo.rows["method"] == "unsteered"]
    assert rows["perplexity_ratio_original"].to_numpy() == pytest.approx(1)
    asked = demo.rows[demo.rows["method"] == "instruction"]
    assert asked["perplexity_ratio"].to_numpy() == pytest.approx(1)


def test_a_random_direction_is_as_long_as_the_descent_it_stands_for(demo):
    random = demo.rows[demo.rows["method"] == "random direction (seed 0)"]
    best = demo.rows[demo.rows["objective"].notna()]
    for task, length in zip(random["task"], random["delta_q_ratio"], strict=True):
        lengths = best[best["task"] == task]["delta_q_ratio"].to_numpy()
        assert length == pytest.approx(lengths[abs(lengths - length).argmin()], rel=1e-4)


def test_a_tutor_that_restates_nothing_on_open_prompts_ends_the_demo_early(folder):
    with pytest.raises(ValueError, match="on open prompts the tutor restated the notes of"):
        run_demo(sqs.load_model(str(folder), device="cpu"), settings=SMALL)


def test_the_full_comparison_has_every_method_every_layer_and_three_controls(
    folder, opened, monkeypatch, tmp_path
):
    monkeypatch.setattr(demo_module, "training_examples", lambda *args: (opened, opened))
    monkeypatch.setattr(demo_module, "chosen_layers", lambda table: (1,))
    settings = replace(SMALL, n_test=6, every_method=True)
    full = run_demo(sqs.load_model(str(folder), device="cpu"), settings=settings)
    rows = full.rows[full.rows["task"] == "redirect"]
    labels = [full.label(row) for row in rows.to_dict("records")]
    assert len(set(labels)) == len(labels), "no two rows have the same name"
    for kind in ("decoder rows (m=4)", "mean difference", "SAE descent, contrast"):
        assert {kind, f"{kind}, requested prompts, response tokens"} <= set(labels)
    for layer in (0, 1):
        assert f"residual mean difference{'' if layer else ', layer 0'}" in labels
    for kind in ("interchange", "mean difference"):
        assert f"{kind}, layer 0" in labels
    assert sum(label.startswith("random direction") for label in labels) == 3
    assert sum(label.startswith("few-shot") for label in labels) == 3
    by_layer = layer_table(full.rows)
    assert by_layer["layer"].tolist() == [0, 1]
    at_0 = rows[(rows["layers"] == "0") & (rows["method"] == "interchange")].iloc[0]
    assert by_layer["redirect: interchange"][0] == at_0["success"]
    write_report(full, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("report.html", "results.json", "table.csv", "curves.csv", "texts.csv"),
    }
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Layer by layer" in page
    assert "From which level to which" in page


def test_equal_settings_give_equal_numbers_also_where_the_demo_was_stopped_on_the_way(
    folder, demo, opened, monkeypatch
):
    monkeypatch.setattr(demo_module, "training_examples", lambda *args: (opened, opened))
    log = folder.parent / "log.jsonl"
    model = sqs.load_model(str(folder), device="cpu")
    add = SweepLog.add

    def stop_after_twelve(self, key, outcome):
        if len(self) == 12:
            raise KeyboardInterrupt
        add(self, key, outcome)

    monkeypatch.setattr(SweepLog, "add", stop_after_twelve)
    with pytest.raises(KeyboardInterrupt):
        run_demo(model, settings=SMALL, log=log)
    monkeypatch.setattr(SweepLog, "add", add)
    again = run_demo(model, settings=SMALL, log=log)
    pd.testing.assert_frame_equal(again.rows, demo.rows, check_exact=True)
    pd.testing.assert_frame_equal(again.sites, demo.sites, check_exact=True)
    pd.testing.assert_frame_equal(again.compared.texts, demo.compared.texts)
    assert again.examples() == demo.examples()
    with pytest.raises(ValueError, match="the log of another sweep .n_test=12 there, 6 here"):
        run_demo(model, settings=replace(SMALL, n_test=6), log=log)


def test_results_have_the_rows_that_were_promised(demo, tmp_path):
    write_report(demo, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"rows", "judge_accuracy", "sites", "seconds", "versions"} <= set(results)
    assert all(set(row) >= ROW for row in results["rows"])
    methods = {row["method"] for row in results["rows"]}
    assert methods == {
        *("unsteered", "instruction", "few-shot (k=2)", "interchange", "mean difference"),
        *("dense descent", "SAE descent", "random direction (seed 0)"),
    }
    for kind, more in (("dense descent", set()), ("SAE descent", {"contrast"})):
        main = {r["objective"] for r in results["rows"] if r["method"] == kind}
        assert main == {"prototype", "squared distance"} | more
    assert results["judge_accuracy"]["feedback"] >= 0.95
    assert results["judge_accuracy"]["shuffled"] >= 0.95
    assert results["judge_accuracy"]["verb_repeating"] >= 0.95
    with pytest.raises(FileExistsError, match="exists"):
        write_report(demo, tmp_path / "out")


def test_the_report_opens_offline(demo):
    page = report_html(demo)
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert verdict(demo)[:40] in page
    assert "Three examples in full" in page
    assert len(display_table(demo)) == len(demo.rows)


def test_only_layers_of_which_the_verdict_says_so_are_steered():
    table = pd.DataFrame(
        {
            "layer": [0, 1, 2, 3],
            "class_effect": [0.2, 1.0, 0.3, 0.09],
            "class_effect_se": [0.15, 0.1, 0.1, 0.01],
            "moved": [0.9, 0.9, 0.3, 0.02],
            "moved_control": [0.0, 0.1, 0.1, 0.01],
        }
    )
    assert chosen_layers(table) == (1, 2)
    assert chosen_layers(table.assign(class_effect_se=9.0)) == (0,), "where most is moved"


def test_settings_too_small_are_refused():
    with pytest.raises(ValueError, match=r"n_test=2 is not allowed: give 6 or more"):
        DemoSettings(n_test=2)


def test_the_command_refuses_before_it_works(folder, tmp_path):
    runner = CliRunner()
    for arguments, message in (
        (["--tutor", str(tmp_path)], "not the folder of a tutor"),
        (["--tutor", str(folder), "--n", "1"], "n_test=1 is not allowed"),
        (["--quick", "--full"], "--quick and --full name two sizes: give one of them"),
    ):
        result = runner.invoke(app, ["demo", *arguments, "--out", str(tmp_path / "out")])
        assert message in str(result.exception)
        assert not (tmp_path / "out").exists()


def test_the_command_writes_a_report_of_a_null_tutor(tmp_path, monkeypatch):
    null = tmp_path / "null"
    make_tutor(null, notes=False)
    monkeypatch.setattr(commands, "QUICK", replace(SMALL, n_test=6))
    opened = TutorCorpus("train", seed=9, notes=False).examples(60, open_share=1.0)
    monkeypatch.setattr(demo_module, "training_examples", lambda *args: (opened, opened))
    out = tmp_path / "out"
    arguments = ["demo", "--tutor", str(null), "--quick", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"wrote {out / 'report.html'}" in result.output
    rows = read_json(out / "results.json")["rows"]
    assert {row["grounded"] for row in rows} == {None}
    assert all(row["success"] == row["target_rate"] for row in rows)
