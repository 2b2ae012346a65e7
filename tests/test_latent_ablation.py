"""Steers without some latents: which are held, how much of the change they make, what is left."""

import re
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.compare.latent_ablation import latent_ablations
from sae_query_steer.descent.places import TokenPlaces

NAME, HEADS = "blocks.2.attn.hook_q", [0, 2]
LEVELS = ("create", "apply")


@dataclass(frozen=True)
class Case:
    target: str


CASES = [Case("create"), Case("apply"), Case("create")]


@pytest.fixture(scope="module")
def steerers(saes, targets):
    return {
        level: sqs.LatentGradientSteerer(
            saes,
            targets,
            target=level,
            objective=sqs.SquaredDistance(),
            n_steps=1,
            step_size=0.8,
            layers=[2],
            heads=HEADS,
        )
        for level in LEVELS
    }


@pytest.fixture(scope="module")
def moved(tiny_models, steerers):
    model, parts = tiny_models["bridge"], []
    for steerer in steerers.values():
        with steerer.apply(model, record=True, prompt_lengths=[7, 7]) as trace, torch.no_grad():
            model(torch.tensor([[1, 5, 9, 30, 22, 8, 40], [1, 45, 19, 33, 2, 18, 4]]))
        parts.append(sqs.moved_latents(steerer, trace))
    return pd.concat(parts, ignore_index=True)


def shares(moved, target, head) -> dict[int, float]:
    own = moved[(moved["target"] == target) & (moved["head"] == head)]
    return dict(zip(own["latent"], own["share"], strict=True))


def delta(steerer) -> torch.Tensor:
    queries = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    return steerer.change(NAME, queries, TokenPlaces.one_a_row(3), record=False).delta


def test_the_top_are_those_of_the_table_and_the_others_are_others_that_move(steerers, moved):
    found = latent_ablations(steerers, moved, ms=(1, 3), seeds=(0, 1), ways=("held",))
    assert [(a.which, a.m, a.seed) for a in found] == [
        (which, m, seed)
        for m in (1, 3)
        for which, seeds in (
            ("top", [None]),
            ("as many others", [0, 1]),
            ("as much of others", [0, 1]),
        )
        for seed in seeds
    ]
    top = {a.m: a for a in found if a.which == "top"}
    for ablation in found:
        made = []
        for level in LEVELS:
            for head in HEADS:
                own, some = shares(moved, level, head), ablation.latents[level][NAME][head]
                assert len(set(some)) == len(some)
                assert set(some) <= set(own), "only what moves"
                made.append(sum(own[i] for i in some))
                best = top[ablation.m].latents[level][NAME][head]
                if ablation.which == "top":
                    assert some == sorted(own, key=lambda i: -own[i])[: ablation.m]
                    continue
                assert not set(some) & set(best)
                if ablation.which == "as many others":
                    assert len(some) == min(ablation.m, len(own) - len(best))
                elif len(some) < len(own) - len(best):
                    wanted = sum(own[i] for i in best)
                    assert made[-1] >= wanted > sum(own[i] for i in some[:-1])
        assert ablation.share == pytest.approx(sum(made) / len(made))


def test_a_seed_says_which_others_and_another_says_otherwise(steerers, moved):
    given = {"ms": (3,), "ways": ("held",), "others": ("as many others",)}
    one, two, again = (
        latent_ablations(steerers, moved, seeds=seeds, **given)[1].latents
        for seeds in ((0,), (1,), (0,))
    )
    assert one == again
    assert one != two
    shuffled = moved.sample(frac=1, random_state=0)
    assert latent_ablations(steerers, shuffled, seeds=(0,), **given)[1].latents == one


def test_each_case_is_steered_by_its_own_target_and_way(steerers, moved):
    found = latent_ablations(steerers, moved, ms=(2,), others=())
    changes = {a.way: delta(a.method.steerer(CASES, 0.0)) for a in found}
    assert list(changes) == ["held", "taken out", "only"]
    whole = torch.stack([delta(steerers[case.target])[i] for i, case in enumerate(CASES)])
    # Latents on their own: without some of them and by these alone sum to the whole.
    torch.testing.assert_close(changes["held"] + changes["only"], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changes["taken out"], changes["held"], rtol=1e-4, atol=1e-5)
    assert all(change.norm() > 0.01 for change in changes.values())
    assert {a.method.name for a in found} == {
        "m=2: top held",
        "m=2: top taken out",
        "m=2: top only",
    }


def test_with_every_latent_held_nothing_is_left(steerers, moved):
    held, _, only = latent_ablations(steerers, moved, ms=(99,), others=())
    assert held.share == pytest.approx(1.0)
    for level, steerer in steerers.items():
        assert len(held.latents[level][NAME]) == 2
        rows = [Case(level)] * 3
        assert only.method.steerer(rows, 0.0).site_heads == steerer.site_heads


def test_where_no_others_move_there_is_no_control(steerers, moved):
    ablations = latent_ablations(steerers, moved, ms=(99,), seeds=(0,), ways=("only", "held"))
    assert [(a.way, a.which) for a in ablations] == [("only", "top"), ("held", "top")]


def test_the_log_of_a_sweep_tells_ablations_of_two_steers_apart(steerers, moved):
    other = {t: replace(s, objective=sqs.PrototypeLogLikelihood()) for t, s in steerers.items()}
    first, second = (
        latent_ablations(some, moved, ms=(1,), ways=("held",), others=())[0].method
        for some in (steerers, other)
    )
    assert first.name == second.name
    assert first.objective != second.objective
    assert first.layers == second.layers


def test_what_can_t_be_ablated_is_refused(steerers, moved):
    for call, text in (
        (lambda: latent_ablations(steerers, moved, ms=(0,)), "m=0 is not allowed"),
        (
            lambda: latent_ablations(steerers, moved[moved["target"] == "apply"]),
            "the table has no target 'create': it has ['apply']",
        ),
        (
            lambda: latent_ablations(
                {
                    "create": sqs.LatentGradientSteerer(
                        steerers["create"].saes,
                        steerers["create"].targets,
                        target="create",
                        objective=sqs.SquaredDistance(),
                        n_steps=1,
                        step_size=1.0,
                        latents=sqs.TopLatents(2),
                    )
                },
                moved,
            ),
            "the steerer towards create has latents=TopLatents(m=2): give one that may move",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
