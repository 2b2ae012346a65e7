"""Context managers that warn if they are never entered."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class SteeringWarning(UserWarning):
    """An intervention had no effect, or its descent diverged or went past its target."""


class _Block(AbstractContextManager[T]):
    """A context manager; it warns where it is dropped before it was entered."""

    def __init__(self, name: str, inner: AbstractContextManager[T]) -> None:
        self._name, self._inner, self._entered = name, inner, False

    def __enter__(self) -> T:
        self._entered = True
        return self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._inner.__exit__(*error)

    def __repr__(self) -> str:
        return f"<{self._name}: no effect until it is entered by `with`>"

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                f"{self._name} was called and never entered, so it had no effect: write "
                "`with ...:` before it and run the model inside the block",
                SteeringWarning,
                stacklevel=2,
            )


def block(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Return what `contextlib.contextmanager` makes of a function, with that warning."""
    made = contextmanager(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Block(function.__qualname__, made(*args, **kwargs))

    return call
