"""`Steerer`: an edit and where it acts, as a value with `apply`; several as `JoinedSteerers`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sae_query_steer.arguments import check_kind
from sae_query_steer.data.prompts import bos_id
from sae_query_steer.models.loading import check_eager
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Positions, PromptLengths, Scope, fixed_positions
from sae_query_steer.sites import QuerySite, Site
from sae_query_steer.steering.block import block
from sae_query_steer.steering.edit import Edit, encoders_on
from sae_query_steer.steering.engine import AppliedEdit, apply_edits, tokens_once
from sae_query_steer.steering.trace import SteeringTrace
from sae_query_steer.steering.where import Heads, Where
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_belongs


@dataclass(frozen=True, eq=False)
class FromCentroids:
    """Encoders and the centroids that were made with them, on one model."""

    encoders: Mapping[str, QueryEncoder]
    """By hook name."""

    targets: CentroidTargets
    """Their centroids, with the fingerprint of the model."""

    def check_model(self, model: Any) -> None:
        """Raise unless the centroids were made with these encoders on this model.

        Raises:
            ValueError: another model, other SAEs, SAEs on another device, or texts with BOS where
                the model's prompts begin without, or the reverse.
        """
        check_belongs(model, self.encoders, self.targets)
        made = self.targets.prepend_bos
        if made is None or self.targets.chat_template or model.tokenizer is None:
            return
        if made != (bos_id(model) is not None):
            raise ValueError(
                f"the centroids were made with prepend_bos={made}, but by "
                f"model.cfg.default_prepend_bos={model.cfg.default_prepend_bos} prompts begin "
                f"{'without' if made else 'with'} BOS: set it to {made} (and pass the same to "
                "generate), or make the centroids anew"
            )

    def to(self, device: str | torch.device) -> "FromCentroids":
        """Return it with its encoders on a device."""
        return replace(self, encoders=encoders_on(self.encoders, device))


@dataclass(frozen=True, eq=False, repr=False)
class Steerer:
    """An edit of activations and where it acts: construct it, apply it to a model."""

    edit: Edit
    """What is added."""

    where: Where
    """At which sites, heads and tokens."""

    _: KW_ONLY

    origin: "FromCentroids | Steerer | None" = None
    """What knows the model that it belongs to; None means any that has the sites."""

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
            (name, AppliedEdit(self.edit, at, tokens_once(self.where.scope)).hook(positions))
            for name, at in self.where.chosen.items()
        ]


@dataclass(frozen=True, eq=False, repr=False)
class EncoderSteerer(Steerer):
    """A steerer that is its own edit of latents."""

    _: KW_ONLY

    scope: Scope = field(default_factory=LastPromptToken)
    """Where to steer. A steer that is clean at the last prompt token breaks the text elsewhere."""

    layers: Sequence[int] | None = None
    """Which layers; None means all that have an SAE."""

    heads: Heads | None = None
    """Which heads: the same in every layer, or by layer; None means all."""

    edit: Edit = field(init=False)
    where: Where = field(init=False)
    origin: FromCentroids | None = field(init=False, default=None)

    def _act_at(self, sites: Mapping[str, QuerySite | Site]) -> None:
        where = Where(sites.values(), scope=self.scope, layers=self.layers, heads=self.heads)
        object.__setattr__(self, "edit", self)
        object.__setattr__(self, "where", where)


@dataclass(frozen=True)
class JoinedSteerers:
    """Steerers that act in the order in which they are listed, as nested `with` blocks would.

    At a site that two of them steer, the second sees the query that the first has changed; sites of
    later layers always see what earlier layers did.
    """

    steerers: tuple[Steerer, ...]
    """The first acts first."""

    def __init__(self, *steerers: Steerer) -> None:
        if not steerers:
            raise ValueError("JoinedSteerers() needs at least one steerer; got none")
        for steerer in steerers:
            check_kind("each steerer", steerer, Steerer, "JoinedSteerers(one, two)")
        object.__setattr__(self, "steerers", steerers)

    @block
    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        record_attention: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> Iterator[tuple[SteeringTrace, ...]]:
        """Steer every forward pass of a model for the length of a `with` block.

        Args, Raises and Warns as `Steerer.apply`; every steerer is checked before the first acts.

        Returns:
            A context manager that yields a trace of each steerer, in order.
        """
        for steerer in self.steerers:
            steerer.check_model(model)
        edits = [(steerer.edit, steerer.where) for steerer in self.steerers]
        with apply_edits(
            model,
            edits,
            record=record,
            record_attention=record_attention,
            prompt_lengths=prompt_lengths,
        ) as traces:
            yield traces


AnySteerer = Steerer | JoinedSteerers | None
"""None steers nothing."""


def parts_of(steerer: AnySteerer) -> tuple[Steerer, ...]:
    """Return the steerers that a steerer consists of."""
    if steerer is None:
        return ()
    return steerer.steerers if isinstance(steerer, JoinedSteerers) else (steerer,)
