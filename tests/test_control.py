"""Control of a steer: by row, over tokens, within limits, by few latents, behind gates."""

import math

import pytest
import torch
from conftest import one_per_row

import sae_query_steer as sqs
from sae_query_steer.descent.goals import Goal

NAME = "blocks.2.attn.hook_q"
PROMPTS = ["w0 w1 w2 w3 w4", "w20 w21", "w40 w3 w7"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "verbose": False}


@pytest.fixture
def model(tiny_models):
    """One backend: `test_steering` compares the two."""
    return tiny_models["bridge"]


@pytest.fixture
def make(saes, targets):
    """Make a steerer of layer 2 towards "create", with changes."""

    def made(**changes):
        settings = {
            "target": "create",
            "objective": sqs.PrototypeLogLikelihood(),
            "n_steps": 8,
            "step_size": 0.4,
            "scope": sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
            "layers": [2],
        }
        return sqs.LatentGradientSteerer(saes, targets, **{**settings, **changes})

    return made


def traced(model, steerer, prompts=PROMPTS):
    with steerer.apply(model, record=True) as trace:
        texts = model.generate(prompts, **GREEDY)
    return texts, trace.to_dataframe()


def queries_of(n: int, n_heads: int = 4) -> torch.Tensor:
    return torch.randn(n, n_heads, 8, generator=torch.Generator().manual_seed(2))


def change(steerer, queries, **places):
    given = one_per_row(len(queries))
    for name, value in places.items():
        object.__setattr__(given, name, value)
    return steerer.change(queries, steerer.where.chosen[NAME], given, record=True)


ROWS = {
    "target": ["create", "apply", {"remember": 1.0, "create": -0.5}],
    "n_steps": [0, 3, 20],
    "step_size": [0.1, 0.0, 1.0],
}


@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_steered_by_its_own_value_as_if_alone(model, make, name):
    texts, table = traced(model, make(**{name: ROWS[name]}))
    for row, value in enumerate(ROWS[name]):
        alone, own = traced(model, make(**{name: value}), PROMPTS[row])
        assert texts[row] == alone
        mine = table[table["row"] == row].reset_index(drop=True)
        assert list(mine["position"]) == list(own["position"])
        assert (mine["delta_norm"] - own["delta_norm"]).abs().max() < 1e-4
        if name == "target":
            assert set(mine["target"]) == set(own["target"])
    assert (table[table["row"] == 0]["delta_norm"] == 0).all() == (name == "n_steps")


def test_a_number_of_values_that_is_not_that_of_the_rows_is_refused(model, make):
    for name, values in ROWS.items():
        steerer = make(**{name: values[:2]})
        with (
            steerer.apply(model),
            pytest.raises(ValueError, match=f"{name} is for 2 rows, the batch has 3"),
        ):
            model.generate(PROMPTS, **GREEDY)


def test_a_schedule_is_the_step_size_of_each_token(model, make):
    schedule = sqs.control.ExponentialDecay(half_life=2.0)
    _, table = traced(
        model, make(schedule=schedule, n_steps=1, objective=sqs.objectives.CentroidContrast())
    )
    lengths = torch.tensor([len(prompt.split()) + 1 for prompt in PROMPTS])
    for age in range(4):
        places = {"position": lengths - 1 + age, "prompt_lengths": lengths}
        queries = queries_of(3)
        scheduled = change(make(schedule=schedule, n_steps=1), queries, **places).delta
        plain = change(make(n_steps=1, step_size=0.4 * 2 ** (-age / 2)), queries).delta
        torch.testing.assert_close(scheduled, plain)
    assert table["delta_norm"].max() > 0


def test_a_schedule_agrees_with_the_cache_on_and_off(model, make):
    steerer = make(schedule=sqs.control.ExponentialDecay(half_life=1.5))
    results = []
    for use_past in (True, False):
        with steerer.apply(model, record=True) as trace:
            text = model.generate(PROMPTS, use_past_kv_cache=use_past, **GREEDY)
        results.append((text, trace.to_dataframe()["delta_norm"]))
    assert results[0][0] == results[1][0]
    assert (results[0][1] - results[1][1]).abs().max() < 1e-4


def test_a_schedule_needs_the_prompt_lengths(tiny_models, make):
    model, schedule = tiny_models["bridge"], sqs.control.LinearWarmUp(3)
    steerer = make(schedule=schedule, scope=sqs.scopes.EveryPosition())
    with (
        steerer.apply(model),
        pytest.raises(ValueError, match="a schedule needs to know where the prompt ends"),
    ):
        model(PROMPTS[0])


@pytest.mark.parametrize("keep_norm", [False, True])
def test_the_query_changes_no_more_than_allowed(model, make, keep_norm):
    free = traced(model, make(keep_norm=keep_norm))[1]["relative_change"]
    most = float(free.median()) / 2
    table = traced(model, make(max_relative_change=most, keep_norm=keep_norm))[1]
    assert (table["relative_change"] <= most * (1 + 1e-4)).all()
    assert (table["relative_change"] > most * 0.999).any()


def test_a_norm_that_is_kept_is_kept_and_points_where_the_steer_points(make):
    queries = queries_of(20)
    free = change(make(), queries).delta
    turned = change(make(keep_norm=True), queries).delta
    norm = (queries + turned).norm(dim=-1)
    torch.testing.assert_close(norm, queries.norm(dim=-1), rtol=1e-4, atol=1e-5)
    cosine = torch.cosine_similarity(queries + free, queries + turned, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_until_steers_as_far_as_asked_and_leaves_alone_what_is_there(make):
    queries = queries_of(40)
    before = change(make(n_steps=0), queries)
    posterior = posteriors(before.distance_before)[..., 2]
    value = float(posterior.quantile(0.8))
    made = change(make(n_steps=3000, step_size=0.02, until=value), queries)
    after = posteriors(made.distance_after)[..., 2]
    assert (after >= value - 1e-4).all()
    short = posterior < value
    assert (after[short] < value + 0.05).all()
    assert (made.delta[~short] == 0).all()


@pytest.mark.slow
def test_until_leads_away_from_a_class_until_it_is_unlikely_enough(make):
    queries = queries_of(40)
    before = posteriors(change(make(n_steps=0), queries).distance_before)[..., 2]
    value = float((1 - before).quantile(0.5))
    away = {"target": {"create": -1.0}, "n_steps": 3000, "step_size": 0.01, "until": value}
    made = change(make(**away), queries)
    assert (1 - posteriors(made.distance_after)[..., 2] >= value - 1e-4).all()
    assert (made.delta[1 - before >= value] == 0).all()


def posteriors(distances: torch.Tensor) -> torch.Tensor:
    return (-distances.square() / 2).softmax(-1)


def test_the_trust_radius_bounds_the_way_of_the_latents(model, make):
    table = traced(model, make(trust_radius=0.05, n_steps=50))[1]
    way = table["latents_moved"].map(lambda moved: math.hypot(*(by for _, by in moved)))
    assert (way <= 0.05 * (1 + 1e-4)).all()
    assert (way > 0.04).any()


def test_only_chosen_latents_move_and_the_trace_names_them(model, make, targets):
    heads = {0: [3, 5], 2: [1]}
    given = sqs.control.GivenLatents({NAME: heads})
    table = traced(model, make(latents=given))[1]
    for head, moved in zip(table["head"], table["latents_moved"], strict=True):
        assert {latent for latent, _ in moved} <= set(heads.get(head, ()))
    assert (table["n_latents_moved"] > 0).any()
    top = traced(model, make(latents=sqs.control.TopLatents(2)))[1]
    goal = Goal.towards(targets.means[NAME], 2, targets.variances[NAME])
    best = sqs.control.TopLatents(2)(targets.means[NAME][0], goal, NAME, range(4))
    for head, moved in zip(top["head"], top["latents_moved"], strict=True):
        assert all(best[head, latent] for latent, _ in moved)
    assert 0 < top["n_latents_moved"].max() <= 2
    active = traced(model, make(latents=sqs.control.ActiveLatents()))[1]
    assert 0 < active["n_latents_moved"].max() <= 3, "three latents of a head fire at a token"


def test_latents_are_chosen_for_the_heads_that_are_steered(make):
    given = sqs.control.GivenLatents({NAME: {3: [4]}})
    made = change(make(latents=given, heads=[1, 3]), queries_of(6, n_heads=2))
    assert (made.n_moved[:, 0] == 0).all()
    assert set(made.moved_latents[:, 1, 0][made.n_moved[:, 1] > 0].tolist()) == {4}


def test_a_closed_gate_is_exactly_no_steer(model, make):
    bare = model.generate(PROMPTS, **GREEDY)
    with make(gate=sqs.control.PosteriorBelow(1e-9), step_size=3.0).apply(model):
        assert model.generate(PROMPTS, **GREEDY) == bare
    queries = queries_of(30)
    posterior = posteriors(change(make(n_steps=0), queries).distance_before)[..., 2]
    value = float(posterior.median())
    made = change(make(gate=sqs.control.PosteriorBelow(value)), queries)
    closed = posterior >= value
    assert (made.delta[closed] == 0).all()
    assert (made.delta[~closed].norm(dim=-1) > 0).any()
    latents = make().saes[NAME].encode(queries)
    made = change(make(gate=sqs.control.LatentAbove(2, 0.1)), queries)
    assert (made.delta[latents[..., 2] <= 0.1] == 0).all()
    made = change(make(gate=lambda z, goal: torch.arange(4).eq(1).expand(z.shape[:-1])), queries)
    assert (made.delta[:, [0, 2, 3]] == 0).all() and (made.delta[:, 1] != 0).any()
    both = {"gate": sqs.control.PosteriorBelow(value), "latents": sqs.control.ActiveLatents()}
    made = change(make(**both), queries)
    assert (made.delta[closed] == 0).all() and (made.delta[~closed] != 0).any()


def test_some_heads_alone_are_steered_as_they_are_among_all(make, untyped):
    queries, heads = queries_of(9), [3, 1]
    whole = change(make(), queries).delta[:, heads]
    torch.testing.assert_close(change(make(heads=heads), queries[:, heads]).delta, whole)

    class OnlyAllHeads:
        """An encoder of somebody else's, which knows nothing of a part of its heads."""

        def __init__(self, sae):
            self.sae, self.latent_min = sae, sae.latent_min
            self.n_heads, self.d_head, self.d_latent = 4, 8, 16

        def encode(self, x):
            assert x.shape[-2:] == (4, 8)
            return self.sae.encode(x)

        def decode(self, z):
            return self.sae.decode(z)

    steerer = make(heads=heads)
    foreign = {name: OnlyAllHeads(sae) for name, sae in steerer.saes.items()}
    theirs = sqs.LatentGradientSteerer(
        foreign,
        steerer.targets,
        target="create",
        objective=steerer.objective,
        n_steps=8,
        step_size=0.4,
        layers=[2],
        heads=heads,
    )
    torch.testing.assert_close(change(theirs, queries[:, heads]).delta, whole)


def test_a_negative_weight_leads_away(make):
    queries = queries_of(30)
    made = change(make(target={"create": -1.0}, step_size=0.05), queries)
    before, after = (posteriors(d)[..., 2] for d in (made.distance_before, made.distance_after))
    moved = made.delta.norm(dim=-1) > 1e-4
    assert (after[moved] <= before[moved]).all() and moved.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": {"create": 0.0}}, ValueError, "target .*other than 0"),
        ({"target": ["create", "creation"]}, ValueError, "no class 'creation'"),
        ({"target": []}, ValueError, r"target .*got \[\]"),
        ({"n_steps": [3, -1]}, ValueError, "n_steps .*got -1"),
        ({"step_size": [0.1, float("nan")]}, ValueError, "step_size .*got nan"),
        ({"until": 1.5}, ValueError, "until .*<= 1, got 1.5"),
        ({"trust_radius": 0.0}, ValueError, "trust_radius .*> 0, got 0.0"),
        ({"max_relative_change": -1.0}, ValueError, "max_relative_change .*got -1.0"),
        ({"schedule": sqs.control.LinearWarmUp}, TypeError, "schedule must be"),
        ({"gate": 3}, TypeError, "gate must be"),
    ],
)
def test_controls_that_cannot_work_are_refused_before_a_model_is_there(
    make, untyped, changes, error, message
):
    with pytest.raises(error, match=message):
        make(**changes)


def test_joined_steerers_act_in_their_order_as_nested_ones_do(model, make):
    first, second = make(), make(target="apply", step_size=1.0, scope=sqs.scopes.EveryPosition())
    with first.apply(model, record=True) as one, second.apply(model, record=True) as two:
        nested = model.generate(PROMPTS, **GREEDY)
    with sqs.steering.JoinedSteerers(first, second).apply(model, record=True) as traces:
        assert model.generate(PROMPTS, **GREEDY) == nested
    for mine, theirs in zip(traces, (one, two), strict=True):
        assert mine.to_dataframe()["delta_norm"].equals(theirs.to_dataframe()["delta_norm"])
    with sqs.steering.JoinedSteerers(second, first).apply(model, record=True) as swapped:
        model.generate(PROMPTS, **GREEDY)
    ours, other = (t.to_dataframe()["query_norm"] for t in (traces[1], swapped[0]))
    assert not torch.allclose(torch.tensor(ours.to_numpy()), torch.tensor(other.to_numpy()))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_nothing_of_joined_steerers_is_left_if_one_does_not_belong(tiny_models, make, untyped):
    model = tiny_models["bridge"]
    with pytest.raises(TypeError, match="steerer must be Steerer, got int"):
        sqs.steering.JoinedSteerers(make(), 3)
    with pytest.raises(ValueError, match="needs at least one steerer"):
        sqs.steering.JoinedSteerers()
    with pytest.raises(RuntimeError), sqs.steering.JoinedSteerers(make(), make()).apply(model):
        raise RuntimeError
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_list_of_steerers_is_not_joined(make, untyped):
    with pytest.raises(TypeError, match=r"must be Steerer, got list: JoinedSteerers\(one, two\)"):
        sqs.steering.JoinedSteerers([make(), make()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": lambda age: 1.0}, r"schedule .*<lambda> returns must be .* \[1\], got 1.0"),
        ({"latents": [3, 5]}, r"latents must be such as GivenLatents\(.*got \[3, 5\]"),
        ({"heads": {"2": [0]}}, r"the layers of heads must be a list of whole numbers"),
        ({"target": "Create"}, "did you mean 'create'"),
    ],
)
def test_a_setting_of_another_kind_is_refused_with_the_right_one(make, untyped, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**change)
