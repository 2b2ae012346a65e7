"""A model's own methods, wrapped for a while: what `generate` knows no hook is told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced_method(model: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Wrap a method of a model for a `with` block; where there is none, do nothing."""
    if not hasattr(model, name):
        yield
        return
    had = name in vars(model)
    original = getattr(model, name)
    setattr(model, name, around(original))
    try:
        yield
    finally:
        if had:
            setattr(model, name, original)
        else:
            delattr(model, name)
