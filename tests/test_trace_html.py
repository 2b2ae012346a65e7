"""The text of a trace is coloured by how much each token was steered, and safe to show."""

import re
from html.parser import HTMLParser

import pandas as pd
import pytest

import sae_query_steer as sqs
from sae_query_steer.steering.trace import SteeringTrace
from sae_query_steer.steering.trace_html import text_html

PROMPTS = ["w1 w20 w33", "w5"]


class Page(HTMLParser):
    """Tags and attributes, tokens with tooltip and opacity, and the text of some HTML."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.attributes, self.spans, self.text = set(), set(), [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        self.attributes |= set(attributes)
        if "title" in attributes:
            self.spans.append([attributes["title"], attributes.get("style", ""), ""])

    def handle_data(self, data):
        self.text += data
        if self.spans:
            self.spans[-1][2] = self.spans[-1][2] or data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def tokens(self) -> list[str]:
        return [text for _, _, text in self.spans]

    @property
    def steered(self) -> list[str]:
        return [text for _, style, text in self.spans if "background" in style]

    @property
    def opacities(self) -> list[float]:
        found = (re.search(r"background:rgba\(.*?,([\d.]+)\)", style) for _, style, _ in self.spans)
        return [float(match[1]) for match in found if match]


def table_of(texts, changes, **columns) -> pd.DataFrame:
    """One row of tokens at positions from 0, one layer and head."""
    n = len(changes)
    given = {"run": 0, "row": 0, "position": range(n), "layer": 0, "head": 0, "text": texts}
    return pd.DataFrame(given | {"relative_change": changes} | columns)


def test_tokens_are_escaped():
    texts = ["<s>", "<script>alert(1)</script>", "&amp;", '" onclick="x', "'"]
    source = text_html(
        table_of(texts, [1.0] * 5, target="</div><b>", nearest_before="<i>a", nearest_after='"b')
    )
    page = Page(source)
    assert page.tags == {"div", "span"}
    assert page.tokens == texts
    assert "target </div><b>" in page.text
    assert all('nearest class <i>a → "b' in title for title, _, _ in page.spans)
    assert page.attributes == {"title", "style"}


def test_the_opacity_is_the_share_of_the_largest_mean_over_layers_and_heads():
    table = table_of(["a", "a", "b", "b", "c"], [0.1, 0.3, 0.8, 0.8, 0.0])
    page = Page(text_html(table.assign(position=[0, 0, 1, 1, 2], head=[0, 1, 0, 1, 0])))
    assert page.tokens == ["a", "b", "c"]
    assert page.opacities == pytest.approx([0.15, 0.6, 0.0])
    assert "relative_change, mean over layers and heads: 0 0.8 (largest)" in page.words


def test_values_below_zero_have_a_colour_of_their_own():
    table = table_of(["a", "b", "c"], [1.0] * 3, loss_after=[-2.0, 1.0, float("nan")])
    page = Page(text_html(table, "loss_after"))
    assert page.opacities == pytest.approx([0.6, 0.3, 0.0])
    colors = [re.search(r"rgba\((\d+),", style)[1] for _, style, _ in page.spans]
    assert colors[0] != colors[1]
    assert "heads: -2 2 (largest)" in page.words
    assert "loss_after -2" in page.spans[0][0]


def test_no_change_at_all_colours_nothing():
    assert Page(text_html(table_of(["a"], [0.0]))).opacities == [0.0]


def test_the_tooltip_of_a_token_has_its_position_change_and_nearest_classes():
    table = table_of(
        ["a"] * 3,
        [0.1, 0.2, 0.3],
        nearest_before=["apply", "apply", "create"],
        nearest_after="create",
    )
    ((title, _, _),) = Page(text_html(table.assign(position=0, head=[0, 1, 2]))).spans
    assert title.splitlines() == [
        "position 0: 'a'",
        "relative change 0.2",
        "nearest class apply (2 of 3) → create",
    ]


def test_an_ellipsis_stands_for_the_tokens_that_were_not_steered():
    page = Page(text_html(table_of(["a", "b", "c"], [1.0] * 3).assign(position=[2, 3, 5])))
    assert page.tokens == [" … ", "a", "b", " … ", "c"]
    assert page.spans[0][0] == "positions 0 to 1: not steered"
    assert page.spans[3][0] == "position 4: not steered"


def test_spaces_and_control_characters_are_visible():
    page = Page(text_html(table_of([" a", "  ", "\n", "\t", "\x00", ""], [1.0] * 6)))
    assert page.tokens == [" a", "··", "↵\n", "⇥\t", "␀", "[5]"]
    assert "white-space:pre-wrap" in text_html(table_of([" a"], [1.0]))


def test_the_html_is_ascii_whatever_the_tokens():
    source = text_html(table_of(["é", "日"], [1.0] * 2))
    assert source.isascii()
    assert Page(source).tokens == ["é", "日"]


def test_runs_and_rows_stand_apart_with_their_targets():
    table = table_of(["a", "b", "c"], [1.0] * 3, target=["x", "y", "x"])
    page = Page(text_html(table.assign(run=[0, 0, 1], row=[0, 1, 0], position=0)))
    assert page.tokens == ["a", "b", "c"]
    for name in ("run 0, row 0, target x", "run 0, row 1, target y", "run 1, row 0, target x"):
        assert name in page.text


def test_tokens_without_text_are_shown_by_position():
    said = "The text of the tokens is unknown"
    for table in (table_of([None] * 2, [1.0] * 2), table_of("", [1.0] * 2).drop(columns="text")):
        page = Page(text_html(table))
        assert page.tokens == ["[0]", "[1]"]
        assert said in page.text
    assert said not in text_html(table_of([None, "b"], [1.0] * 2))


def test_a_column_that_is_absent_or_no_number_is_refused_with_those_there_are():
    table = table_of(["a"], [1.0])
    for name in ("change", "text", "position"):
        with pytest.raises(
            ValueError,
            match=rf"\['layer', 'head', 'relative_change'\], got '{name}'",
        ):
            text_html(table, name)


def test_a_trace_without_records_shows_a_message():
    unrecorded = SteeringTrace(recording=False)
    with pytest.raises(ValueError, match="use `with steerer.apply"):
        unrecorded.to_html()
    assert "use `with steerer.apply" in Page(unrecorded._repr_html_()).text
    empty = SteeringTrace(recording=True)
    assert "no token was steered" in empty.to_html()
    assert "no token was steered" in empty._repr_html_()


def test_the_trace_of_a_generation_shows_its_steered_tokens(model, saes, targets):
    steerer = sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=3,
        step_size=0.5,
        scope=sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
    )
    with steerer.apply(model, record=True) as trace:
        model.generate(PROMPTS, max_new_tokens=3, do_sample=False, verbose=False)
    table = trace.to_dataframe()
    page = Page(trace._repr_html_())
    means = table.groupby(["run", "row", "position"])["relative_change"].mean()
    assert page.opacities == pytest.approx(list(0.6 * means / means.max()), abs=1e-3)
    first = table.drop_duplicates(["run", "row", "position"])["text"].tolist()
    assert page.steered == first
    assert trace.to_html("posterior_after.create") != trace.to_html()
    assert len(sqs.plots.plot_trace(table, "posterior_after.create").data) == 2 * 2


def test_the_end_of_the_prompt_and_what_was_written_stand_around_the_steered_token(
    model, saes, targets
):
    prompts = [" ".join(f"w{i}" for i in range(20)), "w5 w6"]
    settings = {"objective": sqs.SquaredDistance(), "n_steps": 1, "step_size": 0.5}
    steerer = sqs.LatentGradientSteerer(saes, targets, target="create", **settings)
    with steerer.apply(model, record=True) as trace:
        tokens = model.generate(
            prompts,
            max_new_tokens=12,
            return_type="tokens",
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
    page = Page(trace.to_html())
    assert page.steered == ["w19", "w6"]
    texts = [[model.tokenizer.decode([token]) for token in row] for row in tokens.tolist()]
    written = [row[-12:-1] for row in texts]  # the last token is never read
    end, short = [f"w{i}" for i in range(11, 20)], ["<s>", "w5", "w6"]
    assert page.tokens == [" … ", *end, *written[0], *short, *written[1]]
    assert page.spans[-1][:2] == ["position 13: not steered", ""]
