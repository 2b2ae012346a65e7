"""The stream: every token once an epoch, shuffled, and batch k the same wherever it begins."""

from itertools import islice

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.data.batches import PAD
from sae_query_steer.data.token_rows import token_rows
from sae_query_steer.models.activations import read_activations
from sae_query_steer.training.stream import QueryStream

SIZES = [
    # rows, length, padded, batch, forward, chunk
    pytest.param(7, 5, False, 4, 2, 3, id="chunks straddle epochs"),
    pytest.param(3, 6, True, 5, 2, 8, id="a chunk holds rows several times"),
    pytest.param(9, 4, True, 23, 3, 2, id="a batch takes several chunks"),
    pytest.param(8, 4, False, 8, 4, 4, id="all ends meet"),
]


def stream_of(model, rows, *, sites=None, batch=4, buffer=3, **changes) -> QueryStream:
    settings = {
        "train_batch_size_tokens": batch,
        "seed": 3,
        "store_batch_size_prompts": 2,
        "n_batches_in_buffer": buffer,
    }
    config = TrainingConfig(
        sae=TopK(d_sae_per_head=64), training_tokens=1000, **{**settings, **changes}
    )
    sites = sqs.query_sites(model, [0, 2]) if sites is None else sites
    return QueryStream(model=model, rows=rows, sites=sites, config=config)


def some_rows(n_rows: int, length: int, padded: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_rows)
    rows = torch.randint(4, 52, (n_rows, length), generator=generator, dtype=torch.int)
    if padded:
        keep = torch.randint(1, length + 1, (n_rows, 1), generator=generator)
        rows[torch.arange(length) >= keep] = PAD
    return rows


def sized(model, n_rows, length, padded, batch, forward, chunk, **changes) -> QueryStream:
    return stream_of(
        model,
        some_rows(n_rows, length, padded),
        batch=batch,
        store_batch_size_prompts=forward,
        buffer=chunk,
        **changes,
    )


def assert_equal_batches(first, second) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize(("n_rows", "length", "padded", "batch", "forward", "chunk"), SIZES)
def test_batch_k_is_the_same_wherever_the_stream_begins(
    tiny_models, n_rows, length, padded, batch, forward, chunk
):
    stream = sized(tiny_models["bridge"], n_rows, length, padded, batch, forward, chunk)
    batches = list(islice(stream.batches(), 12))
    assert all(value.shape == (batch, 32) for one in batches for value in one.values())
    for start in (1, 2, 5, 8, 10):
        assert_equal_batches(batches[start : start + 2], islice(stream.batches(start), 2))


@pytest.mark.parametrize(("n_rows", "length", "padded", "batch", "forward", "chunk"), SIZES)
def test_every_token_comes_once_in_an_epoch_and_padding_never(
    tiny_models, n_rows, length, padded, batch, forward, chunk
):
    model = tiny_models["bridge"]
    stream = sized(model, n_rows, length, padded, 1, forward, n_rows)  # a chunk is an epoch
    rows = stream.rows
    expected = []
    for row in rows:
        own = row[row != PAD].long()[None]
        expected.append(
            read_activations(model, own, ["blocks.2.attn.hook_q"])["blocks.2.attn.hook_q"][0]
        )
    expected = torch.cat(expected).flatten(1)
    for epoch in (0, 2):
        served = islice(stream.batches(epoch * len(expected)), len(expected))
        served = torch.cat([one["blocks.2.attn.hook_q"] for one in served])
        # Each served token is one of the rows', and each of theirs is met once.
        nearest = torch.cdist(served, expected).argmin(1)
        torch.testing.assert_close(served, expected[nearest], rtol=1e-4, atol=1e-5)
        by_value = torch.cdist(expected, expected) < 1e-4
        counts = by_value.float()[nearest].sum(0)
        assert torch.equal(counts, by_value.float().sum(0))


def test_sites_stay_aligned_token_by_token(model):
    stream = stream_of(model, some_rows(6, 8, True))
    joint = next(stream.batches(5))
    for site in stream.sites:
        alone = next(stream_of(model, stream.rows, sites=[site]).batches(5))[site.hook_name]
        assert torch.equal(joint[site.hook_name], alone)


def test_both_hosts_serve_the_same_queries(tiny_models):
    rows = some_rows(6, 8, True)
    first, second = (next(stream_of(tiny_models[host], rows).batches(3)) for host in tiny_models)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_seeds_and_epochs_have_orders_of_their_own(tiny_models):
    rows = some_rows(5, 4, False)
    stream = stream_of(tiny_models["bridge"], rows, batch=20, buffer=5)
    first, second = islice(stream.batches(), 2)
    other = next(stream_of(stream.model, rows, batch=20, buffer=5, seed=4).batches())
    name = "blocks.0.attn.hook_q"
    for one in (second[name], other[name]):
        assert not torch.equal(first[name], one)
        assert torch.allclose(first[name].sum(0), one.sum(0), atol=1e-4)


def test_tokens_of_a_row_are_spread_over_their_chunk(tiny_models):
    # Layer 0 before any attention: a query tells its token, and every row is one token repeated.
    rows = torch.arange(4, 20, dtype=torch.int)[:, None].expand(16, 16).contiguous()
    stream = stream_of(
        tiny_models["bridge"],
        rows,
        batch=16,
        buffer=16,
        store_batch_size_prompts=4,
    )
    queries = next(stream.batches())["blocks.0.attn.hook_q"]
    kinds = (torch.cdist(queries, queries) < 1e-3).float()
    assert torch.linalg.matrix_rank(kinds) >= 8


def test_the_pad_id_may_be_the_id_of_a_real_token(model):
    # `PAD` is a mark, not a token: a document that is full of the token with id 0 keeps all of it.
    rows = token_rows(model, torch.zeros(2, 4, dtype=torch.long))
    assert len(next(stream_of(model, rows, batch=8).batches())["blocks.0.attn.hook_q"]) == 8


@pytest.mark.parametrize("left_out", [True, (1, 20)])
def test_special_tokens_can_be_left_out(tiny_models, left_out):
    rows = torch.tensor([[1, 20, 5, 7], [1, 9, 20, 11]])
    kept = torch.isin(rows, torch.tensor([1] if left_out is True else [1, 20]), invert=True)
    stream = stream_of(
        tiny_models["bridge"],
        rows,
        batch=int(kept.sum()),
        exclude_special_tokens=left_out,
        buffer=2,
    )
    name = "blocks.2.attn.hook_q"
    expected = read_activations(stream.model, rows, [name])[name][kept].flatten(1)
    torch.testing.assert_close(next(stream.batches())[name].sum(0), expected.sum(0))


def test_autocast_reads_in_sixteen_bits(tiny_models):
    rows = some_rows(6, 8, False)
    full = next(stream_of(tiny_models["bridge"], rows).batches())
    half = next(stream_of(tiny_models["bridge"], rows, autocast_lm=True).batches())
    for name, value in half.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), full[name], rtol=0.1, atol=0.05)


def test_a_forward_batch_without_a_token_to_train_on_changes_no_chunk(tiny_models):
    rows = torch.tensor([[5, 6, 7], [9, 9, 9], [5, 9, 9]], dtype=torch.int)
    settings = {"exclude_special_tokens": (9,), "store_batch_size_prompts": 1}
    stream = stream_of(tiny_models["bridge"], rows, batch=1, buffer=2, **settings)
    name = "blocks.0.attn.hook_q"  # before any attention: a query tells its token
    found = torch.cat([one[name] for one in islice(stream.batches(), 40)])
    known = read_activations(stream.model, rows[:1].long(), [name])[name][0].flatten(1)
    nearest = (found[:, None] - known).norm(dim=-1).min(1)
    assert nearest.values.max() < 1e-3
    assert nearest.indices.bincount().tolist() == [20, 10, 10]
