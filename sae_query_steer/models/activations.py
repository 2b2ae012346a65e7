"""Read the activations of a model: one function for both backends and every hook point."""

import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from sae_query_steer.data.batches import example_batches
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.models.partial_passes import hooks_of_a_pass
from sae_query_steer.sites import QuerySite, check_hook_point, check_model

LOGITS = "logits"
"""Stands among hook names for the model's output."""

_NOT_FINITE = {
    torch.float16: " (float16 overflows above 65,504; use bfloat16 or float32)",
    torch.float64: "; in float64 a TransformerBridge makes NaN of padding: use float32, or give "
    "prompts of one length",
}
"""What else to do about activations that are not finite, by their number format."""


@torch.no_grad()
def read_activations(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    hook_names: Iterable[str],
    *,
    fwd_hooks: Iterable[tuple[str, Any]] = (),
    autocast: bool = False,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return activations of one forward pass, which stops after the last layer that is needed.

    The model runs in eval mode with autocast off; both are restored afterwards. Hooks that are on
    the model stay in place.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: rows of ids, padded on the right or not at all: attention is causal, so the
            activations before the padding do not depend on it. Negative ids count as padding.
        hook_names: the hook points; `LOGITS` for the logits.
        fwd_hooks: hooks placed for this pass, as for `model.run_with_hooks`.
        autocast: run in bfloat16 autocast instead.
        keep: called with the name and the value of each activation during the pass; what it
            returns takes the place of the value, whose memory is then free.

    Returns:
        By hook name, on the device of the layer: queries, keys, values and z
        [batch pos head d_head] (keys and values have their own number of heads), the residual
        stream and other vectors of the model [batch pos 1 d_model], attention patterns and scores
        [batch head query key], logits [batch pos d_vocab].

    Raises:
        ValueError: the model has no such hook point.
    """
    names = list(dict.fromkeys(hook_names))
    check_model(model)
    points = model.hook_dict  # on the bridge 10 ms
    for name in names:
        if name != LOGITS:
            check_hook_point(model, name, points)
    layers = [re.match(r"blocks\.(\d+)\.", name) for name in names]
    stop = None
    if all(layers):
        stop = 1 + max(int(layer[1]) for layer in layers if layer)
    d_head = int(model.cfg.d_head)
    found: dict[str, Tensor] = {}

    def reading(name: str) -> tuple[str, Any]:
        def read(activation: Tensor, hook: Any) -> None:
            del hook
            value = _by_head(activation, name, d_head)
            found[name] = value if keep is None else keep(name, value)

        return name, read

    reads = [reading(name) for name in names if name != LOGITS]
    options: dict[str, Any] = {"stop_at_layer": stop}
    if isinstance(model, TransformerBridge):
        # Not `run_with_cache`, which keeps the attention and the keys and values of all layers.
        square = any(re.search(r"hook_(pattern|attn_scores)$", name) for name in names)
        options = {"output_attentions": True} if square else {}
        meta = str(model.cfg.device) == "meta"  # where masks need a cache
        if getattr(model.original_model.config, "use_cache", False) and not meta:
            options["use_cache"] = False
    hooks = [*fwd_hooks, *reads, *_early_stops(model, names, stop, points)]
    with eval_mode(model, autocast=autocast), hooks_of_a_pass(model, hooks):
        tokens = tokens.clamp(min=0).long().to(model.cfg.device)
        found[LOGITS] = model(tokens, prepend_bos=False, **options)
    return {name: found[name] for name in names}


def _early_stops(
    model: Any, names: list[str], stop: int | None, points: Container[str]
) -> list[tuple[str, Any]]:
    """Return hooks that end a pass of a TransformerBridge where nothing further is read.

    Of a small model, logits are a quarter of the operations.
    """
    if stop is None or not isinstance(model, TransformerBridge):
        return []
    last = [name for name in names if name.startswith(f"blocks.{stop - 1}.")]
    before_z = all(re.search(r"\.attn\.hook_(rot_)?[qkv]$", name) for name in last)
    ends = [f"blocks.{stop - 1}.attn.hook_z"] * before_z
    ends += [f"blocks.{stop}.hook_in", "unembed.hook_in"]
    return [(name, _stop) for name in ends if name in points]


def _stop(value: Tensor, hook: Any) -> Any:
    del hook
    raise StopAtLayerException(value)


def _by_head(activation: Tensor, name: str, d_head: int) -> Tensor:
    if activation.ndim != 3:
        return activation
    if re.search(r"\.attn\.hook_(rot_)?[qkvz]$", name):  # some architectures keep the heads flat
        return activation.unflatten(-1, (-1, d_head))
    return activation[:, :, None]


@contextmanager
def eval_mode(model: Any, *, autocast: bool = False) -> Iterator[None]:
    """Run a model in eval mode, in or outside autocast; afterwards each module is as it was."""
    modules = [*model.modules()]
    if isinstance(original := vars(model).get("original_model"), torch.nn.Module):
        modules += original.modules()  # the bridge does not register all of them
    training = [module for module in modules if module.training]
    device_type = torch.device(model.cfg.device).type
    try:
        for module in training:
            module.training = False
        if device_type == "meta":  # shapes only: autocast knows no such device
            yield
        else:
            with torch.autocast(device_type, torch.bfloat16, enabled=autocast):
                yield
    finally:
        for module in training:
            module.training = True


def pattern_hook(layer: int) -> str:
    """Return the hook point of a layer's attention pattern."""
    return f"blocks.{layer}.attn.hook_pattern"


def key_hook(site: QuerySite) -> str:
    """Return the hook point of the keys that a site's queries are compared with."""
    return f"blocks.{site.layer}.attn.{'hook_rot_k' if site.rotated else 'hook_k'}"


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanActivations:
    """The activations of one batch of examples at the positions of a span, one row per token."""

    activations: Mapping[str, Float[Tensor, "token head d_head"]]
    """By hook name."""

    row: Int[Tensor, " token"]
    """Index of the token's example."""

    position: Int[Tensor, " token"]
    """Absolute position of the token in its example."""

    token: Int[Tensor, " token"]
    """Id of the token."""


def read_at_span(
    model: Any, examples: TokenizedExamples, hook_names: Sequence[str]
) -> Iterator[SpanActivations]:
    """Yield the activations at the span of every example, batch by batch, each example once.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: tokenised examples with their span.
        hook_names: hook points of attention or the residual stream.

    Raises:
        ValueError: an example has no token in the span, an activation is not finite, or the model
            is being steered.
    """
    check_not_steered(model)
    for batch in example_batches(examples, examples.batch_size):
        batch.mask(examples.span)  # an example without a token in the span costs no forward pass
    for batch in example_batches(examples, examples.batch_size, "Reading activations"):
        rows, columns = batch.mask(examples.span).nonzero(as_tuple=True)
        found = {}
        for name, values in read_activations(model, batch.tokens, hook_names).items():
            found[name] = values[rows.to(values.device), columns.to(values.device)]
            check_finite(found[name], name)
        yield SpanActivations(
            activations=found,
            row=torch.tensor(batch.indices)[rows],
            position=columns,
            token=batch.tokens[rows, columns],
        )


def check_finite(activations: Tensor, hook_name: str) -> None:
    """Raise if an activation is NaN or infinite.

    Raises:
        ValueError: the message names the hook point.
    """
    if not bool(activations.isfinite().all()):
        raise ValueError(
            f"the activations at {hook_name} are not finite: look for an overflow in or before "
            f"this layer{_NOT_FINITE.get(activations.dtype, '')}"
        )


@contextmanager
def without_hooks(model: Any) -> Iterator[None]:
    """Run a model without the hooks on its hook points, blocks and embedding; then restore them.

    Fingerprints are taken so: a user's own hooks, or a steerer in place, would change the queries
    that identify the model.
    """
    with hooks_aside([*model.hook_dict.values(), *model.blocks, model.embed]):
        yield


@contextmanager
def hooks_aside(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Take the hooks off some modules, for a `with` block."""
    modules = {id(module): module for module in modules}.values()
    aside = [(module, module._forward_hooks, module._forward_pre_hooks) for module in modules]
    try:
        for module, _, _ in aside:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, hooks, pre_hooks in aside:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks
