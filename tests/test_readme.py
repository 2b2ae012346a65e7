"""The README: its example runs as it stands, its commands are CI's, its names are all there are."""

import re
from pathlib import Path

import pandas as pd
import torch

import sae_query_steer as sqs
from sae_query_steer.storage.records import read_json
from sae_query_steer.toy import TUTOR_FOLDER

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_example_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    said = capsys.readouterr().out
    prompt = names["prompt"]
    for kind, text in (
        ("unsteered:", "metals and compare them. Which parts do the metals have?"),
        ("steered:  ", "harbors and develop them. Write a\nshort story in which the"),
    ):
        assert text in README
        assert f"{kind} {prompt} {text}".replace("Write a\n", "Write a ") in said
    assert "nearest_is_target_after" in said
    assert (names["saes"].metrics["explained_variance"] > 0.6).all()
    table = names["trace"].to_dataframe()
    assert len(table) == 4
    assert (table["loss_after"] < 0.1 * table["loss_before"]).all()
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert isinstance(names["apart"], pd.DataFrame)
    assert "steer here: class effect" in capsys.readouterr().out
    exec(compile(BLOCKS[2], "README.md", "exec"), names)
    control = names["trace"].to_dataframe()
    assert set(control["row"]) == {0, 1}
    assert 0 < control["n_latents_moved"].max() <= 8
    assert (control["relative_change"] <= 0.5 + 1e-4).all()
    assert "latents_moved" in capsys.readouterr().out
    exec(compile(BLOCKS[3], "README.md", "exec"), names)
    assert set(names["moved"]["target"]) == {"create"}
    assert "latent" in capsys.readouterr().out
    assert set(names["look"]["head"]) == {0, 1, 2, 3}
    with names["less"].apply(names["model"], record=True) as trace:
        names["model"].generate(prompt, **names["greedy"])
    assert trace.to_dataframe()["relative_change"].max() > 0
    exec(compile(BLOCKS[4], "README.md", "exec"), names)
    exec(compile(BLOCKS[5], "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert "repo_id: user/repository" in said
    assert torch.equal(
        names["bundle"].saes["blocks.1.attn.hook_q"].W_enc,
        names["saes"]["blocks.1.attn.hook_q"].W_enc,
    )
    assert names["scores"]["head"].tolist() == [0, 1, 2, 3, "all"]
    assert (names["scores"]["explained_variance"] > 0.5).all()
    for name, weights in names["saes"]["blocks.1.attn.hook_q"].state_dict().items():
        assert torch.equal(names["again"].state_dict()[name], weights)


def test_the_example_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 18


def test_every_public_name_is_in_the_readme():
    missing = [name for name in sqs.__all__ if f"`{name}`" not in README and name not in BLOCKS[0]]
    assert missing == []
    assert sorted(sqs.__all__) == sqs.__all__
    assert all(hasattr(sqs, name) for name in sqs.__all__)


def test_every_public_name_has_a_docstring_of_its_own():
    for name in sqs.__all__:
        assert getattr(sqs, name).__doc__, name


def test_ci_runs_the_readmes_test_command():
    (commands,) = re.findall(r"```\n(pip install.*?)```", README, re.S)
    install, test = commands.splitlines()[1].split("#")[0].split("&&")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert install.strip().removeprefix("pip install ") in script
    assert test.strip() == script.strip().splitlines()[-1]
    assert test.split()[0] == "pytest"


def test_the_commands_of_the_readme_have_these_options():
    from typer.testing import CliRunner

    from sae_query_steer.cli.main import app

    blocks = re.findall(r"```\n(sae-query-steer train.*?)```", README, re.S)
    assert len(blocks) == 2
    lines = [line for block in blocks for line in block.splitlines()]
    for line in (line for line in lines if line.startswith("sae-query-steer")):
        _, command, *arguments = line.split()
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
        for option in (a for a in arguments if a.startswith("--")):
            assert option in text, (command, option)


def test_the_readme_says_of_the_shipped_tutor_what_its_card_says():
    card = read_json(TUTOR_FOLDER / "tutor.json")
    assert f"Llama of {card['n_parameters']:,} parameters" in README
    assert f"obeys {card['obeyed']:.2f} and takes up the right note" in README.replace("\n", " ")
    assert f"in {card['right_note']:.2f}. Success" in README.replace("\n", " ")
