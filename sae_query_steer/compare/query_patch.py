"""The reference: real queries, one for each row of a batch, patched in."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import tokenize_examples
from sae_query_steer.models.activations import read_activations
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.sites import QuerySite, query_sites
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.rowwise import check_rows
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads, Where


@dataclass(frozen=True, eq=False)
class QueryPatch(Edit):
    """Activation patching: one real query for each row takes the place of the row's own."""

    queries: Mapping[str, Float[Tensor, "batch head d_head"]]
    """What each row gets at every token in scope, by hook name."""

    @property
    def labels(self) -> dict[str, str]:
        """Return what a trace is to know."""
        return {"method": "interchange"}

    def change(
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
    ) -> QueryChange:
        """Return the difference between the query that each row gets and its own.

        Raises:
            ValueError: the batch has another number of rows.
        """
        del record
        given = self.queries[at.hook_name]
        check_rows(len(given), tokens.n_rows)
        given = given.to(activations)[tokens.row][:, list(at.heads)]
        return QueryChange(delta=given - activations)


def query_patch(
    sites: Iterable[QuerySite], queries: Mapping[str, Float[Tensor, "batch head d_head"]]
) -> Steerer:
    """Return a steerer that patches real queries in at the last prompt token, in all heads.

    Args:
        sites: where.
        queries: what each row gets, by hook name.

    Raises:
        ValueError: no queries for a site, or queries of another shape.
    """
    where = Where(sites)
    for name, at in where.chosen.items():
        shape = list(queries[name].shape) if name in queries else None
        if shape is None or shape[1:] != [at.site.n_heads, at.site.d_head]:
            raise ValueError(
                f"queries at {name} must be [batch, {at.site.n_heads}, {at.site.d_head}], one for "
                f"each row, got {shape}"
            )
    return Steerer(QueryPatch(queries), where)


def requested_queries(
    model: Any, cases: Sequence[SteeringCase], layers: Sequence[int], *, chat_template: bool = False
) -> Steerer:
    """Return a steerer that patches in the queries of the prompts that request the cases' targets.

    Args:
        model: the one that is steered.
        cases: a row for each, in this order.
        layers: all heads of these.
        chat_template: read the prompts in the tokenizer's chat template.

    Raises:
        ValueError: a case has no requesting prompt.
    """
    asking = [
        LabelledExample(prompt=case.requesting, label=case.target)
        for case in cases
        if case.requesting is not None
    ]
    if len(asking) < len(cases):
        raise ValueError(
            f"{len(cases) - len(asking)} of {len(cases)} cases have no requesting prompt: there "
            "are no queries to patch in; leave interchange_methods out"
        )
    sites = query_sites(model, layers)
    read = tokenize_examples(model, asking, chat_template=chat_template)
    rows = [example.tokens for example in read]
    names = [site.hook_name for site in sites]
    queries = read_activations(model, pad_sequence(rows, batch_first=True), names)
    last = torch.tensor([len(row) - 1 for row in rows])
    each = torch.arange(len(rows))
    return query_patch(sites, {name: found[each, last] for name, found in queries.items()})
