"""Tables as Markdown."""

import pandas as pd

from sae_query_steer.storage.markdown import markdown_table


def test_a_table_is_githubs_markdown():
    table = pd.DataFrame(
        {"name": ["a|b", "two\nlines"], "rate": [0.12345, None], "n": [3, 40]}, index=[7, 8]
    )
    assert markdown_table(table, digits=2).splitlines() == [
        "| name | rate | n |",
        "| --- | --- | --- |",
        "| a\\|b | 0.12 | 3 |",
        "| two lines |  | 40 |",
    ]


def test_labels_and_names_of_columns_are_no_markup():
    table = pd.DataFrame({"# a|b": ["<script>x</script>", "[link](http://x) `c` *b*"]})
    assert markdown_table(table).splitlines() == [
        "| \\# a\\|b |",
        "| --- |",
        "| \\<script\\>x\\</script\\> |",
        "| \\[link\\](http://x) \\`c\\` \\*b\\* |",
    ]


def test_an_empty_table_has_a_head():
    assert markdown_table(pd.DataFrame({"a": []})) == "| a |\n| --- |"
