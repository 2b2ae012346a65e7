"""The difference of class means in the residual stream: the usual steering vector, to compare with.

Not at the queries, so no `Steerer`; but scopes, targets by row and traces are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sae_query_steer.baselines.residual_stream import ResidualMeans, check_residual, residual_hook
from sae_query_steer.baselines.simple import above_others, added, check_added
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.descent.strength import each
from sae_query_steer.models.loading import check_eager
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.scopes.positions import (
    LastPromptToken,
    Scope,
    check_scope,
    needs_tokens,
    select,
)
from sae_query_steer.scopes.prompt_lengths import PromptLengths
from sae_query_steer.steering.trace import QueryChange, SteeringTrace, TraceRecord


@dataclass(frozen=True, eq=False)
class ResidualMeanDifference:
    """Adds strength * (mean of the target class - mean of the other classes' means).

    To `blocks.L.hook_resid_post`, at scoped positions of every layer named. The original steers
    one layer at a time; over several, each adds its own difference to what came before.

    Source: contrastive activation addition (arXiv 2312.06681). There the difference is the mean
    over contrastive pairs of a positive and a negative example, and it is added at every position
    after the prompt, with a coefficient of either sign; ours is the difference of the means of
    classes, whose texts need no partners, and is added in the scope.
    """

    means: ResidualMeans
    """From `residual_means`."""

    _: KW_ONLY

    target: str | Sequence[str]
    """The class to steer towards; a list has one for each row of the batch."""

    strength: float | Sequence[float]
    """1 adds the whole difference; 0 or more; a list likewise."""

    scope: Scope = field(default_factory=LastPromptToken)
    """Where to steer."""

    layers: Sequence[int] | None = None
    """After which layers; None means all that have means."""

    _verified: WeakSet[Any] = field(init=False, repr=False, default_factory=WeakSet)

    def __post_init__(self) -> None:
        check_added(self.strength)
        check_scope(self.scope, name="scope", generating=True)
        for target in each(self.target, "target"):
            if target not in self.means.classes:
                raise ValueError(
                    f"no class {str(target)!r}: the classes are {list(self.means.classes)}"
                )
        for layer in self._layers:
            if layer not in self.means.means:
                raise ValueError(
                    f"no means for layer {layer}: there are some for {sorted(self.means.means)}"
                )
        if not self._layers or len(set(self._layers)) != len(self._layers):
            raise ValueError(
                f"layers={list(self._layers)} is not allowed: name at least one, each once"
            )

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(self.means.means if self.layers is None else self.layers)

    def check_model(self, model: Any) -> None:
        """Raise unless the means were taken on this model; a yes is remembered.

        Raises:
            ValueError: another model, or one that shows no residual stream.
        """
        if model in self._verified:
            return
        self.means.check(model, self._layers)
        self._verified.add(model)

    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> AbstractContextManager[SteeringTrace]:
        """Steer every forward pass of a model for the length of a `with` block.

        As `Steerer.apply`: in `generate` and outside it, with the KV cache on and off, in batches.

        Args:
            model: a HookedTransformer or a TransformerBridge.
            record: keep a trace of what was done. Its head is -1, for there is none, and its
                query_norm and relative_change are of the residual stream.
            prompt_lengths: tokens of each row's prompt (BOS included, padding not), for forward
                passes that do not come from `generate`.

        Returns:
            A context manager that yields the trace.

        Raises:
            ValueError: the model is not the one that the means were taken on, or is compiled.
        """
        return self._applied(model, record, prompt_lengths)

    @contextmanager
    def _applied(
        self, model: Any, record: bool, prompt_lengths: PromptLengths | None
    ) -> Iterator[SteeringTrace]:
        check_eager(model)
        self.check_model(model)
        targets = [str(target) for target in each(self.target, "target")]
        trace = SteeringTrace(
            recording=record,
            classes=self.means.classes,
            target=targets[0] if len(set(targets)) == 1 else "",
            row_targets=tuple(targets) if len(set(targets)) > 1 else (),
            method="residual mean difference",
            tokenizer=model.tokenizer,
        )
        keep_tokens = record or needs_tokens(self.scope)
        tracker = PositionTracker(model, self._layers, prompt_lengths, keep_tokens=keep_tokens)
        hooks: list[tuple[str, Any]] = [
            (residual_hook(layer), self._steer(layer, tracker, trace)) for layer in self._layers
        ]
        with tracker.attached(), model.hooks(fwd_hooks=hooks):
            yield trace

    def _steer(
        self, layer: int, tracker: PositionTracker, trace: SteeringTrace
    ) -> Callable[..., Tensor | None]:
        directions = above_others(self.means.means[layer])

        def steer(residual: Tensor, hook: Any) -> Tensor | None:
            del hook  # its name differs between the hosts
            positions = tracker.positions
            rows, columns = select(self.scope, positions).nonzero(as_tuple=True)
            if len(rows) == 0:
                return None
            places = TokenPlaces(
                row=rows,
                position=positions.index[rows, columns],
                n_rows=len(residual),
                prompt_lengths=positions.prompt_lengths,
            )
            at_scope = residual[rows, columns]
            check_residual(at_scope, layer)
            delta = added(
                directions.to(residual.device),
                self.means.classes,
                self.target,
                self.strength,
                places,
            ).to(residual.dtype)
            steered = residual.clone()
            steered[rows, columns] = at_scope + delta
            check_residual(steered[rows, columns], layer)
            if trace.recording:
                trace.records.append(_record(tracker, layer, places, columns, at_scope, delta))
            return steered

        vars(steer)["steers_queries"] = True  # read by hosts.models.check_not_steered
        return steer


def _record(
    tracker: PositionTracker,
    layer: int,
    places: TokenPlaces,
    columns: Tensor,
    residual: Tensor,
    delta: Tensor,
) -> TraceRecord:
    return TraceRecord(
        run=tracker.run_number,
        layer=layer,
        heads=torch.tensor([-1]),
        row=places.row.cpu(),
        position=places.position.cpu(),
        token=tracker.tokens_at(places.row, columns),
        query_norm=residual.detach().float().norm(dim=-1, keepdim=True).cpu(),
        change=QueryChange(delta=delta[:, None]).cpu(),
    )
