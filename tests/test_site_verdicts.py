"""Verdicts of sites: each threshold, and the text."""

import pandas as pd
import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.diagnostics.verdicts import MIN_MOVED, closing_sentence

GOOD = {
    **{"layer": 1, "head": "all", "class_effect": 0.7, "class_effect_se": 0.1},
    **{"moved": 0.6, "moved_control": 0.1, "accuracy_latents": 0.9, "chance": 0.5},
    **{"n_test": 100},
}


def judged(n_sites=4, **changes):
    return sqs.diagnostics.site_verdicts(pd.DataFrame([GOOD | changes]), n_sites=n_sites).iloc[0]


def test_a_class_effect_of_weight_that_the_latents_see_is_worth_a_steer():
    row = judged()
    assert bool(row["steer_here"])
    assert row["verdict"] == "steer here: moves 50% more than the control"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_effect": 0.22}, "nothing to steer here: class effect < 2.2 s.e."),
        ({"class_effect": -0.7}, "nothing to steer here: class effect < 2.2 s.e."),
        ({"class_effect": float("nan")}, "nothing to steer here: class effect < 2.2 s.e."),
        ({"class_effect_se": float("nan")}, "no verdict: too few examples"),
        ({"moved": 0.14}, "nothing to steer here: moves less than 5%"),
        ({"accuracy_latents": 0.6}, "nothing to steer here: latents do not separate"),
    ],
)
def test_what_is_missing_is_named_in_a_text_that_pandas_prints_whole(changes, said):
    row = judged(**changes)
    assert not bool(row["steer_here"])
    assert row["verdict"] == said
    with pd.option_context("display.width", 40):
        assert said in str(pd.DataFrame([row]))
        assert said in pd.DataFrame([row]).to_html(escape=False)


def test_each_threshold_is_where_it_is_said_to_be():
    assert bool(judged(moved=0.1 + MIN_MOVED + 1e-6)["steer_here"])
    assert not bool(judged(moved=0.1 + MIN_MOVED - 1e-6)["steer_here"])
    # One-sided 5 % over four sites: 2.2414 errors; over one: 1.6449.
    assert bool(judged(class_effect=0.2242)["steer_here"])
    assert not bool(judged(class_effect=0.2241)["steer_here"])
    assert bool(judged(class_effect=0.1646, n_sites=1)["steer_here"])
    assert not bool(judged(class_effect=0.1644, n_sites=1)["steer_here"])
    # 2.2414 sqrt(1/4 / 100) = 0.112 above chance.
    assert bool(judged(accuracy_latents=0.613)["steer_here"])
    assert not bool(judged(accuracy_latents=0.612)["steer_here"])


def test_the_more_sites_were_looked_at_the_more_is_wanted_of_each():
    table = pd.DataFrame([GOOD | {"class_effect": 0.25, "layer": i} for i in range(40)])
    assert sqs.diagnostics.site_verdicts(table[:4])["steer_here"].all()
    assert not sqs.diagnostics.site_verdicts(table)["steer_here"].any()


def test_luck_alone_passes_as_seldom_as_is_said():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 20, generator=generator).flatten().tolist()
    table = pd.DataFrame(GOOD, index=range(len(noise))).assign(
        class_effect=noise, class_effect_se=1.0
    )
    found = (
        sqs.diagnostics.site_verdicts(table, n_sites=20)["steer_here"].to_numpy().reshape(2000, 20)
    )
    assert found.any(1).mean() == pytest.approx(0.05, abs=0.015)


def test_separability_is_asked_only_where_it_is_in_the_table():
    table = pd.DataFrame([GOOD | {"accuracy_latents": 0.5}])
    assert not sqs.diagnostics.site_verdicts(table)["steer_here"].any()
    alone = table.drop(columns=["accuracy_latents", "chance", "n_test"])
    assert sqs.diagnostics.site_verdicts(alone)["steer_here"].all()


def test_one_sentence_closes_the_table():
    # The head has the larger effect in nats, all heads together move more.
    head = GOOD | {"head": 3, "class_effect": 0.9, "moved": 0.2}
    table = sqs.diagnostics.site_verdicts(
        pd.DataFrame([head, GOOD, GOOD | {"layer": 2, "moved": 0.1}])
    )
    assert closing_sentence(table).startswith("Steer here: layer 1 (50%); layer 1, head 3 (10%). ")
    nothing = sqs.diagnostics.site_verdicts(table.assign(class_effect=[0.15, 0.1, -1.0]))
    assert closing_sentence(nothing) == (
        "Nothing to steer at any of these 3 sites. Largest total variation at layer 1: class "
        "effect < 2.1 s.e. (class effect 0.100 ± 0.100 nats, total variation 60.0%, control 10.0%, "
        "separability 0.90, chance 0.50)."
    )
    unknown = sqs.diagnostics.site_verdicts(
        pd.DataFrame([GOOD | {"class_effect_se": float("nan")}])
    )
    assert closing_sentence(unknown) == (
        "No verdict at this site: too few examples for a standard error. Add examples."
    )


def test_a_table_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"\['class_effect_se', 'moved'\] are missing"):
        sqs.diagnostics.site_verdicts(pd.DataFrame([{"class_effect": 1.0, "moved_control": 0.0}]))
    with pytest.raises(ValueError, match="n_sites must be 1 or more, got 0"):
        sqs.diagnostics.site_verdicts(pd.DataFrame([GOOD])[:0])


def test_of_a_model_whose_queries_decide_nothing_it_says_so(tiny_folder, examples):
    model = sqs.load_model(str(tiny_folder), device="cpu")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.original_component.weight.zero_()
    tokenized = sqs.tokenize_examples(model, examples)
    table = sqs.diagnostics.site_verdicts(
        sqs.diagnostics.interchange_effect(model, sqs.query_sites(model), tokenized, n_pairs=12)
    )
    assert not table["steer_here"].any()
    assert closing_sentence(table).startswith("Nothing to steer at any of these 15 sites")


def test_a_site_that_a_learned_move_reaches_is_worth_a_steer_whatever_real_queries_do():
    row = judged(class_effect=0.0, reach=0.62, reach_se=0.1)
    assert bool(row["steer_here"])
    assert row["verdict"] == "steer here: a learned move removes 62%"
    assert judged(reach=0.62)["verdict"] == "steer here: moves 50% more than the control"
    for none in ({"reach": 0.09}, {"reach": 0.3, "reach_se": 0.2}, {"reach": float("nan")}):
        assert not bool(judged(class_effect=0.0, **none)["steer_here"])
    for control, steer in ((0.3, True), (0.5, False)):  # 0.62 less it, against 2.24 errors
        row = judged(class_effect=0.0, reach=0.62, reach_se=0.1, reach_control=control)
        assert bool(row["steer_here"]) == steer
    far: dict[str, float] = {"class_effect": 0.0, "reach": 0.62, "reach_se": 0.1}
    paired = far | {"reach_control": 0.5, "reach_control_se": 0.04}
    assert bool(judged(**paired)["steer_here"])  # the same examples: a smaller error
    almost = paired | {"reach_control": 0.6, "reach_control_se": 0.0}
    assert not bool(judged(**almost)["steer_here"])  # 2 % beyond the control
    table = pd.DataFrame([GOOD | {"class_effect": 0.0, "reach": 0.62}])
    assert closing_sentence(sqs.diagnostics.site_verdicts(table)) == (
        "Steer here: layer 1 (50%, 62%). In brackets: total variation beyond that of the control, "
        "and reach."
    )
