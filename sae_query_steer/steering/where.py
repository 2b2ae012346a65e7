"""Where an edit acts: sites, heads of each, and a scope of tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

from sae_query_steer.arguments import whole_numbers
from sae_query_steer.scopes.joins import check_scope
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.sites import QuerySite, Site, check_model

Heads = Sequence[int] | Mapping[int, Sequence[int]]
"""The same heads in each layer, or heads by layer."""


class SiteHeads(NamedTuple):
    """Some heads of one site."""

    site: QuerySite | Site
    """The hook point."""

    heads: tuple[int, ...]
    """The heads that are edited, in the order in which an edit sees them."""

    @property
    def hook_name(self) -> str:
        """Name of the hook point."""
        return self.site.hook_name

    @property
    def every(self) -> bool:
        """Whether these are all heads of the site."""
        return self.heads == tuple(range(self.site.n_heads))


@dataclass(frozen=True, eq=False)
class Where:
    """The sites, heads and tokens at which an edit acts; see the fields.

    Raises:
        TypeError: `layers` or `heads` is no list, or the scope is no scope.
        ValueError: a layer or head that there is not, two sites of one layer, or no site left.
    """

    sites: Iterable[QuerySite | Site]
    """Sites to choose from, one a layer."""

    _: KW_ONLY

    scope: Scope = field(default_factory=LastPromptToken)
    """Which tokens."""

    layers: Sequence[int] | None = None
    """Which layers; None means those of all sites."""

    heads: Heads | None = None
    """Which heads: the same in every layer, or by layer; None means all."""

    chosen: Mapping[str, SiteHeads] = field(init=False, repr=False)
    """The sites and heads that are edited, by hook name."""

    def __post_init__(self) -> None:
        check_scope(self.scope, name="scope", generating=True)
        sites = {site.hook_name: site for site in self.sites}
        heads = chosen_heads(sites, self.layers, self.heads)
        chosen = {name: SiteHeads(sites[name], picked) for name, picked in heads.items()}
        object.__setattr__(self, "sites", tuple(sites.values()))
        object.__setattr__(self, "chosen", chosen)

    def __repr__(self) -> str:
        heads = "" if self.heads is None else f", heads={self.heads}"
        return f"Where({', '.join(self.chosen)}{heads}, scope={self.scope!r})"

    def check(self, model: Any) -> None:
        """Raise unless a model has these sites.

        Raises:
            ValueError: the message names the site.
        """
        check_model(model)
        points = model.hook_dict  # on the bridge 10 ms
        for at in self.chosen.values():
            at.site.check(model, points)


def chosen_heads(
    sites: Mapping[str, QuerySite | Site], layers: Sequence[int] | None, heads: Heads | None
) -> dict[str, tuple[int, ...]]:
    """Return the chosen heads by hook name, in the order of the layers.

    Args:
        sites: the sites there are, by hook name.
        layers: which of their layers; None means all.
        heads: the same heads in each of these layers, or heads by layer; None means all.

    Raises:
        TypeError: `layers` or `heads` is no list.
        ValueError: a layer or head that there is not, two sites of one layer, or no site left.
    """
    by_layer: dict[int, str] = {}
    for name, site in sites.items():
        if site.layer in by_layer:
            raise ValueError(
                f"{by_layer[site.layer]} and {name} are sites of the same layer: make a steerer of "
                "each, and join them with JoinedSteerers"
            )
        by_layer[site.layer] = name
    named = wanted = sorted(by_layer) if layers is None else whole_numbers("layers", layers)
    if isinstance(heads, Mapping):
        wanted = [layer for layer in wanted if layer in heads] if layers is None else wanted
        named = [*wanted, *whole_numbers("the layers of heads", heads)]
    for layer in named:
        if layer not in by_layer:
            raise ValueError(f"no site at layer {layer}: there are some at {sorted(by_layer)}")
    chosen = {}
    for layer in wanted:
        site = sites[by_layer[layer]]
        here = heads.get(layer) if isinstance(heads, Mapping) else heads
        picked = tuple(range(site.n_heads) if here is None else whole_numbers("heads", here))
        for head in picked:
            if not 0 <= head < site.n_heads:
                raise ValueError(
                    f"no head {head} at layer {layer}: the heads are 0 to {site.n_heads - 1}"
                )
        if not picked or len(set(picked)) != len(picked):
            raise ValueError(
                f"heads at layer {layer} must name at least one head, and each once, got "
                f"{list(picked)}"
            )
        if by_layer[layer] in chosen:
            raise ValueError(f"layers must name each layer once, got {wanted}")
        chosen[by_layer[layer]] = picked
    if not chosen:
        raise ValueError(f"no site is left by layers={layers} and heads={heads}")
    return chosen
