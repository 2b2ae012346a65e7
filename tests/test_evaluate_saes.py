"""Scores of SAEs in place: against a loop that replaces one query of one row at a time."""

import math

import pandas as pd
import pytest
import torch
from conftest import HOSTS

import sae_query_steer as sqs
from sae_query_steer.diagnostics import sae_scores
from sae_query_steer.diagnostics.sae_scores import evaluate_saes, max_decoder_cosine, read_run

LAYER, HEAD = 2, 1
NAME = f"blocks.{LAYER}.attn.hook_q"


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(4, 52, (6, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tables(tiny_models, saes, rows):
    """The scores on both hosts, by name."""
    return {host: evaluate_saes(tiny_models[host], saes, rows, batch_size=4) for host in HOSTS}


def row_of(table, head, layer=LAYER):
    return table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]


def run_replaced(model, row, value, heads):
    """Log probabilities and attention [head query key] of one row, some queries replaced."""
    kept = {}

    def replace(activation, hook):
        queries = activation.reshape(*activation.shape[:2], 4, 8).clone()
        for head in heads:
            queries[0, :, head] = value(queries)[..., head, :]
        return queries.reshape(activation.shape)

    def keep(activation, hook):
        kept[hook.name] = activation[0].detach()

    attention = [f"blocks.{LAYER}.attn.hook_{what}" for what in ("pattern", "attn_scores")]
    with torch.no_grad():
        logits = model.run_with_hooks(
            row[None],
            fwd_hooks=[(NAME, replace), *((name, keep) for name in attention)],
            prepend_bos=False,
        )
    return logits[0].log_softmax(-1), *(kept[name] for name in attention)


@pytest.mark.parametrize("heads", [[HEAD], [0, 1, 2, 3]], ids=["one head", "all heads"])
def test_losses_are_those_of_a_loop_over_rows(tiny_models, saes, rows, tables, heads):
    model, sae = tiny_models["bridge"], saes[NAME]
    queries = torch.cat(
        [
            model.run_with_cache(row[None], names_filter=[NAME], prepend_bos=False)[1][NAME]
            for row in rows
        ]
    ).reshape(-1, 4, 8)
    stand_ins = {
        "sae": lambda q: sae(q)[0],
        "zero": lambda q: torch.zeros(q.shape[1], 4, 8),
        "mean": lambda q: queries.mean(0).expand(q.shape[1], 4, 8),
    }
    ce: dict[str, list[float]] = {name: [] for name in ("clean", *stand_ins)}
    kl: dict[str, list[float]] = {name: [] for name in stand_ins}
    pattern_kl, error, norm = [], 0.0, 0.0
    for row in rows:
        bare, pattern, scores = run_replaced(model, row, lambda q: q[0], [])
        for i in range(8):
            ce["clean"].append(-float(bare[i, row[i + 1]]))
        for kind, value in stand_ins.items():
            changed, pattern_2, scores_2 = run_replaced(model, row, value, heads)
            for i in range(8):
                ce[kind].append(-float(changed[i, row[i + 1]]))
                kl[kind].append(float((bare[i].exp() * (bare[i] - changed[i])).sum()))
            if kind != "sae":
                continue
            for head in heads:
                for i in range(9):
                    p, q = pattern[head, i, : i + 1], pattern_2[head, i, : i + 1]
                    pattern_kl.append(float((p * (p / q).log()).sum()))
                    s, t = scores[head, i, : i + 1], scores_2[head, i, : i + 1]
                    s, t = s - s.mean(), t - t.mean()
                    error, norm = error + float((s - t).square().sum()), norm + float((s**2).sum())
    mean = {name: sum(values) / len(values) for name, values in ce.items()}
    found = row_of(tables["bridge"], HEAD if heads == [HEAD] else "all")
    for name, value in mean.items():
        assert found[f"ce_{name}"] == pytest.approx(value, rel=1e-5)
    for kind, values in kl.items():
        assert found[f"kl_{kind}"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert found["pattern_kl"] == pytest.approx(sum(pattern_kl) / len(pattern_kl), rel=1e-3)
    assert found["score_error"] == pytest.approx(error / norm, rel=1e-4)
    for kind in ("zero", "mean"):
        share = (mean[kind] - mean["sae"]) / (mean[kind] - mean["clean"])
        if mean[kind] - mean["clean"] > 1e-9:
            assert found[f"ce_score_{kind}"] == pytest.approx(share, rel=1e-3)
        else:
            assert math.isnan(found[f"ce_score_{kind}"])
        whole = found[f"kl_{kind}"]
        assert found[f"kl_score_{kind}"] == pytest.approx((whole - found["kl_sae"]) / whole)
    assert found["n_tokens"] == 6 * 8


def test_both_hosts_give_the_same_scores(tables):
    numbers = tables["bridge"].columns.drop("head")
    torch.testing.assert_close(
        torch.tensor(tables["hooked"][numbers].astype(float).to_numpy()),
        torch.tensor(tables["bridge"][numbers].astype(float).to_numpy()),
        rtol=2e-3,
        atol=1e-5,
        equal_nan=True,
    )


def test_there_is_a_row_for_every_head_and_one_for_all(tables, tiny_models, saes, rows):
    table = tables["bridge"]
    assert table["head"].tolist() == [0, 1, 2, 3, "all"] * 2
    assert table["layer"].tolist() == [0] * 5 + [2] * 5
    short = evaluate_saes(tiny_models["bridge"], saes, rows, per_head=False, n_tokens=20)
    assert short["head"].tolist() == ["all", "all"]
    assert short["n_tokens"].tolist() == [2 * 8] * 2


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([3], [(0, 3), (2, 3)]),
        ({2: [1], 0: (2, 0)}, [(0, 2), (0, 0), (2, 1)]),
    ],
    ids=["the same in each layer", "by layer"],
)
def test_heads_that_are_named_have_their_rows_and_cost_no_others(
    tiny_models, saes, rows, tables, heads, expected, monkeypatch
):
    runs = []
    monkeypatch.setattr(sae_scores, "read_run", lambda *args: runs.append(args) or read_run(*args))
    found = evaluate_saes(tiny_models["bridge"], saes, rows, batch_size=6, heads=heads)
    assert list(zip(found["layer"], found["head"], strict=True)) == expected
    whole = pd.DataFrame([row_of(tables["bridge"], head, layer) for layer, head in expected])
    pd.testing.assert_frame_equal(
        found, whole.reset_index(drop=True), check_dtype=False, rtol=1e-4, atol=1e-6
    )
    assert len(runs) == 1 + 3 * len(expected)
    assert runs[0][2] == sorted({layer for layer, _ in expected})  # the layers that are looked at


def test_the_identity_loses_nothing(model, rows):
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [LAYER]))
    found = row_of(evaluate_saes(model, encoders, rows, per_head=False), "all")
    for name in ("explained_variance", "cosine", "kl_score_zero", "kl_score_mean"):
        assert found[name] == pytest.approx(1, abs=1e-5)
    for name in ("kl_sae", "pattern_kl", "score_error"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    assert found["ce_sae"] == pytest.approx(found["ce_clean"])
    assert found["kl_zero"] > 0.001
    assert math.isnan(found["max_decoder_cosine"])


def test_padding_counts_for_nothing(tiny_models, saes):
    texts = ["w0 w1 w2 w9 w7", "w3 w8", "w4 w5 w11"]
    model = tiny_models["hooked"]
    settings = {"context_size": 16, "concat_sequences": False, "per_head": False}
    together = evaluate_saes(model, saes, texts, **settings)
    alone = [evaluate_saes(model, saes, [text], **settings) for text in texts]
    n = torch.tensor([one["n_tokens"].iloc[0] for one in alone])
    assert n.tolist() == [5, 2, 3]
    for name in ("ce_clean", "ce_sae", "ce_zero", "kl_zero"):  # the mean query is the texts' own
        weighted = sum(one[name] * int(k) for one, k in zip(alone, n, strict=True)) / 10
        assert together[name].to_numpy() == pytest.approx(weighted.to_numpy(), rel=1e-4)


def test_latents_that_only_tell_the_position_are_found_out(tiny_models):
    model = tiny_models["hooked"]
    rows = torch.randint(4, 52, (64, 9), generator=torch.Generator().manual_seed(2))

    class Positional(sqs.sae.IdentityEncoder):
        def encode(self, x, /):
            here = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
            return torch.zeros_like(x) + here + self.noise * torch.randn(x.shape)

    shares = []
    for noise in (0.0, 1e6):
        encoder = Positional(n_heads=4, d_head=8)
        object.__setattr__(encoder, "noise", noise)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            table = evaluate_saes(model, {NAME: encoder}, rows, per_head=False)
        shares.append(table["position_share"].iloc[0])
    assert shares[0] == pytest.approx(1)
    assert shares[1] == pytest.approx(0, abs=0.01)


def test_the_largest_cosine_of_two_decoder_rows_is_found():
    weights = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], [[1.0, 0], [-1, 0], [0, -1]]])
    assert max_decoder_cosine(weights) == pytest.approx(math.sqrt(0.5))


def test_what_cannot_work_is_refused_before_the_model_runs(tiny_models, saes, rows):
    model = tiny_models["bridge"]
    with pytest.raises(ValueError, match="n_tokens must be a whole number >= 1, got 0"):
        evaluate_saes(model, saes, rows, n_tokens=0)
    with pytest.raises(ValueError, match="texts is empty"):
        evaluate_saes(model, saes, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": [0, 4]}, "no head 4 at layer 0: the heads are 0 to 3"),
        ({"heads": {2: [-1]}}, "no head -1 at layer 2: the heads are 0 to 3"),
        ({"heads": {1: [0]}}, r"no site at layer 1: there are some at \[0, 2\]"),
        ({"heads": [1, 1]}, r"heads at layer 0 must name at least one head, and each once"),
        ({"heads": []}, "must name at least one head"),
        ({"heads": [1], "per_head": False}, r"must be None with per_head=False, got \[1\]"),
    ],
)
def test_heads_that_give_no_rows_are_refused_before_the_texts_are_read(
    tiny_models, saes, settings, message
):
    with pytest.raises(ValueError, match=message):
        evaluate_saes(tiny_models["bridge"], saes, [], **settings)


def test_a_head_that_is_no_list_is_refused(tiny_models, saes, rows, untyped):
    with pytest.raises(TypeError, match=r"heads must be a list of whole numbers, .*, got 1"):
        evaluate_saes(tiny_models["bridge"], saes, rows, heads=1)
