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
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sae_query_steer.models.activations import check_finite, pattern_hook
from sae_query_steer.models.attention_scores import ScoresReader
from sae_query_steer.models.loading import check_eager
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.sae.encoders import in_32_bits
from sae_query_steer.scopes.joins import needs_tokens
from sae_query_steer.scopes.positions import Positions, PromptLengths, Scope, TokenPositions, select
from sae_query_steer.sites import QuerySite, check_hook_point
from sae_query_steer.steering.attention_trace import AttentionRecorder
from sae_query_steer.steering.block import SteeringWarning, block
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.trace import QueryChange, SteeringTrace, TraceRecord
from sae_query_steer.steering.where import SiteHeads, Where

LARGE_CHANGE = 10.0
"""Change of an activation, in units of the largest norm of those that change, above which
`SteeringWarning` is issued. Source: our choice; effective steers of the toy model have 1 to 4."""


@block
def apply_edits(
    model: Any,
    edits: Sequence[tuple[Edit, Where]],
    *,
    record: bool = False,
    record_attention: bool = False,
    prompt_lengths: PromptLengths | None = None,
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

    Yields:
        A trace of each edit, in order.

    Raises:
        ValueError: the model is compiled, or has no such site.
        RuntimeError: at the end of a forward pass, or of the block: a hook of an edit was removed.

    Warns:
        SteeringWarning: it is never entered, or no forward pass ran in the block.
    """
    check_eager(model)
    for _, where in edits:
        where.check(model)
    if record_attention:
        for _, where in edits:
            for at in where.chosen.values():
                check_hook_point(model, pattern_hook(at.site.layer))
    record = record or record_attention
    traces = tuple(new_trace(model, edit, recording=record) for edit, _ in edits)
    layers = {at.site.layer for _, where in edits for at in where.chosen.values()}
    keep_tokens = record or any(e.needs_keys or needs_tokens(w.scope) for e, w in edits)
    tracker = PositionTracker(model, sorted(layers), prompt_lengths, keep_tokens=keep_tokens)
    hooks: list[tuple[str, Hook]] = []
    readers: dict[str, ScoresReader] = {}
    for (edit, where), trace in zip(edits, traces, strict=True):
        attention = AttentionRecorder(trace.attention, tracker) if record_attention else None
        seen = _Recorder(trace, tracker, attention) if record else None
        for name, at in where.chosen.items():
            if edit.needs_keys:
                if name not in readers:  # edits of one site see each other's queries in it
                    readers[name] = ScoresReader(model, _query_site(edit, at))
                    hooks += readers[name].hooks()
                hook = keyed_hook(edit, at, where.scope, tracker, readers[name], seen)
                hooks.append((f"blocks.{at.site.layer}.attn.hook_attn_scores", hook))
            else:
                hook = edit_hook(edit, at, where.scope, lambda _: tracker.positions, seen)
                hooks.append((name, hook))
            if attention is not None:
                hooks.append((pattern_hook(at.site.layer), attention.hook(at.site.layer)))
    with ExitStack() as stack:
        for reader in readers.values():
            stack.enter_context(reader.listening())
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


def new_trace(model: Any, edit: Edit, *, recording: bool) -> SteeringTrace:
    """Return an empty trace of an edit."""
    return SteeringTrace(recording=recording, tokenizer=model.tokenizer, **edit.labels)


def edit_hook(
    edit: Edit,
    at: SiteHeads,
    scope: Scope,
    positions_of: Callable[[Tensor], Positions | None],
    seen: "_Recorder | None" = None,
    *,
    checked: bool = True,
) -> Hook:
    """Return the hook of an edit at one site.

    Args:
        edit: the edit.
        at: the site and the heads that change.
        scope: the tokens that change.
        positions_of: where the columns of an activation [batch pos head d_head] stand; None where
            the activation is none of this model's.
        seen: what keeps a trace.
        checked: whether a change that is not finite, very large or an overshoot is told.
    """
    heads, check = at.heads, _ChangeCheck(edit, at) if checked else None

    def change(activation: Tensor, hook: Any) -> Tensor | None:
        del hook  # its name differs between the backends
        whole = by_head(activation, at)
        positions = positions_of(whole)
        if positions is None:
            return None
        if seen is not None:
            seen.read(positions)
        mask = select(scope, positions)
        tokens = positions.tokens_at(mask)
        rows, columns = tokens.row, tokens.column
        assert columns is not None, "tokens of a running pass have columns"
        if len(rows) == 0:
            return None
        every = at.every and len(rows) == mask.numel()
        index = torch.tensor(heads, device=whole.device)
        if every:  # as in most decode steps: nothing has to be gathered
            before = whole.flatten(0, 1)
        else:
            before = whole[rows[:, None], columns[:, None], index]
        with torch.autocast(before.device.type, enabled=False):
            made = edit.change(in_32_bits(before), at, tokens, record=seen is not None)
            after = before + made.delta.to(before.dtype)
            if check is not None:
                check(before, made, after, tokens)
        if every:
            edited = after
        else:
            edited = whole.clone()
            edited[rows[:, None], columns[:, None], index] = after
        if seen is not None:
            seen.keep(made, before, at, tokens)
        return edited.reshape(activation.shape)

    vars(change)["steers_queries"] = True  # read by models.loading.check_not_steered
    return change


def keyed_hook(
    edit: Edit,
    at: SiteHeads,
    scope: Scope,
    tracker: PositionTracker,
    reader: ScoresReader,
    seen: "_Recorder | None" = None,
) -> Hook:
    """Return the hook, on the attention scores, of an edit that sees keys; Args as `edit_hook`."""
    check = _ChangeCheck(edit, at)

    def change(scores: Tensor, hook: Any) -> Tensor | None:
        del hook  # its name differs between the backends
        positions = tracker.positions
        if positions is None:
            return None
        if seen is not None:
            seen.read(positions)
        tokens = positions.tokens_at(select(scope, positions))
        if len(tokens.row) == 0:
            return None
        with torch.autocast(scores.device.type, enabled=False):
            reader.check(scores)
            keys = AttentionKeys(
                reader=reader,
                at=at,
                tokens=tokens,
                position=tracker.key_positions(scores.shape[-1]),
                rows=positions.of_rows(tracker.columns),
            )
            row, head, column = keys.index
            before = reader.queries[row, column, head]
            keyed: Any = edit
            made = keyed.change(in_32_bits(before), at, tokens, record=seen is not None, keys=keys)
            after = before + made.delta.to(before.dtype)
            check(before, made, after, tokens)
            new = keys.scores(after).to(scores.dtype)
            if not made.delta.requires_grad:  # where nothing changes, not up to rounding either
                still = (after == before).all(-1, keepdim=True)
                new = torch.where(still, scores[keys.index], new)
            if made.score_bias is not None:
                new = new + made.score_bias.to(new.dtype)
                reader.add(keys.index, made.score_bias)
            edited = scores.clone()
            edited[keys.index] = new
            reader.queries = reader.queries.index_put((row, column, head), after)
        if seen is not None:
            seen.keep(made, before, at, tokens)
        return edited

    vars(change)["steers_queries"] = True  # read by models.loading.check_not_steered
    return change


def _query_site(edit: Edit, at: SiteHeads) -> QuerySite:
    if not isinstance(at.site, QuerySite):
        raise ValueError(
            f"{type(edit).__name__} sees keys, so its sites must be queries, got {at.hook_name}"
        )
    return at.site


def by_head(activation: Tensor, at: SiteHeads) -> Tensor:
    """Return an activation as [batch pos head d_head], whatever its layout."""
    if activation.ndim == 4:
        return activation
    return rearrange(activation, "b p (h d) -> b p h d", h=at.site.n_heads, d=at.site.d_head)


class _ChangeCheck:
    """Checks every change of a hook, and warns once of one that diverged or overshot.

    An overshoot is looked for in the first change alone: it costs a recorded descent.
    """

    def __init__(self, edit: Edit, at: SiteHeads) -> None:
        self._edit, self._at, self._first, self._warned = edit, at, True, False

    def __call__(
        self, before: Tensor, made: QueryChange, after: Tensor, tokens: TokenPositions
    ) -> None:
        size = _checked_size(before, made.delta, after, self._at.hook_name)
        first, self._first = self._first, False
        if self._warned or not (first or size > LARGE_CHANGE):
            return
        overshot, progress = False, ""
        if self._edit.has_target:
            if made.loss is None:
                with torch.no_grad():
                    made = self._edit.change(in_32_bits(before), self._at, tokens, record=True)
            overshot, progress = self._edit.progress(made, tokens)
        if overshot or size > LARGE_CHANGE:
            self._warned = True
            warnings.warn(
                f"the change at {self._at.hook_name} is {size:.3g} times the activations' norm"
                f"{progress}: use a smaller step_size or fewer steps",
                SteeringWarning,
                stacklevel=2,
            )


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


class _Recorder:
    """Keeps what an edit does in a trace."""

    def __init__(
        self, trace: SteeringTrace, tracker: PositionTracker, attention: AttentionRecorder | None
    ) -> None:
        self._trace, self._tracker, self._attention = trace, tracker, attention

    def read(self, positions: Positions) -> None:
        """Keep the tokens of the rows so far, steered or not."""
        if positions.tokens is not None:
            self._trace.read[self._tracker.run_number] = positions

    def keep(
        self, made: QueryChange, before: Tensor, at: SiteHeads, tokens: TokenPositions
    ) -> None:
        """Keep one change."""
        is_query = isinstance(at.site, QuerySite)
        assert tokens.column is not None, "tokens of a running pass have columns"
        if self._attention is not None:
            self._attention.steered(at.site.layer, tokens.row, tokens.column, at.heads)
        self._trace.records.append(
            TraceRecord(
                run=self._tracker.run_number,
                layer=at.site.layer,
                heads=torch.tensor([-1] if ".hook_resid_" in at.hook_name else at.heads),
                row=tokens.row.cpu(),
                position=tokens.position.cpu(),
                token=self._tracker.tokens_at(tokens.row, tokens.column),
                query_norm=before.detach().float().norm(dim=-1).cpu(),
                change=made.cpu(),
                query=before.detach().cpu() if is_query else None,
                places=tokens.cpu(),
            )
        )
