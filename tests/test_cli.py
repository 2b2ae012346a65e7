"""The command line: the chain in four commands, and what it says to bad input."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner
from wheel_check import chain, make_model, make_texts

from sae_query_steer import QuerySAEs
from sae_query_steer.cli.main import app
from sae_query_steer.cli.options import ARCHITECTURES

# What SAELens and TransformerLens warn of while a model boots is theirs to mend.
runner = CliRunner()


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
        result = runner.invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    return folder, outputs


def test_the_four_commands_show_tables_and_write_folders(folder):
    folder, (train, targets, sites, steer) = folder
    assert "explained_variance" in train
    for label in ("remember", "apply", "create"):
        assert [label, "12"] in [line.split() for line in targets.splitlines()]
    table = pd.read_csv(folder / "sites" / "sites.csv")
    assert set(table["layer"]) == {0, 1}
    assert {"kl", "kl_control", "accuracy_latents", "accuracy_position"} <= set(table.columns)
    assert len(table) == 2 * 5
    # A bar may stand before it on its line: the runner takes both streams for one.
    assert re.search(r"layer +head +class_effect +class_effect_se .* verdict$", sites, re.M)
    closing = ("Steer here: layer", "Nothing to steer at any of these 10 sites")
    assert sum(line.startswith(closing) for line in sites.splitlines()) == 1
    assert set(table["steer_here"]) <= {True, False}
    texts = json.loads((folder / "steered" / "texts.json").read_text())
    assert texts["unsteered"].startswith("w1 w2 w3")
    assert texts["steered"].startswith("w1 w2 w3")
    assert f"steered towards create: {texts['steered']}" in steer
    trace = pd.read_csv(folder / "steered" / "trace.csv")
    assert (trace["distance_after.create"] < trace["distance_before.create"]).all()
    assert "nearest_is_target_after" in steer


def test_sites_with_centroids_also_steers_each_site(folder, tmp_path):
    folder, (*_, plain, _) = folder
    arguments = [*chain(folder)[2], "--targets", str(folder / "targets")]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "sites")
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert "achieved_effect" in result.output
    assert "achieved_effect" not in plain
    table = pd.read_csv(tmp_path / "sites" / "sites.csv")
    before = pd.read_csv(folder / "sites" / "sites.csv")
    pd.testing.assert_frame_equal(table[before.columns], before)
    assert (table["achieved_moved"] > 0).all()


def test_steer_says_when_no_position_was_met(folder):
    folder, _ = folder
    arguments = chain(folder)[3][:-2]
    arguments += ["--scope", "response", "--max-new-tokens", "1"]
    arguments.remove("8")
    arguments.remove("--max-new-tokens")
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert "No position was steered" in result.output
    assert "The text is unchanged." in result.output


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"--layers": "0-7"}, "no query site at layer 2: the model has 2 layers (0 to 1)"),
        (0, {"--layers": "one"}, "--layers 'one' is not allowed: give all, or such as 1,2 or 8-20"),
        (0, {"--arch": "relu"}, "--arch 'relu' is not allowed: choose from topk, batchtopk"),
        (0, {"--text": "body"}, "no column 'body'"),
        (0, {"--texts": "none.csv"}, "no file"),
        (
            0,
            {"--texts": "model/config.json"},
            "the folder of a dataset, got '.json'",
        ),
        (0, {"--tokens": "1.5"}, "--tokens 1.5 is not allowed: give a whole number"),
        (0, {"--lr": "nan"}, "lr must be a finite number > 0, got nan"),
        (0, {"--k": "99"}, "k must be a whole number >= 1 and <= 16, got 99"),
        (0, {"--out": "saes"}, "exists: give another folder, or --overwrite"),
        (1, {"--label": "grade"}, "no column 'grade'; the columns are"),
        (1, {"--span": "end"}, "--span 'end' is not allowed: choose from last-prompt-token"),
        (1, {"--csv": "none.csv"}, "no file"),
        (1, {"--saes": "none"}, "none"),
        (3, {"--target": "creation"}, "no class 'creation': the classes are"),
        (3, {"--objective": "nearest"}, "--objective 'nearest' is not allowed: choose from"),
        (3, {"--step-size": "nan"}, "--step-size must be a finite number >= 0, got nan"),
        (3, {"--scope": "last-response-token"}, "LastResponseToken() can't be a scope"),
        (3, {"--model": "/none/such"}, "no model folder"),
        (3, {"--prompt": " "}, "--prompt is blank"),
        (3, {"--max-new-tokens": "0"}, "--max-new-tokens 0 is not allowed"),
        (3, {"--saes": "targets"}, "is no folder that `train` wrote"),
        (0, {"--layers": "1-0"}, "--layers '1-0' runs backwards: write 0-1"),
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
    result = runner.invoke(app, arguments)
    assert message in f"{result.exception}"
    assert isinstance(result.exception, ValueError | FileNotFoundError | FileExistsError)
    assert not (folder / "elsewhere").exists()


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_and_loads(folder, arch, tmp_path):
    folder, _ = folder
    arguments = [*chain(folder)[0], "--arch", arch, "--lr", "0.01"]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "saes")
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(QuerySAEs.load(tmp_path / "saes")) == 2
