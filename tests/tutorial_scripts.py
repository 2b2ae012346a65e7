"""The tutorials' code as scripts, for pyright and for the tests that read it.

Usage: python tests/tutorial_scripts.py FOLDER, then pyright FOLDER.
"""

import re
import sys
from pathlib import Path

import nbformat

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"

# A notebook displays the last expression of a cell; in a script it has no effect.
HEAD = "# pyright: reportUnusedExpression=false\n"


def code_cells(notebook: Path) -> list[str]:
    """Return the code cells of a notebook, magics commented out, so that each is Python."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return [re.sub(r"^(\s*)([%!].*)$", r"\1pass  # \2", source, flags=re.M) for source in code]


def write_scripts(folder: Path) -> list[Path]:
    """Write every tutorial as a script; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for notebook in sorted(TUTORIALS.glob("*.ipynb")):
        files.append(folder / f"tutorial_{notebook.stem}.py")
        text = HEAD + "\n\n".join(code_cells(notebook)) + "\n"
        files[-1].write_text(text, encoding="utf-8")
    return files


if __name__ == "__main__":
    write_scripts(Path(sys.argv[1]))
