"""Execute tutorials with their own parameters and keep what they show.

Usage: python tests/keep_outputs.py [NUMBER ...], such as 01 10; without numbers all of them. Needs
`pip install kaleido` and a Chrome or Chromium, which draw the figures as PNG (BROWSER_PATH names
one that is not found). The tests need neither: they compare what was kept with what the code
prints.
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import nbformat
import numpy as np
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from tutorial_scripts import TUTORIALS

FIGURE = "application/vnd.plotly.v1+json"

QUIET = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PLOTLY_RENDERER": "plotly_mimetype"}
"""One thread, for sums in the same order; figures without the code of plotly.js beside them."""

RELATIVE, ABSOLUTE = 0.05, 0.02
"""Numbers may differ by so much of the kept one, plus so much: training sums in another order on
another processor."""

PATH = re.compile(r"(?<![\w/.:<])(/(tmp|home|root|usr|var|work|opt|Users)/|[A-Z]:\\)")
"""The start of a path of this machine."""

NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def start_kernel(folder: Path) -> AsyncKernelManager:
    """Return a kernel started in an empty folder: a tutorial needs nothing of the repository."""
    manager = AsyncKernelManager(kernel_name="python3")
    asyncio.run(manager.start_kernel(env=os.environ | QUIET, cwd=str(folder)))
    return manager


def execute(notebook: nbformat.NotebookNode, kernel: AsyncKernelManager, timeout: int) -> None:
    """Execute a notebook in a kernel that others may have used."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(
        notebook, timeout=timeout, km=kernel, record_timing=False, coalesce_streams=True
    )
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
        notebook.cells.pop(0)


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of all code, the parameters included."""
    sources = [cell.source for cell in code_of(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the text of the outputs of each code cell: printed, tables, numbers of figures.

    What goes to stderr, progress and warnings, is left out.
    """
    return ["\n".join(map(_text, cell.outputs)) for cell in code_of(notebook)]


def _text(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    data = output.get("data", {})
    if FIGURE in data:
        return "\n".join(_numbers(trace) for trace in data[FIGURE]["data"])
    return data.get("text/plain", "")


def _numbers(trace: dict) -> str:
    """Return name and values of a trace of a figure."""
    values = [trace.get("name", "")]
    for axis in ("x", "y", "z"):
        found = trace.get(axis, [])
        if isinstance(found, dict):
            found = np.frombuffer(base64.b64decode(found["bdata"]), found["dtype"]).tolist()
        values += [found]
    return " ".join(map(str, values)).replace("None", "nan")


def difference(kept: str, found: str) -> str | None:
    """Return the first difference of two texts; None if they agree.

    Words must be equal; numbers may differ by the tolerance. White space does not count.
    """
    for one, other in zip_longest(_words(kept), _words(found), fillvalue=""):
        if one == other:
            continue
        if not (NUMBER.fullmatch(one) and NUMBER.fullmatch(other)):
            return f"kept {one!r}, found {other!r}"
        a, b = (float(number.replace(",", "")) for number in (one, other))
        if abs(a - b) > ABSOLUTE + RELATIVE * abs(a):
            return f"kept {one}, found {other}"
    return None


def _words(text: str) -> Iterator[str]:
    """Yield numbers, and what stands between them, without white space and table rules."""
    end = 0
    for number in NUMBER.finditer(text):
        yield re.sub(r"\s+", "", text[end : number.start()])
        yield number.group().rstrip(",")
        end = number.end()
    yield re.sub(r"\s+", "", text[end:])


def paths(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the paths of a machine that stand in the outputs, each with what is around it."""
    texts = [
        text
        for cell in code_of(notebook)
        for output in cell.outputs
        for text in (output.get("text", ""), *output.get("data", {}).values())
    ]
    joined = "\n".join(text for text in texts if isinstance(text, str))
    return [joined[max(0, m.start() - 30) : m.end() + 60] for m in PATH.finditer(joined)]


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave out what differs from run to run, or is of this machine."""
    for cell in code_of(notebook):
        outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in outputs:
            if "metadata" in output:
                output.metadata = {}
            if FIGURE in output.get("data", {}):
                output.data = {FIGURE: _slim(output.data[FIGURE])}
        cell.outputs, cell.metadata = outputs, {}
        cell.pop("attachments", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "kept": {"digest": digest(notebook)},
    }


def _slim(figure: dict) -> dict:
    """Return a figure without what its template says about traces that it does not have."""
    figure["config"] = {}
    template = figure["layout"].get("template", {})
    used = {trace["type"] for trace in figure["data"]}
    styles = template.get("data", {})
    template["data"] = {kind: style for kind, style in styles.items() if kind in used}
    return figure


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """Put a PNG beside every figure, drawn by one browser."""
    import kaleido

    kaleido.start_sync_server(silence_warnings=True, timeout=300)
    try:
        for data in (one.get("data", {}) for cell in code_of(notebook) for one in cell.outputs):
            if FIGURE in data:
                layout = data[FIGURE]["layout"]
                size = {"width": layout.get("width", 800), "height": layout.get("height", 400)}
                picture = kaleido.calc_fig_sync(
                    {"data": data[FIGURE]["data"], "layout": layout},
                    opts={"format": "png", "scale": 1.25, **size},
                )
                data["image/png"] = base64.b64encode(picture).decode()
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


def keep(path: Path) -> str:
    """Execute a tutorial in a kernel of its own and write it with its outputs; return a line."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kernel = start_kernel(Path(folder))
        try:
            execute(notebook, kernel, timeout=1800)
        finally:
            asyncio.run(kernel.shutdown_kernel(now=True))
    seconds = time.monotonic() - start
    for number, cell in enumerate(code_of(notebook), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    clean(notebook)
    if found := paths(notebook):
        raise ValueError(f"{path.name}: its outputs name paths of this machine: {found}")
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")  # if the browser fails
    add_pictures(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return f"{path.stem}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB"


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:]) or ("",)
    for notebook_path in sorted(TUTORIALS.glob("*.ipynb")):
        if notebook_path.name.startswith(wanted):
            sys.stdout.write(keep(notebook_path) + "\n")
            sys.stdout.flush()
