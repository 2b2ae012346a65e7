"""Attention scores as a function of the queries, with the keys that the running pass will use.

A layer's queries are hooked before its keys, and before the cache is extended, so a hook on queries
cannot see keys. Here queries and keys are kept as the last hooks on them leave them, and the scores
are computed again from both. Masks, and all else that no query changes, are in the scores of the
running pass.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.tensors import get_offset_position_ids

from sae_query_steer.models.calls import hooked
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.token_scores import ScoreParts, TokenScores
from sae_query_steer.scopes.positions import TokenPositions
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

    def note_bias(self) -> None:
        """Note that an edit added to the scores: from now on they are not those of the queries."""
        self._kept["biased"] = True

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if it has none."""
        return self._model.tokenizer

    def scores_at(
        self, scores: Scores, tokens: TokenPositions, heads: Sequence[int]
    ) -> TokenScores:
        """Return the scores of some tokens and heads as a function of their queries.

        Args:
            scores: those of the running pass.
            tokens: which tokens.
            heads: which heads.

        Raises:
            ValueError: this attention computes scores in a way that is not known here, or a hook
                between `hook_q` and the scores changes them.
        """
        made, grad = _bridge_parts if self._is_bridge else _hooked_parts, torch.is_grad_enabled()
        # `generate` is in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            parts = made(self._attention, self._kept, rotated=self._site.rotated)
            found = TokenScores.of(scores, self.queries, parts, tokens, heads)
            mine = found.unmasked.detach()  # kept in `found`, with gradients where these are on
        mine = mine.masked_fill(found.now == -torch.inf, -torch.inf).softmax(-1).nan_to_num()
        difference = float((mine - found.now.detach().softmax(-1).nan_to_num()).abs().max())
        if not self._kept["biased"] and not difference <= _tolerance(scores):
            raise ValueError(
                f"the attention at layer {self._site.layer} differs by {difference:.2g} from what "
                "its queries and keys give: the architecture is not supported for edits that see "
                "keys, or a hook on hook_rot_q, hook_rot_k or hook_attn_scores changes it; of "
                "several that see keys make one with JoinedSteerers"
            )
        return found

    def _keep(self, key: str) -> Hook:
        def keep(activation: Tensor, hook: Any) -> None:
            del hook  # its name differs between the backends
            n_tokens, d_head = activation.shape[:2], self._site.d_head
            self._kept[key] = activation.reshape(*n_tokens, -1, d_head)

        vars(keep)["reads_last"] = self
        return keep

    def _before(self, _attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        self._kept = {"arguments": given, "past": self._past(given), "biased": False}
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


def _hooked_parts(attention: Any, kept: dict[str, Any], *, rotated: bool) -> ScoreParts:
    config, given, past = attention.cfg, kept["arguments"], kept["past"]
    k, turn, cap = kept.get("rotated k"), None, config.attn_scores_soft_cap
    if k is None:
        k = kept["k"]
        if config.use_qk_norm:
            k = attention._apply_qk_norm(k, attention.k_norm)
        k = k if past is None else torch.cat([past, k], dim=1)
    elif not rotated:
        offset, mask = 0 if past is None else past.shape[1], given.get("attention_mask")
        place = slice(offset, offset + kept["q"].shape[1])
        if mask is not None:
            place = get_offset_position_ids(offset, mask)
        cos, sin = (wave[place] for wave in (attention.rotary_cos, attention.rotary_sin))
        cos, sin = (wave if wave.ndim == 3 else wave[None] for wave in (cos, sin))
        turn = cos, sin, attention.rotate_every_two

    def norm(q: Tensor) -> Tensor:
        return attention._apply_qk_norm(q[None], attention.q_norm)[0]

    own_norm = norm if config.use_qk_norm and not rotated else None
    k = k.transpose(1, 2) / attention.attn_scale
    return ScoreParts(k, turn, own_norm, cap if (cap or 0) > 0 else None)


def _bridge_parts(attention: Any, kept: dict[str, Any], *, rotated: bool) -> ScoreParts:
    inner, given, past = attention.original_component, kept["arguments"], kept["past"]
    norms = getattr(attention, "_qk_norm_phase", None) == "post_reshape"
    k, turn = kept["k"].transpose(1, 2), None
    if norms:
        k = attention.k_norm.original_component(k)
    if given.get("position_embeddings") is not None:
        cos, sin = given["position_embeddings"]
        k, turn = _rotated(k, cos, sin), None if rotated else (cos, sin, _flipped)
    k = k if past is None else torch.cat([past, k], dim=2)
    norm = attention.q_norm.original_component if norms and not rotated else None
    cap = getattr(inner, "attn_logit_softcapping", None)
    return ScoreParts(k * getattr(inner, "scaling", k.shape[-1] ** -0.5), turn, norm, cap)


def _tolerance(scores: Scores) -> float:
    """Return by how much attention computed here may differ from that of the model."""
    return 1e-4 if scores.dtype in (torch.float32, torch.float64) else 5e-2


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys [batch head pos d_head] after rotary embedding, partial or whole."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + _flipped(turned) * sin, rest], dim=-1)


def _flipped(x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([-two, one], dim=-1)
