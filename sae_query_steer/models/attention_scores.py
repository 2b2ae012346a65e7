"""Attention scores as a function of the queries, with the keys that the running pass will use.

A layer's queries are hooked before its keys, and before the cache is extended, so a hook on queries
cannot see keys. Here queries and keys are kept as the last hooks on them leave them, and the scores
are computed again from both: by the attention's own functions on HookedTransformer, by the same
steps on a TransformerBridge.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.tensors import get_offset_position_ids

from sae_query_steer.models.calls import hooked
from sae_query_steer.models.linear_scores import LinearScores, Turn, picked
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.sites import QuerySite

Scores = Float[Tensor, "batch head query key"]
ScoresOf = Callable[[Tensor], Tensor]
"""From queries [row pos head d_head] to scores [row head column key]."""

Index = tuple[Tensor, Tensor, Tensor]
"""Some tokens and heads in scores [batch head query key]."""


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
        inner = getattr(self._attention, "original_component", self._attention)
        self._argument_names = list(inspect.signature(inner.forward).parameters)
        self._points: list[Any] = []
        self._kept: dict[str, Any] = {}

    def hooks(self) -> list[tuple[str, Hook]]:
        """Return the hooks that keep queries and keys."""
        names = {"q": self._site.hook_name, "k": f"blocks.{self._site.layer}.attn.hook_k"}
        if not self._is_bridge and self._attention.cfg.positional_embedding_type == "rotary":
            names["rotated k"] = f"blocks.{self._site.layer}.attn.hook_rot_k"  # of all tokens
        return [(name, self._keep(key)) for key, name in names.items()]

    @contextmanager
    def listening(self, points: Mapping[str, Any]) -> Iterator[None]:
        """Listen to the arguments of the attention, for a `with` block.

        Args:
            points: the model's `hook_dict`, which the bridge makes in 20 ms.
        """
        self._points = [points[name] for name, _ in self.hooks()]
        handle = self._attention.register_forward_pre_hook(self._before, with_kwargs=True)
        with hooked(self._model, self._attention, handle):
            yield

    @property
    def queries(self) -> Float[Tensor, "batch pos head d_head"]:
        """The queries of the site as the last hook on them, or an edit of the scores, left them."""
        return self._kept["q"]

    @queries.setter
    def queries(self, queries: Tensor) -> None:
        self._kept["q"] = queries

    def add(self, index: Index, bias: Float[Tensor, "token head key"]) -> None:
        """Keep what an edit adds to the scores of this pass; `index` as of `AttentionKeys`."""
        self._kept["added"].append((index, bias))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if it has none."""
        return self._model.tokenizer

    def scores(self, queries: Float[Tensor, "batch pos head d_head"]) -> Scores:
        """Return the masked scores of queries of the site, before the softmax; differentiable.

        What edits added to scores of this pass is in them.
        """
        rows, columns = (torch.arange(n, device=queries.device) for n in queries.shape[:2])
        return self.at(rows, columns)(queries)

    def at(self, rows: Int[Tensor, " row"], columns: Int[Tensor, " column"]) -> ScoresOf:
        """Return scores as a function of queries, with all that the keys alone decide computed.

        Args:
            rows: rows of the batch.
            columns: columns of the forward pass.

        Returns:
            A function from the queries of all columns of these rows [row pos head d_head] to the
            scores of these columns [row head column key].
        """
        made = _bridge_scores if self._is_bridge else _hooked_scores
        scores = made(self._attention, self._kept, rows, columns, rotated=self._site.rotated)
        if not self._kept["added"]:
            return scores
        n_rows, n_pos, n_heads = self.queries.shape[:3]
        n_keys = self._kept["added"][0][1].shape[-1]
        bias = self.queries.new_zeros(n_rows, n_heads, n_pos, n_keys)
        for index, one in self._kept["added"]:
            bias[index] += one.to(bias)
        bias = bias[rows][:, :, columns]
        return lambda queries: scores(queries) + bias

    def linear(
        self, scores: Scores, tokens: TokenPositions, heads: Sequence[int]
    ) -> LinearScores | None:
        """Return the scores of some tokens and heads as a linear map of their queries.

        Args:
            scores: those of the running pass.
            tokens: which tokens.
            heads: which heads.

        Returns:
            None if they are not linear, because of a soft cap or a norm of the queries after the
            site, or differ from what queries and keys give, because of anything else.
        """
        made = _bridge_linear if self._is_bridge else _hooked_linear
        parts = made(self._attention, self._kept, rotated=self._site.rotated)
        if parts is None or self._kept["added"]:
            return None
        found = LinearScores.of(scores, *parts, tokens, heads)
        with torch.no_grad():
            mine = found.change(picked(self.queries, tokens, heads).to(found.now.dtype))
            mine = mine.masked_fill(found.now == -torch.inf, -torch.inf)
            difference = (mine.softmax(-1) - found.now.softmax(-1)).abs().max()
        return found if float(difference) <= _tolerance(scores) else None

    def check(self, scores: Scores) -> None:
        """Raise unless the scores computed here are those of the model.

        Raises:
            ValueError: this attention computes them in a way that is not known here, or a hook
                between `hook_q` and the scores changes them.
        """
        with torch.no_grad():
            mine = self.scores(self.queries.detach()).softmax(-1)
            difference = float((mine.nan_to_num() - scores.softmax(-1).nan_to_num()).abs().max())
        if not difference <= _tolerance(scores):
            raise ValueError(
                f"the attention at layer {self._site.layer} differs by {difference:.2g} from what "
                "its queries and keys give: the architecture is not supported for edits that see "
                "keys, or a hook on hook_rot_q, hook_rot_k or hook_attn_scores changes it; of "
                "several that see keys make one with JoinedSteerers"
            )

    def _keep(self, key: str) -> Hook:
        def keep(activation: Tensor, hook: Any) -> None:
            del hook  # its name differs between the backends
            n_tokens, d_head = activation.shape[:2], self._site.d_head
            self._kept[key] = activation.reshape(*n_tokens, -1, d_head)

        vars(keep)["reads_last"] = self
        return keep

    def _before(self, _attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        self._kept = {"arguments": given, "past": self._past(given), "added": []}
        for point in self._points:
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


def _hooked_scores(
    attention: Any, kept: dict[str, Any], rows: Tensor, columns: Tensor, *, rotated: bool
) -> ScoresOf:
    config, given, n_pos = attention.cfg, kept["arguments"], kept["q"].shape[1]
    k, past, mask = kept["k"][rows], kept["past"], _rows_of(given.get("attention_mask"), rows)
    offset = 0 if past is None else past.shape[1]
    rotary = config.positional_embedding_type == "rotary"
    if config.use_qk_norm:
        k = attention._apply_qk_norm(k, attention.k_norm)
    k = k if past is None else torch.cat([past[rows], k], dim=1)
    k = attention.apply_rotary(k, 0, mask) if rotary else k
    masked = k.new_zeros(len(rows), 1, n_pos, k.shape[1])
    if config.attention_dir == "causal":
        masked = attention.apply_causal_mask(masked, offset, mask)
    additive = _rows_of(given.get("additive_attention_mask"), rows)
    masked = (masked if additive is None else masked + additive)[:, :, columns]

    def scores(q: Tensor) -> Tensor:
        if config.use_qk_norm and not rotated:
            q = attention._apply_qk_norm(q, attention.q_norm)
        q = attention.apply_rotary(q, offset, mask) if rotary and not rotated else q
        return attention.calculate_attention_scores(q[:, columns], k) + masked

    return scores


def _bridge_scores(
    attention: Any, kept: dict[str, Any], rows: Tensor, columns: Tensor, *, rotated: bool
) -> ScoresOf:
    inner, given, past = attention.original_component, kept["arguments"], kept["past"]
    n_heads, n_pos = kept["q"].shape[2], kept["q"].shape[1]
    k, turns = kept["k"][rows].transpose(1, 2), []
    norms = getattr(attention, "_qk_norm_phase", None) == "post_reshape"
    if norms:
        k = attention.k_norm.original_component(k)
    if given.get("position_embeddings") is not None:
        turns = [_rows_of(turn, rows) for turn in given["position_embeddings"]]
        k = _rotated(k, *turns)
        turns = [turn[:, columns] for turn in turns]
    k = k if past is None else torch.cat([past[rows], k], dim=2)
    k = k.repeat_interleave(n_heads // k.shape[1], dim=1)
    masked = attention._apply_reconstruct_attention_mask(
        attn_scores=k.new_zeros(len(rows), 1, n_pos, k.shape[2]),
        attention_mask=_rows_of(given.get("attention_mask"), rows),
        seq_len=k.shape[2],
        q_seq_len=n_pos,
    )[:, :, columns]
    cap = getattr(inner, "attn_logit_softcapping", None)

    def scores(q: Tensor) -> Tensor:
        q = q[:, columns].transpose(1, 2)
        if norms and not rotated:
            q = attention.q_norm.original_component(q)
        q = _rotated(q, *turns) if turns and not rotated else q
        found = q @ k.mT * getattr(inner, "scaling", q.shape[-1] ** -0.5)
        return (found if cap is None else (found / cap).tanh() * cap) + masked

    return scores


Linear = tuple[Tensor, Turn | None]
"""Keys [batch group key d_head], rotated and times the scale, and what rotates the queries."""


def _hooked_linear(attention: Any, kept: dict[str, Any], *, rotated: bool) -> Linear | None:
    config, given, past = attention.cfg, kept["arguments"], kept["past"]
    if (config.use_qk_norm and not rotated) or (config.attn_scores_soft_cap or 0) > 0:
        return None
    k, turn = kept.get("rotated k"), None
    if k is None:
        k = kept["k"] if past is None else torch.cat([past, kept["k"]], dim=1)
    elif not rotated:
        offset, mask = 0 if past is None else past.shape[1], given.get("attention_mask")
        place = slice(offset, offset + kept["q"].shape[1])
        if mask is not None:
            place = get_offset_position_ids(offset, mask)
        cos, sin = (wave[place] for wave in (attention.rotary_cos, attention.rotary_sin))
        cos, sin = (wave if wave.ndim == 3 else wave[None] for wave in (cos, sin))
        turn = cos, sin, attention.rotate_every_two
    return k.transpose(1, 2) / attention.attn_scale, turn


def _bridge_linear(attention: Any, kept: dict[str, Any], *, rotated: bool) -> Linear | None:
    inner, given, past = attention.original_component, kept["arguments"], kept["past"]
    norms = getattr(attention, "_qk_norm_phase", None) == "post_reshape"
    if (norms and not rotated) or getattr(inner, "attn_logit_softcapping", None) is not None:
        return None
    k, turn = kept["k"].transpose(1, 2), None
    if norms:
        k = attention.k_norm.original_component(k)
    if given.get("position_embeddings") is not None:
        cos, sin = given["position_embeddings"]
        k, turn = _rotated(k, cos, sin), None if rotated else (cos, sin, _flipped)
    k = k if past is None else torch.cat([past, k], dim=2)
    return k * getattr(inner, "scaling", k.shape[-1] ** -0.5), turn


def _tolerance(scores: Scores) -> float:
    """Return by how much attention computed here may differ from that of the model."""
    return 1e-4 if scores.dtype in (torch.float32, torch.float64) else 5e-2


def _rows_of(values: Tensor | None, rows: Tensor) -> Any:
    """Return some rows of a tensor as a copy; one row stands for all."""
    if values is None:
        return None
    return values.clone() if len(values) == 1 else values[rows]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys [batch head pos d_head] after rotary embedding, partial or whole."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + _flipped(turned) * sin, rest], dim=-1)


def _flipped(x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([-two, one], dim=-1)
