"""The tokens at which latents are most active, and the texts around them."""

import re

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.data.batches import PAD
from sae_query_steer.diagnostics import latent_texts
from sae_query_steer.models.activations import read_activations

NAMES = ["blocks.0.attn.hook_q", "blocks.2.attn.hook_q"]
NAME = NAMES[1]
K, MANY, BOS = 4, 40, 1


@pytest.fixture(scope="module")
def texts(examples) -> list[str]:
    """Documents of different lengths, so that rows are padded; some words stand at their edges."""
    return [example.prompt + example.response for example in examples[:20]]


def everything(model, sae, rows, name=NAME):
    """Latents of every real token but BOS in the order of the texts, with row and position."""
    kept = []
    for row, tokens in enumerate(rows):
        own = tokens[tokens != PAD]
        latents = sae.encode(read_activations(model, own[None], [name])[name][0])
        kept += [((row, p), latents[p]) for p in range(len(own)) if own[p] != BOS]
    return [place for place, _ in kept], torch.stack([latent for _, latent in kept])


def test_the_stream_finds_what_topk_over_everything_finds(model, saes, texts):
    assert model.tokenizer.bos_token_id == BOS
    found = sqs.diagnostics.top_tokens(model, saes, texts, k=MANY, batch_size=7)
    for name in NAMES:
        places, latents = everything(model, saes[name], found.rows, name)
        best = latents.topk(MANY, dim=0).values.permute(1, 2, 0)
        torch.testing.assert_close(found.activations[name], best.clamp(min=0), rtol=0, atol=1e-5)
        assert (found.activations[name].diff(dim=-1) <= 0).all()
        assert torch.equal(found.n_fired[name], (latents > 0).sum(0))
        assert found.n_tokens == len(places)
        index = torch.full((found.rows.numel(),), -1)
        index[[row * found.rows.shape[1] + p for row, p in places]] = torch.arange(len(places))
        head, latent, rank = (found.activations[name] > 0).nonzero(as_tuple=True)
        there = latents[index[found.places[name][head, latent, rank]], head, latent]
        kept = found.activations[name][head, latent, rank]
        torch.testing.assert_close(there, kept, rtol=0, atol=1e-5)
        fires = found.activations[name] > 0
        assert torch.equal(found.places[name] >= 0, fires)
        assert 0 < fires.float().mean() < 1, "some latents fire less than k times"


def test_the_batches_make_no_difference_not_even_to_ties(tiny_models, saes, texts):
    model, twice = tiny_models["hooked"], [text for text in texts[:6] for _ in range(2)]
    one = sqs.diagnostics.top_tokens(model, {NAME: saes[NAME]}, twice, k=3, batch_size=3)
    two = sqs.diagnostics.top_tokens(model, {NAME: saes[NAME]}, twice, k=3, batch_size=2)
    torch.testing.assert_close(one.activations[NAME], two.activations[NAME], rtol=0, atol=1e-5)
    row = two.places[NAME] // two.rows.shape[1]
    # Each text comes twice, in one batch and bitwise alike: the first of a pair is named first.
    pairs = (row[..., 0] >= 0) & (two.activations[NAME][..., 0] == two.activations[NAME][..., 1])
    assert pairs.any()
    assert (row[..., 0] % 2 == 0)[pairs].all()
    assert (row[..., 1] == row[..., 0] + 1)[pairs].float().mean() > 0.5


def test_merging_keeps_the_earlier_of_equals():
    top = latent_texts._TopK((1, 2), 2)
    for values, first in (([[1.0, 5.0]], 7), ([[1.0, 0.0], [1.0, 5.0], [3.0, 0.0]], 8)):
        top.update(torch.tensor(values)[:, None], first)
    assert top.values.tolist() == [[[3.0, 1.0], [5.0, 5.0]]]
    assert top.places.tolist() == [[[10, 7], [7, 9]]]
    assert top.n_fired.tolist() == [[4, 2]]


def test_the_text_on_both_sides_is_the_document_and_ends_with_it(tiny_models, saes, texts):
    model = tiny_models["hooked"]
    found = sqs.diagnostics.top_tokens(model, saes, texts, k=K)
    table = found.table(NAME, 1, context=2)
    assert set(table["row"]) <= set(range(len(texts)))
    edges = set()
    for _, line in table.iterrows():
        words, at = texts[line["row"]].split(), line["position"] - 1  # BOS stands before them
        assert line["text"].strip() == words[at]
        assert line["left"].split() == words[max(0, at - 2) : at]
        assert line["right"].split() == words[at + 1 : at + 3]
        whole = line["left"] + line["text"] + line["right"]
        assert whole in texts[line["row"]]
        assert line["token"] == found.rows[line["row"], line["position"]]
        edges |= {"start"} if at == 0 else {"end"} if at == len(words) - 1 else set()
    assert edges == {"start", "end"}
    assert (table.groupby("latent")["rank"].max() <= K).all()
    wide = found.table(NAME, 1, context=99)
    assert [texts[r] for r in wide["row"]] == (wide["left"] + wide["text"] + wide["right"]).tolist()
    none = found.table(NAME, 1, context=0)
    assert (none["left"] + none["right"] == "").all()


def test_bos_does_not_count(tiny_models, saes, texts):
    found = sqs.diagnostics.top_tokens(tiny_models["hooked"], {NAME: saes[NAME]}, texts, k=MANY)
    assert found.n_tokens == sum(len(text.split()) for text in texts)
    assert all((found.table(NAME, head)["position"] > 0).all() for head in range(4))


def test_joined_documents_are_rows_too(tiny_models, saes, texts):
    model = tiny_models["bridge"]
    found = sqs.diagnostics.top_tokens(
        model, saes, texts, k=2, concat_sequences=True, context_size=12, n_tokens=50
    )
    assert found.rows.shape == (4, 12)
    places, latents = everything(model, saes[NAME], found.rows)
    best = latents.topk(2, dim=0).values.permute(1, 2, 0).clamp(min=0)
    torch.testing.assert_close(found.activations[NAME], best, rtol=0, atol=1e-5)
    assert found.n_tokens == len(places) < 48


def test_single_heads_and_latents_read_as_in_the_whole(tiny_models, saes, texts):
    model = tiny_models["hooked"]
    found = sqs.diagnostics.top_tokens(model, saes, texts, k=3)
    whole = found.table(NAME, 2)
    alone = sqs.diagnostics.top_tokens(model, saes, texts, k=3, heads={2: [2]})
    some = alone.table(NAME, 2, [9, 4])
    order = [i for i in (9, 4) if (whole["latent"] == i).any()]
    assert some["latent"].drop_duplicates().tolist() == order
    for latent in order:
        ours, theirs = (t[t["latent"] == latent].reset_index(drop=True) for t in (some, whole))
        assert ours.drop(columns="activation").equals(theirs.drop(columns="activation"))
        assert ours["activation"].to_numpy() == pytest.approx(theirs["activation"].to_numpy())
    fired = found.n_fired[NAME][2, order].double() / found.n_tokens
    assert some.groupby("latent")["frequency"].first()[order].tolist() == fired.tolist()
    silent = (found.n_fired[NAME][2] == 0).nonzero()[:, 0].tolist()
    assert len(found.table(NAME, 2, silent)) == 0


def test_a_token_within_a_letter_or_a_word_reads_as_in_its_text():
    class Bytes:
        bos_token_id = 0

        @staticmethod
        def decode(ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    row = torch.tensor([[0, *"aéz".encode(), PAD]])
    top = sqs.diagnostics.TopTokens(
        rows=row,
        heads={NAME: (0,)},
        activations={NAME: torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])},
        places={NAME: torch.tensor([[[1, 2, 3, 4]]])},
        n_fired={NAME: torch.tensor([[4]])},
        n_tokens=4,
        bos=0,
        tokenizer=Bytes,
    )
    spots = top.table(NAME, 0, context=9)[["left", "text", "right"]].to_numpy().tolist()
    assert all("".join(spot) == "aéz" for spot in spots)
    assert [spots[0], spots[2], spots[3]] == [["", "a", "éz"], ["a", "é", "z"], ["aé", "z", ""]]


@pytest.mark.filterwarnings("ignore:no forward pass ran")
def test_what_can_t_be_read_or_shown_is_refused(tiny_models, saes, targets, texts):
    model = tiny_models["bridge"]
    found = sqs.diagnostics.top_tokens(model, saes, texts[:2], k=2, heads={2: [1, 3]})
    for call, text in (
        (lambda: sqs.diagnostics.top_tokens(model, saes, texts, k=0), "k must be a whole number"),
        (lambda: sqs.diagnostics.top_tokens(model, saes, texts, n_tokens=-1), "n_tokens must be"),
        (lambda: sqs.diagnostics.top_tokens(model, saes, texts, heads=[4]), "no head 4 at layer 0"),
        (lambda: found.table(NAME, 0), "head 0 at blocks.2.attn.hook_q was not read: there"),
        (lambda: found.table(NAMES[0], 1), "are {'blocks.2.attn.hook_q': (1, 3)}"),
        (lambda: found.table(NAME, 1, [16]), "no latent 16 at blocks.2.attn.hook_q head 1: they"),
        (lambda: found.table(NAME, 1, context=-1), "context must be a whole number >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=1.0
    )
    with steerer.apply(model), pytest.raises(ValueError, match="queries are being changed"):
        sqs.diagnostics.top_tokens(model, saes, texts)
