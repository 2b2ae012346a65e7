"""A change of queries as a scope over `model.hooks`: what every steerer shares.

Everything is checked before the first hook is placed; the hook returns a new tensor, in which
only the chosen heads at the scoped positions differ; nothing is left behind, after an exception
too.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.models.activations import check_finite, check_hook_point, pattern_hook
from sae_query_steer.models.loading import check_eager
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.scopes.positions import Positions, Scope, needs_tokens, select
from sae_query_steer.scopes.prompt_lengths import PromptLengths, fixed_positions
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.attention_trace import AttentionRecorder
from sae_query_steer.steering.trace import QueryChange, SteeringTrace, TraceRecord

HookFunction = Callable[..., Tensor | None]


class Steerer(ABC):
    """Something that changes the queries of scoped positions at some sites; a frozen value."""

    scope: Scope
    """Which positions."""

    sites: Mapping[str, QuerySite]
    """The site of every hook name."""

    site_heads: Mapping[str, tuple[int, ...]]
    """The heads that change, by hook name."""

    @abstractmethod
    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model."""

    @abstractmethod
    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace."""

    @abstractmethod
    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return the change of queries of the steered heads of a site.

        Args:
            hook_name: the site.
            queries: of `site_heads[hook_name]` alone, in their order.
            places: where the tokens stand.
            record: also tell how the change came about.
        """

    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        record_attention: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> AbstractContextManager[SteeringTrace]:
        """Steer every forward pass of a model for the length of a `with` block.

        Works in `generate` and `generate_stream` with the KV cache on and off, in batches of
        prompts of different lengths, in plain forward passes and in `run_with_cache`, beside other
        hooks: on the same hook point, hooks placed before see the query as it was, hooks placed
        inside the block see the steered one.

        Args:
            model: a HookedTransformer or a TransformerBridge.
            record: keep a trace of what was done; it costs nothing otherwise.
            record_attention: the same, and keep the attention of the steered tokens, for
                `SteeringTrace.attention_change`.
            prompt_lengths: tokens of each row's prompt (BOS included, padding not), for forward
                passes that do not come from `generate`, where scopes such as `LastPromptToken`
                can't know it.

        Returns:
            A context manager that yields the trace.

        Raises:
            ValueError: the model is not the one that the centroids belong to, or has no such site.
        """
        return self._applied(model, record, record_attention, prompt_lengths)

    def fwd_hooks(
        self,
        model: Any,
        *,
        prompt_lengths: PromptLengths | None = None,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
        """Return plain TransformerLens pairs, for `run_with_hooks` and `model.hooks`.

        They see forward passes over whole rows without a KV cache; inside `generate` use `apply`,
        which knows where a decode step stands.

        Args:
            model: a HookedTransformer or a TransformerBridge.
            prompt_lengths: tokens of each row's prompt; needed by scopes that depend on it.
            attention_mask: 0 where a column is padding, [batch pos]; None means no padding.
            tokens: token ids [batch pos], padding included; needed by scopes that read them, such
                as `AfterToken`.

        Raises:
            ValueError: the model is not the one that the centroids belong to, or has no such site.
        """
        check_eager(model)
        self.check_model(model)
        trace = SteeringTrace(recording=False)

        def positions(queries: Tensor) -> Positions:
            batch, n_pos = queries.shape[:2]
            return fixed_positions(
                batch, n_pos, queries.device, prompt_lengths, attention_mask, tokens
            )

        return [(name, _hook(self, name, positions, trace)) for name in self.site_heads]

    @contextmanager
    def _applied(
        self,
        model: Any,
        record: bool,
        record_attention: bool,
        prompt_lengths: PromptLengths | None,
    ) -> Iterator[SteeringTrace]:
        check_eager(model)
        self.check_model(model)
        record = record or record_attention
        trace = self.new_trace(model, recording=record)
        layers = [self.sites[name].layer for name in self.site_heads]
        keep_tokens = record or needs_tokens(self.scope)
        tracker = PositionTracker(model, layers, prompt_lengths, keep_tokens=keep_tokens)
        attention = AttentionRecorder(trace.attention, tracker) if record_attention else None
        hooks: list[tuple[str, Any]] = [
            (name, _hook(self, name, lambda _queries: tracker.positions, trace, tracker, attention))
            for name in self.site_heads
        ]
        if attention is not None:
            for layer in layers:
                check_hook_point(model, pattern_hook(layer))
                hooks.append((pattern_hook(layer), attention.hook(layer)))
        with tracker.attached(), model.hooks(fwd_hooks=hooks):
            yield trace


def _hook(
    steerer: Steerer,
    hook_name: str,
    positions_of: Callable[[Tensor], Positions],
    trace: SteeringTrace,
    tracker: PositionTracker | None = None,
    attention: AttentionRecorder | None = None,
) -> HookFunction:
    site, heads = steerer.sites[hook_name], steerer.site_heads[hook_name]
    every_head = heads == tuple(range(site.n_heads))

    def steer(activation: Tensor, hook: Any) -> Tensor | None:
        del hook  # its name differs between the hosts
        queries = activation
        if activation.ndim == 3:
            queries = rearrange(activation, "b p (h d) -> b p h d", h=site.n_heads, d=site.d_head)
        positions = positions_of(queries)
        mask = select(steerer.scope, positions)
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows) == 0:
            return None
        everything = every_head and len(rows) == mask.numel()
        index = torch.tensor(heads, device=queries.device)
        if everything:  # as in most decode steps: nothing has to be picked out
            at_scope = queries.flatten(0, 1)
        else:
            at_scope = queries[rows[:, None], columns[:, None], index]
        places = TokenPlaces(
            row=rows,
            position=positions.index[rows, columns],
            n_rows=len(queries),
            prompt_lengths=positions.prompt_lengths,
        )
        change = steerer.change(hook_name, at_scope, places, record=trace.recording)
        changed = at_scope + change.delta.to(queries.dtype)
        if not math.isfinite(float(changed.detach().abs().max())):
            check_finite(at_scope, hook_name)
            raise ValueError(
                f"the change of the queries at {hook_name} is not finite: the descent diverged, or "
                f"overflows {queries.dtype}; use a smaller step_size or fewer steps"
            )
        if everything:
            steered = changed
        else:
            steered = queries.clone()
            steered[rows[:, None], columns[:, None], index] = changed
        if attention is not None:
            attention.steered(site.layer, rows, columns, heads)
        if trace.recording and tracker is not None:
            trace.records.append(
                _record(change, at_scope, index, site.layer, places, columns, tracker)
            )
        return steered.reshape(activation.shape)

    vars(steer)["steers_queries"] = True  # read by hosts.models.check_not_steered
    return steer


def _record(
    change: QueryChange,
    queries: Tensor,
    heads: Tensor,
    layer: int,
    places: TokenPlaces,
    columns: Tensor,
    tracker: PositionTracker,
) -> TraceRecord:
    return TraceRecord(
        run=tracker.run_number,
        layer=layer,
        heads=heads.cpu(),
        row=places.row.cpu(),
        position=places.position.cpu(),
        token=tracker.tokens_at(places.row, columns),
        query_norm=queries.detach().float().norm(dim=-1).cpu(),
        change=change.cpu(),
        query=queries.detach().cpu(),
        places=places.cpu(),
    )


def chosen_heads(
    sites: Mapping[str, QuerySite],
    layers: Sequence[int] | None,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None,
) -> dict[str, tuple[int, ...]]:
    """Return the heads to steer, by hook name.

    Args:
        sites: the sites there are.
        layers: which of their layers; None means all.
        heads: the same heads in each of these layers, or heads by layer; None means all.

    Raises:
        ValueError: a layer or head that there is not, or nothing left to steer.
    """
    by_layer: dict[int, str] = {}
    for name, site in sites.items():
        if site.layer in by_layer:
            raise ValueError(
                f"{by_layer[site.layer]} and {name} are sites of the same layer: make a steerer of "
                "each, and join them with JoinedSteerers"
            )
        by_layer[site.layer] = name
    for name, value in (("layers", layers), ("heads", heads)):
        if isinstance(value, int | float | str):
            raise TypeError(f"{name}={value!r} is not allowed: give a list, such as [{value}]")
    wanted = sorted(by_layer) if layers is None else [operator.index(layer) for layer in layers]
    if isinstance(heads, Mapping):
        wanted = [layer for layer in wanted if layer in heads] if layers is None else wanted
        named = [*wanted, *heads]
    else:
        named = wanted
    for layer in named:
        if layer not in by_layer:
            raise ValueError(f"no SAE for layer {layer}: there is one for {sorted(by_layer)}")
    chosen = {}
    for layer in wanted:
        site = sites[by_layer[layer]]
        here = heads.get(layer) if isinstance(heads, Mapping) else heads
        picked = tuple(range(site.n_heads) if here is None else map(operator.index, here))
        for head in picked:
            if not 0 <= head < site.n_heads:
                raise ValueError(
                    f"no head {head} at layer {layer}: the heads are 0 to {site.n_heads - 1}"
                )
        if not picked or len(set(picked)) != len(picked):
            raise ValueError(
                f"heads={list(picked)} at layer {layer} is not allowed: name at least one head, "
                "and each once"
            )
        chosen[by_layer[layer]] = picked
    if not chosen:
        raise ValueError(f"nothing to steer: layers={layers} and heads={heads} leave no site")
    return chosen
