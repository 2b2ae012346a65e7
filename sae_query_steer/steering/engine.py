"""The engine: apply edits to the activations of a model, in every forward pass of a `with` block.

Everything is checked before the first hook is placed. A hook returns a new tensor, in which only
the chosen heads at the scoped tokens differ; heads and tokens that are not chosen are bitwise as
they were. Nothing is left behind, after an exception too. A pass that ran without an edit, because
something removed its hook, ends in an error.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.models.activations import check_finite, pattern_hook
from sae_query_steer.models.attention_scores import ScoresReader
from sae_query_steer.models.loading import check_eager
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.token_scores import picked, put
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.sae.encoders import in_32_bits
from sae_query_steer.scopes.joins import needs_tokens
from sae_query_steer.scopes.positions import Positions, PromptLengths, Scope, TokenPositions, select
from sae_query_steer.sites import QuerySite, check_hook_point
from sae_query_steer.steering.block import SteeringWarning, block
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.recorder import Recorder
from sae_query_steer.steering.trace import QueryChange, SteeringTrace
from sae_query_steer.steering.where import SiteHeads, Where

AFTER_PATTERN = ("hook_z", "hook_resid_mid", "hook_resid_post")
"""Hook points that come after the attention pattern of their layer."""

LARGE_CHANGE = 10.0
"""Change of an activation, in units of the largest norm of those that change, above which
`SteeringWarning` is issued. Source: our choice; effective steers of the toy model have 1 to 4."""


class Changes(NamedTuple):
    """How much some tokens changed at a site."""

    tokens: TokenPositions

    relative: Float[Tensor, "token head"]
    """|change| / |activation|."""


@block
def apply_edits(
    model: Any,
    edits: Sequence[tuple[Edit, Where]],
    *,
    record: bool = False,
    record_attention: bool = False,
    prompt_lengths: PromptLengths | None = None,
    changes: list[Changes] | None = None,
) -> Iterator[tuple[SteeringTrace, ...]]:
    """Apply edits in every forward pass of a model for the length of a `with` block.

    At a site that several edits change, each acts on what those before it made of the activation.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        edits: edits, and where each acts; the first acts first.
        record: keep a trace of what was done.
        record_attention: the same, and keep the attention of the edited tokens.
        prompt_lengths: tokens of each row's prompt (BOS included, padding not), for forward passes
            that do not come from `generate`.
        changes: gets how much each edit changes, which costs less than a trace.

    Yields:
        A trace of each edit, in order.

    Raises:
        ValueError: the model is compiled, or has no such site, or attention is to be recorded that
            no edit can change.
        RuntimeError: at the end of a forward pass, or of the block: a hook of an edit was removed.

    Warns:
        SteeringWarning: it is never entered, or no forward pass ran in the block.
    """
    check_eager(model)
    for _, where in edits:
        where.check(model)
        late = [name for name in where.chosen if name.endswith(AFTER_PATTERN)]
        if record_attention and late:
            raise ValueError(
                f"record_attention needs edits before the attention of their layer, got {late[0]}: "
                "use record=True"
            )
    layers = {at.site.layer for _, where in edits for at in where.chosen.values()}
    for layer in layers if record_attention else ():
        check_hook_point(model, pattern_hook(layer))
    record = record or record_attention
    traces = tuple(
        SteeringTrace(recording=record, tokenizer=model.tokenizer, **edit.labels)
        for edit, _ in edits
    )
    keep_tokens = record or any(e.needs_keys or needs_tokens(w.scope) for e, w in edits)
    tracker = PositionTracker(model, sorted(layers), prompt_lengths, keep_tokens=keep_tokens)
    hooks: list[tuple[str, Hook]] = []
    readers: dict[str, ScoresReader] = {}
    for (edit, where), trace in zip(edits, traces, strict=True):
        recorder = Recorder(trace, tracker) if record else None
        scope = tokens_once(where.scope)
        for name, at in where.chosen.items():
            applied = AppliedEdit(edit, at, scope, recorder, changes=changes)
            if not edit.needs_keys:
                hooks.append((name, applied.hook(lambda _: tracker.positions)))
            elif not isinstance(at.site, QuerySite):
                raise ValueError(
                    f"{type(edit).__name__} sees keys, so its sites must be queries, got {name}"
                )
            else:
                if name not in readers:  # edits of one site see each other's queries in it
                    readers[name] = ScoresReader(model, at.site)
                    hooks += readers[name].hooks()
                hook = applied.keyed_hook(tracker, readers[name])
                hooks.append((f"blocks.{at.site.layer}.attn.hook_attn_scores", hook))
            if record_attention and recorder is not None:
                keep = partial(recorder.keep_attention, at.site.layer)
                hooks.append((pattern_hook(at.site.layer), keep))
    points = model.hook_dict if readers else {}
    with ExitStack() as stack:
        for reader in readers.values():
            stack.enter_context(reader.listening(points))
        stack.enter_context(tracker.attached(hooks))
        yield traces
    warn_unless_heard(tracker)


def warn_unless_heard(tracker: PositionTracker) -> None:
    """Warn if no forward pass ran in the block that ends."""
    if not tracker.heard:
        warnings.warn(
            "no forward pass ran in the `with` block, so nothing was steered: generate inside it",
            SteeringWarning,
            stacklevel=3,
        )


@dataclass(eq=False)
class AppliedEdit:
    """An edit at one site: makes its changes, checks and keeps them.

    It warns once of a change that diverged or overshot. An overshoot is looked for in the first
    change alone: it costs a recorded descent.
    """

    edit: Edit
    """The edit."""

    at: SiteHeads
    """The site and the heads that change."""

    find: Callable[[Positions], TokenPositions]
    """Finds the tokens that change; made by `tokens_once`."""

    recorder: Recorder | None = None
    """What keeps a trace."""

    checked: bool = True
    """Whether a change that is not finite, very large or an overshoot is told."""

    changes: list[Changes] | None = None
    """Gets how much the edit changes."""

    _first: bool = field(init=False, default=True)
    _warned: bool = field(init=False, default=False)

    def hook(self, positions_of: Callable[[Tensor], Positions | None]) -> Hook:
        """Return the hook of the edit at its site.

        Args:
            positions_of: where the columns of an activation [batch pos head d_head] stand; None
                where the activation is none of this model's.
        """

        def change(activation: Tensor, hook: Any) -> Tensor | None:
            del hook  # its name differs between the backends
            whole = by_head(activation, self.at)
            tokens = self._tokens(positions_of(whole))
            if tokens is None:
                return None
            index = tokens.index(self.at.heads)
            # As in most decode steps: nothing has to be gathered.
            every = self.at.every and len(tokens.row) == whole.shape[0] * whole.shape[1]
            before = whole.flatten(0, 1) if every else whole[index]
            with torch.autocast(before.device.type, enabled=False):
                after, _ = self._made(before, tokens)
            edited = after if every else whole.index_put(index, after)
            return edited.reshape(activation.shape)

        vars(change)["steers_queries"] = True  # read by models.loading.check_not_steered
        return change

    def keyed_hook(self, tracker: PositionTracker, reader: ScoresReader) -> Hook:
        """Return the hook, on the attention scores, of an edit that sees keys."""

        def change(scores: Tensor, hook: Any) -> Tensor | None:
            del hook  # its name differs between the backends
            positions = tracker.positions
            tokens = self._tokens(positions)
            if positions is None or tokens is None:
                return None
            with torch.autocast(scores.device.type, enabled=False):
                keys = AttentionKeys(reader, self.at, tokens, scores, positions, tracker)
                _ = keys.position  # a cache with other keys is refused
                chosen = tokens, self.at.heads
                linear, before = keys.linear, picked(reader.queries, *chosen)
                after, made = self._made(before, tokens, keys=keys)
                by_token = scores.transpose(1, 2)
                change = linear.change(made.delta) if linear else keys.by_queries.added(after)
                new = picked(by_token, *chosen) + change.to(scores.dtype)
                if made.score_bias is not None:
                    new = new + made.score_bias.to(new.dtype)
                    reader.note_bias()
                reader.queries = put(reader.queries, *chosen, after)
                return put(by_token, *chosen, new).transpose(1, 2)

        vars(change)["steers_queries"] = True  # read by models.loading.check_not_steered
        return change

    def _tokens(self, positions: Positions | None) -> TokenPositions | None:
        """Return the scoped tokens of a forward pass of this model; None without any."""
        if positions is None:
            return None
        if self.recorder is not None:
            self.recorder.read(positions)
        tokens = self.find(positions)
        return tokens if len(tokens.row) else None

    def _made(
        self, before: Tensor, tokens: TokenPositions, **keys: AttentionKeys
    ) -> tuple[Tensor, QueryChange]:
        edit: Any = self.edit  # only one that needs `keys` has such a parameter
        record = self.recorder is not None
        made = edit.change(in_32_bits(before), self.at, tokens, record=record, **keys)
        after = before + made.delta.to(before.dtype)
        if self.checked:
            self._check(before, made, after, tokens)
        if self.recorder is not None:
            self.recorder.keep(made, before, self.at, tokens)
        if self.changes is not None:
            moved, size = (x.detach().float().norm(dim=-1) for x in (made.delta, before))
            self.changes.append(Changes(tokens, (moved / size.clamp(min=1e-30)).cpu()))
        return after, made

    def _check(
        self, before: Tensor, made: QueryChange, after: Tensor, tokens: TokenPositions
    ) -> None:
        size = _checked_size(before, made.delta, after, self.at.hook_name)
        first, self._first = self._first, False
        if self._warned or not (first or size > LARGE_CHANGE):
            return
        overshot, progress = False, ""
        if self.edit.has_target:
            if made.loss is None:
                with torch.no_grad():
                    made = self.edit.change(in_32_bits(before), self.at, tokens, record=True)
            overshot, progress = self.edit.progress(made, tokens)
        if overshot or size > LARGE_CHANGE:
            self._warned = True
            warnings.warn(
                f"the change at {self.at.hook_name} is {size:.3g} times the activations' norm"
                f"{progress}: use a smaller step_size or fewer steps",
                SteeringWarning,
                stacklevel=2,
            )


def tokens_once(scope: Scope) -> Callable[[Positions], TokenPositions]:
    """Return what finds the tokens of a scope, once for all sites of a forward pass."""
    last: list[tuple[Positions, TokenPositions]] = []

    def find(positions: Positions) -> TokenPositions:
        if not last or last[0][0] is not positions:
            last[:] = [(positions, positions.tokens_at(select(scope, positions)))]
        return last[0][1]

    return find


def by_head(activation: Tensor, at: SiteHeads) -> Tensor:
    """Return an activation as [batch pos head d_head], whatever its layout."""
    if activation.ndim == 4:
        return activation
    return rearrange(activation, "b p (h d) -> b p h d", h=at.site.n_heads, d=at.site.d_head)


def _checked_size(before: Tensor, delta: Tensor, after: Tensor, hook_name: str) -> float:
    """Return the size of a change in units of the largest norm; 0 where all activations are 0.

    Raises:
        ValueError: the change, or what it makes of the activations, is not finite.
    """
    norms = [values.detach().norm(dim=-1).max() for values in (delta, before)]
    numbers = [number.float() for number in (after.detach().abs().max(), *norms)]
    largest, moved, norm = torch.stack(numbers).tolist()  # one wait for the device
    if not math.isfinite(largest):
        check_finite(before, hook_name)
        raise ValueError(
            f"the edit at {hook_name} is not finite: the descent diverged, or overflows "
            f"{before.dtype}; use a smaller step_size, fewer steps or less strength"
        )
    return moved / norm if norm > 0 else 0.0
