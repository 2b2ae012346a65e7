"""Real queries in the place of a row's own, at the last prompt token and nowhere else."""

import re

import pytest
import torch
from conftest import greedy_logits
from torch.nn.utils.rnn import pad_sequence

import sae_query_steer as sqs
from sae_query_steer.compare import SteeringCase, interchange_methods
from sae_query_steer.compare.interchange import query_patch
from sae_query_steer.models.activations import read_activations
from sae_query_steer.steering.steerer import Steerer

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
LENGTHS = [4, 2, 6]
NAMES = ["blocks.0.attn.hook_q", "blocks.2.attn.hook_q"]


def rows_of(model) -> torch.Tensor:
    """The prompts as rows, padded on the right."""
    return pad_sequence([model.to_tokens(p, prepend_bos=True)[0] for p in PROMPTS], True)


def last_queries(model, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The queries at the last prompt token of each row, [batch head d_head]."""
    found = read_activations(model, rows, NAMES)
    return {name: found[name][range(3), [n - 1 for n in LENGTHS]] for name in NAMES}


def patch_of(model, queries: dict[str, torch.Tensor]) -> Steerer:
    return query_patch(sqs.query_sites(model, [0, 2]), queries)


def refuses(text: str):
    return pytest.raises(ValueError, match=f"^{re.escape(text)}$")


def test_a_batch_of_another_size_is_refused_and_nothing_is_left(model):
    plain = greedy_logits(model, PROMPTS)
    text = (
        "the patch is for 2 rows, the batch has 3: give all prompts in one call of "
        "generate(), in order"
    )
    short = {name: q[:2] for name, q in last_queries(model, rows_of(model)).items()}
    with refuses(text), patch_of(model, short).apply(model):
        greedy_logits(model, PROMPTS)
    assert torch.equal(greedy_logits(model, PROMPTS), plain)


def test_a_patch_of_sites_that_the_model_has_not_is_refused(model):
    wrong = sqs.QuerySite(layer=2, n_heads=4, d_head=9)
    patch = query_patch([wrong], {NAMES[1]: torch.zeros(1, 4, 9)})
    text = "the site at layer 2 has 4 heads of 9: the model has 4 heads of 8"
    with pytest.raises(ValueError, match=text), patch.apply(model):
        pass


def test_a_patch_with_the_rows_own_queries_changes_nothing(model):
    plain = greedy_logits(model, PROMPTS)
    patch = patch_of(model, last_queries(model, rows_of(model)))
    with patch.apply(model):
        torch.testing.assert_close(greedy_logits(model, PROMPTS), plain, rtol=0, atol=1e-5)


def test_a_patch_puts_another_rows_queries_at_the_last_prompt_token_and_nowhere_else(model):
    rows = rows_of(model)
    own = last_queries(model, rows)
    given = {name: q.roll(1, dims=0) for name, q in own.items()}
    plain = read_activations(model, rows, [NAMES[0]])[NAMES[0]]
    with patch_of(model, given).apply(model, prompt_lengths=LENGTHS):
        _, cache = model.run_with_cache(rows, names_filter=NAMES)
    seen = {name: cache[name].reshape(3, 6, 4, 8) for name in NAMES}
    for name in NAMES:
        for row, length in enumerate(LENGTHS):
            here = seen[name][row, length - 1]
            torch.testing.assert_close(here, given[name][row], rtol=0, atol=1e-5)
            assert not torch.allclose(here, own[name][row], atol=1e-2)
    last = torch.zeros(3, 6, dtype=torch.bool)
    last[range(3), [n - 1 for n in LENGTHS]] = True
    assert torch.equal(seen[NAMES[0]][~last], plain[~last])


def test_a_patched_batch_equals_each_row_alone_with_its_own_queries(model):
    given = {name: q.roll(1, dims=0) for name, q in last_queries(model, rows_of(model)).items()}
    with patch_of(model, given).apply(model, record=True) as trace:
        together = greedy_logits(model, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        with patch_of(model, {n: q[row : row + 1] for n, q in given.items()}).apply(model):
            alone = greedy_logits(model, prompt)[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(together, greedy_logits(model, PROMPTS), atol=1e-2)
    table = trace.to_dataframe()
    assert set(table["method"]) == {"interchange"}
    assert len(table) == 3 * 2 * 4, "3 rows, 2 layers, all 4 heads"


def test_the_reference_patches_in_the_queries_of_each_requesting_prompt(model):
    asking = [f"w7 w9 {prompt}" for prompt in PROMPTS]
    cases = [
        SteeringCase(prompt=prompt, target="create", requesting=wanted)
        for prompt, wanted in zip(PROMPTS, asking, strict=True)
    ]
    (method,) = interchange_methods(model, [[0, 2]])
    assert method.layers == (0, 2)
    patch = method.steerer(cases, 0.0)
    rows = pad_sequence([model.to_tokens(p, prepend_bos=True)[0] for p in asking], True)
    found = read_activations(model, rows, NAMES)
    for name in NAMES:
        own = found[name][range(3), [n + 1 for n in LENGTHS]]
        torch.testing.assert_close(patch.edit.queries[name], own, rtol=0, atol=1e-5)
    assert len(interchange_methods(model, [[0], [2]])) == 2


def test_the_reference_needs_requesting_prompts(model):
    cases = [
        SteeringCase(prompt="w1", target="create", requesting="w2 w1"),
        SteeringCase(prompt="w1", target="create"),
    ]
    (method,) = interchange_methods(model, [[0]])
    with pytest.raises(ValueError, match="must have a requesting prompt .*, 1 of 2 have"):
        method.steerer(cases, 0.0)
