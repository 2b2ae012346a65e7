"""The reference method: queries of the prompts that request the target are patched in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.compare.methods import Layers, Method, SteeringCase
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.models.activations import read_activations
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import TokenPositions, check_rows
from sae_query_steer.sites import QuerySite, query_sites
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads, Where


@dataclass(frozen=True, eq=False)
class QueryPatch(Edit):
    """Activation patching: a given query replaces the own query of each row."""

    queries: Mapping[str, Float[Tensor, "batch head d_head"]]
    """The query of each row at every token in scope, by hook name."""

    @property
    def labels(self) -> dict[str, str]:
        """Return what a trace should record."""
        return {"method": "interchange"}

    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
    ) -> QueryChange:
        """Return the difference between the given query and the row's own."""
        del record
        given = self.queries[at.hook_name]
        check_rows("the patch", len(given), tokens.n_rows)
        given = given.to(activations)[tokens.row][:, list(at.heads)]
        return QueryChange(delta=given - activations)


def query_patch(
    sites: Iterable[QuerySite], queries: Mapping[str, Float[Tensor, "batch head d_head"]]
) -> Steerer:
    """Return a steerer that patches given queries in at the last prompt token, in all heads."""
    return Steerer(QueryPatch(queries), Where(sites))


def interchange_methods(
    model: Any, layers: Layers, *, chat_template: ChatTemplate = False
) -> list[Method]:
    """Return the reference, a method for each set of layers: queries of the requesting prompts.

    Each case gets, at its last prompt token, the queries that the model has there if its prompt
    requests the target: how far a query alone can lead, if the model obeys requests.

    Args:
        model: the model that is steered.
        layers: sets of layers that are patched together, in all heads.
        chat_template: read the requesting prompts in the chat template, as `TextScorer` does.

    Raises:
        ValueError: when used, a case has no requesting prompt.
    """

    def method(some: Sequence[int]) -> Method:
        return Method(
            name="interchange",
            scope=scope_name(LastPromptToken()),
            layers=tuple(some),
            steerer=lambda cases, _: _requested(model, cases, some, chat_template),
        )

    return list(map(method, layers))


def _requested(
    model: Any, cases: Sequence[SteeringCase], layers: Sequence[int], chat_template: ChatTemplate
) -> Steerer:
    asking = [LabelledExample(prompt=c.requesting, label=c.target) for c in cases if c.requesting]
    if len(asking) < len(cases):
        raise ValueError(
            f"all cases must have a requesting prompt to take queries from, {len(asking)} of "
            f"{len(cases)} have: leave interchange_methods out"
        )
    sites = query_sites(model, layers)
    read = tokenize_examples(model, asking, chat_template=chat_template)
    rows = [example.tokens for example in read]
    tokens = pad_sequence(rows, batch_first=True)
    queries = read_activations(model, tokens, [site.hook_name for site in sites])
    last = torch.tensor([len(row) - 1 for row in rows])
    each = torch.arange(len(rows))
    return query_patch(sites, {name: found[each, last] for name, found in queries.items()})
