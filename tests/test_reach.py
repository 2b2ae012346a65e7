"""Reach: held-out effect of learned constant changes of queries, on both hosts."""

import pytest
import torch

import sae_query_steer as sqs

OTHER = {"create": "remember", "remember": "create"}
REQUESTS = {"create": "w20 w21", "remember": "w30 w31"}


def prompts(model, *, requested, n=12, response="", requests=REQUESTS):
    """Prompts labelled by their own class, or with the request of the other class."""
    made = [
        sqs.LabelledExample(
            prompt=f"{requests[OTHER[k]]} w{i} w1" if requested else f"w9 w{i} w1",
            response=response,
            label=OTHER[k] if requested else k,
        )
        for i in range(4, 4 + n)
        for k in OTHER
    ]
    return sqs.tokenize_examples(model, made)


def measured(model, layers=(1,), **changes):
    examples = prompts(model, requested=False)
    others = prompts(model, requested=True)
    settings = {"counterparts": others, "n_updates": 8, **changes}
    return sqs.diagnostics.reach(model, sqs.query_sites(model, layers), examples, **settings)


def test_a_larger_budget_reaches_further_on_examples_held_out(model):
    small, large = (measured(model, budget=budget).iloc[0] for budget in (0.05, 4.0))
    assert 0 < small["reach"] < large["reach"] < 1
    assert small["relative_change"] <= 0.05 + 1e-5 < large["relative_change"]
    assert small["reach"] == pytest.approx(1 - small["reach_kl_after"] / small["reach_kl_before"])
    assert small["n_held_out"] == 6


def test_the_kl_before_is_that_of_whole_passes(model):
    table = measured(model, held_out=[0, 1])
    kl = []
    for open_, other in zip(
        list(prompts(model, requested=False))[:2],
        list(prompts(model, requested=True))[:2],
        strict=True,
    ):
        with torch.no_grad():
            own, wanted = (model(e.tokens[None])[0, -1].log_softmax(-1) for e in (open_, other))
        kl.append(float((wanted.exp() * (wanted - own)).sum()))
    assert table["reach_kl_before"].iloc[0] == pytest.approx(sum(kl) / 2, rel=1e-3)


def test_each_head_has_a_row_and_a_site_alone_gives_the_same(tiny_models):
    model = tiny_models["hooked"]
    table = measured(model, layers=(0, 2), per_head=True)
    assert list(table["head"]) == [0, 1, 2, 3, "all"] * 2
    alone = measured(model, layers=(2,))
    assert alone["reach"].iloc[0] == table["reach"].iloc[-1]


def test_the_control_reaches_as_far_where_the_requests_of_all_classes_are_one(tiny_models):
    model, plain = tiny_models["hooked"], measured(tiny_models["hooked"])
    assert "reach_control" not in plain
    own = measured(model, control=True)
    assert own["reach"].equals(plain["reach"])
    assert (own["reach_control"] < 0.5 * own["reach"]).all()
    same = prompts(model, requested=True, requests=dict.fromkeys(OTHER, "w20 w21"))
    shared = measured(model, control=True, counterparts=same).iloc[0]
    assert shared["reach_control"] == pytest.approx(shared["reach"], rel=1e-4)
    assert shared["reach"] > 0
    assert shared["reach_control_se"] == pytest.approx(0, abs=1e-4)


def test_a_layer_whose_output_is_cut_off_reaches_nothing(tiny_folder):
    model = sqs.load_model(str(tiny_folder), device="cpu")
    with torch.no_grad():
        model.blocks[1].attn.o.original_component.weight.zero_()
    row = measured(model).iloc[0]
    assert row["reach"] == pytest.approx(0, abs=1e-6)


def test_it_refuses_what_does_not_fit(tiny_models, untyped):
    model = tiny_models["hooked"]
    with pytest.raises(ValueError, match="counterpart of example 0 .* another class"):
        measured(model, counterparts=prompts(model, requested=False))
    with pytest.raises(ValueError, match="one for each of the 24 examples.*got 4"):
        measured(model, counterparts=prompts(model, requested=True, n=2))
    with pytest.raises(ValueError, match="counterpart 0 must have the class and the response"):
        measured(model, counterparts=prompts(model, requested=True, response=" w5"))
    with pytest.raises(ValueError, match="budget must be a finite number > 0, got 0"):
        measured(model, budget=0)
    with pytest.raises(ValueError, match="must have examples to learn from, got none"):
        measured(model, held_out=range(24))


@pytest.mark.slow
def test_on_smollm2_a_layer_in_the_second_half_reaches_further_than_an_early_one():
    try:
        model = sqs.load_smollm2()
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    topics = ["volcanoes", "magnets", "fractions", "rivers"]
    asked = {"analyze": " They should compare two things.", "create": " They should design one."}

    def tokens(requests):
        texts = [
            sqs.LabelledExample(
                prompt=f"Write one short exercise about {topic} for students.{requests[k][0]}",
                label=requests[k][1],
            )
            for topic in topics
            for k in asked
        ]
        return sqs.tokenize_examples(model, texts, chat_template=True)

    other = {"analyze": "create", "create": "analyze"}
    table = sqs.diagnostics.reach(
        model,
        sqs.query_sites(model, [3, 21]),
        tokens({k: ("", k) for k in asked}),
        counterparts=tokens({k: (asked[other[k]], other[k]) for k in asked}),
        n_updates=6,
    )
    early, late = table["reach"].tolist()
    assert late > max(0.1, early)
    assert table["reach_kl_before"].nunique() == 1
