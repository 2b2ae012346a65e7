"""What a steerer needs of an encoder, and the identity: dense steering without an SAE."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_query_steer.descent.goals import Latents
from sae_query_steer.sae.core import QueryHeadSAE
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

    def __post_init__(self) -> None:
        for size in (self.n_heads, self.d_head):
            if type(size) is not int or size < 1:
                raise ValueError(f"{self!r:.200} is not allowed: give whole numbers, 1 or more")

    @property
    def d_latent(self) -> int:
        """The same as `d_head`."""
        return self.d_head

    def encode(self, x: Float[Tensor, "*batch head d_head"], /) -> Tensor:
        """Return the queries, in 32 bits where they came in fewer."""
        return in_32_bits(x)

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


def in_32_bits(queries: Tensor) -> Tensor:
    """Return queries in 32 bits at least: half precision would lose small steps."""
    return queries.to(torch.promote_types(queries.dtype, torch.float32))


def device_of(encoder: QueryEncoder) -> torch.device | None:
    """Return where the weights of an encoder lie; None if it has none."""
    weights = getattr(encoder, "W_dec", None)
    return weights.device if isinstance(weights, Tensor) else None


def encoded(encoder: QueryEncoder, queries: Float[Tensor, "*batch head d_head"]) -> Latents:
    """Return the latents of queries, on the encoder's device: layers may lie on several."""
    return encoder.encode(queries.to(device_of(encoder) or queries.device))


def decoded_difference(
    encoder: QueryEncoder,
    after: Float[Tensor, "*batch head d_latent"],
    before: Float[Tensor, "*batch head d_latent"],
) -> Float[Tensor, "*batch head d_head"]:
    """Return decode(after) - decode(before); by one product where the decoder is linear."""
    if isinstance(encoder, QueryHeadSAE):
        return encoder.linear_decode(after - before)
    return encoder.decode(after) - encoder.decode(before)


def on_device(encoder: QueryEncoder, device: str | torch.device) -> QueryEncoder:
    """Return an encoder on a device: itself where it is there, or has no weights; or a copy."""
    if not isinstance(encoder, torch.nn.Module) or device_of(encoder) == torch.device(device):
        return encoder
    return copy.deepcopy(encoder).to(device)


def at_heads(
    encoder: QueryEncoder, heads: Sequence[int], device: str | torch.device
) -> QueryEncoder:
    """Return the encoder of some heads of a site alone, so that the others cost nothing.

    Args:
        encoder: of all heads.
        heads: which, in this order.
        device: where its weights are to lie.

    Returns:
        The encoder itself where these are all its heads and it lies there; of a query-head SAE a
        copy of the weights of these heads, as they are now, without the hooks on it.
    """
    if tuple(heads) == tuple(range(encoder.n_heads)):
        return on_device(encoder, device)
    if isinstance(encoder, IdentityEncoder):
        return dataclasses.replace(encoder, n_heads=len(heads))
    if isinstance(encoder, QueryHeadSAE):
        config = dataclasses.replace(encoder.cfg, n_heads=len(heads), d_in=0, d_sae=0)
        with temporary_seed(0):  # a new SAE draws weights, which are replaced at once
            some: QueryHeadSAE[Any] = type(encoder)(config)
        index = list(heads)
        some.load_state_dict({name: value[index] for name, value in encoder.state_dict().items()})
        return some.to(device=device).requires_grad_(False).eval()
    return _SomeHeads(on_device(encoder, device), tuple(heads))


class _SomeHeads:
    """Some heads of an encoder that only knows all of them."""

    latent_min: ClassVar[float | None] = None

    def __init__(self, encoder: QueryEncoder, heads: tuple[int, ...]) -> None:
        self._encoder, self._heads = encoder, list(heads)
        vars(self)["latent_min"] = encoder.latent_min
        self.n_heads = len(heads)
        self.d_head, self.d_latent = encoder.d_head, encoder.d_latent

    def encode(self, x: Tensor, /) -> Tensor:
        return self._encoder.encode(self._padded(x))[..., self._heads, :]

    def decode(self, feature_acts: Tensor, /) -> Tensor:
        return self._encoder.decode(self._padded(feature_acts))[..., self._heads, :]

    def _padded(self, x: Tensor) -> Tensor:
        whole = x.new_zeros(*x.shape[:-2], self._encoder.n_heads, x.shape[-1])
        whole[..., self._heads, :] = x
        return whole


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
