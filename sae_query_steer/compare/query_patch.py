"""The reference: real queries, one for each row of a batch, put in the place of its own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.comparison import Method
from sae_query_steer.compare.rowwise import check_rows
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.models.activations import read_activations
from sae_query_steer.scopes.positions import LastPromptToken, Scope, scope_name
from sae_query_steer.sites import QuerySite, query_sites
from sae_query_steer.steering.intervention import Steerer
from sae_query_steer.steering.trace import QueryChange, SteeringTrace


@dataclass(frozen=True, eq=False)
class QueryPatch(Steerer):
    """Real queries at the last prompt token: there every row has one, so rows go by their order."""

    sites: Mapping[str, QuerySite]
    """The sites that are patched, all heads of them, by hook name."""

    queries: Mapping[str, Float[Tensor, "batch head d_head"]]
    """What each row gets, by hook name."""

    scope: Scope = field(init=False, repr=False, default_factory=LastPromptToken)
    """The last prompt token."""

    site_heads: Mapping[str, tuple[int, ...]] = field(init=False, repr=False)
    """All heads of the sites."""

    def __post_init__(self) -> None:
        for name, site in self.sites.items():
            shape = list(self.queries[name].shape) if name in self.queries else None
            if shape is None or shape[1:] != [site.n_heads, site.d_head]:
                raise ValueError(
                    f"queries of shape {shape} do not fit {name}: give one for each row, "
                    f"[batch, {site.n_heads}, {site.d_head}]"
                )
        heads = {name: tuple(range(site.n_heads)) for name, site in self.sites.items()}
        object.__setattr__(self, "site_heads", heads)

    def check_model(self, model: Any) -> None:
        """Raise unless the model has these sites."""
        for site in self.sites.values():
            site.check(model)

    def new_trace(self, model: Any, *, recording: bool) -> SteeringTrace:
        """Return an empty trace."""
        return SteeringTrace(recording=recording, method="interchange", tokenizer=model.tokenizer)

    def change(
        self,
        hook_name: str,
        queries: Float[Tensor, "token head d_head"],
        places: TokenPlaces,
        *,
        record: bool,
    ) -> QueryChange:
        """Return what leads from each row's query to the one it gets.

        Raises:
            ValueError: the batch has another number of rows.
        """
        del record, places
        given = self.queries[hook_name]
        check_rows(len(given), len(queries))
        return QueryChange(delta=given.to(queries) - queries)


def interchange_methods(
    model: Any, layers: Iterable[Sequence[int]], *, chat_template: bool = False
) -> list[Method]:
    """Return the reference, a method for each set of layers: queries of the requesting prompts.

    Each case gets, at its last prompt token, the queries that the model has there where its prompt
    requests the target: how far a query can lead at all, if the model obeys requests.

    Args:
        model: the one that is steered.
        layers: sets of layers that are patched together, all heads of them.
        chat_template: read the requesting prompts in the tokenizer's chat template, as a
            `TextScorer` with it does.

    Raises:
        ValueError: when used, a case has no requesting prompt.
    """

    def method(some: Sequence[int]) -> Method:
        sites = {site.hook_name: site for site in query_sites(model, some)}

        def patch(cases: Sequence[SteeringCase], strength: float) -> QueryPatch:
            del strength
            asking = [
                LabelledExample(prompt=case.requesting, label=case.target)
                for case in cases
                if case.requesting is not None
            ]
            if len(asking) < len(cases):
                raise ValueError(
                    f"{len(cases) - len(asking)} of {len(cases)} cases have no requesting prompt: "
                    "there are no queries to patch in; leave interchange_methods out"
                )
            read = tokenize_examples(model, asking, chat_template=chat_template)
            rows = [example.tokens for example in read]
            queries = read_activations(model, pad_sequence(rows, batch_first=True), list(sites))
            last = torch.tensor([len(row) - 1 for row in rows])
            each = torch.arange(len(rows))
            return QueryPatch(sites, {name: found[each, last] for name, found in queries.items()})

        return Method(
            name="interchange",
            scope=scope_name(LastPromptToken()),
            layers=tuple(some),
            steerer=patch,
        )

    return [method(some) for some in layers]
