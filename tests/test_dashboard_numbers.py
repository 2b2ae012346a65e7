"""What dashboards tell of latents, against slow loops over single texts."""

import dataclasses

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.dashboards import attention_effect as effect_module
from sae_query_steer.dashboards import statistics as key_module
from sae_query_steer.dashboards.attention_effect import attention_effect
from sae_query_steer.dashboards.site_data import class_shares
from sae_query_steer.dashboards.statistics import N_BINS, KeyMeans, key_matches, read_again
from sae_query_steer.data.batches import PAD

LAYER, HEADS = 2, (3, 1)
NAME = f"blocks.{LAYER}.attn.hook_q"
K, CONTEXT, N_LOOKS = 4, 3, 3


@pytest.fixture(scope="module")
def texts(examples) -> list[str]:
    """Documents of different lengths, so that rows are padded."""
    return [example.prompt + example.response for example in examples[:14]]


def found_on(model, saes, texts, **reading):
    return sqs.diagnostics.top_tokens(model, {NAME: saes[NAME]}, texts, k=K, heads=HEADS, **reading)


def alone(model, row, hooks=()):
    """Queries, keys and pattern at the layer of one row without its padding."""
    names = [f"blocks.{LAYER}.attn.hook_{part}" for part in ("q", "k", "pattern")]
    with model.hooks(fwd_hooks=list(hooks)):
        cache = model.run_with_cache(
            row[row != PAD][None], names_filter=names, prepend_bos=False, return_type=None
        )[1]
    return [cache[name][0] for name in names]


def test_histogram_mean_and_surroundings_are_those_of_a_loop(model, saes, texts):
    tops = found_on(model, saes, texts)
    found, keys = read_again(
        model, {NAME: saes[NAME]}, tops, context=CONTEXT, keys=False, batch_size=5
    )
    assert keys == {}
    found = found[NAME]
    latents = {}
    for row, tokens in enumerate(tops.rows):
        z = saes[NAME].encode(alone(model, tokens)[0])[:, list(HEADS)]
        latents |= {(row, p): z[p] for p in range(1, len(z))}  # BOS does not count
    stacked = torch.stack(list(latents.values()))
    assert len(stacked) == tops.n_tokens
    torch.testing.assert_close(found.total, stacked.relu().sum(0), rtol=1e-5, atol=1e-4)
    width, checked = tops.rows.shape[1], 0
    for h in range(len(HEADS)):
        for i in range(16):
            largest = float(stacked[:, h, i].max())
            values = stacked[:, h, i][stacked[:, h, i] > 0]
            own = found.histogram[h, i]
            assert own.sum() == len(values) == tops.n_fired[NAME][h, i]
            if len(values):
                expected = torch.histc(values, N_BINS, 0, largest)
                assert (own - expected).abs().sum() <= 2, "one value may lie on an edge"
            for rank in range(K):
                place = int(tops.places[NAME][h, i, rank])
                window = [0.0] * (2 * CONTEXT + 1)
                for j in range(2 * CONTEXT + 1) if place >= 0 else ():
                    spot = place // width, place % width + j - CONTEXT
                    if spot in latents:
                        window[j] = float(latents[spot][h, i].clamp(min=0))
                around = found.around[h, i, rank]
                torch.testing.assert_close(around, torch.tensor(window), rtol=0, atol=1e-5)
                checked += place >= 0
    assert checked > 60


def test_attention_without_a_latent_is_that_of_a_query_without_its_part(
    tiny_models, saes, texts, monkeypatch
):
    model = tiny_models["hooked"]
    # Few rows a pass, and copies of rows: several latents have one top token.
    tops = found_on(model, saes, texts)
    site = sqs.query_sites(model, [LAYER])[0]
    sae = saes[NAME]
    places = tops.places[NAME][..., :N_LOOKS]
    wide = attention_effect(model, site, sae, tops, n_tokens=N_LOOKS, n_sources=3)
    monkeypatch.setattr(effect_module, "PATTERN_AT_ONCE", 3 * 4 * tops.rows.shape[1] ** 2)
    found = attention_effect(model, site, sae, tops, n_tokens=N_LOOKS, n_sources=3)
    assert set(wide) == set(found) == set(map(tuple, (places >= 0).nonzero().tolist()))
    for key, look in found.items():
        assert wide[key].moved == pytest.approx(look.moved, abs=1e-5)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    width, largest, compared = tops.rows.shape[1], 0.0, 0
    for h, head in enumerate(HEADS):
        for i in range(0, 16, 5):
            for rank in range(N_LOOKS):
                place = int(tops.places[NAME][h, i, rank])
                if place < 0:
                    continue
                look = found[h, i, rank]
                row, position = tops.rows[place // width], place % width
                query, _, plain = alone(model, row)
                latents = sae.encode(query[position][None])[0]
                without = latents.clone()
                without[head, i] = 0
                step = sae.decode(without) - sae.decode(latents)

                def change(q, hook, position=position, head=head, step=step):
                    q = q.clone()
                    q[0, position, head] += step[head]
                    return q

                off = alone(model, row, [(NAME, change)])[2]
                moved = (plain - off)[head, position].abs()
                assert look.moved == pytest.approx(float(moved.sum() / 2), abs=1e-5)
                spots, on, without = (
                    torch.tensor(column) for column in zip(*look.sources, strict=True)
                )
                expected = moved.topk(min(3, position + 1)).values[: len(spots)]
                torch.testing.assert_close(moved[spots], expected, rtol=0, atol=1e-5)
                for kept, truth in ((on, plain), (without, off)):
                    there = truth[head, position, spots]
                    torch.testing.assert_close(kept, there, rtol=0, atol=1e-5)
                largest = max(largest, float(moved.sum() / 2))
                compared += 1
    assert compared > 12
    assert largest > 0.02, "some latent moves attention"


def test_no_two_latents_are_switched_off_at_one_token_of_a_copy():
    places = torch.tensor([[[5, 9], [5, -1], [5, 14]], [[5, 3], [-1, -1], [22, 9]]])
    passes = effect_module._passes(places, 10, n_heads=2, batch_size=3)
    spots = set()
    for number, own in enumerate(passes):
        assert own.groupby(["row", "copy"]).ngroups <= 3
        for job in own.itertuples():
            assert int(places[job.head, job.latent, job.rank]) == job.row * 10 + job.position
            spots.add((number, job.copy, job.head, job.row, job.position))
    assert len(spots) == 9
    assert [sorted(set(own.groupby(["row", "copy"]).groups)) for own in passes] == [
        [(0, 0), (0, 1), (0, 2)],
        [(1, 0), (2, 0)],
    ], "three latents of a head share token 5"


def test_matching_keys_are_those_with_the_largest_product_with_the_decoder_row(
    tiny_models, saes, texts
):
    model = tiny_models["hooked"]
    sae, tops = saes[NAME], found_on(model, saes, texts)
    _, keys = read_again(model, {NAME: sae}, tops, context=0, keys=True, batch_size=5)
    ids, found = key_matches(keys[NAME], sae, HEADS, n=3)
    by_token, every = {}, []
    for row in tops.rows:
        own = alone(model, row)[1]
        assert own.shape[1] == 2, "two key heads for four query heads"
        every.append(own)
        for token, key in zip(row.tolist(), own, strict=False):
            by_token.setdefault(token, []).append(key)
    centre = torch.cat(every).mean(0)
    assert 1 in by_token, "queries look at BOS too"
    often = {token: kept for token, kept in by_token.items() if len(kept) >= 3}
    assert 3 < len(often) < len(by_token)
    assert keys[NAME].ids.tolist() == sorted(often)
    assert keys[NAME].counts.tolist() == [len(often[token]) for token in sorted(often)]
    for h, head in enumerate(HEADS):
        for i in range(16):
            scores = {
                token: float((torch.stack(kept).mean(0) - centre)[head // 2] @ sae.W_dec[head, i])
                / 8**0.5
                for token, kept in often.items()
            }
            best = sorted(scores.values(), reverse=True)[:3]
            assert found[h, i].tolist() == pytest.approx(best, abs=1e-5)
            named = [scores[token] for token in ids[h, i].tolist()]
            assert named == pytest.approx(best, abs=1e-5)


def test_the_commonest_ids_are_kept_and_all_where_none_is_common(monkeypatch):
    rows = torch.tensor([[4, 4, 4, 7, 7, 9], [9, 9, 9, 7, 8, PAD]])
    assert KeyMeans(rows).ids.tolist() == [4, 7, 9]
    assert KeyMeans(rows[:1, 3:]).ids.tolist() == [7, 9]
    monkeypatch.setattr(key_module, "MAX_IDS", 2)
    assert KeyMeans(rows).ids.tolist() == [4, 9]


def test_the_share_of_a_latent_is_between_over_total(saes, targets, examples, tiny_models):
    share, highest, found = (part[list(HEADS)] for part in class_shares(targets, NAME))
    model, sae = tiny_models["bridge"], saes[NAME]
    values, labels = [], []
    for example in examples:
        tokens = model.to_tokens(example.prompt)
        query = model.run_with_cache(tokens, names_filter=[NAME], prepend_bos=False)[1][NAME]
        values.append(sae.encode(query[0, -1])[list(HEADS)].double())
        labels.append(targets.classes.index(example.label))
    values, labels = torch.stack(values), torch.tensor(labels)
    total = (values - values.mean(0)).square().sum(0)
    within = sum(
        (values[labels == k] - values[labels == k].mean(0)).square().sum(0) for k in range(3)
    )
    live = total > 1e-12
    expected = torch.where(live, 1 - within / total, 0.0)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-4)
    assert ((highest >= 0) == live).all()
    means = torch.stack([values[labels == k].mean(0) for k in range(3)], dim=-1)
    torch.testing.assert_close(found, means, rtol=0, atol=1e-5)
    assert torch.equal(highest[live], means.argmax(-1)[live])
    silent = {name: torch.zeros_like(mean) for name, mean in targets.means.items()}
    share, highest, _ = class_shares(
        dataclasses.replace(targets, means=silent, variances=silent), NAME
    )
    assert (share == 0).all()
    assert (highest == -1).all()
