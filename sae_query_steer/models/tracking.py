"""Where the columns of a running forward pass stand: prompt lengths, padding, cache offset.

A hook sees only a tensor [batch pos head d_head]. What its columns mean is known to the block
around it, which gets attention mask and cache as keyword arguments on both hosts, and to the call
of `generate` that started it. `PositionTracker` listens to both and leaves nothing behind.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_query_steer.models.block_arguments import (
    cache_of,
    cached_length,
    own_columns,
    past_columns,
)
from sae_query_steer.models.calls import Enter, hooked, listening
from sae_query_steer.models.loading import check_prompts_fit
from sae_query_steer.models.placed_hooks import Hook, PlacedHooks
from sae_query_steer.scopes.positions import (
    Positions,
    PromptLengths,
    as_lengths,
    by_position,
    row_lengths,
)

BEGUN = "begun_with"
"""Attribute of a cache that was filled before anyone listened: the tokens [batch past] in it, and
which of them are no padding."""


@dataclass(eq=False)
class _Run:
    """One call of `generate`, or one row that a user's own loop grows."""

    number: int
    prompt_lengths: Int[Tensor, " batch"] | None
    prompts_fit: bool = False
    """Whether the lengths were compared with the rows."""
    columns: Bool[Tensor, "batch total"] | None = None
    tokens: Int[Tensor, "batch total"] | None = None
    from_start: bool = False
    """Whether the tokens are those of all columns, and not of the last ones alone."""
    cache: Callable[[], Any] = lambda: None
    """The cache of a user's own loop, as a weak reference."""


@dataclass
class _State:
    """What is going on; put back when a call that lies inside another one ends."""

    run: _Run
    generating: bool = False
    in_forward: bool = False
    run_begun: bool = False
    embedded: Int[Tensor, "batch new"] | None = None
    positions: Positions | None = None
    located: tuple[Any, ...] = ()
    """The mask and sizes that the last block of this forward pass got, and its positions."""
    layers: set[int] = field(default_factory=set)
    """The followed layers whose blocks ran to their end in the forward pass."""
    ran: set[int] = field(default_factory=set)
    """The numbers of the hooks that ran in it."""


class PositionTracker:
    """Tells, inside a hook of a steered layer, where each column of its query stands.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        layers: the layers whose hooks will ask.
        prompt_lengths: tokens of each row's prompt (BOS included, padding not), for forward
            passes that do not come from `generate`; those of `generate` must be its prompts'.
        keep_tokens: also keep the token ids, for a trace and for scopes that read them.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        prompt_lengths: PromptLengths | None = None,
        *,
        keep_tokens: bool = False,
    ) -> None:
        self._model = model
        self._layers = tuple(layers)
        self._given = as_lengths(prompt_lengths)
        self._keep_tokens = keep_tokens
        config = getattr(vars(model).get("original_model"), "config", None)  # of a bridge
        self._window = getattr(config, "sliding_window", None)
        self._n_runs = 0
        self.heard = False
        """Whether the model was called."""
        self._loops: list[_Run] = []
        self._now = self._nothing_yet()
        self._check_pass: Callable[[set[int], set[int]], None] = lambda _layers, _ran: None

    @property
    def positions(self) -> Positions | None:
        """Where the columns of the running forward pass stand; None outside a followed block."""
        return self._now.positions

    @property
    def columns(self) -> Bool[Tensor, "batch total"]:
        """Which columns of the rows so far are tokens, and not padding."""
        assert self._now.run.columns is not None, "asked outside a block of a steered layer"
        return self._now.run.columns

    @property
    def run_number(self) -> int:
        """Counts calls of `generate` and forward passes outside it, from 0."""
        return self._now.run.number

    @property
    def tokens(self) -> Int[Tensor, "batch total"] | None:
        """Token ids of the rows so far, padding included; None if not kept or not known.

        Where a cache was filled before anyone listened they are those of the last columns alone.
        """
        return self._now.run.tokens

    def tokens_at(
        self, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]
    ) -> Int[Tensor, " token"] | None:
        """Return the token ids at columns of the running forward pass; None where not known."""
        tokens, positions = self.tokens, self.positions
        width = 0 if positions is None else positions.index.shape[1]
        if tokens is None or tokens.shape[1] < width:
            return None
        return tokens[rows, columns + tokens.shape[1] - width].cpu()

    def key_positions(self, n_keys: int) -> Int[Tensor, "batch key"]:
        """Return the absolute position of each key of the running pass; -1 where it is padding.

        Args:
            n_keys: how many keys the layer has: a sliding window's cache holds the last alone.

        Raises:
            ValueError: a static cache, whose keys are more than the tokens so far.
        """
        real = self.columns
        if n_keys > real.shape[1]:
            raise ValueError(
                f"attention must be over the {real.shape[1]} tokens so far, got {n_keys} keys, as "
                "of a static cache: leave cache_implementation out"
            )
        return torch.where(real, real.long().cumsum(1) - 1, -1)[:, -n_keys:]

    @contextmanager
    def attached(self, hooks: Sequence[tuple[str, Hook]] = ()) -> Iterator[None]:
        """Follow the model for the length of a `with` block, with hooks in place.

        Args:
            hooks: pairs of a hook name and a hook, at followed layers; they may ask for positions.

        Raises:
            RuntimeError: see `PlacedHooks`.
        """
        placed = PlacedHooks(self._model, hooks, lambda number: self._now.ran.add(number))
        with ExitStack() as stack:
            for layer in self._layers:
                block = self._model.blocks[layer]
                handle = block.register_forward_pre_hook(
                    self._before_block(layer), with_kwargs=True
                )
                stack.enter_context(hooked(self._model, block, handle))
                handle = block.register_forward_hook(self._after_block(layer))
                stack.enter_context(hooked(self._model, block, handle))
            if self._keep_tokens:
                embed = self._model.embed
                handle = embed.register_forward_pre_hook(self._before_embedding)
                stack.enter_context(hooked(self._model, embed, handle))
            self._check_pass = placed.check_pass
            stack.enter_context(listening(self._model, self))
            stack.enter_context(placed.in_place())
            yield

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Follow a forward pass, and check at its end that the hooks ran in it."""
        self.heard = True
        if self._now.in_forward:
            # A hook of the user's runs the model inside the model: a pass of its own.
            with self._put_back(self._nothing_yet()), self.forward_pass():
                yield
            return
        now = self._now
        now.in_forward, now.run_begun = True, False
        now.layers, now.ran = set(), set()
        try:
            yield
            self._check_pass(now.layers, now.ran)
        finally:
            now.in_forward, now.positions, now.embedded = False, None, None
            now.located = ()

    def generation(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Enter:
        """Follow a call of `generate`: its prompts are the rows of the first forward pass.

        Raises:
            ValueError: a prompt is longer than the model's context, where the model would cut it.
        """
        self.heard = True
        given = inspect.signature(call).bind(*args, **kwargs).arguments
        check_prompts_fit(self._model, given.get("input"), kwargs.get("prepend_bos"))
        run = self._new_run()
        return lambda: self._put_back(_State(run=run, generating=True))

    def _new_run(self) -> _Run:
        run = _Run(number=self._n_runs, prompt_lengths=self._given)
        self._n_runs += 1
        return run

    def _nothing_yet(self) -> _State:
        return _State(run=_Run(number=-1, prompt_lengths=self._given))

    @contextmanager
    def _put_back(self, state: _State) -> Iterator[None]:
        before, self._now = self._now, state
        try:
            yield
        finally:
            self._now = before

    def _before_block(self, layer: int) -> Callable[..., None]:
        block = self._model.blocks[layer]
        inner = getattr(block, "original_component", block)  # the bridge hides the names
        names = list(inspect.signature(inner.forward).parameters)

        def listen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not block:
                return  # a copy of it
            # GPT-2's blocks get mask and cache by position, Llama's by name.
            arguments = dict(zip(names, args, strict=False)) | kwargs
            hidden, cache = arguments[names[0]], cache_of(arguments)
            past = cached_length(cache, layer)
            now = self._now
            if not now.run_begun:
                if not now.generating:
                    now.run = self._run_of_loop(cache, past)
                self._follow_tokens(len(hidden), past + hidden.shape[1])
            now.run_begun = now.in_forward
            given = arguments.get("attention_mask"), past, hidden.shape[:2], hidden.device
            known = now.in_forward and now.located and now.located[0][0] is given[0]
            if not known or now.located[0][1:] != given[1:]:
                now.located = given, self._locate(hidden, arguments, past)
            now.positions = now.located[1]

        return listen

    def _after_block(self, layer: int) -> Callable[..., None]:
        block = self._model.blocks[layer]

        def listen(module: Any, _args: Any, _output: Any) -> None:
            if module is block:  # and not a copy of it
                self._now.layers.add(layer)

        return listen

    def _run_of_loop(self, cache: Any, past: int) -> _Run:
        """Return the run that a forward pass outside generate goes on with, or a new one."""
        alive = [run for run in self._loops if run.cache() is not None]
        run = next((run for run in alive if run.cache() is cache), None) if past else None
        if run is None:
            run = self._new_run()
            if past:  # a cache begun outside, or a copy of one: only the padding may be known
                run.columns = self._now.run.columns
            if (begun := getattr(cache, BEGUN, None) if past else None) is not None:
                run.tokens, run.columns = begun
                run.from_start = True
            if cache is not None:
                run.cache = weakref.ref(cache)
        self._loops = [other for other in alive if other.cache() is not cache]
        self._loops += [run] if cache is not None else []
        return run

    def _follow_tokens(self, batch: int, total: int) -> None:
        """Bring the tokens of the run up to the forward pass that is about to run."""
        run, new = self._now.run, self._now.embedded
        self._now.embedded = None
        if new is None or len(new) != batch or new.shape[1] > total:  # embeddings, not tokens
            if run.tokens is not None and run.tokens.shape != (batch, total):
                run.tokens, run.from_start = None, False
            return
        before, known = total - new.shape[1], run.tokens
        if known is not None and run.from_start and len(known) == batch:
            new = torch.cat([known[:, :before], new.to(known.device)], dim=1)
        run.tokens, run.from_start = new, new.shape[1] == total

    def _locate(self, hidden: Tensor, arguments: dict[str, Any], past: int) -> Positions:
        batch, n_pos = hidden.shape[:2]
        mask = arguments.get("attention_mask")
        run, generating = self._now.run, self._now.generating
        valid = own_columns(mask, batch, n_pos, past, hidden.device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            seen = mask[:, : mask.shape[1] - n_pos].bool().to(hidden.device)
        elif past == 0:
            seen = valid[:, :0]
        elif (told := past_columns(mask, valid, past, self._window)) is not None:
            seen = told
        elif run.columns is not None and len(run.columns) == batch and run.columns.shape[1] >= past:
            seen = run.columns[:, :past].to(hidden.device)
        else:
            seen = valid.new_ones(batch, past)  # the cache was begun outside: no padding known
        run.columns = torch.cat([seen, valid], dim=1)
        if generating and not run.prompts_fit:
            known = run.columns.sum(1)
            given = known if run.prompt_lengths is None else run.prompt_lengths
            if (given := row_lengths(given, run.columns)).tolist() != known.tolist():
                raise ValueError(
                    f"prompt_lengths must be those of the prompts, {known.tolist()}, got "
                    f"{given.tolist()}: leave it out, generate knows them"
                )
            run.prompt_lengths = known
        if run.prompt_lengths is not None and not run.prompts_fit:
            run.prompt_lengths = row_lengths(run.prompt_lengths, run.columns)
            run.prompts_fit = True  # a row only grows: what fits its beginning fits it later on
        tokens = None
        if run.tokens is not None and run.tokens.shape == run.columns.shape:
            tokens = by_position(run.tokens.to(valid.device), run.columns)
        return Positions(
            index=seen.sum(1, keepdim=True) + valid.cumsum(1) - 1,
            valid=valid,
            prompt_lengths=run.prompt_lengths,
            tokens=tokens,
        )

    def _before_embedding(self, _embed: Any, args: tuple[Any, ...]) -> None:
        tokens = args[0] if args else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            return
        self._now.embedded = tokens
