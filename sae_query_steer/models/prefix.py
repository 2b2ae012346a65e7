"""Run the first tokens of some rows once, and the tokens after them as often as is asked."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.models.activations import eval_mode
from sae_query_steer.models.partial_passes import (
    BlockOutput,
    hooks_of_a_pass,
    reading,
    returning,
)
from sae_query_steer.models.tracking import BEGUN
from sae_query_steer.scopes.positions import Positions, by_position


class PrefixedRows:
    """The last tokens of some rows, behind a KV cache of those before them.

    The cache is made once, without gradients, and is never written again: each pass extends a copy
    that shares its tensors. So a pass costs the last tokens alone. It begins at the layer of its
    first hook if `unchanged` kept the residual stream there: the blocks before it return what was
    kept, on both backends (TransformerBridge has no `start_at_layer`). Logits are computed only for
    the tokens that are read.

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
        self._is_bridge = isinstance(model, TransformerBridge)
        self._start = start
        self._times = 1
        self.shares_cache = False
        """Whether `repeated` rows share the cache; `unchanged` sets it."""
        self.first_layer = 0
        """The first layer that ran in the last pass."""
        self.running: list[Positions] = []
        """Where the tokens of each copy stand in the running pass of `generate`."""
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
                # Logits of one token, because a large vocabulary is most of the memory.
                self._run(prefix, self._cache, read=(torch.tensor([0]), torch.tensor([-1])))

    def followed_by(self, batch: TokenBatch) -> "PrefixedRows":
        """Return rows that share the cache, and so the tokens before `start`, with other rows."""
        other = copy.copy(self)
        other._follow(batch, None)
        return other

    def repeated(self, n: int) -> "PrefixedRows":
        """Return the rows n times, one after another, with what `unchanged` kept.

        On TransformerBridge a row and its copies stand side by side behind one cache, where
        `unchanged` saw that the model takes a mask by which they don't see each other: the cache is
        then not copied. `places` says where a token of a copy is.
        """
        if n == 1 or not self.shares_cache:
            return self.taken(torch.arange(len(self.tokens)).repeat(n))
        other = copy.copy(self)
        other._times, other.tokens = n, self.tokens.repeat(1, n)
        other.positions = replace(
            self.positions,
            index=self.positions.index.repeat(1, n),
            valid=self.positions.valid.repeat(1, n),
        )
        other._kept = {
            layer: replace(output, residual=output.residual.repeat(1, n, 1))
            for layer, output in self._kept.items()
        }
        return other

    def taken(self, rows: Int[Tensor, " row"]) -> "PrefixedRows":
        """Return some of the rows, which may repeat, with what `unchanged` kept."""
        if torch.equal(rows, torch.arange(len(self.tokens))):
            return self
        other = _taken(self, rows)
        other.positions = _taken(self.positions, rows)
        other._kept = {layer: _taken(output, rows) for layer, output in self._kept.items()}
        if self._cache is not None:
            other._cache = self._copied(partial(_taken, rows=rows))
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
        self._kept: dict[int, BlockOutput] = {}
        self.prepared: frozenset[int] = frozenset()
        """The layers that were given to `unchanged`."""

    @property
    def before(self) -> Positions:
        """Positions of the tokens in the cache; their scopes may read the whole prompts."""
        return Positions(
            index=self._seen.cumsum(1) - 1,
            valid=self._seen,
            prompt_lengths=self.positions.prompt_lengths,
            tokens=self.positions.tokens,
        )

    @property
    def n_rows(self) -> int:
        """Number of rows, copies of `repeated` counted."""
        return len(self.tokens) * self._times

    @property
    def n_bytes(self) -> int:
        """Size of the cache."""
        parts: Any = [] if self._cache is None else self._layers(self._cache)
        tensors = [value for part in parts for value in vars(part).values()]
        # A sliding window's keys are the end of a longer tensor.
        kept = [value.untyped_storage() for value in tensors if isinstance(value, Tensor)]
        return sum(storage.nbytes() for storage in kept)

    @torch.no_grad()
    def generate(self, max_new_tokens: int, ends: Sequence[int]) -> Int[Tensor, "batch new"]:
        """Return greedy continuations, as `model.generate` would write them; hooks see each pass.

        Those of `repeated` rows come one copy after another. Where copies share the cache,
        `running` says where their tokens stand in each pass.

        Args:
            max_new_tokens: most tokens of a continuation.
            ends: ids that end a continuation; a row that has ended repeats its end.
        """
        cache = self._new_cache(len(self.tokens)) if self._cache is None else self._copied()
        n, tokens, index = self._times, self.tokens, self.positions.index
        mask = self._mask if n == 1 else self._blocks(self._mask)
        written: list[Tensor] = []  # [batch copy]
        for _ in range(max_new_tokens):
            if n > 1:
                self._stand(index, written)
            logits = self._run(tokens, cache, mask=mask, index=index)
            new = logits.unflatten(1, (n, -1))[:, :, -1].argmax(-1).cpu()
            if written and ends:
                ended = torch.isin(written[-1], torch.tensor(ends))
                new = torch.where(ended, written[-1], new)
            written.append(new)
            if ends and bool(torch.isin(new, torch.tensor(ends)).all()):
                break
            tokens, index = new, index.unflatten(1, (n, -1))[:, :, -1] + 1
            if n > 1:  # a copy sees what its last token saw, and its new one
                mask = mask.unflatten(1, (n, -1))[:, :, -1]
                new = torch.eye(n, dtype=torch.bool).expand(len(new), -1, -1)
            mask = torch.cat([mask, torch.ones_like(new) if n == 1 else new], dim=-1)
        return torch.stack(written, dim=2).transpose(0, 1).flatten(0, 1)

    def _stand(self, index: Int[Tensor, "batch pos"], written: Sequence[Tensor]) -> None:
        """Set `running` for the next pass of `generate`."""
        first = self.tokens.chunk(self._times, dim=1)[0]
        new = torch.ones(len(first), first.shape[1] + len(written), dtype=torch.bool)
        columns = torch.cat([self._seen, new], dim=1)
        self.running = [
            Positions(
                index=own,
                valid=torch.ones_like(own, dtype=torch.bool),
                prompt_lengths=self.positions.prompt_lengths,
                tokens=by_position(
                    torch.cat([self._prefix, first, *(w[:, [copy]] for w in written)], 1), columns
                ),
            )
            for copy, own in enumerate(index.chunk(self._times, dim=1))
        ]

    @torch.no_grad()
    def unchanged(
        self,
        rows: Int[Tensor, " token"],
        positions: Int[Tensor, " token"],
        layers: Iterable[int],
        *,
        copies: bool = False,
    ) -> Float[Tensor, "token d_vocab"]:
        """Return `log_probs` without hooks, and prepare passes that begin at some layers.

        Where layers share keys and values, a pass that begins later differs: none does then. With
        `copies`, see whether rows of `repeated` can share the cache, in one more pass.
        """
        self._kept, self.prepared, self.shares_cache = {}, frozenset(layers), False
        found = self._log_probs(rows, positions, keep=self.prepared - {0})
        if self._kept:
            again = self._log_probs(rows, positions, first_layer=max(self._kept))
            self._kept = self._kept if torch.allclose(again, found, atol=1e-4) else {}
        self.shares_cache = copies and self._takes_blocks(rows, positions, found)
        return found

    def _takes_blocks(self, rows: Tensor, positions: Tensor, expected: Tensor) -> bool:
        """Return whether copies of rows side by side give what the rows give."""
        if self._cache is None or not self._is_bridge:
            return False
        forward = inspect.signature(self.model.original_model.forward)
        if "position_ids" not in forward.parameters:
            return False
        self.shares_cache = True
        both = torch.cat([rows, rows + len(self.tokens)])
        try:
            found = self.repeated(2)._log_probs(both, positions.repeat(2))
        except (RuntimeError, TypeError, ValueError):  # masks of four dimensions are refused
            return False
        return torch.allclose(found, expected.repeat(2, 1), atol=1e-4)

    def log_probs(
        self,
        rows: Int[Tensor, " token"],
        positions: Int[Tensor, " token"],
        fwd_hooks: Iterable[tuple[str, Any]] = (),
        *,
        first_layer: int = 0,
    ) -> Float[Tensor, "token d_vocab"]:
        """Return log probabilities of the token after each of some; with gradients where enabled.

        Args:
            rows: row of each token.
            positions: its absolute position, not before `start`.
            fwd_hooks: as for `model.run_with_hooks`; they see the unembedding of these tokens only.
            first_layer: the first layer with a hook: those before it are left out where `unchanged`
                was given it; `self.first_layer` says whether they were.
        """
        first_layer = first_layer if first_layer in self._kept else 0
        return self._log_probs(rows, positions, fwd_hooks, first_layer=first_layer)

    def _log_probs(
        self, rows: Tensor, positions: Tensor, fwd_hooks: Iterable[Any] = (), **given: Any
    ) -> Tensor:
        cache = None if self._cache is None else self._copied()
        read = self.places(rows, positions)
        (logits,) = self._run(self.tokens, cache, fwd_hooks, read=read, **given)
        return logits.float().log_softmax(-1)

    def places(
        self, rows: Int[Tensor, " token"], positions: Int[Tensor, " token"]
    ) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Return row and column of tokens in a pass, by their rows and absolute positions."""
        n_rows, width = len(self.tokens), self.tokens.shape[1] // self._times
        row = rows % n_rows
        return row, rows // n_rows * width + positions - self._start[row]

    def _run(
        self,
        tokens: Tensor,
        cache: Any,
        hooks: Iterable[tuple[str, Any]] = (),
        *,
        read: tuple[Tensor, Tensor] | None = None,
        first_layer: int = 0,
        keep: Iterable[int] = (),
        mask: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Any:
        """Return the logits of a pass that extends a cache: [1 token d_vocab] of those read."""
        device, blocks = self.model.cfg.device, self.model.blocks
        n_past = 0 if cache is None else self._past(cache)
        mask = self._mask if mask is None else mask
        if self._times > 1:
            mask = self._blocks(mask) if mask.ndim == 2 else mask
            dtype, last = self.model.cfg.dtype, int(self.model.cfg.n_ctx) - 1  # of padding
            index = self.positions.index if index is None else index
            given: dict[str, Any] = {
                "attention_mask": torch.zeros(mask.shape, dtype=dtype)
                .masked_fill(~mask, torch.finfo(dtype).min)[:, None]
                .to(device),
                "position_ids": index.clamp(max=last).to(device),
            }
        else:
            mask = mask[:, : n_past + tokens.shape[1]].to(device)
            given = {"attention_mask": mask}
        if self._is_bridge and cache is not None:
            given |= {"past_key_values": cache, "use_cache": True}
        elif cache is not None:  # the embedding adds the mask of the past
            given = {"past_kv_cache": cache, "attention_mask": mask[:, n_past:]}
        self.first_layer = first_layer
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(hooks_of_a_pass(self.model, hooks))
            if first_layer:
                stack.enter_context(returning(blocks[:first_layer], self._kept[first_layer]))
            for layer in keep:
                handle = blocks[layer - 1].register_forward_hook(partial(self._keep, layer))
                stack.callback(handle.remove)
            if read is not None:
                stack.enter_context(reading(self.model, *read))
            return self.model(tokens.to(device), return_type="logits", **given)

    def _blocks(self, mask: Int[Tensor, "batch key"]) -> Bool[Tensor, "batch pos keys_of_all"]:
        """Return what each token sees: the cache, and the tokens of its own copy up to itself."""
        n, n_past = self._times, self._prefix.shape[1]
        new = mask[:, n_past:].bool()
        own = torch.eye(n, dtype=torch.bool)[:, None, :, None]
        width = new.shape[1]
        within = new[:, None, :] & torch.ones(width, width, dtype=torch.bool).tril()
        blocks = (own & within[:, None, :, None]).flatten(1, 2).flatten(2)
        before = mask[:, None, :n_past].bool().expand(-1, n * width, -1)
        return torch.cat([before, blocks], dim=2)

    def _keep(self, layer: int, _block: Any, _args: Any, output: Any) -> None:
        self._kept[layer] = BlockOutput.of(output)

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

    def _copied(self, copied: Any = copy.copy) -> Any:
        """Return a copy of the cache; what extends it makes new tensors."""
        other = copied(self._cache)
        layers = [copied(layer) for layer in self._layers(self._cache)]
        setattr(other, "layers" if self._is_bridge else "entries", layers)
        for part in (other, *layers):
            setattr(part, BEGUN, (self._prefix, self._seen))
        return other

    def _layers(self, cache: Any) -> list[Any]:
        return cache.layers if self._is_bridge else cache.entries


def _taken(part: Any, rows: Int[Tensor, " row"]) -> Any:
    """Return a copy of an object whose tensors have some of their rows."""
    other = copy.copy(part)
    for name, value in vars(part).items():
        if isinstance(value, Tensor) and value.ndim:
            vars(other)[name] = value[rows.to(value.device)]
    return other


class PromptCaches:
    """Keeps the caches of prompts that are continued more than once.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        max_bytes: size of all caches at most; what does not fit is made anew each time.
    """

    def __init__(self, model: Any, max_bytes: int) -> None:
        self.max_bytes = max_bytes
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
