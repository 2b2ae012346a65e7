"""What is kept of a tutorial's outputs, and when it counts as the same."""

import nbformat
import pytest
from keep_outputs import FIGURE, clean, difference, digest, paths, shown


def test_a_change_of_code_or_of_a_parameter_changes_the_digest():
    cells = [nbformat.v4.new_markdown_cell("Why?"), nbformat.v4.new_code_cell("N = 2\nprint(N)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    before = digest(notebook)
    cells[0].source = "What?"
    cells[1].outputs = [nbformat.v4.new_output("stream", text="2\n")]
    assert digest(notebook) == before
    cells[1].source = "N = 3\nprint(N)"
    assert digest(notebook) != before


@pytest.mark.parametrize(
    ("kept", "found", "same"),
    [
        ("a  0.50\nb", "a 0.51 b", True),
        ("a 0.50", "a 0.60", False),
        ("1,000 tokens", "1,030 tokens", True),
        ("1,000 tokens", "1,100 tokens", False),
        ("-0.0 ± 1e-05", "0.00 ± 0", True),
        ("metals and compare them.", "metals and compare them", False),
        ("layer 1: steer here", "layer 1: nothing", False),
        ("one", "one 2", False),
    ],
)
def test_kept_numbers_have_a_tolerance_and_kept_words_have_none(kept, found, same):
    assert (difference(kept, found) is None) == same


def test_a_path_of_this_machine_in_an_output_is_found():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)")])
    for text, n in (("in /tmp/x/y", 1), ("and/or </s> 1/2", 0), ("C:\\Users", 1)):
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text=text)]
        assert len(paths(notebook)) == n


def test_warnings_metadata_and_styles_of_other_figures_are_not_kept():
    cell = nbformat.v4.new_code_cell("f(x)")
    template = {"data": {"bar": [{}], "pie": [{}]}, "layout": {"font": {}}}
    figure = {"data": [{"type": "bar", "y": [1, 2]}], "layout": {"template": template}}
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="/tmp/x.py:3: Warning"),
        nbformat.v4.new_output("stream", text="1.5 kept\n"),
        nbformat.v4.new_output("display_data", {FIGURE: figure, "text/html": "<script>"}),
    ]
    cell.metadata = {"execution": {"started": "now"}}
    notebook = nbformat.v4.new_notebook(cells=[cell])
    clean(notebook)
    printed, drawn = cell.outputs
    assert printed.text == "1.5 kept\n" and cell.metadata == {}
    assert list(drawn.data) == [FIGURE]
    assert list(drawn.data[FIGURE]["layout"]["template"]["data"]) == ["bar"]
    assert notebook.metadata["kept"]["digest"] == digest(notebook)
    assert shown(notebook) == ["1.5 kept\n\n [] [1, 2] []"]
