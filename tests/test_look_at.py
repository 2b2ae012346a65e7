"""Attention targets: heads turn to chosen tokens, by the gradient of the model's own attention."""

from typing import Any

import pytest
import torch
from conftest import greedy_logits
from recipe_models import write_tiny

import sae_query_steer as sqs
from sae_query_steer.compare.generation import continuations
from sae_query_steer.descent.attention import AttentionGoal
from sae_query_steer.models.prefix import PromptCaches
from sae_query_steer.scopes import AtPositions, EveryPosition, PromptTokens, ResponseTokens, RowMask
from sae_query_steer.steering import AttentionSteerer, LookAt
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.look_at import attention_goal, looks_of_rows, token_span
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.where import Where

PROMPTS = ["w1 w20 w33 w5", "w20 w33", "w40 w41 w20 w33 w9 w17"]  # with BOS 5, 3 and 7 tokens
PLACES = [[2, 3], [1, 2], [3, 4]]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
SCOPE = sqs.LastPromptToken() | ResponseTokens()
PHRASE = LookAt("w20 w33")


@pytest.fixture(params=["sparse", "dense", "rotated"])
def encoders(request, tiny_models, saes):
    """SAEs of layers 0 and 2, or the identity, before and after rotary embedding."""
    if request.param == "sparse":
        return saes
    rotated = request.param == "rotated"
    sites = sqs.query_sites(tiny_models["bridge"], [0, 2], rotated=rotated)
    return sqs.sae.identity_encoders(sites)


def logits(model, prompts, **changes):
    output = model.generate(
        prompts, return_type="tokens", output_logits=True, **{**GREEDY, **changes}
    )
    return torch.stack(output.logits, dim=1)


def goal(*weights, seed=0):
    """A goal of 3 tokens over 7 keys, scores of 2 heads, some keys hidden."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 2, 7, generator=generator, dtype=torch.float64) * 3
    scores[0, :, 5:], scores[1, :, 6:] = -torch.inf, torch.finfo(torch.float64).min
    inside = torch.rand(len(weights), 3, 7, generator=generator) < 0.4
    inside[..., 0] = True
    weight = torch.tensor(weights, dtype=torch.float64)[:, None].expand(-1, 3)
    return AttentionGoal(inside, weight), scores


@pytest.mark.parametrize("weights", [(1.0,), (-2.0,), (1.5, -0.5, 0.0)])
def test_the_gradient_in_closed_form_is_that_of_autograd(weights):
    made, scores = goal(*weights)
    leaf = scores.clone().requires_grad_()
    (expected,) = torch.autograd.grad(made.loss(leaf).sum(), leaf)
    torch.testing.assert_close(made.gradient(scores), expected.nan_to_num(0))
    assert made.gradient(scores).abs().max() > 0.01


def test_the_loss_is_the_log_of_the_attention_inside_or_outside():
    made, scores = goal(1.0, -2.0)
    inside = made.inside.clone()
    pattern = scores.softmax(-1)
    one, two = (torch.where(i[:, None], pattern, 0).sum(-1) for i in inside)
    torch.testing.assert_close(made.loss(scores), -one.log() - 2 * two.log())
    masses = torch.stack([one, 1 - two], -1)
    torch.testing.assert_close(made.masses(scores), masses)


def test_extreme_scores_and_invisible_sources_give_finite_losses_and_gradients():
    inside = torch.tensor([[[True, False, False]], [[False, True, False]]])
    made = AttentionGoal(inside, torch.tensor([[1.0], [1.0]]))
    scores = torch.tensor([[[-400.0, -torch.inf, 400.0]]])
    assert float(made.loss(scores)) == 800
    assert made.gradient(scores).tolist() == [[[-1.0, 0.0, 1.0]]]
    assert made.masses(scores).tolist() == [[[0.0, 0.0]]]


def test_the_gradient_keeps_its_digits_where_there_is_hardly_anything_to_look_away_from():
    scores = torch.tensor([[[-16.0, 1.0, 0.5, -0.25]]])
    made = AttentionGoal(torch.tensor([[[False, True, True, True]]]), torch.tensor([[-1.0]]))
    exact = made.gradient(scores.double()).float()
    torch.testing.assert_close(made.gradient(scores), exact, rtol=1e-5, atol=0)


class Probe(Edit):
    """One step of a descent, beside the numerical gradient of its loss in the latents."""

    needs_keys = True

    def __init__(self, descent) -> None:
        self.descent, self.found = descent, []

    def change(self, activations, at, tokens, *, keys, record=False):
        made = self.descent.change(activations, at, tokens, keys=keys, record=True)
        encoder = self.descent._encoder(at, activations.device)
        z = encoder.encode(activations)
        goal = attention_goal(looks_of_rows(self.descent.look_at), keys, token_span)

        def loss(z_):
            delta = encoder.decode(z_) - encoder.decode(z)
            return goal.loss(keys.scores(activations + delta))

        slopes, width = torch.zeros_like(z), 1e-2
        for i in range(z.shape[-1]):
            step = torch.zeros_like(z)
            step[..., i] = width
            slopes[..., i] = (loss(z + step) - loss(z - step)) / (2 * width)
        if encoder.latent_min is not None:
            slopes = slopes.masked_fill((z <= encoder.latent_min) & (slopes > 0), 0)
        way = -(encoder.decode(z + slopes) - encoder.decode(z))
        size = self.descent.step_size * activations.norm(dim=-1, keepdim=True)
        self.found.append((made.delta, size * way / way.norm(dim=-1, keepdim=True), z))
        return made


def test_a_step_follows_the_numerical_gradient_and_has_the_size_asked_for(model, encoders):
    descent = AttentionSteerer(
        encoders, (PHRASE, LookAt(AtPositions([0]), weight=-0.5)), n_steps=1, step_size=0.01
    )
    probe = Probe(descent)
    where = Where(descent.where.sites, heads=[0, 2, 3])
    with Steerer(probe, where).apply(model):
        model.generate(PROMPTS, **GREEDY)
    assert len(probe.found) == 2
    for delta, expected, _ in probe.found:
        if encoders.__class__ is dict:
            torch.testing.assert_close(delta, expected, rtol=0.02, atol=1e-3)
        else:  # the bound may shorten a step of latents that are nearly 0
            assert torch.cosine_similarity(delta, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("scope", [SCOPE, EveryPosition()], ids=["end", "every"])
def test_cache_on_equals_cache_off_and_a_batch_equals_its_rows(model, encoders, scope):
    steerer = AttentionSteerer(encoders, PHRASE, n_steps=3, scope=scope)
    bare = logits(model, PROMPTS)
    with steerer.apply(model):
        batch = logits(model, PROMPTS)
        off = logits(model, PROMPTS, use_past_kv_cache=False)
        torch.testing.assert_close(off, batch, rtol=0, atol=2e-5)
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(logits(model, [prompt])[0], batch[row], rtol=0, atol=2e-5)
    assert (batch - bare).abs().max() > 1e-3


def test_prompts_that_ran_once_know_the_phrase(model, encoders):
    steerer = AttentionSteerer(encoders, PHRASE, n_steps=3, scope=SCOPE)
    whole = continuations(model, PROMPTS, max_new_tokens=4, steerer=steerer)
    caches = PromptCaches(model, 2**30)
    kept = continuations(model, PROMPTS, max_new_tokens=4, steerer=steerer, caches=caches)
    assert kept.texts == whole.texts
    assert kept.relative_changes == pytest.approx(whole.relative_changes, rel=1e-3)
    assert whole.relative_changes[0] > 0


def test_both_hosts_give_equal_logits(tiny_models, encoders):
    found = []
    for model in tiny_models.values():
        with AttentionSteerer(encoders, PHRASE, n_steps=3, scope=SCOPE).apply(model):
            found.append(logits(model, PROMPTS))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


@pytest.mark.parametrize("changes", [{"n_steps": 0}, {"step_size": 0.0}])
def test_without_steps_every_bit_stays(model, encoders, changes):
    bare = logits(model, PROMPTS)
    with AttentionSteerer(encoders, PHRASE, scope=EveryPosition(), **changes).apply(model):
        assert torch.equal(logits(model, PROMPTS), bare)


def test_the_trace_has_the_masses_that_the_model_then_pays(model, encoders):
    steerer = AttentionSteerer(encoders, PHRASE, scope=SCOPE, layers=[2], heads=[1, 3])
    with steerer.apply(model, record_attention=True) as trace:
        model.generate(PROMPTS, **GREEDY)
    table = trace.to_dataframe().set_index(["row", "position", "head"]).sort_index()
    change = trace.attention_change(model)
    inside = [s in PLACES[r] for r, s in zip(change["row"], change["source_position"], strict=True)]
    by_head = change[inside].groupby(["row", "position", "head"])
    sums = by_head[["attention_before", "attention_after"]].sum()
    assert (sums["attention_after"] - table["mass_after"]).abs().max() < 1e-5
    assert (sums["attention_before"] - table["mass_before"]).abs().max() < 1e-5
    assert (table["mass_after"] > table["mass_before"]).all()
    assert (
        table["loss_after"] + table["mass_after"].map(torch.tensor).map(torch.log)
    ).abs().max() < 1e-4
    assert (table["loss_after"] < table["loss_before"]).all()
    assert set(table["target"]) == {"w20 w33"}
    assert trace.summary()["mass_after"].item() == pytest.approx(table["mass_after"].mean())
    assert all(table["latents_moved"].map(len) > 0)
    assert (table["relative_change"] <= 0.25 + 1e-5).all()


def first(model, steerer, prompts=PROMPTS):
    """The trace of the last prompt tokens."""
    with steerer.apply(model, record=True) as trace:
        model.generate(prompts, **{**GREEDY, "max_new_tokens": 1})
    return trace.to_dataframe()


def test_a_negative_weight_looks_away(model, encoders):
    table = first(model, AttentionSteerer(encoders, LookAt("w20 w33", weight=-1.0)))
    assert (table["mass_after"] < table["mass_before"]).all()
    assert set(table["target"]) == {"away from w20 w33"}


def test_several_sources_have_masses_of_their_own(model, encoders):
    looks = (PHRASE, LookAt(AtPositions([0]), weight=-3.0))
    table = first(model, AttentionSteerer(encoders, looks))
    assert table["mass_after.1"].mean() < table["mass_before.1"].mean()
    assert (table["loss_after"] < table["loss_before"]).all()


def test_until_stops_at_a_mass(model, encoders):
    settings = {"layers": [0], "max_relative_change": None}
    whole, table = (
        first(model, AttentionSteerer(encoders, PHRASE, **settings, until=until))
        for until in (None, 0.5)
    )
    done = table["mass_before"] >= 0.5
    assert (table["delta_norm"][done] == 0).all()
    assert (table["mass_after"][whole["mass_after"] >= 0.5] >= 0.5).all()
    assert table["mass_after"].mean() < whole["mass_after"].mean() - 0.1


def test_few_latents_move_few(model, saes):
    table = first(model, AttentionSteerer(saes, PHRASE, n_latents=2))
    assert table["n_latents_moved"].max() == 2
    assert (table["mass_after"] >= table["mass_before"]).all()
    every = first(model, AttentionSteerer(saes, PHRASE))
    assert every["n_latents_moved"].max() > 2


def test_the_change_keeps_to_the_share_of_the_norm(model, encoders):
    table = first(model, AttentionSteerer(encoders, PHRASE, max_relative_change=0.1))
    assert table["relative_change"].max() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_with_a_sliding_window_what_is_out_of_sight_is_left(tmp_path, cache):
    model = sqs.load_model(
        str(write_tiny("mistralai/Mistral-7B-Instruct-v0.2", tmp_path / "model")), device="cpu"
    )
    saes = sqs.sae.identity_encoders(sqs.query_sites(model, [1]))
    prompts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w3 w4"]
    steerer = AttentionSteerer(saes, LookAt("w3 w4"), scope=EveryPosition(), step_size=0.1)
    with steerer.apply(model, record=True) as trace:
        model.generate(prompts, use_past_kv_cache=cache, **GREEDY)
    table = trace.to_dataframe()
    for row, last in ((0, 4), (1, 2)):
        sees = (table["position"] >= last - 1) & (table["position"] < last + 6)
        here = table[table["row"] == row]
        moved = here["delta_norm"] > 0
        assert moved[sees & (here["position"] > last)].all()
        assert not moved[~sees].any()
        assert (here["mass_before"][~sees] == 0).all()


def test_sources_of_every_kind_are_the_same_tokens(model, encoders):
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row, places in enumerate(PLACES):
        mask[row, places] = True
    sources = [
        "w20 w33",
        AtPositions(PLACES),
        RowMask(mask),
        lambda p: torch.isin(p.tokens, model.to_tokens("w20 w33", prepend_bos=False)),
        PromptTokens() & AtPositions(PLACES),
    ]
    found = [first(model, AttentionSteerer(encoders, LookAt(s), layers=[0])) for s in sources]
    for table in found[1:]:
        assert table["mass_after"].tolist() == found[0]["mass_after"].tolist()


def test_markers_enclose_what_is_looked_at(model, encoders):
    between = LookAt(("w1", "w5"))
    table = first(model, AttentionSteerer(encoders, between, layers=[0]), PROMPTS[:1])
    same = first(model, AttentionSteerer(encoders, PHRASE, layers=[0]), PROMPTS[:1])
    assert table["mass_after"].tolist() == same["mass_after"].tolist()
    assert set(table["target"]) == {"w1...w5"}


def test_each_row_looks_where_it_is_told(model, encoders):
    looks = [LookAt("w1"), (PHRASE, LookAt("w33", -1.0)), LookAt("w9 w17")]
    with AttentionSteerer(encoders, looks, scope=SCOPE).apply(model, record=True) as trace:
        batch = logits(model, PROMPTS)
    for row, look in enumerate(looks):
        with AttentionSteerer(encoders, look, scope=SCOPE).apply(model):
            alone = logits(model, [PROMPTS[row]])[0]
        torch.testing.assert_close(alone, batch[row], rtol=0, atol=2e-5)
    table = trace.to_dataframe()
    assert list(table.groupby("row")["target"].first()) == [
        "w1",
        "w20 w33, away from w33",
        "w9 w17",
    ]


def test_a_forward_pass_with_gradients_takes_the_change_as_constant(model, encoders):
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    steerer = AttentionSteerer(encoders, PHRASE)
    with torch.no_grad(), steerer.apply(model, prompt_lengths=[5]):
        expected = model(tokens)
    with steerer.apply(model, prompt_lengths=[5]):
        found = model(tokens)
        found[0, -1, 3].backward()
    torch.testing.assert_close(found, expected)
    model.zero_grad()


class Bytes:
    """Ids are bytes: a character may be several tokens."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("source", "found"),
    [("list é", "list é"), ("é", "é"), (("<a>", "</a>"), "list é or"), ("x", "x")],
)
def test_the_span_is_that_of_the_text(source, found):
    text = "x <a>list é or</a> €"
    first, end = token_span(Bytes(), text.encode(), source, 0)
    assert text.encode()[first:end].decode() == found


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (LookAt("w6"), "'w6' is not in the prompt of row 0: .*; the prompt is .*w1 w20 w33 w5"),
        (LookAt("w"), "'w' stands more than once in the prompt of row 0: give a longer phrase"),
        (LookAt(("w33", "w20")), "row 0 has no text between the markers"),
        (LookAt(AtPositions([5])), r"LookAt\(.*names no token of row 0, which has 5: .* in every"),
        (LookAt(lambda p: p.index > 9), "names no token of row 0"),
        (LookAt(lambda p: p.index), "must be a torch.bool tensor"),
        ([PHRASE, PHRASE], "look_at is for 2 rows, the batch has 3"),
    ],
)
def test_what_is_not_in_the_prompt_once_is_refused(model, encoders, look, message):
    with (
        AttentionSteerer(encoders, look).apply(model),
        pytest.raises(ValueError, match=message),
    ):
        model.generate(PROMPTS, **GREEDY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": -1}, "n_steps must be"),
        ({"step_size": -0.1}, "step_size must be"),
        ({"n_latents": 0}, "n_latents must be"),
        ({"until": 1.5}, "until must be"),
        ({"max_relative_change": 0.0}, "max_relative_change must be"),
        ({"until": 0.5, "look_at": (PHRASE, PHRASE)}, "until must be None with several sources"),
        ({"until": 0.5, "look_at": LookAt("a", -1.0)}, "until must be None .* negative weight"),
        ({"look_at": []}, "at least one LookAt"),
        ({"layers": [1]}, "no site at layer 1"),
    ],
)
def test_values_out_of_range_are_refused(saes, changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionSteerer(saes, **{"look_at": PHRASE, **changes})


@pytest.mark.parametrize("source", ["", " ", ("a", ""), ("a", "b", "c")])
def test_empty_texts_are_refused(untyped, source):
    with pytest.raises(ValueError, match="source must be a phrase, a pair of markers"):
        LookAt(source)


def test_other_wrong_kinds_are_refused(untyped, saes):
    listed: Any = [3, 4]
    with pytest.raises(TypeError, match="source must be a scope"):
        LookAt(listed)
    with pytest.raises(ValueError, match="weight must not be 0"):
        LookAt("a", 0.0)
    text: Any = "w20 w33"
    with pytest.raises(TypeError, match="look_at must be LookAt, got str"):
        AttentionSteerer(saes, text)


def test_the_random_control_is_as_long(model, encoders):
    steerer = AttentionSteerer(encoders, PHRASE, layers=[0])
    control = sqs.baselines.random_direction(steerer, seed=3)
    own, random = first(model, steerer), first(model, control)
    assert random["delta_norm"].to_numpy() == pytest.approx(own["delta_norm"], rel=1e-4)
    assert set(random["method"]) == {"random direction (seed 3)"}


def test_towards_a_phrase_and_then_away_from_it(model, encoders):
    then = AttentionSteerer(encoders, LookAt("w20 w33", weight=-1.0), scope=ResponseTokens())
    joined = sqs.steering.JoinedSteerers(AttentionSteerer(encoders, PHRASE), then)
    with joined.apply(model, record=True) as traces:
        batch = greedy_logits(model, PROMPTS)
    first, second = (trace.to_dataframe() for trace in traces)
    assert (first["mass_after"] > first["mass_before"]).all()
    assert second["mass_after"].mean() < 0.8 * second["mass_before"].mean()
    with joined.apply(model):
        alone = greedy_logits(model, PROMPTS[:1])
    # Ten steps let the rounding of the model grow.
    torch.testing.assert_close(alone[0], batch[0], rtol=0, atol=1e-4)
