"""Steerers that treat every row differently: a batch is its rows, each with its own steerer."""

import re

import pytest
import torch
from conftest import greedy_logits, one_per_row

import sae_query_steer as sqs
from experiments.tutor.rowwise import rowwise
from sae_query_steer.compare.generation import continuations

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
NAMES = ["blocks.0.attn.hook_q", "blocks.2.attn.hook_q"]


@pytest.fixture
def make(saes, targets):
    """Make a steerer towards a class, with some settings changed."""

    def make(target: str, **changes) -> sqs.LatentGradientSteerer:
        settings = {"objective": sqs.objectives.CentroidContrast(), "n_steps": 3, "step_size": 2.0}
        return sqs.LatentGradientSteerer(saes, targets, target=target, **{**settings, **changes})

    return make


def refuses(text: str):
    return pytest.raises(ValueError, match=f"^{re.escape(text)}$")


def test_a_batch_equals_each_row_alone_with_its_own_steerer(model, make):
    control = sqs.baselines.random_direction(make("remember"), seed=3)
    steerers = [make("create"), control, make("apply")]
    with rowwise(steerers).apply(model):
        together = greedy_logits(model, PROMPTS)
    for row, steerer in enumerate(steerers):
        with steerer.apply(model):
            alone = greedy_logits(model, PROMPTS[row])[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
        with steerers[row - 1].apply(model):
            other = greedy_logits(model, PROMPTS[row])[0]
        assert not torch.allclose(together[row], other, atol=1e-2)


def test_the_change_of_a_row_is_that_of_its_own_steerer_in_any_order(make):
    create, apply = make("create", heads=[1, 2]), make("apply", heads=[1, 2])
    generator = torch.Generator().manual_seed(11)
    queries = torch.randn(5, 2, 8, generator=generator)  # of the two steered heads
    steerers = [apply, create, create, apply, create]
    at, tokens = create.where.chosen[NAMES[1]], one_per_row(len(queries))
    made = rowwise(steerers).edit.change(queries, at, tokens).delta
    for row, steerer in enumerate(steerers):
        one = one_per_row(1)
        own = steerer.change(queries[row : row + 1], at, one).delta[0]
        torch.testing.assert_close(made[row], own, rtol=1e-5, atol=1e-6)
    again = make("create", heads=[1, 2])
    copies = rowwise([apply, create, again, apply, again])
    torch.testing.assert_close(copies.edit.change(queries, at, tokens).delta, made)


def test_one_steerer_for_all_rows_is_that_steerer(model, make):
    steerer = make("create", heads=[0, 3])
    joined = rowwise([steerer] * 3)
    assert [at.heads for at in joined.where.chosen.values()] == [(0, 3)] * 2
    made = continuations(model, PROMPTS, max_new_tokens=4, steerer=joined)
    plain = continuations(model, PROMPTS, max_new_tokens=4, steerer=steerer)
    assert made.texts == plain.texts
    assert made.relative_changes == pytest.approx(plain.relative_changes, rel=1e-4)
    assert min(made.relative_changes) > 0.01


def test_the_trace_names_the_way_and_every_row(model, make):
    joined = rowwise([make("create"), make("apply"), make("create")])
    with joined.apply(model, record=True) as trace:
        greedy_logits(model, PROMPTS)
    table = trace.to_dataframe()
    assert set(table["method"]) == {"row by row"}
    assert sorted(set(zip(table["row"], table["position"], strict=True))) == [
        (0, 3),
        (1, 1),
        (2, 5),
    ]
    assert len(table) == 3 * 2 * 4, "3 rows, 2 layers, 4 heads"


def test_a_batch_of_another_size_is_refused_and_nothing_is_left(model, make):
    plain = greedy_logits(model, PROMPTS)
    text = (
        "the steerer is for 2 rows, the batch has 3: give all prompts in one call of generate(), "
        "in order"
    )
    with refuses(text), rowwise([make("create")] * 2).apply(model):
        greedy_logits(model, PROMPTS)
    assert torch.equal(greedy_logits(model, PROMPTS), plain)
