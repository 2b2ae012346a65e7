"""The effect of replacing queries on next tokens and attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_query_steer.diagnostics.metrics import kl_divergence
from sae_query_steer.models.activations import LOGITS, pattern_hook, read_activations
from sae_query_steer.sae.encoders import IdentityEncoder

KINDS = ("sae", "zero", "mean")
"""Replacements of the query: its reconstruction, zero, or the mean query of the head."""


class ConstantEncoder(IdentityEncoder):
    """An encoder that decodes every query to one value."""

    value: Float[Tensor, "head d_head"]

    def __init__(self, value: Float[Tensor, "head d_head"]) -> None:
        super().__init__(n_heads=value.shape[0], d_head=value.shape[1])
        object.__setattr__(self, "value", value)

    def decode(self, feature_acts: Float[Tensor, "*batch head d_latent"], /) -> Tensor:
        """Return the value for every query."""
        return self.value.expand(feature_acts.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionRun:
    """Next-token distribution and attention of one forward pass."""

    log_probs: Float[Tensor, "batch pos d_vocab"]
    """Of the next token."""

    patterns: Mapping[int, Float[Tensor, "batch head query key"]]
    """Attention, by layer."""

    scores: Mapping[int, Float[Tensor, "batch head query key"]]
    """Attention scores before the softmax, by layer."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: Tensor, layers: list[int]) -> "AttentionRun":
        """Run a model on token rows and keep the attention of some layers."""
        patterns = {n: pattern_hook(n) for n in layers}
        scores = {n: f"blocks.{n}.attn.hook_attn_scores" for n in layers}
        cache = read_activations(model, tokens, [LOGITS, *patterns.values(), *scores.values()])
        return cls(
            log_probs=cache[LOGITS].float().log_softmax(-1),
            patterns={n: cache[name] for n, name in patterns.items()},
            scores={n: cache[name] for n, name in scores.items()},
        )


@dataclass(eq=False)
class ReplacementLosses:
    """Streams the losses with some queries replaced."""

    sums: dict[str, float] = field(default_factory=dict)
    """Sums over tokens, and their numbers."""

    def update(
        self,
        kind: str,
        bare: AttentionRun,
        run: AttentionRun,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
    ) -> None:
        """Add the losses of a batch of rows with one of `KINDS` in place."""
        counted = real[:, 1:].to(run.log_probs.device)  # a token that has a next one
        following = tokens[:, 1:, None].to(run.log_probs.device)
        for name, log_probs in (("clean", bare.log_probs), (kind, run.log_probs)):
            losses = -log_probs[:, :-1].gather(-1, following)[..., 0]
            if name != "clean" or kind == KINDS[0]:
                self._add(f"ce_{name}", losses[counted])
        self._add(f"kl_{kind}", kl_divergence(bare.log_probs, run.log_probs)[:, :-1][counted])
        if kind == KINDS[0]:
            self._add("n", counted.float()[counted])

    def update_attention(
        self,
        bare: AttentionRun,
        run: AttentionRun,
        layer: int,
        heads: list[int],
        real: Bool[Tensor, "batch pos"],
    ) -> None:
        """Add the change of attention of some heads; `run` has the reconstruction in place."""
        before, after = bare.patterns[layer][:, heads], run.patterns[layer][:, heads]
        divergence = kl_divergence(
            before.float().log(), after.float().clamp(min=1e-30).log()
        ).transpose(1, 2)
        counted = real.to(divergence.device)
        self._add("pattern_kl", divergence[counted].mean(-1))
        self._add("n_queries", counted.float()[counted])
        seen = torch.ones(before.shape[-2:], dtype=torch.bool, device=before.device).tril()
        mask = seen & counted[:, None, :, None]
        before = _centred(bare.scores[layer][:, heads].float(), seen).where(mask, 0.0)
        after = _centred(run.scores[layer][:, heads].float(), seen).where(mask, 0.0)
        self._add("score_error", (after - before).square())
        self._add("score_norm", before.square())

    def row(self) -> dict[str, float]:
        """Return the scores."""
        s = self.sums
        row = {name: s[name] / s["n"] for name in ("ce_clean", *(f"ce_{k}" for k in KINDS))}
        row |= {f"kl_{kind}": s[f"kl_{kind}"] / s["n"] for kind in KINDS}
        for kind in ("zero", "mean"):
            gap = row[f"ce_{kind}"] - row["ce_clean"]
            row[f"ce_score_{kind}"] = _share(row[f"ce_{kind}"] - row["ce_sae"], gap)
            row[f"kl_score_{kind}"] = _share(row[f"kl_{kind}"] - row["kl_sae"], row[f"kl_{kind}"])
        row["pattern_kl"] = s["pattern_kl"] / s["n_queries"]
        row["score_error"] = _share(s["score_error"], s["score_norm"])
        return row | {"n_tokens": int(s["n"])}

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())


def _centred(scores: Tensor, seen: Tensor) -> Tensor:
    kept = scores.where(seen, 0.0)
    return kept - kept.sum(-1, keepdim=True) / seen.sum(-1)[:, None]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 1e-9 else float("nan")
