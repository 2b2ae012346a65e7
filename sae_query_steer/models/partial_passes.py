"""Forward passes without the first blocks, with hooks, and with logits of some tokens only."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.placed_hooks import drop


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """What a block returned."""

    residual: Float[Tensor, "batch pos d_model"]

    rest: tuple[Any, ...] | None
    """What some architectures return after it, as a tuple; None where the stream comes alone."""

    @classmethod
    def of(cls, output: Any) -> "BlockOutput":
        """Return a copy of an output."""
        if isinstance(output, tuple):
            return cls(output[0].clone(), output[1:])
        return cls(output.clone(), None)


@contextmanager
def hooks_of_a_pass(model: Any, hooks: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """Place hooks for a `with` block, as `model.hooks` does.

    TransformerBridge reads all its hook points, 10 ms of a CPU, for each hook that is placed there.
    """
    hooks = list(hooks)
    points, placed = model.hook_dict if hooks else {}, []
    try:
        for name, hook in hooks:
            points[name].add_hook(hook)
            placed.append((points[name], points[name].fwd_hooks[-1]))
        yield
    finally:
        for point, handle in placed:
            handle.hook.remove()
            drop(point, handle)


@contextmanager
def returning(blocks: Iterable[Any], output: BlockOutput) -> Iterator[None]:
    """Let blocks return an output without running, for a `with` block.

    The model's own forward does the rest, so embedding, masks and rotary angles are as always.
    TransformerBridge has no `start_at_layer`.
    """

    def forward(*_: Any, **__: Any) -> Any:
        residual = output.residual.clone()  # a hook may write to it
        return residual if output.rest is None else (residual, *output.rest)

    # Past the bridge's __setattr__, which would reach the module inside.
    before = [(attributes := vars(block), attributes.get("forward")) for block in blocks]
    try:
        for attributes, _ in before:
            attributes["forward"] = forward
        yield
    finally:
        for attributes, own in before:
            attributes.pop("forward")
            if own is not None:
                attributes["forward"] = own


@contextmanager
def reading(
    model: Any, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]
) -> Iterator[None]:
    """Let a model return the logits of some tokens, [1 token d_vocab], for a `with` block."""

    def choose(_unembed: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        chosen = args[0][rows.to(args[0].device), columns.to(args[0].device)]
        return (chosen[None], *args[1:])

    handle = model.unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
