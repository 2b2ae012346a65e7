"""All that the page of one site shows, as one JSON object."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_query_steer.dashboards.attention_effect import AttentionEffect
from sae_query_steer.dashboards.class_shares import class_shares
from sae_query_steer.dashboards.key_matches import KeyMatches
from sae_query_steer.dashboards.statistics import LatentStatistics
from sae_query_steer.data.batches import PAD
from sae_query_steer.diagnostics.active_tokens import TopTokens
from sae_query_steer.sites import QuerySite
from sae_query_steer.targets.centroids import CentroidTargets

FORMAT = "sae_query_steer.dashboard/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteDashboard:
    """What was found of the latents of some heads of one site."""

    site: QuerySite
    """The site."""

    model_name: str
    """Name of the model."""

    tops: TopTokens
    """Top tokens of each latent."""

    statistics: LatentStatistics
    """Histograms, means and activations around the top tokens."""

    attention: AttentionEffect | None = None
    """Attention with each latent on and off; None where it was not asked for."""

    keys: KeyMatches | None = None
    """Tokens whose keys match; None where they were not asked for."""

    targets: CentroidTargets | None = None
    """Centroids of classes, where there are."""

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads."""
        return self.tops.heads[self.site.hook_name]

    def data(self, k: int | None = None) -> dict[str, Any]:
        """Return what the page shows, as JSON; numbers have three digits.

        Texts are stored once: `tokens` joins the pieces of text that stand around any top token,
        by index into `vocabulary`, and a top text is a window of it.

        Args:
            k: top texts of each latent; None means all that were kept.
        """
        name, tops = self.site.hook_name, self.tops
        places = tops.places[name]
        windows = _Windows(tops, places[..., :k], self._context)
        vocabulary = _Vocabulary(tops.tokenizer)
        rows = tops.rows.flatten()
        data: dict[str, Any] = {
            "format": FORMAT,
            "site": name,
            "layer": self.site.layer,
            "model": self.model_name,
            "n_tokens": tops.n_tokens,
            "n_texts": len(tops.rows),
            "k": places.shape[-1] if k is None else k,
            "k_kept": places.shape[-1],
            "rotated": self.site.rotated,
            "has_attention": self.attention is not None,
            "has_keys": self.keys is not None,
            "classes": None,
            "tokens": [vocabulary.index(t) for t in rows[windows.covered].tolist()],
        }
        if self.targets is not None:
            counts = self.targets.counts
            data |= {
                "classes": [str(label) for label in self.targets.classes],
                "class_counts": counts.tolist(),
                "span": self.targets.span,
                "share_by_chance": _three((len(counts) - 1) / max(1, int(counts.sum()) - 1)),
            }
        data["heads"] = [
            self._head(index, windows, vocabulary, k) for index in range(len(self.heads))
        ]
        data["vocabulary"] = vocabulary.texts  # the last: by now all ids are in it
        return data

    @property
    def _context(self) -> int:
        return self.statistics.around.shape[-1] // 2

    def _head(
        self, index: int, windows: "_Windows", vocabulary: "_Vocabulary", k: int | None
    ) -> dict[str, Any]:
        """Return the columns of one head: a list with an entry for each latent in each."""
        name, found = self.site.hook_name, self.statistics
        fired = self.tops.n_fired[name][index]
        histogram = found.histogram[index].tolist()
        head: dict[str, Any] = {
            "head": self.heads[index],
            "fired": fired.tolist(),
            "max": _rounded(self.tops.activations[name][index, :, 0]),
            "mean": _rounded(found.mean[index]),
            "histogram": [bars if n else [] for bars, n in zip(histogram, fired, strict=True)],
            "texts": self._texts(index, windows, k),
        }
        if self.attention is not None:
            moved = self.attention.moved[index]
            seen = (self.tops.places[name][index, :, : moved.shape[-1]] >= 0).sum(-1)
            head["moved"] = _rounded(moved.sum(-1) / seen.clamp(min=1))
            head["attention"] = self._attention(index, vocabulary)
        if self.keys is not None:
            ids = self.keys.ids[index].tolist()
            scores = _rounded(self.keys.scores[index])
            head["keys"] = [
                [x for i, s in zip(own, score, strict=True) for x in (vocabulary.index(i), s)]
                for own, score in zip(ids, scores, strict=True)
            ]
        if self.targets is not None:
            shares = class_shares(self.targets, name, (self.heads[index],))
            head["share"] = _rounded(shares.share[0])
            head["class"] = shares.highest[0].tolist()
            head["class_means"] = _rounded(shares.means[0])
        return head

    def _texts(self, index: int, windows: "_Windows", k: int | None) -> list[list[Any]]:
        """Return the top texts of each latent.

        A text is [activation, row, position, where its window starts in `tokens`, index of the top
        token in it, its length, then index and activation of each token in it that fires].
        """
        name = self.site.hook_name
        values = self.tops.activations[name][index, :, :k]
        around = self.statistics.around[index, :, :k].numpy()
        texts: list[list[Any]] = [[] for _ in range(len(values))]
        latents, ranks = (values > 0).nonzero(as_tuple=True)
        shown = _rounded(values[latents, ranks])
        for latent, rank, value in zip(latents.tolist(), ranks.tolist(), shown, strict=True):
            place = int(windows.places[index, latent, rank])
            first, at, length = windows.of(index, latent, rank)
            active = around[latent, rank, self._context - at : self._context - at + length]
            (fires,) = active.nonzero()
            width = self.tops.rows.shape[1]
            text = [value, place // width, place % width, first, at, length]
            for i in fires.tolist():
                text += [i, _three(float(active[i]))]
            texts[latent].append(text)
        return texts

    def _attention(self, index: int, vocabulary: "_Vocabulary") -> list[list[Any]]:
        """Return of each latent, for each top token that was looked at, where attention went.

        An entry is [share that moved, then of each source token its position, its text's index,
        attention with the latent and without].
        """
        found = self.attention
        assert found is not None
        places = self.tops.places[self.site.hook_name][index]
        width = self.tops.rows.shape[1]
        looks: list[list[Any]] = [[] for _ in range(len(places))]
        moved = found.moved[index].numpy()
        on, off = found.on[index].numpy(), found.off[index].numpy()
        latents, ranks = (places[:, : moved.shape[-1]] >= 0).nonzero(as_tuple=True)
        for latent, rank in zip(latents.tolist(), ranks.tolist(), strict=True):
            row = self.tops.rows[int(places[latent, rank]) // width]
            look: list[Any] = [_three(float(moved[latent, rank]))]
            for i, position in enumerate(found.positions[index, latent, rank].tolist()):
                if position >= 0:
                    token = vocabulary.index(int(row[position]))
                    pair = _three(float(on[latent, rank, i])), _three(float(off[latent, rank, i]))
                    look += [position, token, *pair]
            looks[latent].append(look)
        return looks


class _Windows:
    """The tokens around top tokens, and where each window starts among all that are shown."""

    def __init__(self, tops: TopTokens, places: Tensor, context: int) -> None:
        rows, width = tops.rows, tops.rows.shape[1]
        self.places = places.numpy()
        lengths = (rows != PAD).sum(1)
        row, position = places // width, places % width
        # BOS is shown only where it is the top token itself.
        has_bos = (rows[:, 0] == tops.tokenizer.bos_token_id)[row.clamp(min=0)]
        begins = (has_bos & (position > 0)).long()
        first = torch.maximum(begins, position - context)
        end = torch.minimum(lengths[row.clamp(min=0)], position + 1 + context)
        there = places >= 0
        edges = torch.zeros(rows.numel() + 1, dtype=torch.long)
        starts, ends = (row * width + first)[there], (row * width + end)[there]
        edges.index_add_(0, starts, torch.ones_like(starts))
        edges.index_add_(0, ends, -torch.ones_like(ends))
        self.covered = edges.cumsum(0)[:-1] > 0
        index = self.covered.long().cumsum(0) - 1
        flat = (row * width + first).clamp(min=0, max=rows.numel() - 1)
        self._starts = index[flat].numpy()
        self._at = (position - first).numpy()
        self._lengths = (end - first).numpy()

    def of(self, *where: int) -> tuple[int, int, int]:
        """Return where a window starts, which token of it is the top token, and its length."""
        return int(self._starts[where]), int(self._at[where]), int(self._lengths[where])


class _Vocabulary:
    """The texts of the token ids that the page shows.

    A token alone loses its leading space in some tokenizers; so each is read after itself, and what
    the second one adds is taken. Tokens that are parts of one letter stay unreadable.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._index: dict[int, int] = {}
        self.texts: list[str] = []

    def index(self, token: int) -> int:
        if token not in self._index:
            self._index[token] = len(self.texts)
            self.texts.append(self._text(token))
        return self._index[token]

    def _text(self, token: int) -> str:
        one, two = (
            self._tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2)
        )
        return two[len(one) :] if two.startswith(one) else one


def _three(value: float) -> float:
    return float(f"{value:.3g}")


def _rounded(values: Tensor) -> Any:
    """Return numbers as lists, with three digits that count."""
    array = values.double().numpy()
    with np.errstate(divide="ignore"):
        digits = np.where(array == 0, 0, np.floor(np.log10(np.abs(array))))
    scale = 10.0 ** (2 - digits)
    rounded = np.round(array * scale) / scale
    return rounded.tolist()
