"""Decoder rows of a class's top latents: which, how much, and where they are added."""

import re

import pytest
import torch
from conftest import HOSTS, one_per_row

import sae_query_steer as sqs
from sae_query_steer.baselines.directions import decoder_rows
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.fingerprint import Fingerprint
from sae_query_steer.sae import QueryHeadTopKSAE, QueryHeadTopKSAEConfig

NAME = "blocks.2.attn.hook_q"
PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}

# Two heads of five latents and three classes. Head 0: of class "b", latent 1 rises most in its
# deviations (by 2 where the others have 0, hardly varying), then 3 (by 4, varying much); 0 falls,
# 2 is the same everywhere and never varies, 4 rises a little in much noise. Head 1: nothing rises.
MEANS = {
    "a": [[1.0, 0.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]],
    "b": [[0.0, 2.0, 3.0, 6.0, 0.5], [0.0, 1.0, 0.0, 1.0, 0.5]],
    "c": [[2.0, 0.0, 3.0, 2.0, 0.0], [1.0, 1.0, 2.0, 1.0, 0.5]],
}
VARIANCES = [[0.1, 0.1, 0.0, 9.0, 9.0], [0.1, 0.1, 0.1, 0.0, 0.1]]
RISE = [[-1.5, 2.0, 0.0, 4.0, 0.5], [-1.0, 0.0, -1.5, 0.0, -0.25]]


def built(rescale: bool = False):
    """An SAE with decoder rows of unequal norm and biases, and centroids made by hand."""
    config = QueryHeadTopKSAEConfig(
        n_heads=2, d_head=3, d_sae_per_head=5, k=2, rescale_acts_by_decoder_norm=rescale
    )
    sae, generator = QueryHeadTopKSAE(config), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in sae.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    empty = torch.zeros(2, 6, 2, 3)
    targets = sqs.CentroidTargets(
        classes=tuple(MEANS),
        means={NAME: torch.tensor(list(MEANS.values()))},
        variances={NAME: torch.tensor(VARIANCES).expand(3, -1, -1).contiguous()},
        counts=torch.tensor([4, 4, 4]),
        span="LastPromptToken()",
        fingerprint=Fingerprint(
            tokens=torch.zeros(2, 6, dtype=torch.long),
            queries={NAME: empty},
            reconstructions={NAME: empty},
        ),
    )
    return {NAME: sae}, targets


@pytest.fixture
def make(saes, targets):
    """Make a steerer that visibly changes the tiny model, with some settings changed."""

    def make(**changes) -> decoder_rows:
        settings = {"target": "create", "strength": 3.0, "scope": sqs.scopes.EveryPosition()}
        return decoder_rows(saes, targets, **{**settings, **changes})

    return make


def generate(model, prompts, **changes):
    output = model.generate(prompts, return_type="tokens", output_logits=True, **GREEDY | changes)
    return output.sequences, torch.stack(output.logits, dim=1)


def delta_of(steerer, queries) -> torch.Tensor:
    places = one_per_row(len(queries))
    return steerer.edit.change(queries, steerer.where.chosen[NAME], places).delta


def query(n: int = 1, heads: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, heads, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("m", "chosen"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (9, [1, 3, 4])])
def test_the_direction_is_the_rows_of_the_top_latents_weighted_by_the_difference(m, chosen):
    saes, targets = built()
    steerer = decoder_rows(saes, targets, target="b", strength=1.7, m=m)
    rows = saes[NAME].W_dec[0]
    expected = 1.7 * sum(RISE[0][i] * rows[i] for i in chosen)
    delta = delta_of(steerer, query())
    torch.testing.assert_close(delta[0, 0], expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(delta[0, 1], torch.zeros(3)), "nothing rises in head 1"


def test_the_rows_are_as_the_sae_reads_them():
    saes, targets = built(rescale=True)
    steerer = decoder_rows(saes, targets, target="b", strength=1.0, m=2)
    rows = torch.nn.functional.normalize(saes[NAME].W_dec[0], dim=-1)
    expected = RISE[0][1] * rows[1] + RISE[0][3] * rows[3]
    torch.testing.assert_close(
        delta_of(steerer, query())[0, 0], expected.detach(), rtol=1e-5, atol=1e-5
    )


def test_the_direction_does_not_depend_on_the_query_nor_on_the_other_heads():
    saes, targets = built()
    both = delta_of(decoder_rows(saes, targets, target="c", strength=1.0), query(5))
    assert torch.equal(both, both[:1].expand(5, -1, -1))
    assert both[0].norm(dim=-1).min() > 0.1
    alone = decoder_rows(saes, targets, target="c", strength=1.0, heads=[1])
    assert torch.equal(delta_of(alone, query(5, heads=1)), both[:, 1:])


def test_with_all_latents_of_an_identity_encoder_it_is_the_rising_part_of_the_mean_difference(
    tiny_models, examples
):
    model = tiny_models["bridge"]
    sites = sqs.query_sites(model, [2])
    encoders = sqs.sae.identity_encoders(sites)
    targets = sqs.CentroidTargetBuilder(model, encoders).fit(sqs.tokenize_examples(model, examples))
    steerer = decoder_rows(encoders, targets, target="apply", strength=1.0, m=8)
    means, own = targets.means[NAME], targets.class_index("apply")
    others = (means.sum(0) - means[own]) / 2
    delta = delta_of(steerer, torch.zeros(1, 4, 8))
    torch.testing.assert_close(delta[0], (means[own] - others).clamp(min=0), rtol=1e-4, atol=1e-5)


def test_a_strength_of_zero_leaves_the_logits_bitwise_unchanged(model, make):
    plain = generate(model, PROMPTS)
    with make(strength=0.0).apply(model):
        for mine, theirs in zip(generate(model, PROMPTS), plain, strict=True):
            assert torch.equal(mine, theirs)


def test_only_the_scoped_positions_of_the_chosen_heads_change(model, make):
    tokens = model.to_tokens("w1 w20 w33 w7 w30 w2", prepend_bos=True)
    steerer = make(
        layers=[2], heads=[1, 3], scope=sqs.LastPromptToken() | sqs.scopes.ResponseTokens()
    )
    before, seen = read_activations(model, tokens, [NAME])[NAME], []
    with (
        steerer.apply(model, prompt_lengths=4),
        model.hooks(fwd_hooks=[(NAME, lambda q, hook: seen.append(q.clone()))]),
    ):
        model(tokens)
    changed = (seen[0].reshape(before.shape) != before).any(-1)[0]
    wanted = torch.zeros(7, 4, dtype=torch.bool)
    wanted[3:, [1, 3]] = True
    assert torch.equal(changed, wanted)


def test_cache_batch_and_host_change_nothing(tiny_models, make):
    targets, strengths = ["apply", "create", "remember"], [1.0, 3.0, 0.0]
    results = []
    for host in HOSTS:
        model = tiny_models[host]
        with make(target=targets, strength=strengths).apply(model):
            tokens, logits = generate(model, PROMPTS)
            cacheless = generate(model, PROMPTS, use_past_kv_cache=False)
        assert torch.equal(cacheless[0], tokens)
        for row, prompt in enumerate(PROMPTS):
            with make(target=targets[row], strength=strengths[row]).apply(model):
                alone = generate(model, prompt)[1]
            torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=1e-4)
        assert not torch.allclose(logits, generate(model, PROMPTS)[1], atol=1e-2)
        results.append(logits)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)


def test_as_many_rows_are_wanted_as_there_are_targets(model, make):
    message = "target is for 2 rows, the batch has 3: give all prompts in one call"
    with (
        make(target=["apply", "create"]).apply(model),
        pytest.raises(ValueError, match=f"^{message}"),
    ):
        generate(model, PROMPTS)


def test_the_trace_names_the_method_and_the_latents_that_moved(model, make):
    steerer = make(scope=sqs.LastPromptToken(), m=2)
    with steerer.apply(model, record=True) as trace:
        generate(model, PROMPTS)
    table = trace.to_dataframe()
    assert len(table) == 3 * 2 * 4, "rows, layers, heads"
    assert set(table["method"]) == {"decoder rows (m=2)"}
    assert set(table["target"]) == {"create"}
    assert {"distance_before.create", "distance_after.create", "latents_moved"} <= set(table)
    assert (table["relative_change"] > 0).any()


def test_it_moves_to_a_device_and_joins_other_steerers(model, make):
    steerer = make(layers=[0]).to("cpu")
    joined = sqs.steering.JoinedSteerers(steerer, make(layers=[2]))
    with joined.apply(model):
        both = generate(model, PROMPTS)[1]
    with make().apply(model):
        torch.testing.assert_close(generate(model, PROMPTS)[1], both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "analyse"}, "no class 'analyse': the classes are ['remember', 'apply', "),
        ({"target": ["apply", "analyse"]}, "no class 'analyse': the classes are"),
        ({"target": []}, "target must be one value for all rows or one for each, got []"),
        ({"m": 0}, "m must be a whole number >= 1, got 0"),
        ({"strength": -0.5}, "strength must be a finite number >= 0, got"),
        ({"strength": float("inf")}, "strength must be a finite number >= 0, got"),
        ({"scope": sqs.scopes.LastResponseToken()}, "LastResponseToken() can't be a scope"),
        ({"layers": [1]}, "no site at layer 1: there are some at [0, 2]"),
        ({"heads": [4]}, "no head 4 at layer 0: the heads are 0 to 3"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_construction(make, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**changes)


def test_another_model_is_refused(tiny_folder, make):
    other = sqs.load_model(str(tiny_folder), device="cpu")
    with torch.no_grad():
        other.blocks[0].attn.q.original_component.weight.mul_(1.1)
    with pytest.raises(ValueError, match="another model: at blocks.0.attn.hook_q"):
        make().apply(other).__enter__()
