"""Rows behind a cached prefix: equal to whole passes, on both hosts."""

import functools

import pytest
import torch

from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.models.prefix import PrefixedRows

LENGTHS = (12, 9, 14, 6)


def batch_of(lengths=LENGTHS) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(4, 50, (length,), generator=generator)
    return TokenBatch(
        tokens=tokens,
        lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor(lengths) - 3,
        labels=("a",) * len(lengths),
        indices=tuple(range(len(lengths))),
    )


def largest_difference(model, starts, hooks=()) -> float:
    batch = batch_of()
    rows = PrefixedRows(model, batch, torch.tensor(starts))
    with torch.no_grad():
        row, position = read_from(starts)
        whole = model.run_with_hooks(batch.tokens, fwd_hooks=list(hooks))
        whole = whole[row, position].log_softmax(-1)
        # A second pass: the cache is unchanged.
        found = [rows.log_probs(row, position, hooks) for _ in range(2)][1]
    return float((found - whole).abs().max())


def read_from(starts):
    """Row and position of the tokens from some positions on."""
    index = torch.arange(max(LENGTHS))
    starts, ends = torch.tensor(starts)[:, None], torch.tensor(LENGTHS)[:, None]
    return ((index >= starts) & (index < ends)).nonzero(as_tuple=True)


@pytest.mark.parametrize("starts", [[7, 5, 13, 2], [7, 0, 1, 2], [0, 0, 0, 0]])
def test_rows_behind_a_prefix_equal_whole_passes(model, starts):
    assert largest_difference(model, starts) < 1e-4


def test_a_hook_at_the_last_tokens_acts_as_in_a_whole_pass(model):
    name, batch = "blocks.1.attn.hook_q", batch_of((9, 9))
    rows = PrefixedRows(model, batch, torch.tensor([8, 8]))

    def last(q, hook):
        del hook
        q = q.clone()
        q[:, -1] *= torch.linspace(-1, 2, q.shape[-1])
        return q

    with torch.no_grad():
        whole = model.run_with_hooks(batch.tokens, fwd_hooks=[(name, last)])[:, -1]
        assert not torch.allclose(whole, model(batch.tokens)[:, -1], atol=1e-3)
        found = rows.log_probs(torch.arange(2), torch.tensor([8, 8]), [(name, last)])
        torch.testing.assert_close(found, whole.log_softmax(-1), atol=1e-5, rtol=1e-4)


def later_layers(model) -> list[float]:
    """How far passes that begin at each layer differ from whole ones, of rows that come twice."""
    starts = [7, 5, 13, 2]
    rows, (row, position) = PrefixedRows(model, batch_of(), torch.tensor(starts)), read_from(starts)
    n_layers, found = int(model.cfg.n_layers), []
    rows.unchanged(row, position, range(n_layers), copies=True)
    many, twice = rows.repeated(2), (torch.cat([row, row + 4]), position.repeat(2))
    for layer in range(n_layers):

        def hook(q, hook):
            del hook
            return q * torch.linspace(-1, 2, q.shape[-1])

        hooks = [(f"blocks.{layer}.attn.hook_q", hook)]
        with torch.no_grad():
            whole = rows.log_probs(row, position, hooks)
            assert rows.first_layer == 0
            later = many.log_probs(*twice, hooks, first_layer=layer)
        assert many.first_layer == layer
        assert not torch.allclose(whole, rows.log_probs(row, position), atol=1e-3)
        found.append(float((later - whole.repeat(2, 1)).abs().max()))
    return found


def test_passes_that_begin_at_a_later_layer_equal_whole_ones(model):
    forwards = [vars(block).get("forward") for block in model.blocks]
    assert max(later_layers(model)) < 1e-4
    assert [vars(block).get("forward") for block in model.blocks] == forwards


def test_a_layer_that_would_begin_otherwise_runs_from_the_start(model):
    batch, row = batch_of(), torch.arange(4)
    position = torch.tensor(LENGTHS) - 1
    rows, last = PrefixedRows(model, batch, position), model.blocks[-1]
    plain = rows.unchanged(row, position, [])
    ran, inside = [], model.hook_dict["blocks.0.attn.hook_q"]
    handles = [
        model.embed.register_forward_pre_hook(lambda *_: ran.clear()),
        inside.register_forward_hook(lambda *_: ran.append(1)),
        # As where a layer takes the keys of an earlier one: it differs when that did not run.
        last.register_forward_hook(lambda _, __, x: x if ran else jumbled(x)),
    ]
    try:
        rows.unchanged(row, position, [1, 2])
        found = rows.log_probs(row, position, first_layer=2)
    finally:
        for handle in handles:
            handle.remove()
    assert rows.first_layer == 0
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["refused", "ignored"])
def test_copies_of_rows_have_caches_of_their_own_where_a_mask_does_not_part_them(
    tiny_models, monkeypatch, how
):
    model, starts = tiny_models["bridge"], [7, 5, 13, 2]
    rows, (row, position) = PrefixedRows(model, batch_of(), torch.tensor(starts)), read_from(starts)
    forward = model.original_model.model.forward

    @functools.wraps(forward)
    def other(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            if how == "refused":
                raise ValueError("masks have two dimensions")
            attention_mask = None
        return forward(*args, attention_mask=attention_mask, **kwargs)

    plain = rows.unchanged(row, position, [], copies=True)
    assert rows.shares_cache
    monkeypatch.setattr(model.original_model.model, "forward", other)
    rows.unchanged(row, position, [], copies=True)
    assert not rows.shares_cache
    many = rows.repeated(3)
    found = many.log_probs(torch.cat([row, row + 4, row + 8]), position.repeat(3))
    torch.testing.assert_close(found, plain.repeat(3, 1), atol=1e-4, rtol=0)


def jumbled(output):
    """What a block returns, reversed."""
    return (output[0].flip(-1), *output[1:]) if isinstance(output, tuple) else output.flip(-1)
