"""docs/recipes.md: its commands run in order on tiny models, and its lines of Python."""

import dataclasses
import json
import random
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import invoke
from recipe_models import PUBLISHED, write_config, write_tiny
from transformers import AutoModelForCausalLM
from wheel_check import WORDS

import sae_query_steer as sqs
from sae_query_steer.compare import DESCENTS
from sae_query_steer.compare.methods import STRENGTHS
from sae_query_steer.data.tokenized import tokenize_example

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```sh\n(.*?)```.*?```\n(.*?)```", DOCS, re.S)
MODELS = ["mistralai/Mistral-7B-Instruct-v0.2", "microsoft/Phi-3-mini-4k-instruct"]
CHAIN = ["train", "train", "targets", "sites", "steer", "sweep"]
SMALLER = {
    "8-20": "0-1",
    "14-16": "0-1",
    "12,14,16": "1",
    "1024": "16",
    "32": "3",
    "50000000": "4096",
    "256": "24",
    "4096": "128",
    "192": "4",
    "60": "3",
    "80": "2",
}
"""The sizes of the recipes, and those they are tested with."""

BLOOM = ("remember", "apply", "create")


def commands(recipe: str) -> list[list[str]]:
    """The arguments of each command of a block."""
    lines = recipe.replace("\\\n", " ").strip().splitlines()
    split = [shlex.split(line) for line in lines]
    assert {words[0] for words in split} == {"sae-query-steer"}
    return [words[1:] for words in split]


def tiny(arguments: list[str], model: Path) -> list[str]:
    """The same arguments for a tiny model on the CPU."""
    replaced = SMALLER | {name: str(model) for name in PUBLISHED}
    return [*(replaced.get(word, word) for word in arguments), "--device", "cpu"]


def run(arguments: list[str]) -> str:
    done = invoke(arguments, catch=False)
    assert done.exit_code == 0, done.output
    return done.output


def write_texts(folder: Path) -> None:
    draw = random.Random(0)
    rows = []
    for i in range(60):
        words = [WORDS[16 * (i % 3) + j] for j in draw.choices(range(16), k=4 + i % 9)]
        rows.append((" ".join(words), " " + " ".join(words[::-1]), BLOOM[i % 3]))
    table = pd.DataFrame(rows, columns=["question", "answer", "level"])
    table.to_csv(folder / "feedback.csv", index=False)
    table[["question", "answer"]].to_parquet(folder / "dialogues.parquet")


@pytest.fixture(scope="module", params=range(len(RECIPES)), ids=["mistral", "phi3"])
def recipe(request, tmp_path_factory):
    """A folder in which the commands of a recipe have run, its tiny model, and what they said."""
    folder = tmp_path_factory.mktemp("recipe")
    model = write_tiny(MODELS[request.param], folder / "model")
    write_texts(folder)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Fewer strengths: which is best is not asked here.
        two = [dataclasses.replace(d, step_sizes=d.step_sizes[:2]) for d in DESCENTS]
        patch.setattr("sae_query_steer.compare.DESCENTS", two)
        patch.setattr("sae_query_steer.compare.methods.STRENGTHS", STRENGTHS[:2])
        for arguments in commands(RECIPES[request.param][0]):
            said.append((arguments, run(tiny(arguments, model))))
    return folder, model, said


def test_there_is_a_recipe_for_each_model_with_the_whole_chain():
    assert len(RECIPES) == len(MODELS)
    for (block, _), model in zip(RECIPES, MODELS, strict=True):
        found = commands(block)
        assert [words[0] for words in found] == CHAIN
        assert all(words[words.index("--model") + 1] == model for words in found)
        assert all(words[words.index("--dtype") + 1] == "bfloat16" for words in found)
        assert all(
            "--chat-template" in words for words in found if words[0] not in ("train", "steer")
        )


def test_every_size_of_the_recipes_is_made_smaller_for_the_test():
    words = {word for block, _ in RECIPES for line in commands(block) for word in line}
    assert set(SMALLER) <= words, "a size that no recipe has any more"
    assert {word for word in words if re.fullmatch(r"[\d,-]{2,}", word)} <= set(SMALLER)


def test_the_settings_of_the_follow_up_steer_a_tiny_model(tiny_models):
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    model = tiny_models["bridge"]
    texts = [sqs.LabelledExample(prompt=f"w{i} w7", label=BLOOM[i % 3]) for i in range(12)]
    names = {"sqs": sqs, "model": model, "examples": sqs.tokenize_examples(model, texts)}
    names["texts"] = [f"w{i} w{i + 1} w7" for i in range(40)]
    exec(compile(block.replace("40_960", "1_024"), "docs/recipes.md", "exec"), names)
    (sae,) = names["saes"].values()
    assert sae.cfg.architecture() == "query_head_standard"
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.W_dec.shape[:2]))
    tokens = torch.tensor([[1, 5, 9]])
    with names["steerer"].apply(model, prompt_lengths=[3]):
        changed = model(tokens)
    assert not torch.equal(changed, model(tokens))


@pytest.mark.slow
def test_the_commands_of_a_recipe_run_in_order_and_write_their_folders(recipe):
    folder, _, said = recipe
    outs = [Path(words[words.index("--out") + 1]) for words, _ in said]
    top = outs[0].parts[0]
    assert sorted(path.name for path in (folder / top).iterdir()) == [
        *("saes", "sites", "steered", "sweep", "targets"),
    ]
    assert "memory of the SAEs" in said[0][1]
    assert "explained_variance" in said[1][1]
    for label in BLOOM:
        assert [label, "20"] in [line.split() for line in said[2][1].splitlines()]
    assert sorted(set(pd.read_csv(folder / top / "sites" / "sites.csv")["layer"])) == [0, 1]
    trace = pd.read_csv(folder / top / "steered" / "trace.csv")
    moved = trace[trace["layer"] == 1]
    assert (moved["distance_before.create"] > 0).all()
    assert (moved["distance_after.create"] < 0.2 * moved["distance_before.create"]).all()
    table = pd.read_csv(folder / top / "sweep" / "table.csv")
    assert {"unsteered", "SAE descent", "dense descent"} <= set(table["method"])
    settings = json.loads((folder / top / "sweep" / "comparison.json").read_text())["settings"]
    assert (settings["chat_template"], settings["dtype"]) == (True, "bfloat16")


@pytest.mark.slow
def test_sae_descent_changes_the_query_at_the_end_of_the_chat_prompt(recipe):
    folder, model, said = recipe
    steered = Path(said[4][0][said[4][0].index("--out") + 1])
    given = said[4][0][said[4][0].index("--prompt") + 1]
    loaded = sqs.load_model(str(model), device="cpu")
    example = sqs.LabelledExample(prompt=given, label="none")
    read = tokenize_example(loaded, example, chat_template=True).tokens
    plain = tokenize_example(loaded, example).tokens
    trace = pd.read_csv(folder / steered / "trace.csv")
    assert set(trace["position"]) == {len(read) - 1}
    assert len(read) > len(plain)


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_models_window_counts_and_is_that_of_transformers(name, tmp_path):
    folder = write_tiny(name, tmp_path / "model")
    tokens = torch.randint(5, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = sqs.load_model(str(folder), device="cpu")(tokens, prepend_bos=False)
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, sliding_window=None)
    torch.testing.assert_close(ours, narrow(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, wide(tokens).logits, atol=0.1)


@pytest.mark.parametrize(("block", "told"), RECIPES, ids=["mistral", "phi3"])
def test_the_sizes_in_the_recipe_are_those_that_the_dry_run_says(
    block, told, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    dry = commands(block)[0]
    name = dry[dry.index("--model") + 1]
    folder = write_config(name, tmp_path / "config")
    said = run([str(folder) if word == name else word for word in dry])
    without_texts = [
        [line for line in text.splitlines() if not line.startswith("texts")]
        for text in (said, told)
    ]
    assert without_texts[0] == without_texts[1]
    assert "texts                60, " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config", "dialogues.parquet", "feedback.csv"),
    ]
