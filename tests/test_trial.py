"""`sae-query-steer trial`, from texts with labels to a verdict and a steerer, on the tiny model."""

import csv
import random
import re
import shlex

import pytest
from command_line import invoke

import sae_query_steer as sqs
from sae_query_steer.cli.options import SmallModelOptions
from sae_query_steer.compare import own_trial
from sae_query_steer.config import TrialSettings
from sae_query_steer.data.examples import split_after_words

# The tiny model's weights are random: two updates need not lower a loss.
pytestmark = pytest.mark.filterwarnings("ignore:nothing was learned")

LEVELS = ("apply it", "create", "remember")  # a shell would split the first


def text(i: int) -> str:
    return " ".join(f"w{16 * (i % 3) + j}" for j in random.Random(i).choices(range(16), k=7))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """60 texts that differ in their words by class."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "level"])
        rows.writerows([text(i), LEVELS[i % 3]] for i in range(60))
    return path


def arguments(model, texts, out, **changes):
    given = {"--model": model, "--csv": texts, "--prompt": "text", "--label": "level", "--out": out}
    given |= {"--first-words": 3, "--n-cases": 6, "--n-learned": 8, "--n-updates": 2}
    given |= {"--training-tokens": 2048, "--d-sae-per-head": 16, "--k": 3, "--max-new-tokens": 3}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["trial", *(str(word) for pair in given.items() for word in pair)]


@pytest.fixture(scope="module")
def done(tiny_folder, texts, tmp_path_factory):
    """What a whole trial printed, and its folder."""
    out = tmp_path_factory.mktemp("trial") / "out"
    return invoke(arguments(tiny_folder, texts, out), catch=False).output, out


@pytest.mark.slow
def test_a_trial_shows_the_texts_and_a_verdict_and_writes_a_page_saes_and_a_steerer(done):
    output, out = done
    assert "the first 3 words of 'text' are the prompt, such as" in output
    for shown in (
        "class apply",
        "This takes about 1 min on this machine.",
        "Judge: accuracy",
        "Success, other class, n = 6: unsteered",
    ):
        assert shown in output
    assert re.search(r"This takes about \d+ min on this machine\.", output)
    for method in ("few-shot (k=1)", "SAE centroids", "learned moves, SAE", "learned moves, dense"):
        assert method in output
    (command,) = [line for line in output.splitlines() if line.startswith("sae-query-steer steer")]
    words = shlex.split(command)
    assert words[words.index("--steerer") + 1] == str(out / "steerer")
    assert words[words.index("--target") + 1] in LEVELS
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {"saes", "SAE-moves", "dense-moves", "steerer"}
    assert (out / "report.html").stat().st_size > 1e6
    assert not out.with_name("out.unfinished").exists()


@pytest.mark.slow
def test_the_steerer_of_a_trial_is_the_best_on_validation_and_steers_a_prompt(done, tiny_folder):
    _, out = done
    steerer = sqs.steering.load_steerer(out / "steerer")
    settings = {"--model": tiny_folder, "--steerer": out / "steerer", "--target": "create"}
    settings |= {"--prompt": "w1 w2 w3", "--max-new-tokens": 3}
    words = ["steer", *(str(word) for pair in settings.items() for word in pair)]
    assert "steered towards create: w" in invoke(words, catch=False).output
    assert steerer.max_relative_change == 0.5
    with pytest.raises(ValueError, match="--steerer has its own settings: leave out"):
        invoke([*words, "--step-size", "2"], catch=False)
    with pytest.raises(ValueError, match="--saes and --targets must be given, or --steerer"):
        invoke(
            [word for word in words if word not in ("--steerer", str(out / "steerer"))], catch=False
        )


@pytest.mark.slow
def test_a_trial_that_was_stopped_goes_on_to_the_same_table(
    done, tiny_folder, texts, tmp_path, monkeypatch
):
    _, out = done
    again = tmp_path / "again"
    with monkeypatch.context() as patch:

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(own_trial, "compare_methods", stopped)
        with pytest.raises(KeyboardInterrupt):
            invoke(arguments(tiny_folder, texts, again), catch=False)
    monkeypatch.setattr(own_trial, "trained_saes", None)  # they are kept, and so are targets
    with pytest.raises(ValueError, match="n_updates=2 there, 3 here"):
        other = arguments(tiny_folder, texts, again, n_updates=3)
        invoke([*other, "--resume"], catch=False)
    invoke([*arguments(tiny_folder, texts, again), "--resume"], catch=False)
    assert (again / "table.csv").read_text() == (out / "table.csv").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "grade"}, "no column 'grade': the columns are"),
        ({"n_updates": 0}, "n_updates must be a whole number > 0, got 0"),
        ({"l1": -1}, "l1 must be a finite number >= 0, got -1"),
        ({"layers": "some"}, "layers and heads must be all, or such as 1,2 or 8-20, got 'some'"),
        ({"first_words": 0}, "n_words must be a whole number >= 1, got 0"),
        ({"long": "cut-end"}, "--long must be refuse or drop in a comparison, got cut-end"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_read(
    tiny_folder, texts, tmp_path, change, message, monkeypatch
):
    monkeypatch.setattr(sqs, "load_model", None)
    failed = invoke(arguments(tiny_folder, texts, tmp_path / "out", **change))
    assert message in str(failed.exception)
    assert list(tmp_path.iterdir()) == []


def test_smollm2_is_the_default_model_and_a_size_that_is_too_small_is_refused():
    assert SmallModelOptions().model == "smollm2"
    with pytest.raises(ValueError, match="n_cases must be a whole number >= 6, got 5"):
        TrialSettings(n_cases=5)


def test_a_text_is_split_after_its_first_words_or_its_half():
    texts = ["one two  three four five", " one two three", "one two "]
    examples = [sqs.LabelledExample(prompt=text, label="a") for text in texts]
    parts = [(e.prompt, e.response) for e in split_after_words(examples, 2)]
    assert parts == [("one two", "  three four five"), (" one", " two three"), ("one", " two")]
    examples.append(sqs.LabelledExample(prompt="one", label="a", place="row 9"))
    with pytest.raises(ValueError, match="two words or more and no response, got 1 .*row 9"):
        split_after_words(examples, 2)
