"""Baselines: the same mechanism without the SAE, without the direction, without the steer."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.data.batches import example_batches
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.prefix import PrefixedRows

NAME = "blocks.2.attn.hook_q"


@pytest.fixture
def dense(tiny_models, examples):
    """Identity encoders of layers 0 and 2 and the centroids of raw queries."""
    sites = sqs.query_sites(tiny_models["bridge"], [0, 2])
    encoders = sqs.sae.identity_encoders(sites)
    targets = sqs.CentroidTargetBuilder(tiny_models["bridge"], encoders).fit(
        sqs.tokenize_examples(tiny_models["bridge"], examples)
    )
    return sites, encoders, targets


def change_of(model, steerer, tokens) -> torch.Tensor:
    """What a steerer adds at the last prompt token of layer 2, [head d_head]."""
    seen = []
    with (
        steerer.apply(model, prompt_lengths=tokens.shape[1]),
        model.hooks(fwd_hooks=[(NAME, lambda q, hook: seen.append(q.clone()))]),
    ):
        model(tokens)
    return (seen[0] - read_activations(model, tokens, [NAME])[NAME])[0, -1]


def test_dense_centroids_are_the_mean_queries_of_the_classes(model, dense, examples):
    _, _, targets = dense
    tokenized = sqs.tokenize_examples(model, examples)
    for index, label in enumerate(targets.classes):
        queries = [
            read_activations(model, e.tokens[None, : e.prompt_length], [NAME])[NAME][0, -1]
            for e in tokenized
            if e.label == label
        ]
        torch.testing.assert_close(targets.means[NAME][index], torch.stack(queries).mean(0))


def test_dense_steering_moves_the_query_itself_towards_the_mean(model, dense):
    _, encoders, targets = dense
    steerer = sqs.LatentGradientSteerer(
        encoders,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=2,
        step_size=0.5,
        layers=[2],
    )
    tokens = model.to_tokens("w1 w20 w33")
    query = read_activations(model, tokens, [NAME])[NAME][0, -1]
    mean = targets.means[NAME][targets.class_index("create")]
    torch.testing.assert_close(
        change_of(model, steerer, tokens), 0.75 * (mean - query), rtol=1e-4, atol=1e-5
    )


def test_the_mean_difference_is_added_whole_and_may_leave_the_positive_range(model, dense):
    *_, targets = dense
    steerer = sqs.baselines.mean_difference(targets, target="apply", strength=1.5, layers=[2])
    means = targets.means[NAME]
    own = targets.class_index("apply")
    others = means[[i for i in range(3) if i != own]]
    difference = 1.5 * (means[own] - others.mean(0))
    assert (difference < 0).any()
    tokens = model.to_tokens("w1 w20 w33")
    torch.testing.assert_close(change_of(model, steerer, tokens), difference, rtol=1e-4, atol=1e-5)


def test_a_random_direction_is_as_long_as_the_steers_change_and_follows_its_seed(
    model, saes, targets
):
    steerer = sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=3,
        step_size=0.5,
        layers=[2],
        heads=[0, 2],
    )
    tokens = model.to_tokens("w1 w20 w33")
    real = change_of(model, steerer, tokens)
    first, again, other = (
        change_of(model, sqs.baselines.random_direction(steerer, seed=s), tokens) for s in (1, 1, 2)
    )
    torch.testing.assert_close(first.norm(dim=-1), real.norm(dim=-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], other[0], atol=1e-3)
    assert (real[[1, 3]] == 0).all()
    cosine = torch.cosine_similarity(first[[0, 2]], real[[0, 2]], dim=-1)
    assert (cosine.abs() < 0.95).all()


def test_the_random_control_is_recorded_and_needs_its_model(model, saes, targets, tiny_folder):
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=1.0
    )
    control = sqs.baselines.random_direction(steerer, seed=5)
    with control.apply(model, record=True) as trace:
        model.generate("w1 w2", max_new_tokens=2, do_sample=False, verbose=False)
    table = trace.to_dataframe()
    assert set(table["method"]) == {"random direction (seed 5)"}
    assert set(table["target"]) == {"create"}
    with steerer.apply(model, record=True) as trace:
        model.generate("w1 w2", max_new_tokens=2, do_sample=False, verbose=False)
    real = trace.to_dataframe()
    # At the first layer both start at the same latents; only the steer comes nearer to the target.
    table, real = (t[t["layer"] == 0] for t in (table, real))
    pd.testing.assert_series_equal(table["loss_before"], real["loss_before"], rtol=1e-4)
    assert (real["loss_after"] < table["loss_after"]).all()
    assert (table["loss_after"] < table["loss_before"]).mean() < 1
    assert len(table) == 4
    pairs = control.fwd_hooks(model, prompt_lengths=3)
    assert [name for name, _ in pairs] == ["blocks.0.attn.hook_q", NAME]


def test_a_few_shot_prompt_shows_k_solved_examples_of_the_class(examples):
    prompt = sqs.baselines.few_shot_prompt("w0 w1", examples, target="create", k=2, seed=4)
    shots = {e.prompt + e.response for e in examples if e.label == "create"}
    *shown, last = prompt.split("\n\n")
    assert last == "w0 w1"
    assert len(set(shown)) == 2
    assert set(shown) <= shots
    assert prompt == sqs.baselines.few_shot_prompt("w0 w1", examples, target="create", k=2, seed=4)
    assert prompt != sqs.baselines.few_shot_prompt("w0 w1", examples, target="create", k=2, seed=5)


def test_a_few_shot_prompt_never_shows_the_prompts_own_answer(examples):
    own = next(e for e in examples if e.label == "create")
    n = sum(e.label == "create" for e in examples)
    with pytest.raises(ValueError, match=f"class 'create' has {n - 1} examples with a response"):
        sqs.baselines.few_shot_prompt(own.prompt, examples, target="create", k=n)
    with pytest.raises(ValueError, match="k must be a whole number >= 1, got 0"):
        sqs.baselines.few_shot_prompt("w0", examples, target="create", k=0)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_a_strength_that_is_not_allowed_is_named_as_the_user_gave_it(dense, strength):
    *_, targets = dense
    with pytest.raises(ValueError, match=f"strength must be .* got {strength}"):
        sqs.baselines.mean_difference(targets, target="apply", strength=strength)


def test_a_control_without_its_steerer_is_refused(saes, untyped):
    with pytest.raises(TypeError, match="steerer must be Steerer, got QuerySAEs"):
        sqs.baselines.random_direction(saes)


def test_control_dictionaries_have_the_size_and_norms_of_the_trained_ones(saes):
    for kind in ("random", "permuted"):
        made = sqs.baselines.control_dictionaries(saes, kind, seed=1)
        for name, sae in saes.items():
            norms = [one.W_dec.norm(dim=-1).flatten().sort().values for one in (sae, made[name])]
            torch.testing.assert_close(*norms)
            assert made[name].W_dec.shape == sae.W_dec.shape
            assert not made[name].W_dec.equal(sae.W_dec)
        again = sqs.baselines.control_dictionaries(saes, kind, seed=1)
        assert all(again[name].W_dec.equal(one.W_dec) for name, one in made.items())


def test_permuted_rows_keep_their_encoder_and_bias(saes):
    name, sae = next(iter(saes.items()))
    made = sqs.baselines.control_dictionaries(saes, "permuted")[name]
    row = made.W_dec[0, 0]
    head, latent = (sae.W_dec == row).all(-1).nonzero()[0].tolist()
    assert made.W_enc[0, :, 0].equal(sae.W_enc[head, :, latent])
    assert made.b_enc[0, 0] == sae.b_enc[head, latent]


def test_unknown_control_dictionaries_are_refused(saes):
    with pytest.raises(ValueError, match="kind must be one of"):
        sqs.baselines.control_dictionaries(saes, "shuffled")


WORDS_OF = {"create": ["w5", "w6"], "remember": ["w9"]}
UNEVEN = ["w1 w20 w33", "w3", "w40 w41 w2 w17"]


def bias_of(bias, **changes):
    settings = {"target": ["remember", "create", "remember"], "bias": bias}
    return sqs.baselines.LogitBias(WORDS_OF, **settings | changes)


def test_a_logit_bias_chooses_the_first_word_of_each_row_and_no_other(model):
    def written(steerer, prompts=UNEVEN):
        found = sqs.compare.continuations(model, prompts, max_new_tokens=4, steerer=steerer)
        return [row.tolist() for row in found.tokens]

    rows, ids = written(bias_of(100.0)), bias_of(1.0).first_tokens(model)
    for row, target in zip(rows, bias_of(1.0).target, strict=True):
        assert row[0] in ids[target]
    assert rows == [
        written(bias_of(100.0, target=t), [p])[0]
        for p, t in zip(UNEVEN, bias_of(1.0).target, strict=True)
    ]
    begun = [f"{p} {model.tokenizer.decode(row[:1])}" for p, row in zip(UNEVEN, rows, strict=True)]
    assert [row[:3] for row in written(None, begun)] == [row[1:] for row in rows]
    assert written(bias_of(0.0)) == written(None)


def test_a_logit_bias_adds_a_constant_to_the_logits_after_the_last_prompt_token_alone(model):
    tokens = model.to_tokens(["w1 w20 w33", "w3 w4 w5"])
    steerer = bias_of(2.5, target=["create", "remember"])
    with torch.no_grad():
        plain = model(tokens)
        with steerer.apply(model, prompt_lengths=[3, 2]):
            biased = model(tokens)
        with bias_of(0.0, target="create").apply(model, prompt_lengths=3):
            assert torch.equal(model(tokens), plain)
    expected, ids = plain.clone(), steerer.first_tokens(model)
    expected[0, 2, ids["create"]] += 2.5
    expected[1, 1, ids["remember"]] += 2.5
    assert torch.equal(biased, expected)
    assert not model.unembed._forward_hooks


def test_a_logit_bias_acts_behind_a_cached_prefix_of_padded_rows(model):
    examples = [sqs.LabelledExample(prompt=p, label="a") for p in UNEVEN]
    (batch,) = example_batches(sqs.tokenize_examples(model, examples), 3)
    rows = PrefixedRows(model, batch, batch.prompt_lengths - 1)  # the last prompt token alone
    targets = [bias_of(1.0).target[i] for i in batch.indices]
    with bias_of(1e4, target=targets).apply(model, prompt_lengths=batch.prompt_lengths):
        written = rows.generate(1, ())
    ids = bias_of(1.0).first_tokens(model)
    assert all(int(written[row, 0]) in ids[target] for row, target in enumerate(targets))


def test_a_logit_bias_is_on_forms_that_are_one_token_where_there_are_such():
    class Halves:  # "Invent" and "exemplify" are two tokens, a space before them a third
        pieces = (" ", "In", "vent", "invent", "ex", "emplify", "Ex", "?")
        unk_token_id = 7

        def __call__(self, text, add_special_tokens):
            found = []
            while text:
                piece = max((p for p in self.pieces if text.startswith(p)), key=len)
                found.append(self.pieces.index(piece))
                text = text.removeprefix(piece)
            return {"input_ids": found}

        def decode(self, ids):
            return "".join(self.pieces[i] for i in ids)

    model = SimpleNamespace(cfg=None, tokenizer=Halves())
    words = {"a": ["invent"], "b": [" exemplify"]}
    found = sqs.baselines.LogitBias(words, target="a", bias=1.0).first_tokens(model)
    assert found == {"a": [3], "b": [4, 6]}


def test_a_logit_bias_refuses_what_it_cannot_do(tiny_models, saes, targets):
    model, one = tiny_models["bridge"], bias_of(1.0)
    with pytest.raises(ValueError, match="no class 'apply': the classes are"):
        bias_of(1.0, target="apply")
    with pytest.raises(ValueError, match="bias must be a finite number, got nan"):
        bias_of(float("nan"))
    with (
        pytest.raises(ValueError, match="must begin with a token of the model, got 'design'"),
        sqs.baselines.LogitBias({"a": ["design"]}, target="a", bias=1.0).apply(model),
    ):
        pass
    with one.apply(model), pytest.raises(ValueError, match="target is for 3 rows, the batch has 1"):
        model.generate("w1", max_new_tokens=1, verbose=False)
    with one.apply(model), pytest.raises(ValueError, match="pass prompt_lengths"):
        model(model.to_tokens(UNEVEN))
    with (
        pytest.raises(TypeError, match="can't be joined with steerers"),
        sqs.steering.JoinedSteerers(one).apply(model),
    ):
        pass
    with pytest.raises(ValueError, match="changes logits, which have no hook point: use apply"):
        one.fwd_hooks(model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'recrod'"):
        one.apply(model, recrod=True)
