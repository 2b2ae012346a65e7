"""All that the page of one site shows, as one JSON object."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_query_steer.dashboards.attention_effect import Look
from sae_query_steer.dashboards.statistics import LatentStatistics
from sae_query_steer.data.batches import PAD
from sae_query_steer.diagnostics.latent_texts import TopTokens
from sae_query_steer.sites import QuerySite
from sae_query_steer.targets.centroids import CentroidTargets


def site_data(
    site: QuerySite,
    model_name: str,
    tops: TopTokens,
    statistics: LatentStatistics,
    *,
    attention: Mapping[tuple[int, int, int], Look] | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    targets: CentroidTargets | None = None,
) -> dict[str, Any]:
    """Return what the page shows, as JSON; numbers have three digits.

    Args:
        site: the site.
        model_name: name of the model.
        tops: top tokens of each latent.
        statistics: of the same latents.
        attention: of `attention_effect`.
        keys: of `key_matches`.
        targets: centroids of classes.
    """
    name = site.hook_name
    shown = set((tops.places[name] // tops.rows.shape[1]).unique().tolist())
    data: dict[str, Any] = {
        "format": "sae_query_steer.dashboard/2",
        "site": name,
        "layer": site.layer,
        "model": model_name,
        "n_tokens": tops.n_tokens,
        "n_texts": len(tops.rows),
        "rotated": site.rotated,
        "has_attention": attention is not None,
        "has_keys": keys is not None,
        "classes": None,
        "texts": [r[r != PAD].tolist() if i in shown else [] for i, r in enumerate(tops.rows)],
        "vocabulary": {
            i: _piece(tops.tokenizer, i) for i in tops.rows.unique().tolist() if i != PAD
        },
    }
    heads = [
        {
            "head": head,
            "fired": tops.n_fired[name][i].tolist(),
            "max": _rounded(tops.activations[name][i, :, 0]),
            "mean": _rounded(statistics.total[i] / max(1, tops.n_tokens)),
            "histogram": statistics.histogram[i].tolist(),
            "texts": _texts(tops, name, i, statistics.around[i].numpy()),
        }
        for i, head in enumerate(tops.heads[name])
    ]
    if attention is not None:
        for i, head in enumerate(heads):
            looks: list[list[Any]] = [[] for _ in head["fired"]]
            for _, latent, rank in sorted(key for key in attention if key[0] == i):
                look = attention[i, latent, rank]
                sources = [_three(number) for source in look.sources for number in source]
                looks[latent].append([look.moved, *sources])
            head["moved"] = _rounded([np.mean([m for m, *_ in own] or [0.0]) for own in looks])
            head["attention"] = [[[_three(m), *rest] for m, *rest in own] for own in looks]
    if keys is not None:
        for head, ids, scores in zip(heads, *keys, strict=True):
            pairs = zip(ids.tolist(), _rounded(scores), strict=True)
            head["keys"] = [[x for pair in zip(*own, strict=True) for x in pair] for own in pairs]
    if targets is not None:
        counts = targets.counts
        data |= {
            "classes": [str(label) for label in targets.classes],
            "span": targets.span,
            "share_by_chance": _three((len(counts) - 1) / max(1, int(counts.sum()) - 1)),
        }
        share, highest, means = class_shares(targets, name)
        for head in heads:
            own = head["head"]
            head |= {"share": _rounded(share[own]), "class": highest[own].tolist()}
            head["class_means"] = _rounded(means[own])
    return data | {"heads": heads}


def class_shares(targets: CentroidTargets, hook_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of each latent's variance that the class explains, and its class means.

    As `CentroidTargets.class_share_of_variance`, latent by latent.

    Returns:
        The share [head d_latent], 0 where the latent never varies; the class with the largest mean
        [head d_latent], -1 where it never varies; the means [head d_latent class].
    """
    means = targets.means[hook_name].double().cpu()
    between, total = targets.variance_by_latent(hook_name)
    share = torch.where(total > 0, between / total, 0.0)
    return share, torch.where(total > 0, means.argmax(0), -1), means.permute(1, 2, 0)


def _texts(tops: TopTokens, name: str, index: int, around: np.ndarray) -> list[list[Any]]:
    """Return the top texts of each latent of a head.

    A text is [activation, row, position, start of its window in the row, length of the window, then
    index in the window and activation of each token that fires]. BOS is shown only where it is the
    top token itself.
    """
    values, places = tops.activations[name][index], tops.places[name][index]
    lengths, context = (tops.rows != PAD).sum(1).tolist(), around.shape[-1] // 2
    begins_with_bos = (tops.rows[:, 0] == tops.bos).tolist()
    texts: list[list[Any]] = [[] for _ in values]
    for latent, rank in (values > 0).nonzero().tolist():
        row, position = divmod(int(places[latent, rank]), tops.rows.shape[1])
        start = max(int(begins_with_bos[row] and position > 0), position - context)
        end = min(lengths[row], position + context + 1)
        active = around[latent, rank][start - position + context : end - position + context]
        fires = [x for i in active.nonzero()[0].tolist() for x in (i, _three(active[i]))]
        value = _three(float(values[latent, rank]))
        texts[latent].append([value, row, position, start, end - start, *fires])
    return texts


def _piece(tokenizer: Any, token: int) -> str:
    """Return the text of a token within a text.

    A token alone loses its leading space in some tokenizers; so each is read after itself, and what
    the second one adds is taken. Tokens that are parts of one letter stay unreadable.
    """
    one, two = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    return two[len(one) :] if two.startswith(one) else one


def _three(value: Any) -> float:
    return float(f"{value:.3g}")


def _rounded(values: Any) -> list[Any]:
    """Return numbers with three digits that count."""
    return np.vectorize(_three, otypes=[float])(np.asarray(values)).tolist()
