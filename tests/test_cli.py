"""The command line: the chain in four commands, and what it says to bad input."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from command_line import invoke
from wheel_check import chain, make_model, make_texts

import sae_query_steer as sqs
from sae_query_steer import QuerySAEs
from sae_query_steer.config import ARCHITECTURES, TrainingConfig
from sae_query_steer.storage.folders import locked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and texts, in which the four commands have run."""
    import torch

    folder = tmp_path_factory.mktemp("cli")
    with torch.random.fork_rng():
        make_model(folder / "model")
    make_texts(folder / "texts.csv")
    outputs = []
    for arguments in chain(folder):
        result = invoke(arguments, catch=False)
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    return folder, outputs


def test_the_four_commands_show_tables_and_write_folders(folder):
    folder, (train, targets, sites, steer) = folder
    assert "explained_variance" in train
    page = (folder / "saes" / "curves.html").read_text(encoding="utf-8")
    assert "blocks.1.attn.hook_q" in page and 'src="http' not in page
    for label in ("remember", "apply", "create"):
        assert [label, "12"] in [line.split() for line in targets.splitlines()]
    table = pd.read_csv(folder / "sites" / "sites.csv")
    assert set(table["layer"]) == {0, 1}
    assert {"kl", "kl_control", "accuracy_latents", "accuracy_position"} <= set(table.columns)
    assert list(table["head"]) == ["all"] * 2
    closing = ("Steer here: layer", "Nothing to steer at any of these 2 sites")
    lines = sites.splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith(closing))
    assert re.match(r" *layer +verdict +class_effect +class_effect_se", lines[first + 2])
    assert len(lines) == first + 2 + 3 + 1, "the sentence, the layers, and the folder"
    assert set(table["steer_here"]) <= {True, False}
    texts = json.loads((folder / "steered" / "texts.json").read_text())
    assert texts["prompt"] == "w1 w2 w3"
    assert f"steered towards create: {texts['steered']}" in steer
    trace = pd.read_csv(folder / "steered" / "trace.csv")
    assert (trace["distance_after.create"] < trace["distance_before.create"]).all()
    assert "nearest_is_target_after" in steer


def test_sites_with_centroids_also_steers_each_site(folder, tmp_path):
    folder, (*_, plain, _) = folder
    arguments = [*chain(folder)[2], "--targets", str(folder / "targets"), "--per-head"]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "sites")
    result = invoke(arguments, catch=False)
    assert "achieved_effect" in result.output
    assert "achieved_effect" not in plain
    table = pd.read_csv(tmp_path / "sites" / "sites.csv")
    before = pd.read_csv(folder / "sites" / "sites.csv")
    layers = table[table["head"] == "all"].reset_index(drop=True)
    numbers = [name for name in before if name not in ("steer_here", "verdict")]
    pd.testing.assert_frame_equal(layers[numbers], before[numbers])
    assert len(table) == 2 * 5
    assert re.search(r"^ *layer +head +verdict", result.output, re.M)
    assert (table["achieved_moved"] > 0).all()


def test_sites_with_counterparts_shows_reach_beside_interchange(folder, tmp_path):
    folder, _ = folder
    table = pd.read_csv(folder / "texts.csv")
    table["level"] = table["level"].to_list()[1:] + table["level"].to_list()[:1]
    table["question"] = "w3 " + table["question"]
    table.to_csv(tmp_path / "others.csv", index=False)
    arguments = [*chain(folder)[2], "--counterparts", str(tmp_path / "others.csv")]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "sites")
    result = invoke(arguments, catch=False)
    assert re.search(r"moved_control +reach +reach_control ", result.output)
    found = pd.read_csv(tmp_path / "sites" / "sites.csv")
    assert found["reach"].between(0, 1).all() and found["class_effect"].notna().all()

    table[:-1].to_csv(tmp_path / "others.csv", index=False)
    with pytest.raises(ValueError, match="row for each of the 36 examples, .* got 35"):
        invoke([*arguments, "--overwrite"], catch=False)
    with pytest.raises(ValueError, match="--long must not be drop with --counterparts"):
        invoke([*arguments, "--overwrite", "--long", "drop"], catch=False)


def test_steer_says_when_no_position_was_met(folder):
    folder, _ = folder
    arguments = chain(folder)[3][:-2]
    arguments += ["--scope", "response-tokens", "--max-new-tokens", "1"]
    arguments.remove("8")
    arguments.remove("--max-new-tokens")
    result = invoke(arguments, catch=False)
    assert "No token was steered" in result.output


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"--layers": "0-7"}, "no query site at layer 2: the model has 2 layers (0 to 1)"),
        (0, {"--layers": "one"}, "layers and heads must be all, or such as 1,2 or 8-20, got 'one'"),
        (0, {"--text": "body"}, "no column 'body'"),
        (0, {"--texts": "none.csv"}, "no file"),
        (0, {"--texts": "model/config.json"}, "must be one of .csv, .tsv, .jsonl, .parquet"),
        (0, {"--training-tokens": "1.5"}, "--training-tokens"),
        (0, {"--lr": "nan"}, "lr must be a finite number > 0, got nan"),
        (0, {"--sae.k": "99"}, "k must be a whole number <= 16, got 99"),
        (0, {"--out": "saes"}, "exists: give another folder, or overwrite"),
        (1, {"--label": "grade"}, "no column 'grade': the columns are"),
        (1, {"--span": "end"}, "--span"),
        (1, {"--csv": "none.csv"}, "no file"),
        (1, {"--saes": "none"}, "none"),
        (3, {"--target": "creation"}, "no class 'creation': the classes are"),
        (3, {"--objective": "nearest"}, "--objective"),
        (3, {"--step-size": "nan"}, "--step-size must be a finite number >= 0, got nan"),
        (3, {"--scope": "last-response-token"}, "LastResponseToken() can't be a scope"),
        (3, {"--model": "/none/such"}, "no model folder"),
        (3, {"--max-new-tokens": "0"}, "--max-new-tokens must be a whole number >= 1, got 0"),
        (3, {"--saes": "targets"}, "no file"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(folder, index, change, message):
    folder, _ = folder
    arguments = chain(folder)[index]
    options = {"--out": "elsewhere"} | change
    for option, value in options.items():
        if option in ("--csv", "--texts", "--out", "--saes"):
            value = str(folder / value)
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    result = invoke(arguments)
    assert message in f"{result.exception}"
    assert isinstance(
        result.exception, ValueError | TypeError | FileNotFoundError | FileExistsError
    )
    assert not (folder / "elsewhere").exists()


@pytest.mark.parametrize("command", range(4))
def test_an_output_folder_that_another_writes_is_refused_before_the_model_is_read(
    folder, tmp_path, command, monkeypatch
):
    arguments, out = chain(folder[0])[command], tmp_path / "out"
    arguments[arguments.index("--out") + 1] = str(out)
    monkeypatch.setattr(sqs, "load_model", None)
    with ThreadPoolExecutor() as other, locked(out):
        done = other.submit(invoke, arguments).result()
    with pytest.raises(BlockingIOError, match=f"{out} is being written by another process: wait"):
        raise done.exception
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_one_line_and_status_two(tmp_path):
    command = [sys.executable, "-c", "from sae_query_steer.cli.main import main; main()"]
    result = subprocess.run(
        [*command, "targets", "--model", "/none", "--saes", "x", "--csv", str(tmp_path / "t.csv")]
        + ["--prompt", "q", "--label", "l", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("sae-query-steer: no file")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_and_loads(folder, architecture, tmp_path):
    folder, _ = folder
    name = architecture.name.removeprefix("query_head_").replace("_", "-")
    arguments = [*chain(folder)[0], "--lr", "0.01"]
    arguments[1] = name
    arguments[arguments.index("--out") + 1] = str(tmp_path / "saes")
    if "topk" not in name:
        at = arguments.index("--sae.k")
        del arguments[at : at + 2]
    if name.startswith("matryoshka"):
        arguments += ["--sae.matryoshka-widths", "4", "8", "16"]
    result = invoke(arguments, catch=False)
    assert result.exit_code == 0, result.output
    assert len(QuerySAEs.load(tmp_path / "saes")) == 2
    arguments += ["--start", str(tmp_path / "saes"), "--exclude-special-tokens", "1", "2"]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    assert invoke(arguments, catch=False).exit_code == 0
    settings = QuerySAEs.load(tmp_path / "again").settings
    assert settings["start_sha256"] and settings["exclude_special_tokens"] == [1, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_setting_is_an_option_with_its_description(architecture):
    name = architecture.name.removeprefix("query_head_").replace("_", "-")
    text = " ".join(invoke(["train", name, "--help"]).output.replace("│", " ").split())
    for field in dataclasses.fields(architecture):
        assert f"--sae.{field.name.replace('_', '-')}" in text
    for field in dataclasses.fields(TrainingConfig):
        assert field.name == "sae" or f"--{field.name.replace('_', '-')}" in text
    assert "Latents of each head; a usual choice is 4 to 32 times d_head." in text
    assert "Learning rate of Adam. (default: 0.001)" in text


SLOW = ("torch", "transformers", "transformer_lens", "sae_lens", "datasets", "pandas", "lm_eval")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["train", "topk", "--help"], 0),
        (["steer", "--modle", "x"], 2),
        (
            [
                "targets",
                "--model={m}",
                "--saes={s}",
                "--csv={csv}",
                "--prompt=q",
                "--label=l",
                "--out=o",
            ],
            2,
        ),
        (
            ["train", "topk", "--model={m}", "--layers=1", "--texts={csv}", "--text=q", "--out=o"]
            + ["--training-tokens=1000", "--sae.d-sae-per-head=64"],
            2,
        ),
        (["bundle", "--model={m}/no", "--saes={s}", "--out=o"], 2),
        (["bundle", "--model={m}", "--saes={m}", "--out=o"], 2),
        (["lm-eval", "--help"], 0),
        (["lm-eval", "--model={m}", "--bundle={m}", "--tasks=t"], 2),
    ],
    ids=[
        *("help", "help of train", "wrong option", "wrong column", "wrong column of texts"),
        *("no model", "no SAEs", "help of lm-eval", "no bundle"),
    ],
)
def test_help_and_refusals_import_no_slow_library(arguments, status, tmp_path):
    (tmp_path / "t.csv").write_text("question,level\na,b\n", encoding="utf-8")
    for name in ("config.json", "query_saes.json"):
        (tmp_path / name).write_text("{}")
    paths = {"csv": tmp_path / "t.csv", "m": tmp_path, "s": tmp_path}
    if "--saes={m}" in arguments:
        (tmp_path / "query_saes.json").unlink()
    arguments = [argument.format(**paths) for argument in arguments]
    code = (
        "import sys\n"
        "from sae_query_steer.cli.main import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        f"    print([end.code or 0, *(name for name in {SLOW} if name in sys.modules)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([status])
    if arguments[0] == "bundle":
        named = "query_saes.json" if "/no" not in arguments[1] else "no"
        assert f"{tmp_path / named}" in done.stderr
    if "csv" in str(arguments):
        assert "no column 'q': the columns are ['question', 'level']" in done.stderr
