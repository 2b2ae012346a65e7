"""Listen to the calls of a model: its forward passes and its calls of `generate`.

Torch's own hooks on the model do not suffice: HookedTransformer calls `self.forward`, which they do
not see. While someone listens, the class of the model is a subclass whose `forward`, `generate`,
`generate_stream` and `hf_generate` tell the listeners, and so is that of the Hugging Face model
inside a TransformerBridge, whose `generate` pipelines call. The listeners are kept beside the model
and not in it: a deep copy is a plain model, and listeners may leave in any order.
"""

import copy
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import nn

Enter = Callable[[], AbstractContextManager[None]]
"""Makes the context around one call of `generate`, or around each item of a stream."""


@runtime_checkable
class Listener(Protocol):
    """What hears of the calls of a model."""

    def forward_pass(self) -> AbstractContextManager[None]:
        """Return a context around one forward pass."""
        ...

    def generation(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Enter:
        """Return what makes the contexts around a call of `generate` or `generate_stream`."""
        ...


@dataclass(eq=False)
class _Calls:
    """The listeners of one model."""

    listeners: list[Listener] = field(default_factory=list)
    hooks: dict[int, nn.Module] = field(default_factory=dict)
    """Modules that carry torch hooks of listeners, by the id of the hook."""
    plain: list[tuple[nn.Module, type, dict[str, Any]]] = field(default_factory=list)
    """The model, and on a TransformerBridge the model inside it, with what they were before."""
    running: Counter[bool] = field(default_factory=Counter)
    """Passes (True) and calls that generate (False) that are running, one inside the other."""
    lock: Any = field(default_factory=threading.RLock)
    """Held during every call: threads that share a model take turns."""


_CALLS: WeakKeyDictionary[nn.Module, _Calls] = WeakKeyDictionary()
_NAMES = ("forward", "generate", "generate_stream", "hf_generate")


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a listener hear of all calls of a model, for a `with` block."""
    calls = _CALLS.setdefault(model, _Calls())
    with calls.lock:
        if not calls.listeners:
            _begin(model, calls)
        calls.listeners.append(listener)
    try:
        yield
    finally:
        with calls.lock:
            calls.listeners[:] = [one for one in calls.listeners if one is not listener]
            if not calls.listeners:
                _end(calls)
                calls.plain.clear()


@contextmanager
def hooked(model: nn.Module, module: nn.Module, handle: Any) -> Iterator[None]:
    """Leave a torch hook in place for a `with` block; a deep copy of the model is without it."""
    hooks = _CALLS.setdefault(model, _Calls()).hooks
    hooks[handle.id] = module
    try:
        yield
    finally:
        handle.remove()
        hooks.pop(handle.id)


def _begin(model: nn.Module, calls: _Calls) -> None:
    inner = vars(model).get("original_model")  # of a TransformerBridge
    for part in (model, *([inner] if isinstance(inner, nn.Module) else [])):
        # What stands in the way of the methods of a class, as accelerate's own forward.
        own = {name: vars(part).pop(name) for name in _NAMES if name in vars(part)}
        calls.plain.append((part, type(part), own))
        _CALLS[part] = calls
        object.__setattr__(part, "__class__", _listening_class(type(part), inner=part is not model))


def _end(calls: _Calls) -> None:
    for part, plain_class, own in calls.plain:
        object.__setattr__(part, "__class__", plain_class)
        vars(part).update({name: call for name, call in own.items() if name not in vars(part)})


@lru_cache
def _listening_class(plain_class: type, *, inner: bool) -> type:
    """Return a subclass whose calls the listeners hear of."""
    methods: dict[str, Any] = {"__deepcopy__": _deepcopy, "__module__": plain_class.__module__}
    for name in ("forward", "generate") if inner else _NAMES:
        if hasattr(plain_class, name):
            around = _stream if name == "generate_stream" else _around
            methods[name] = around(getattr(plain_class, name))
    return type(plain_class.__name__, (plain_class,), methods)


def _call_of(model: nn.Module, plain: Callable[..., Any]) -> tuple[_Calls, Callable[..., Any]]:
    calls = _CALLS.setdefault(model, _Calls())
    own = next((own for part, _, own in calls.plain if part is model), {})
    call = own.get(plain.__name__)
    return calls, call or plain.__get__(model)


def _around(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward`, or a way to generate, inside the blocks of all listeners."""
    is_pass = plain.__name__ == "forward"

    @wraps(plain)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls, call = _call_of(self, plain)
        is_inner = bool(calls.plain) and self is not calls.plain[0][0]
        with calls.lock, ExitStack() as stack:
            if calls.running[is_pass] and is_inner:  # part of the bridge's pass or `hf_generate`
                return call(*args, **kwargs)
            calls.running[is_pass] += 1
            try:
                for one in tuple(calls.listeners):
                    inside = one.forward_pass() if is_pass else one.generation(call, args, kwargs)()
                    stack.enter_context(inside)
                return call(*args, **kwargs)
            finally:
                calls.running[is_pass] -= 1

    return method


def _stream(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def stream(self: nn.Module, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        calls, call = _call_of(self, plain)
        enters = [one.generation(call, args, kwargs) for one in tuple(calls.listeners)]
        items = call(*args, **kwargs)
        try:
            while True:
                # Between two items the caller may use the model for something else.
                with calls.lock, ExitStack() as stack:
                    for enter in enters:
                        stack.enter_context(enter())
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
        finally:
            items.close()

    return stream


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a model as if nobody listened, and without the hooks of the listeners."""
    calls, aside = _CALLS[self], []
    with calls.lock:
        for module in {id(module): module for module in calls.hooks.values()}.values():
            for name in ("_forward_hooks", "_forward_pre_hooks", "fwd_hooks"):
                if name in vars(module):
                    aside.append((module, name, vars(module)[name]))
                    vars(module)[name] = _without(vars(module)[name], calls.hooks)
        listening_classes = [type(part) for part, _, _ in calls.plain]
        _end(calls)
        try:
            return copy.deepcopy(self, memo)
        finally:
            for (part, _, own), kind in zip(calls.plain, listening_classes, strict=True):
                for name in own:
                    vars(part).pop(name, None)
                object.__setattr__(part, "__class__", kind)
            for module, name, hooks in aside:
                vars(module)[name] = hooks


def _without(hooks: Any, ids: dict[int, nn.Module]) -> Any:
    if isinstance(hooks, list):  # TransformerLens's handles
        return [handle for handle in hooks if handle.hook.id not in ids]
    return OrderedDict((key, hook) for key, hook in hooks.items() if key not in ids)
