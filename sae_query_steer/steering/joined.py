"""Several steerers as one: each acts on what those before it made of the activation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from sae_query_steer.models.loading import check_eager
from sae_query_steer.scopes.positions import PromptLengths
from sae_query_steer.steering.engine import apply_edits
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import SteeringTrace


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
            if not isinstance(steerer, Steerer):
                raise TypeError(f"steerers must be Steerer values, got {steerer!r}")
        object.__setattr__(self, "steerers", steerers)

    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        record_attention: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> AbstractContextManager[tuple[SteeringTrace, ...]]:
        """Steer every forward pass of a model for the length of a `with` block.

        Args and Raises as `Steerer.apply`; every steerer is checked before the first acts.

        Returns:
            A context manager that yields a trace of each steerer, in order.
        """
        return self._applied(
            model,
            record=record,
            record_attention=record_attention,
            prompt_lengths=prompt_lengths,
        )

    @contextmanager
    def _applied(self, model: Any, **settings: Any) -> Iterator[tuple[SteeringTrace, ...]]:
        check_eager(model)
        for steerer in self.steerers:
            steerer.check_model(model)
        edits = [(steerer.edit, steerer.where) for steerer in self.steerers]
        with apply_edits(model, edits, **settings) as traces:
            yield traces
