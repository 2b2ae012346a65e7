"""`sae-query-steer sweep`, from a CSV to a report, on the tiny model."""

import csv
import json
import random
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from command_line import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_query_steer.compare import DESCENTS, own_texts
from sae_query_steer.compare.log import ComparisonLog
from sae_query_steer.compare.methods import STRENGTHS

pytestmark = pytest.mark.slow

TABLES = ["classes.csv", "curves.csv", "sites.csv", "table.csv", "texts.csv"]
FILES = sorted(["comparison.json", "report.html", *TABLES])


@pytest.fixture(scope="module")
def command(tiny_folder, saes, tmp_path_factory):
    """The command on 3 x 20 texts that differ in their words, with changes."""
    folder = tmp_path_factory.mktemp("sweep")
    saes.save(folder / "saes")
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer", "level"])
        for i in range(60):
            words = [f"w{16 * (i % 3) + j}" for j in random.Random(i).choices(range(16), k=5)]
            answer = " " + " ".join(words[::-1])
            rows.writerow([" ".join(words), answer, ("apply", "create", "remember")[i % 3]])

    def run(out, *changes):
        given = {
            "--model": tiny_folder,
            "--csv": folder / "texts.csv",
            "--prompt": "question",
            "--response": "answer",
            "--label": "level",
            "--saes": folder / "saes",
            "--layers": "0,2",
            "--objectives": "squared distance",
            "--n-cases": "6",
            "--max-new-tokens": "3",
            "--out": out,
        }
        given |= dict(zip(changes[::2], changes[1::2], strict=True))
        flags = [w for pair in given.items() for w in map(str, pair) if w not in ("None", "")]
        return invoke(["sweep", *flags])

    run.texts = folder / "texts.csv"
    with pytest.MonkeyPatch.context() as patch:
        # Fewer strengths: which is best is not asked here.
        few = [replace(d, step_sizes=d.step_sizes[:3]) for d in DESCENTS]
        patch.setattr("sae_query_steer.compare.DESCENTS", few)
        patch.setattr("sae_query_steer.compare.methods.STRENGTHS", STRENGTHS[:3])
        yield run


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a sweep that ran to its end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = command(out)
    assert done.exit_code == 0, done.output
    return out


def test_a_sweep_writes_its_table_its_texts_and_a_page_that_opens_offline(whole):
    assert sorted(path.name for path in whole.iterdir()) == FILES
    assert not whole.with_name("out.unfinished").exists()
    table = pd.read_csv(whole / "table.csv")
    assert set(table["method"]) == {
        *("unsteered", "few-shot (k=1)", "few-shot (k=2)", "few-shot (k=4)"),
        *("dense descent", "SAE descent", "decoder rows (m=4)", "residual mean difference"),
        *(
            "value mean difference",
            "query and value mean difference",
            "inference-time intervention",
        ),
        *(f"random direction (seed {seed})" for seed in range(3)),
    }
    assert (table["n"] == 6).all()
    assert sorted(pd.read_csv(whole / "sites.csv")["layer"]) == [0, 2]
    classes = pd.read_csv(whole / "classes.csv")
    # A name says also what differs from most rows, such as the layer.
    for method in ("unsteered", "random direction (seed 0)"):
        assert any(name.startswith(method) for name in classes["method"]), method
    assert set(classes["target"]) == {"remember", "apply", "create"}
    page = (whole / "report.html").read_text(encoding="utf-8")
    for name in table["method"]:
        assert name in page
    assert 'src="http' not in page
    found = json.loads((whole / "comparison.json").read_text())
    assert 0 <= found["judge"]["accuracy"] <= 1
    assert found["settings"]["layers"] == [0, 2]


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(command, whole, tmp_path, monkeypatch):
    add = ComparisonLog.add

    def stop_after_four(self, key, outcome):
        if len(self) == 4:
            raise KeyboardInterrupt
        add(self, key, outcome)

    out = tmp_path / "stopped"
    monkeypatch.setattr(ComparisonLog, "add", stop_after_four)
    assert command(out).exit_code != 0
    assert not out.exists()
    monkeypatch.setattr(ComparisonLog, "add", add)
    refused = command(out)
    assert isinstance(refused.exception, FileExistsError)
    assert "continue it with --resume, or delete it" in str(refused.exception)
    assert command(out, "--resume", None).exit_code == 0
    for name in ("table.csv", "curves.csv", "texts.csv"):
        one, other = (pd.read_csv(folder / name) for folder in (whole, out))
        # What is left shares its passes with other conditions: equal but for rounding.
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, check_exact=False)


def test_a_sweep_does_not_go_on_with_other_texts_under_the_same_name(
    command, tmp_path, monkeypatch
):
    def stop(self, key, outcome):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(ComparisonLog, "add", stop)
    texts = tmp_path / "texts.csv"
    texts.write_bytes(command.texts.read_bytes())
    assert command(out, "--csv", texts).exit_code != 0
    texts.write_text(texts.read_text().replace("w1,", "w2,"))
    done = command(out, "--csv", texts, "--resume", None)
    assert "is the log of another comparison (contents=" in str(done.exception)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--long", "cut-end", "--long must be refuse or drop in a comparison, got cut-end"),
        ("--objectives", "distance", "--objectives must be all, or some of .*distance"),
        ("--layers", "1", "saes must hold all layers, got none for .1.: train them"),
        ("--n-cases", "100", "n cases must be a whole number >= 1 and <= .*, got 100"),
        ("--max-new-tokens", "0", "max_new_tokens must be a whole number >= 1, got 0"),
        ("--temperature", "0", "temperature must be a finite number >= 1e-06, got 0.0"),
        ("--span", "all", "'all' for argument '--span'"),
        ("--dtype", "half", "'half' for argument '--dtype'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    command, tmp_path, option, value, message
):
    done = command(tmp_path / "out", option, value)
    with pytest.raises(ValueError, match=message):
        raise done.exception
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def chat_folder(tiny_folder, tmp_path_factory):
    """The tiny model, its tokenizer with a chat template of two words."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ 'w40 ' + m['content'] + ' w41' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sweep_in_the_chat_template_reads_and_continues_it(
    command, chat_folder, tmp_path, monkeypatch
):
    given = []
    tokenize = own_texts.tokenize_examples

    def kept(*args, **settings):
        given.append(settings["chat_template"])
        return tokenize(*args, **settings)

    monkeypatch.setattr(own_texts, "tokenize_examples", kept)
    out = tmp_path / "out"
    done = command(out, "--model", chat_folder, "--layers", "2", "--chat-template", "")
    assert done.exit_code == 0, done.output
    assert given == [True, True]
    assert json.loads((out / "comparison.json").read_text())["settings"]["chat_template"] is True
    texts = pd.read_csv(out / "texts.csv")
    texts = texts[texts["method"] == "unsteered"]
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    for prompt, text in zip(texts["prompt"], texts["text"], strict=True):
        ids = tokenizer(f"<s>w40 {prompt} w41", add_special_tokens=False, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=3, do_sample=False)
        own = made[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(own, skip_special_tokens=True) == text


def test_a_sweep_without_a_chat_template_says_so(command, tmp_path):
    done = command(tmp_path / "out", "--chat-template", "")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        raise done.exception


def test_a_sweep_is_not_resumed_in_another_format_or_template(
    command, chat_folder, tmp_path, monkeypatch
):
    def stop(self, key, outcome):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(ComparisonLog, "add", stop)
    assert command(out, "--model", chat_folder).exit_code != 0
    done = command(out, "--model", chat_folder, "--chat-template", "", "--resume", None)
    assert "chat_template=False there, True here" in str(done.exception)
