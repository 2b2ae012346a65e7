"""The README: its example prints what stands below it, and its test command is CI's."""

import re
from pathlib import Path

import pytest

import sae_query_steer as sqs
from sae_query_steer.toy.pretrained import TUTOR_FOLDER

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()


@pytest.mark.slow
def test_the_example_prints_the_output_below_it(capsys):
    example, verdicts = re.findall(r"```python\n(.*?)```", README, re.S)
    expected = re.search(r"```python\n.*?```\n\n```\n(.*?)```", README, re.S)
    assert expected is not None
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out.split()
    assert printed == expected[1].split()
    exec(compile(verdicts, "README.md", "exec"), names)
    assert "steer here" in capsys.readouterr().out


def test_install_example_and_output_stand_within_the_first_60_lines():
    fences = [i for i, line in enumerate(LINES) if line.startswith("```")]
    assert fences[5] < 60  # install, example, output: three blocks
    assert len(LINES) <= 150
    assert len(README.split()) <= 1200


def test_ci_runs_the_test_command_of_the_readme():
    (commands,) = re.findall(r"```\n(pip install.*?)```", README, re.S)
    install, test = commands.splitlines()[1].split("#")[0].split("&&")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert install.strip().removeprefix("pip install ") in script
    assert script.strip().splitlines()[-1].startswith(test.strip())
    assert test.split()[0] == "pytest"


def test_the_front_has_25_to_35_names_each_with_a_docstring():
    assert 25 <= len(sqs.__all__) <= 35
    for name in sqs.__all__:
        assert getattr(sqs, name).__doc__, name


def test_the_toy_model_is_in_the_package():
    assert (TUTOR_FOLDER / "model.safetensors").is_file()
