"""The tutorials run from top to bottom; their last cells assert what they claim."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

# nbclient leaves its event loop to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"


def run(name: str, parameters: str, monkeypatch) -> str:
    """Execute a tutorial with other parameters in its first code cell; return what it printed."""
    # The kernel reads no settings of the machine's, and its threads don't fight each other.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert {line.split(" = ")[0] for line in first.source.splitlines()} == {
        line.split(" = ")[0] for line in parameters.splitlines()
    }
    first.source = parameters
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def test_01_steer_the_tutor(monkeypatch):
    said = run(
        "01_steer_the_tutor.ipynb",
        "N_EXAMPLES, TOKENS = 240, 100_000\nN_PAIRS, N_CASES = 90, 24",
        monkeypatch,
    )
    assert "create: harbors and develop them." in said
    assert "Teacher: Thanks Kim, first take metals and compare them." in said


def test_03_your_own_classes(shared_data, monkeypatch):
    parameters = [
        f"MODEL = {str(shared_data / 'stories260K')!r}",
        f"CSV = {str(shared_data / 'bloom_yahya2012' / 'yahya-2012.csv')!r}",
        "PROMPT, LABEL = 'QUESTION', 'BT LEVEL'",
        "LAYERS = [1, 4]",
        "TOKENS, N_PAIRS = 60_000, 24",
    ]
    said = run("03_your_own_classes.ipynb", "\n".join(parameters), monkeypatch)
    assert "of 18 sites pass z >" in said
    assert "steered:   Once upon a time" in said
