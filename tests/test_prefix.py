"""Rows behind a cached prefix: equal to whole passes, on both hosts."""

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
        whole = model.run_with_hooks(batch.tokens, fwd_hooks=list(hooks))
        found = [rows.logits(hooks) for _ in range(2)][1]  # a second pass: the cache is unchanged
    return max(
        float((found[row, : end - start] - whole[row, start:end]).abs().max())
        for row, (start, end) in enumerate(zip(starts, LENGTHS, strict=True))
    )


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
        torch.testing.assert_close(rows.logits([(name, last)])[:, 0], whole, atol=1e-5, rtol=1e-4)
