"""Targets learned through the frozen model: gradients, limits, early stopping, resume, files."""

import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import greedy_logits
from safetensors.torch import load_file, save_file
from test_distributed import in_processes

import sae_query_steer as sqs
from sae_query_steer.descent.control import PosteriorBelow, TargetLatents, TopLatents
from sae_query_steer.descent.objectives import FixedMove
from sae_query_steer.learning import LearningWarning, no_moves
from sae_query_steer.learning.rows import frozen, learning_rows
from sae_query_steer.learning.run import LearningRun
from sae_query_steer.models.launch import launched
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.scopes import LastPromptToken, ResponseTokens, Window

pytestmark = pytest.mark.filterwarnings(
    "ignore::sae_query_steer.learning.learner.LearningWarning"  # the models are random
)
CLASSES = ("create", "remember")
SCOPE = LastPromptToken() | ResponseTokens()


def texts(prompt: str) -> list[sqs.LabelledExample]:
    answers = {"create": " w40 w41 w42", "remember": " w10 w11"}
    return [
        sqs.LabelledExample(prompt=f"{prompt} w{i} w{i + 1}", response=answers[k], label=k)
        for i in range(4, 12)
        for k in CLASSES
    ]


@pytest.fixture
def data(model):
    """Open prompts with responses, and the same after prompts with a request."""
    return tuple(sqs.tokenize_examples(model, texts(p)) for p in ("w1", "w1 w20 w21"))


def recipe(model, saes, **changes):
    settings = {"objective": FixedMove(), "n_steps": 1, "step_size": 1.0, "scope": SCOPE}
    start = no_moves(model, saes, CLASSES)
    return sqs.LatentGradientSteerer(saes, start, **{"target": "create"} | settings | changes)


def dense(model, layers=(0, 1, 2)):
    return sqs.sae.identity_encoders(sqs.query_sites(model, layers))


def learner(model, steerer, **changes):
    settings = {"n_updates": 12, "every": 3, "learning_rate": 0.2, "batch_size": 8}
    return sqs.TargetLearner(model, steerer, **settings | changes)


def test_moves_lower_the_held_out_loss_and_steer_generation_likewise(model, data):
    steerer = recipe(model, dense(model))
    learned = learner(model, steerer).fit(data[0])
    assert all(share > 0 for share in learned.share_removed.values())
    steered = replace(steerer, targets=learned)
    example = data[0][0]
    tokens = example.tokens[None]
    with steered.apply(model, prompt_lengths=[example.prompt_length]), torch.no_grad():
        logits = model(tokens)[0]
    read = slice(example.prompt_length - 1, -1)
    loss = torch.nn.functional.cross_entropy(logits[read], tokens[0, example.prompt_length :])
    (rows,) = learning_rows(model, data[0].subset([0]), None, SCOPE, 1)
    run = LearningRun(learner(model, steered), [rows], [rows])
    run._classes = ("create",)
    run._begin()
    torch.testing.assert_close(
        float(loss), float(run.losses(rows)[0].detach()), rtol=1e-4, atol=1e-4
    )


def test_layers_below_the_first_steered_one_run_once(model, data, monkeypatch):
    steerer = recipe(model, dense(model, [1, 2]))
    learned = learner(model, steerer).fit(data[0])
    monkeypatch.setattr(PrefixedRows, "unchanged", lambda *_: None)
    whole = learner(model, steerer).fit(data[0])
    assert all(torch.equal(learned.means[name], mean) for name, mean in whole.means.items())


def test_metrics_are_those_of_the_history(model, data):
    heard = []
    steerer = recipe(model, dense(model, [1]))
    found = learner(model, steerer).fit(data[0], on_metrics=heard.append)
    assert [row["step"] for row in heard] == [0, 3, 6, 9, 12]
    for step, table in found.history.groupby("step"):
        row = next(row for row in heard if row["step"] == step)
        for one in table.to_dict("records"):
            for name in ("held_out_loss", "relative_change", "n_latents"):
                assert row[f"{name}/{one['label']}"] == one[name]
            assert (f"loss/{one['label']}" in row) == (step > 0)


def test_output_scores_are_the_fall_of_the_loss_with_each_latent(model, data):
    steerer = recipe(model, dense(model, [1, 2]))
    found = learner(model, steerer, n_latents=3).fit_output_scores(data[0], held_out=range(8))
    every = learner(model, steerer).fit_output_scores(data[0], held_out=range(8))
    rows, kept = (
        learning_rows(model, data[0].subset(some), None, SCOPE, 8)
        for some in (range(8, 16), range(8))
    )
    run = LearningRun(learner(model, steerer), rows, kept)
    run._begin()
    (rows,) = rows
    name = "blocks.2.attn.hook_q"
    scale = run._scales[name]
    label, head = 0, 1
    own = torch.tensor([one == steerer.targets.classes[label] for one in rows.labels])
    falls = []
    for latent in range(every.means[name].shape[-1]):
        of_sign = []
        for sign in (1, -1):
            with torch.no_grad():
                run._values[name].zero_()[label, head, latent] = sign * 1e-2
                of_sign.append(float(run.losses(rows)[0][own].double().sum()))
        falls.append((of_sign[1] - of_sign[0]) / 2e-2)
    moves = every.means[name][label, head] / scale[head]
    falls = torch.tensor(falls)
    factor = float((moves @ falls) / (falls @ falls))
    assert factor > 0
    torch.testing.assert_close(
        moves, factor * falls, rtol=0.05, atol=0.02 * float(moves.abs().max())
    )
    kept = found.means[name][label, head].nonzero()[:, 0]
    assert set(kept.tolist()) == set(falls.abs().topk(3).indices.tolist())
    # Of each class the moves are as long as the query, in the root mean square over heads.
    lengths = [every.means[n][label] / run._scales[n] for n in every.means]
    assert float(torch.cat(lengths).square().sum(-1).mean()) == pytest.approx(1.0, rel=1e-4)


def test_output_scores_are_of_moves_only(model, saes, targets, data):
    descent = {"objective": sqs.SquaredDistance(), "n_steps": 1, "step_size": 0.5}
    points = sqs.LatentGradientSteerer(saes, targets, target="create", scope=SCOPE, **descent)
    with pytest.raises(ValueError, match="must be moves, got points"):
        learner(model, points).fit_output_scores(data[0])


@pytest.mark.parametrize("counterparts", [False, True])
@pytest.mark.parametrize("points", [False, True])
def test_the_gradient_equals_finite_differences(model, saes, targets, data, points, counterparts):
    if points:
        changes = {"objective": sqs.SquaredDistance(), "n_steps": 2, "step_size": 0.5}
        three = replace(targets, classes=(*CLASSES, "apply"))
        # The last layer: a change there can't switch the active latents of a later one.
        changes |= {"scope": SCOPE, "layers": [2]}
        steerer = sqs.LatentGradientSteerer(saes, three, target="create", **changes)
    else:
        steerer = recipe(model, saes, max_relative_change=0.5)
    others = data[1].subset(range(4)) if counterparts else None
    (rows,) = learning_rows(model, data[0].subset(range(4)), others, SCOPE, 4)
    run = LearningRun(learner(model, steerer), [rows], [rows])
    run._classes = CLASSES
    run._begin()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in run._values.values():
            value += 0.5 * torch.rand(value.shape, generator=generator)
    value = run._values["blocks.2.attn.hook_q"]
    (gradient,) = torch.autograd.grad(run.losses(rows)[0].mean(), value)
    direction = torch.randn(value.shape, generator=generator)
    expected = float((gradient * direction).sum())
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            value += sign * 1e-3 * direction
            found.append(float(run.losses(rows)[0].double().mean()))
            value -= sign * 1e-3 * direction
    assert abs(expected) > 1e-4
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(expected, rel=0.05, abs=2e-4)


def test_counterparts_are_what_the_steered_model_comes_near_to(model, data):
    learned = learner(model, recipe(model, dense(model))).fit(data[0], counterparts=data[1])
    assert all(share > 0 for share in learned.share_removed.values())


def test_points_start_at_the_centroids_and_lower_the_loss(model, saes, targets, data):
    three = replace(targets, classes=("apply", *CLASSES))
    steerer = sqs.LatentGradientSteerer(
        saes, three, target="create", objective=sqs.SquaredDistance(), n_steps=3, step_size=0.3
    )
    more = [replace(e, label="apply") for e in data[0]][::2]
    examples = replace(data[0], examples=[*data[0].examples, *more])
    learned = learner(model, steerer).fit(examples)
    first = learned.history.groupby("label")["held_out_loss"].first()
    last = learned.history.groupby("label")["held_out_loss"].min()
    assert (last <= first).all() and (last < first).any()
    travelled = (learned.means["blocks.2.attn.hook_q"] - three.means["blocks.2.attn.hook_q"]).norm()
    assert travelled > 0
    assert not learned.are_moves
    assert min(float(mean.min()) for mean in learned.means.values()) >= 0
    replace(steerer, targets=learned, gate=PosteriorBelow(0.9), until=0.9)


def test_moves_stay_in_the_range_of_the_latents_and_keep_to_their_number(model, saes, data):
    few = {"n_updates": 20, "every": 2, "patience": 2}  # it must not stop before all are removed
    learned = learner(model, recipe(model, saes), n_latents=2, **few).fit(data[0])
    for mean in learned.means.values():
        assert float(mean.min()) >= 0
        assert 1 <= int((mean != 0).sum(-1).max()) <= 2
    total = learner(model, recipe(model, saes), n_latents_total=5, **few).fit(data[0])
    joined = torch.cat([mean.flatten(1) for mean in total.means.values()], dim=1)
    assert 1 <= int((joined != 0).sum(-1).max()) <= 5


def test_latents_with_equal_rows_are_no_more_than_the_number_allowed(model, saes, data):
    twins = copy.deepcopy(dict(saes))
    for sae in twins.values():
        for name in ("W_enc", "b_enc", "W_dec"):
            weight = getattr(sae, name).data
            weight.copy_(weight[(slice(None),) * (name == "W_enc") + (slice(None), slice(0, 1))])
    few = {"n_updates": 6, "every": 2}
    learned = learner(model, recipe(model, twins), n_latents=2, **few).fit(data[0])
    for mean in learned.means.values():
        assert int((mean != 0).sum(-1).max()) == 2


def test_a_penalty_makes_moves_smaller(model, saes, data):
    sizes = []
    for l1 in (0.0, 1.0):
        learned = learner(model, recipe(model, saes), l1=l1).fit(data[0])
        sizes.append(sum(float(mean.abs().sum()) for mean in learned.means.values()))
    assert sizes[1] < sizes[0] / 2


def test_a_sparse_point_moves_its_own_latents_alone(model, saes, targets):
    sparse = {
        name: torch.where(torch.rand(m.shape) < 0.2, 1.0, 0.0) for name, m in targets.means.items()
    }
    steerer = sqs.LatentGradientSteerer(
        *(saes, replace(targets, means=sparse)),
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=1,
        step_size=1.0,
        latents=TargetLatents(),
    )
    with steerer.apply(model, record=True) as trace:
        greedy_logits(model, ["w3 w4 w5"])
    for record in trace.records:
        own = sparse[f"blocks.{record.layer}.attn.hook_q"][targets.class_index("create")]
        moved = record.change.moved_latents[record.change.moved_by != 0]
        heads = (record.change.moved_by != 0).nonzero()[:, 1]
        assert bool((own[heads, moved] == 1).all())


def test_learning_is_the_same_again_and_after_a_stop(model, data, tmp_path, monkeypatch):
    steerer = recipe(model, dense(model))
    wanted = learner(model, steerer).fit(data[0])
    again = learner(model, steerer).fit(data[0])
    assert all(again.means[name].equal(mean) for name, mean in wanted.means.items())
    update, calls = LearningRun._update, []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(LearningRun, "_update", stopping)
    with pytest.raises(KeyboardInterrupt):
        learner(model, steerer).fit(data[0], checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="must be of the same settings and examples"):
        learner(model, steerer, l1=0.1).fit(data[0], checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="must be of the same settings and examples"):
        learner(model, steerer).fit(data[0], held_out=[0, 1], checkpoint=tmp_path / "run")
    resumed = learner(model, steerer).fit(data[0], checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(resumed.means[name].equal(mean) for name, mean in wanted.means.items())
    assert len(calls) < 8 + 12


def assert_learned_alike(found, wanted):
    for name, mean in wanted.means.items():  # Adam makes small gradients, and their rounding, large
        assert (found.means[name] - mean).norm() <= 1e-4 * mean.norm()
    pd.testing.assert_frame_equal(found.history, wanted.history, rtol=1e-5)


@pytest.mark.parametrize(("n", "batch_size"), [(2, 7), (3, 2)], ids=["a share", "an empty share"])
def test_ranks_learn_what_one_process_learns(tiny_models, saes, tmp_path, n, batch_size):
    model = tiny_models["bridge"]
    examples, counterparts = (sqs.tokenize_examples(model, texts(p)) for p in ("w1", "w1 w20 w21"))
    settings = {"batch_size": batch_size, "l1": 0.1, "n_latents": 6, "n_updates": 9}
    given = {"counterparts": counterparts, "held_out": range(9, 16)}
    wanted = learner(model, recipe(model, saes), **settings).fit(examples, **given)

    def gradients(one):
        run = LearningRun(replace(one, n_updates=1), *one.rows(examples, **given)[:2])
        with frozen([model]):
            run.run()
        return {name: value.grad for name, value in run._values.items()}

    def run():
        with launched() as ranks:
            one = learner(model, recipe(model, saes), ranks=ranks, **settings)
            one.fit(examples, **given).save(tmp_path / str(ranks.rank))
            save_file(gradients(one), tmp_path / f"{ranks.rank}.safetensors")

    assert in_processes(n, run) == [""] * n
    for name, gradient in gradients(learner(model, recipe(model, saes), **settings)).items():
        found = load_file(tmp_path / "1.safetensors")[name]
        assert gradient.any() and (found - gradient).norm() <= 1e-6 * gradient.norm()
    first, *others = (sqs.LearnedTargets.load(tmp_path / str(rank)) for rank in range(n))
    assert_learned_alike(first, wanted)
    for other in others:
        assert all(torch.equal(other.means[name], mean) for name, mean in first.means.items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_learning(tiny_models, tmp_path, before, after):
    model = tiny_models["bridge"]
    examples = sqs.tokenize_examples(model, texts("w1"))
    wanted = learner(model, recipe(model, dense(model))).fit(examples)

    def run(n_updates):
        update = LearningRun._update

        def stopping(self, batch):
            if self._step > n_updates:
                raise KeyError("stopped")
            return update(self, batch)

        with launched() as ranks, pytest.MonkeyPatch.context() as patch:
            patch.setattr(LearningRun, "_update", stopping)
            one = learner(model, recipe(model, dense(model)), ranks=ranks)
            found = one.fit(examples, checkpoint=tmp_path / "run")
            found.save(tmp_path / f"of {ranks.rank}")

    assert in_processes(before, lambda: run(7)) == ["KeyError('stopped')"] * before
    assert (tmp_path / "run").exists()
    assert in_processes(after, lambda: run(12)) == [""] * after
    assert not (tmp_path / "run").exists()
    assert_learned_alike(sqs.LearnedTargets.load(tmp_path / "of 0"), wanted)


def test_learned_targets_are_read_back_and_steer_alike(model, saes, data, tmp_path):
    steerer = recipe(model, saes, max_relative_change=0.5)
    steered = replace(steerer, targets=learner(model, steerer).fit(data[0]))
    sqs.steering.save_steerer(steered, tmp_path / "steerer")
    loaded = sqs.steering.load_steerer(tmp_path / "steerer")
    assert isinstance(loaded.targets, sqs.LearnedTargets)
    assert loaded.targets.history.equals(steered.targets.history)
    logits = []
    for one in (steered, loaded):
        with one.apply(model):
            logits.append(greedy_logits(model, ["w3 w4 w5", "w7"]))
    assert logits[0].equal(logits[1])


def test_learners_share_the_rows_of_one_of_them(model, data):
    one, other = (learner(model, recipe(model, dense(model, [layer]))) for layer in (0, 1))
    given = {"counterparts": data[1], "held_out": range(12, 16)}
    shared = one.rows(data[0], **given)
    own = other.fit(data[0], **given)
    for _ in range(2):
        found = other.fit(data[0], **given, rows=shared)
        for name, mean in own.means.items():
            assert torch.equal(found.means[name], mean)
    with pytest.raises(ValueError, match="rows must be of a learner with the same classes, scope"):
        learner(model, recipe(model, dense(model)), seed=1).fit(data[0], **given, rows=shared)


def test_a_class_that_is_not_learned_is_told(model, data):
    steerer = recipe(model, dense(model), scope=Window(0, 1))  # which attends to itself alone
    with pytest.warns(LearningWarning, match="nothing was learned for"):
        learned = learner(model, steerer).fit(data[0])
    assert set(learned.share_removed.values()) == {0.0}


def test_moves_refuse_what_has_no_meaning_for_them(model, saes, targets):
    with pytest.raises(ValueError, match="until must not be 0.9 for moves"):
        recipe(model, saes, until=0.9)
    with pytest.raises(ValueError, match="gate must not be"):
        recipe(model, saes, gate=PosteriorBelow(0.5))
    with pytest.raises(ValueError, match="latents must not be"):
        recipe(model, saes, latents=TopLatents(2))
    with pytest.raises(ValueError, match="objective must be FixedMove"):
        recipe(model, saes, objective=sqs.SquaredDistance())
    with pytest.raises(ValueError, match="objective must be FixedMove"):
        sqs.LatentGradientSteerer(
            saes, targets, target="create", objective=FixedMove(), n_steps=1, step_size=1.0
        )


def test_wrong_input_is_refused_before_the_model_runs(model, saes, data):
    steerer = recipe(model, saes)
    for wrong in ({"l1": -1.0}, {"n_latents": 0}, {"learning_rate": 0.0}, {"n_updates": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            learner(model, steerer, **wrong)
    with pytest.raises(ValueError, match="must have examples to hold out"):
        learner(model, steerer).fit(data[0].subset(range(4)))
    with pytest.raises(ValueError, match="counterparts must be one for each"):
        learner(model, steerer).fit(data[0], counterparts=data[1].subset(range(3)))
    with pytest.raises(ValueError, match="counterpart 0 must have the class and the response"):
        others = data[1].subset([1, 0, *range(2, len(data[1]))])
        learner(model, steerer).fit(data[0], counterparts=others)
    with pytest.raises(ValueError, match="max_relative_change must be"):
        recipe(model, saes, max_relative_change=0.0)
    prompts = [sqs.LabelledExample(prompt=f"w{i} w2", label=k) for i in range(4) for k in CLASSES]
    with pytest.raises(ValueError, match="must have a response, got none"):
        learner(model, steerer).fit(sqs.tokenize_examples(model, prompts))


def test_the_models_weights_stay_as_they_were(model, data):
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = [p.requires_grad for p in model.parameters()]
    learner(model, recipe(model, dense(model))).fit(data[0])
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_query_that_keeps_its_norm_has_a_gradient_from_the_start(model, saes, data):
    for keep in ({"keep_norm": True}, {"keep_norm": True, "max_relative_change": 0.5}):
        learned = learner(model, recipe(model, saes, **keep)).fit(data[0])
        assert any(bool(mean.any()) for mean in learned.means.values())


def test_offsets_of_the_residual_stream_are_learned_likewise(model, data):
    name = "blocks.1.hook_resid_post"
    encoders = {name: sqs.sae.IdentityEncoder(n_heads=1, d_head=int(model.cfg.d_model))}
    steerer = recipe(model, encoders, max_relative_change=0.5)
    learned = learner(model, steerer, n_updates=30).fit(data[0])
    assert all(share > 0.2 for share in learned.share_removed.values())
    with replace(steerer, targets=learned).apply(model, record=True) as trace:
        greedy_logits(model, ["w3 w4 w5"])
    assert 0.1 < float(trace.summary()["relative_change"].max()) <= 0.5001


def test_targets_of_rotated_queries_are_learned_and_no_strength_is_the_identity(model, data):
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [0, 1, 2], rotated=True))
    steerer = recipe(model, encoders)
    learned = learner(model, steerer).fit(data[0])
    assert any(share > 0 for share in learned.share_removed.values())
    plain = greedy_logits(model, ["w3 w4 w5", "w7"])
    with replace(steerer, targets=learned, step_size=0.0).apply(model):
        assert greedy_logits(model, ["w3 w4 w5", "w7"]).equal(plain)
    with replace(steerer, targets=learned).apply(model):
        assert not greedy_logits(model, ["w3 w4 w5", "w7"]).equal(plain)
