"""Run the first tokens of some rows once, and the tokens after them as often as is asked."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformers import DynamicCache

from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.models.activations import eval_mode
from sae_query_steer.models.tracking import BEGUN
from sae_query_steer.scopes.positions import Positions, by_position


class PrefixedRows:
    """The last tokens of some rows, behind a KV cache of those before them.

    The cache is made once, without gradients, and is never written again: each pass extends a copy
    that shares its tensors. So a pass costs the last tokens alone. It runs through all layers,
    unless `unchanged` kept what a HookedTransformer needs to start later; TransformerBridge has no
    `start_at_layer`.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        batch: the rows.
        start: position of the first token of each row that is not in the cache.
        stop: position after the last token that is needed; None means the row's end.
    """

    def __init__(
        self,
        model: Any,
        batch: TokenBatch,
        start: Int[Tensor, " batch"],
        stop: Int[Tensor, " batch"] | None = None,
    ) -> None:
        self.model = model
        self._is_bridge = not isinstance(model, HookedTransformer)
        self._start = start
        # Aligned at the border: the prefixes are padded on the left, the rest on the right.
        before = [row[:first] for row, first in zip(batch.tokens, start.tolist(), strict=True)]
        prefix = pad_sequence(before, batch_first=True, padding_side="left")
        self._prefix = prefix
        self._seen = torch.arange(prefix.shape[1]) >= prefix.shape[1] - start[:, None]
        self._follow(batch, stop)
        self._cache: Any = None
        if prefix.shape[1]:
            with torch.no_grad():
                self._cache = self._new_cache(len(prefix))
                self._run(prefix, self._cache, (), last=True)

    def followed_by(self, batch: TokenBatch) -> "PrefixedRows":
        """Return rows that share the cache, and so the tokens before `start`, with other rows."""
        other = copy.copy(self)
        other._follow(batch, None)
        return other

    def _follow(self, batch: TokenBatch, stop: Int[Tensor, " batch"] | None) -> None:
        """Set the tokens after the cache."""
        start, ends = self._start, batch.lengths if stop is None else stop
        rows = zip(batch.tokens, start.tolist(), ends.tolist(), strict=True)
        self.tokens: Int[Tensor, "batch pos"] = pad_sequence(
            [row[first:end] for row, first, end in rows], batch_first=True
        )
        new = torch.arange(self.tokens.shape[1]) < (ends - start)[:, None]
        self._mask = torch.cat([self._seen, new], dim=1).long()
        self.positions = Positions(
            index=start[:, None] + torch.arange(self.tokens.shape[1]),
            valid=new,
            prompt_lengths=batch.prompt_lengths,
            lengths=batch.lengths,
            tokens=batch.positions.tokens,
        )
        self._residuals: dict[int, Tensor] = {}

    @property
    def before(self) -> Positions:
        """Positions of the tokens in the cache."""
        return Positions(
            index=self._seen.cumsum(1) - 1,
            valid=self._seen,
            prompt_lengths=self.positions.prompt_lengths,
            tokens=by_position(self._prefix, self._seen),
        )

    @property
    def n_bytes(self) -> int:
        """Size of the cache."""
        parts: Any = [] if self._cache is None else self._layers(self._cache)
        tensors = [value for part in parts for value in vars(part).values()]
        return sum(value.nbytes for value in tensors if isinstance(value, Tensor))

    @torch.no_grad()
    def generate(self, max_new_tokens: int, ends: Sequence[int]) -> Int[Tensor, "batch new"]:
        """Return greedy continuations, as `model.generate` would write them; hooks see each pass.

        Args:
            max_new_tokens: most tokens of a continuation.
            ends: ids that end a continuation; a row that has ended repeats its end.
        """
        cache = self._new_cache(len(self.tokens)) if self._cache is None else self._copied()
        tokens, mask, written = self.tokens, self._mask, []
        for _ in range(max_new_tokens):
            new = self._run(tokens, cache, (), mask=mask)[:, -1].argmax(-1, keepdim=True).cpu()
            if written and ends:
                ended = torch.isin(written[-1], torch.tensor(ends))
                new = torch.where(ended, written[-1], new)
            written.append(new)
            if ends and bool(torch.isin(new, torch.tensor(ends)).all()):
                break
            tokens, mask = new, torch.cat([mask, torch.ones_like(new)], dim=1)
        return torch.cat(written, dim=1)

    @torch.no_grad()
    def unchanged(self, layers: Iterable[int]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits without hooks, and prepare passes that begin at some layers."""

        def keep(residual: Tensor, hook: Any) -> None:
            self._residuals[hook.layer()] = residual.clone()

        if self._is_bridge or self.model.cfg.positional_embedding_type == "shortformer":
            return self.logits()
        return self.logits([(f"blocks.{layer}.hook_resid_pre", keep) for layer in {*layers}])

    def logits(
        self, fwd_hooks: Iterable[tuple[str, Any]] = (), *, first_layer: int | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of these tokens in a pass with hooks; with gradients where enabled.

        Args:
            fwd_hooks: as for `model.run_with_hooks`.
            first_layer: the first layer with a hook: those before it are left out where `unchanged`
                was given it and the model can start there.
        """
        cache = None if self._cache is None else self._copied()
        start = self._residuals.get(-1 if first_layer is None else first_layer)
        if start is None:
            return self._run(self.tokens, cache, fwd_hooks)
        return self._run(start, cache, fwd_hooks, start_at_layer=first_layer)

    def columns(
        self, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"]
    ) -> Int[Tensor, " token"]:
        """Return the columns of tokens by their absolute positions."""
        return positions - self.positions.index[rows, 0]

    def _run(
        self,
        tokens: Tensor,
        cache: Any,
        hooks: Iterable[tuple[str, Any]],
        *,
        last: bool = False,
        mask: Tensor | None = None,
        **given: Any,
    ) -> Any:
        """Return the logits of a pass that extends a cache; with `last` at most of the last."""
        device = self.model.cfg.device
        n_past = 0 if cache is None else self._past(cache)
        mask = (self._mask if mask is None else mask)[:, : n_past + tokens.shape[1]].to(device)
        given["attention_mask"] = mask
        if self._is_bridge and cache is not None:
            given |= {"past_key_values": cache, "use_cache": True}
        elif cache is not None:
            given["past_kv_cache"] = cache
            if "start_at_layer" not in given:  # the embedding adds the mask of the past
                given["attention_mask"] = mask[:, n_past:]
        if last and self._is_bridge:  # a large vocabulary is most of the memory
            accepted = inspect.signature(self.model.original_model.forward).parameters
            given |= {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        kind = None if last and not self._is_bridge else "logits"
        with eval_mode(self.model), self.model.hooks(fwd_hooks=list(hooks)):
            return self.model(tokens.to(device), return_type=kind, **given)

    def _past(self, cache: Any) -> int:
        return int(
            cache.get_seq_length() if self._is_bridge else cache.previous_attention_mask.shape[1]
        )

    def _new_cache(self, n_rows: int) -> Any:
        if self._is_bridge:
            return DynamicCache(config=self.model.original_model.config)
        return TransformerLensKeyValueCache.init_cache(
            self.model.cfg, self.model.cfg.device, n_rows
        )

    def _copied(self) -> Any:
        """Return a copy of the cache; what extends it makes new tensors."""
        other = copy.copy(self._cache)
        layers = [copy.copy(layer) for layer in self._layers(self._cache)]
        setattr(other, "layers" if self._is_bridge else "entries", layers)
        for part in (other, *layers):
            setattr(part, BEGUN, (self._prefix, self._seen))
        return other

    def _layers(self, cache: Any) -> list[Any]:
        return cache.layers if self._is_bridge else cache.entries


class PromptCaches:
    """Keeps the caches of prompts that are continued more than once.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        max_bytes: size of all caches at most; what does not fit is made anew each time.
    """

    def __init__(self, model: Any, max_bytes: int) -> None:
        self._model, self._left = model, max_bytes
        self._kept: dict[tuple[tuple[int, ...], ...], PrefixedRows] = {}

    def rows(self, batch: TokenBatch) -> PrefixedRows:
        """Return rows behind the cache of their prompts without the last token."""
        lengths = batch.prompt_lengths
        prompts = zip(batch.tokens.tolist(), lengths.tolist(), strict=True)
        key = tuple(tuple(row[:length]) for row, length in prompts)
        if key in self._kept:
            return self._kept[key].followed_by(batch)
        found = PrefixedRows(self._model, batch, lengths - 1)
        if found.n_bytes <= self._left:
            self._left -= found.n_bytes
            self._kept[key] = found
        return found
