"""Every tutorial runs with small parameters; its last cell asserts its claim."""

import ast
import asyncio
import gc
import os
import random
import re

import nbformat
import pandas as pd
import pytest
from datasets import Dataset
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from recipe_models import write_bytes, write_tiny
from tutorial_scripts import TUTORIALS, write_scripts
from wheel_check import WORDS

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


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all tutorials, because importing torch takes longer than some of them."""
    manager = AsyncKernelManager(kernel_name="python3")
    quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    asyncio.run(manager.start_kernel(env=os.environ | quiet))
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
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = with_parameters(first.source, parameters)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(notebook, timeout=300, km=kernel)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.slow
def test_01_steer_the_tutor(kernel):
    printed = run(
        kernel,
        "01_steer_the_tutor.ipynb",
        "N_EXAMPLES, TOKENS = 120, 40_000\nN_PAIRS, N_CASES = 48, 12",
    )
    assert "create: harbors and develop them." in printed
    assert "Teacher: Thanks Kim, first take metals and compare them." in printed


@pytest.mark.slow
def test_02_train_query_saes(kernel):
    run(kernel, "02_train_query_saes.ipynb", "TOKENS, SHORT = 10_000, 6_000\nHELD_OUT = 512")


@pytest.mark.slow
def test_03_your_own_classes(kernel, shared_data):
    parameters = [
        f"MODEL = {str(shared_data / 'stories260K')!r}",
        f"CSV = {str(shared_data / 'bloom_yahya2012' / 'yahya-2012.csv')!r}",
        "PROMPT, LABEL = 'QUESTION', 'BT LEVEL'",
        "LAYERS = [1, 4]",
        "TOKENS, N_PAIRS = 60_000, 24",
    ]
    printed = run(kernel, "03_your_own_classes.ipynb", "\n".join(parameters))
    assert "of 18 sites pass z >" in printed
    assert "steered:   Once upon a time" in printed


@pytest.mark.slow
def test_04_choose_layer_head_span_strength(kernel):
    printed = run(
        kernel,
        "04_choose_layer_head_span_strength.ipynb",
        "TOKENS, N_EXAMPLES = 12_000, 60\nN_PAIRS, N_VALIDATION, N_TEST = 24, 6, 12",
    )
    assert "layer 0: nothing to steer here" in printed


@pytest.mark.slow
def test_05_compose_and_read_the_trace(kernel):
    printed = run(kernel, "05_compose_and_read_the_trace.ipynb", "TOKENS, N_EXAMPLES = 12_000, 120")
    assert "harbors" in printed


@pytest.mark.slow
def test_06_publish_and_load(kernel):
    printed = run(kernel, "06_publish_and_load.ipynb", "N_EXAMPLES, TOKENS = 120, 40_000")
    assert "theirs: harbors" in printed
    assert "path: heads/blocks.1.attn.hook_q.3" in printed


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
    run(
        kernel,
        "08_compare_ways_to_steer.ipynb",
        "TOKENS, N_EXAMPLES = 12_000, 120\nN_VALIDATION, N_TEST, N_STRENGTHS = 6, 12, 2",
    )


@pytest.mark.slow
def test_09_scopes_objectives_controls(kernel):
    run(
        kernel,
        "09_scopes_objectives_controls.ipynb",
        "TOKENS, N_EXAMPLES, NEW_TOKENS = 12_000, 120, 6",
    )


@pytest.mark.slow
def test_10_what_steers_a_real_model(kernel, tmp_path):
    model = write_bytes(tmp_path / "model")
    small = [
        f"MODEL = {str(model)!r}",
        "N_TOPICS, N_TEST, UPDATES, TOKENS, L1 = 4, 1, 20, 2048, 0.0",
        "LAYERS, CURVE = [0, 1], [1]",
    ]
    assert "latents move" in run(kernel, "10_what_steers_a_real_model.ipynb", "\n".join(small))


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
    assert cells[-2].source.startswith("## The claim of this notebook")
    assert code[-1] is cells[-1] and "assert" in code[-1].source
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_the_tutorials_are_valid_scripts(tmp_path):
    files = write_scripts(tmp_path / "scripts")
    assert [file.stem for file in files] == [f"tutorial_{path.stem}" for path in NOTEBOOKS]
    for file in files:
        compile(file.read_text(encoding="utf-8"), file.name, "exec")
