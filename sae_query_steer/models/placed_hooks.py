"""Hooks that must run in every forward pass of a `with` block, or the pass ends in an error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from sae_query_steer.models.calls import hooked

Hook = Callable[..., Tensor | None]
"""A hook of TransformerLens: from an activation and `hook` to the new activation, or None."""


class PlacedHooks:
    """Hooks on hook points, placed for a `with` block; notes which ran in a forward pass.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        hooks: pairs of a hook name and a hook.
        note: called with the hook's number when it runs.
    """

    def __init__(
        self, model: Any, hooks: Sequence[tuple[str, Hook]], note: Callable[[int], None]
    ) -> None:
        self._model, self._hooks, self._note = model, hooks, note
        self._placed: list[tuple[str, Any, Any]] = []
        self._failed = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Place the hooks, and remove them at the end of the block.

        Raises:
            RuntimeError: at the end of the block: a hook was removed, and no pass has told.
        """
        with ExitStack() as stack:
            stack.callback(self._forget)
            points = self._model.hook_dict  # on the bridge 10 ms
            for number, (name, hook) in enumerate(self._hooks):
                point = points[name]
                # Of no level: where another context of hooks ends, these stay.
                point.add_hook(self._noted(number, hook))
                handle = point.fwd_hooks[-1]
                stack.callback(drop, point, handle)
                stack.enter_context(hooked(self._model, point, handle.hook))
                self._placed.append((name, point, handle))
            yield
            points = self._model.hook_dict
            removed = [
                self._cause(name, point, handle)
                for name, point, handle in self._placed
                if points.get(name) is not point or handle.hook.id not in point._forward_hooks
            ]
            if removed and not self._failed:
                raise RuntimeError(_message(removed, "the rest of this block"))

    def check_pass(self, layers: set[int], ran: set[int]) -> None:
        """Raise unless the hooks of the layers that ran in a forward pass ran in it too.

        Raises:
            RuntimeError: the message names the hook and what removed it.
        """
        missing = [
            self._cause(*one)
            for number, one in enumerate(self._placed)
            if number not in ran and int(one[0].split(".")[1]) in layers
        ]
        if missing:
            self._failed = True
            raise RuntimeError(_message(missing, "this forward pass"))

    def _forget(self) -> None:
        """Release the hooks, whose traces would wait for the garbage collector otherwise."""
        self._hooks = ()
        self._placed.clear()

    def _noted(self, number: int, hook: Hook) -> Hook:
        def noted(activation: Tensor, hook: Any, _call: Hook = hook) -> Tensor | None:
            self._note(number)
            return _call(activation, hook=hook)

        vars(noted).update(vars(hook))
        return noted

    def _cause(self, name: str, point: Any, handle: Any) -> str:
        if name in getattr(self._model, "acts_to_saes", {}):
            return f"an SAE of SAELens's add_sae or run_with_saes took the place of {name}"
        if self._model.hook_dict.get(name) is not point:
            return f"SAELens's add_sae, run_with_saes or reset_saes replaced {name}"
        if handle.hook.id not in point._forward_hooks:
            return f"model.reset_hooks() or remove_all_hook_fns() removed the hook at {name}"
        return f"{name} did not run"


def drop(point: Any, handle: Any) -> None:
    """Take a hook off the list of a hook point."""
    point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


def _message(causes: list[str], when: str) -> str:
    return (
        f"{causes[0]}: {when} ran without the intervention. Leave the `with` block before you "
        "remove hooks or attach SAEs, or remove your own hooks alone, with `model.hooks(...)`"
    )
