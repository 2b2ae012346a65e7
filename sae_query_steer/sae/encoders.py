"""What a steerer needs of an encoder, and the identity: dense steering without an SAE."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.sites import QuerySite


@runtime_checkable
class QueryEncoder(Protocol):
    """A map from the queries of all heads of a site to latents and back, heads independent."""

    latent_min: ClassVar[float | None]

    @property
    def n_heads(self) -> int:
        """Heads of the site."""
        ...

    @property
    def d_head(self) -> int:
        """Dimension of one head's query."""
        ...

    @property
    def d_latent(self) -> int:
        """Latents of one head."""
        ...

    def encode(self, x: Float[Tensor, "*batch head d_head"], /) -> Tensor:
        """Return the latents, [*batch head d_latent]."""
        ...

    def decode(self, feature_acts: Float[Tensor, "*batch head d_latent"], /) -> Tensor:
        """Return the queries, [*batch head d_head]."""
        ...


@dataclass(frozen=True, kw_only=True)
class IdentityEncoder:
    """The query itself as its latent: the same steering without an SAE, for comparison."""

    n_heads: int
    """Heads of the site."""

    d_head: int
    """Dimension of one head's query."""

    latent_min: ClassVar[float | None] = None

    @property
    def d_latent(self) -> int:
        """The same as `d_head`."""
        return self.d_head

    def encode(self, x: Float[Tensor, "*batch head d_head"], /) -> Tensor:
        """Return the queries, in 32 bits where they came in fewer."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def decode(self, feature_acts: Float[Tensor, "*batch head d_latent"], /) -> Tensor:
        """Return the latents."""
        return feature_acts


def identity_encoders(sites: Iterable[QuerySite]) -> dict[str, IdentityEncoder]:
    """Return an identity encoder for every site, by hook name.

    A steerer over these is dense query steering: objective, steps and scope are the same by
    construction, and only the SAE is missing. Source: the paper's baseline "steering the query
    directly" (arXiv 2502.18644).
    """
    return {s.hook_name: IdentityEncoder(n_heads=s.n_heads, d_head=s.d_head) for s in sites}


def encoder_sites(encoders: Mapping[str, QueryEncoder]) -> dict[str, QuerySite]:
    """Return the site of every encoder.

    Raises:
        TypeError: a value is no encoder of queries.
        ValueError: there are none, or a name is not that of a query hook point.
    """
    if not isinstance(encoders, Mapping):
        raise TypeError(
            f"saes is a {type(encoders).__name__}: give a mapping from hook name to SAE, such as "
            "train_query_saes returns"
        )
    if not encoders:
        raise ValueError("there are no SAEs: give a mapping from hook name to SAE")
    sites = {}
    for name, encoder in encoders.items():
        if not isinstance(encoder, QueryEncoder):
            raise TypeError(
                f"the encoder at {name} is a {type(encoder).__name__}: allowed are query-head SAEs "
                "and IdentityEncoder"
            )
        sites[name] = QuerySite.from_hook_name(name, n_heads=encoder.n_heads, d_head=encoder.d_head)
    return sites
