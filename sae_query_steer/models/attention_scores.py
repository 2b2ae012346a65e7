"""Attention scores as a function of the queries, with the keys that the running pass will use.

A layer's queries are hooked before its keys, and before the cache is extended, so a hook on queries
cannot see keys. Here queries and keys are kept as the last hooks on them leave them, and the scores
are computed again from both: by the attention's own functions on HookedTransformer, by the same
steps on a TransformerBridge.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.models.calls import hooked
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.sites import QuerySite

Scores = Float[Tensor, "batch head query key"]


class ScoresReader:
    """Keeps queries and keys of one layer in the running forward pass.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        site: the queries, before or after rotary embedding.
    """

    def __init__(self, model: Any, site: QuerySite) -> None:
        self._model, self._site = model, site
        self._attention = model.blocks[site.layer].attn
        self._is_bridge = hasattr(self._attention, "original_component")
        self._kept: dict[str, Any] = {}

    def hooks(self) -> list[tuple[str, Hook]]:
        """Return the hooks that keep queries and keys."""
        names = (self._site.hook_name, f"blocks.{self._site.layer}.attn.hook_k")
        return [(name, self._keep(key)) for name, key in zip(names, ("q", "k"), strict=True)]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the arguments of the attention, for a `with` block."""
        handle = self._attention.register_forward_pre_hook(self._before, with_kwargs=True)
        with hooked(self._model, self._attention, handle):
            yield

    @property
    def queries(self) -> Float[Tensor, "batch pos head d_head"]:
        """The queries of the site as the last hook on them left them."""
        return self._kept["q"]

    def scores(self, queries: Float[Tensor, "batch pos head d_head"]) -> Scores:
        """Return the masked scores of queries of the site, before the softmax; differentiable."""
        compute = _bridge_scores if self._is_bridge else _hooked_scores
        return compute(self._attention, self._kept, queries, rotated=self._site.rotated)

    def check(self, scores: Scores) -> None:
        """Raise unless the scores computed here are those of the model.

        Raises:
            ValueError: this attention computes them in a way that is not known here, or a hook
                between `hook_q` and the scores changes them.
        """
        with torch.no_grad():
            mine = self.scores(self.queries.detach()).softmax(-1)
            difference = float((mine.nan_to_num() - scores.softmax(-1).nan_to_num()).abs().max())
        exact = scores.dtype in (torch.float32, torch.float64)
        if not difference <= (1e-4 if exact else 5e-2):
            raise ValueError(
                f"the attention at layer {self._site.layer} differs by {difference:.2g} from what "
                "its queries and keys give: the architecture is not supported for edits that see "
                "keys, or a hook on hook_rot_q, hook_rot_k or hook_attn_scores changes it"
            )

    def _keep(self, key: str) -> Hook:
        def keep(activation: Tensor, hook: Any) -> None:
            del hook  # its name differs between the backends
            n_tokens, d_head = activation.shape[:2], self._site.d_head
            self._kept[key] = activation.reshape(*n_tokens, -1, d_head)

        vars(keep)["reads_last"] = self
        return keep

    def _before(self, _attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inner = getattr(self._attention, "original_component", self._attention)
        names = list(inspect.signature(inner.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        self._kept = {"arguments": given, "past": self._past(given)}
        for name, _ in self.hooks():
            point = self._model.hook_dict[name]
            for handle in point.fwd_hooks:  # hooks that were placed later come before ours too
                if getattr(handle.user_hook, "reads_last", None) is self:
                    point._forward_hooks.move_to_end(handle.hook.id)

    def _past(self, given: dict[str, Any]) -> Tensor | None:
        """Return the keys of the cache: not rotated on HookedTransformer, rotated on the bridge."""
        if not self._is_bridge:
            entry = given.get("past_kv_cache_entry")
            return None if entry is None else entry.past_keys
        cache = given.get("past_key_values")
        if cache is None or int(cache.get_seq_length(self._site.layer)) == 0:
            return None
        return cache.layers[self._site.layer].keys


def _hooked_scores(attention: Any, kept: dict[str, Any], q: Tensor, *, rotated: bool) -> Scores:
    config, given, k, past = attention.cfg, kept["arguments"], kept["k"], kept["past"]
    offset, mask = 0 if past is None else past.shape[1], given.get("attention_mask")
    if config.use_qk_norm:
        k = attention._apply_qk_norm(k, attention.k_norm)
        q = q if rotated else attention._apply_qk_norm(q, attention.q_norm)
    k = k if past is None else torch.cat([past, k], dim=1)
    if config.positional_embedding_type == "rotary":
        k = attention.apply_rotary(k, 0, mask)
        q = q if rotated else attention.apply_rotary(q, offset, mask)
    scores = attention.calculate_attention_scores(q, k)
    if config.attention_dir == "causal":
        scores = attention.apply_causal_mask(scores, offset, mask)
    additive = given.get("additive_attention_mask")
    return scores if additive is None else scores + additive


def _bridge_scores(attention: Any, kept: dict[str, Any], q: Tensor, *, rotated: bool) -> Scores:
    inner, given, past = attention.original_component, kept["arguments"], kept["past"]
    q, k = q.transpose(1, 2), kept["k"].transpose(1, 2)
    if getattr(attention, "_qk_norm_phase", None) == "post_reshape":
        k = attention.k_norm.original_component(k)
        q = q if rotated else attention.q_norm.original_component(q)
    embeddings = given.get("position_embeddings")
    if embeddings is not None:
        k = _rotated(k, *embeddings)
        q = q if rotated else _rotated(q, *embeddings)
    k = k if past is None else torch.cat([past, k], dim=2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * getattr(inner, "scaling", q.shape[-1] ** -0.5)
    cap = getattr(inner, "attn_logit_softcapping", None)
    scores = scores if cap is None else (scores / cap).tanh() * cap
    return attention._apply_reconstruct_attention_mask(
        attn_scores=scores,
        attention_mask=given.get("attention_mask"),
        seq_len=k.shape[2],
        q_seq_len=q.shape[2],
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys [batch head pos d_head] after rotary embedding, partial or whole."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, two = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-two, one], dim=-1) * sin, rest], dim=-1)
