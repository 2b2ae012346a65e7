"""`Steerer`: an edit and where it acts, as a value with `apply`."""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sae_query_steer.models.loading import check_eager
from sae_query_steer.scopes.positions import Positions, PromptLengths, fixed_positions
from sae_query_steer.steering.block import block
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.engine import apply_edits, edit_hook
from sae_query_steer.steering.origin import Origin
from sae_query_steer.steering.trace import SteeringTrace
from sae_query_steer.steering.where import Where


@dataclass(frozen=True, eq=False, repr=False)
class Steerer:
    """An edit of activations and where it acts: construct it, apply it to a model."""

    edit: Edit
    """What is added."""

    where: Where
    """At which sites, heads and tokens."""

    _: KW_ONLY

    origin: Origin | None = None
    """Which model it belongs to; None means any that has the sites."""

    _verified: WeakSet[Any] = field(init=False, repr=False, default_factory=WeakSet)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.edit!r:.120}, {self.where!r})"

    def check_model(self, model: Any) -> None:
        """Raise unless the steerer belongs to this model; a yes is remembered.

        A model whose weights are changed in place afterwards is not looked at again.

        Raises:
            TypeError: no model of TransformerLens.
            ValueError: the model is compiled, has no such site, is another model than the edit was
                made for, or lies on another device.
        """
        check_eager(model)
        if model in self._verified:
            return
        self.where.check(model)
        if self.origin is not None:
            self.origin.check_model(model)
        self._verified.add(model)

    def to(self, device: str | torch.device) -> "Steerer":
        """Return this steerer with its weights on a device; what is there already is shared."""
        origin = None if self.origin is None else self.origin.to(device)
        return replace(self, edit=self.edit.to(device), origin=origin)

    @block
    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        record_attention: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> Iterator[SteeringTrace]:
        """Steer every forward pass of a model for the length of a `with` block.

        Works in `generate` and `generate_stream` with the KV cache on and off, in batches of
        prompts of different lengths, in plain forward passes and in `run_with_cache`, beside other
        hooks: on the same hook point, hooks placed before see the activation as it was, hooks
        placed inside the block see the steered one. A deep copy of the model is not steered;
        threads that share the model take turns.

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
            TypeError: no model of TransformerLens.
            ValueError: the model is not the one that the steerer belongs to, or is compiled.
            RuntimeError: at the end of a forward pass, or of the block, if something removed the
                hook, such as `model.reset_hooks()` or SAELens's `add_sae`.

        Warns:
            SteeringWarning: it is never entered, no forward pass ran in the block, or a change is
                very large.
        """
        self.check_model(model)
        with apply_edits(
            model,
            [(self.edit, self.where)],
            record=record,
            record_attention=record_attention,
            prompt_lengths=prompt_lengths,
        ) as traces:
            yield traces[0]

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
            ValueError: the model is not the one that the steerer belongs to, or is compiled, or
                the edit sees keys.
        """
        self.check_model(model)
        if self.edit.needs_keys:
            raise ValueError(
                f"{self!r} sees keys, which plain hooks don't show: use apply, with prompt_lengths "
                "outside generate"
            )

        def positions(activation: Tensor) -> Positions:
            return fixed_positions(activation, prompt_lengths, attention_mask, tokens)

        return [
            (name, edit_hook(self.edit, at, self.where.scope, positions))
            for name, at in self.where.chosen.items()
        ]
