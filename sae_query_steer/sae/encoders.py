"""Encoders of queries: the interface that steering needs, and the identity for dense steering."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_device, check_kind, check_number
from sae_query_steer.descent.goals import Latents
from sae_query_steer.sae.core import QueryHeadSAE, with_weights
from sae_query_steer.sae.topk import QueryHeadTopKSAE
from sae_query_steer.sites import QuerySite, Site, is_other_site


@runtime_checkable
class QueryEncoder(Protocol):
    """A map from the queries of all heads of a site to latents and back, heads independent."""

    latent_min: ClassVar[float | None]

    @property
    def n_heads(self) -> int:
        """Query heads of the site."""
        ...

    @property
    def d_head(self) -> int:
        """Dimension of the query of one head."""
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
    """The query itself as its latents: the same steering without an SAE, for comparison."""

    n_heads: int
    """Query heads of the site."""

    d_head: int
    """Dimension of the query of one head."""

    latent_min: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_number("n_heads", self.n_heads, whole=True, least=1)
        check_number("d_head", self.d_head, whole=True, least=1)

    @property
    def d_latent(self) -> int:
        """The same as `d_head`."""
        return self.d_head

    def encode(self, x: Float[Tensor, "*batch head d_head"], /) -> Tensor:
        """Return the queries in at least 32 bits."""
        return in_32_bits(x)

    def decode(self, feature_acts: Float[Tensor, "*batch head d_latent"], /) -> Tensor:
        """Return the latents."""
        return feature_acts


def identity_encoders(sites: Iterable[QuerySite | Site]) -> dict[str, IdentityEncoder]:
    """Return an identity encoder for every site, by hook name.

    A steerer over these is dense query steering with the same objective, steps and scope. Source:
    the baseline "steering the query directly" of arXiv 2502.18644.
    """
    return {s.hook_name: IdentityEncoder(n_heads=s.n_heads, d_head=s.d_head) for s in sites}


def in_32_bits(queries: Tensor) -> Tensor:
    """Return queries in at least 32 bits: half precision would lose small steps."""
    return queries.to(torch.promote_types(queries.dtype, torch.float32))


def device_of(encoder: QueryEncoder) -> torch.device | None:
    """Return the device of an encoder's weights; None if it has none."""
    weights = getattr(encoder, "W_dec", None)
    return weights.device if isinstance(weights, Tensor) else None


def encoded(encoder: QueryEncoder, queries: Float[Tensor, "*batch head d_head"]) -> Latents:
    """Return the latents of queries, on the device of the encoder and outside autocast."""
    device = device_of(encoder) or queries.device
    with torch.autocast(device.type, enabled=False):
        return encoder.encode(queries.to(device))


def decoded_difference(
    encoder: QueryEncoder,
    after: Float[Tensor, "*batch head d_latent"],
    before: Float[Tensor, "*batch head d_latent"],
) -> Float[Tensor, "*batch head d_head"]:
    """Return decode(after) - decode(before), by one product if the decoder is linear."""
    if isinstance(encoder, QueryHeadSAE):
        return encoder.linear_decode(after - before)
    return encoder.decode(after) - encoder.decode(before)


Product = Callable[[Tensor], Tensor]
"""With a matrix for each head, from [token head d_from] to [token head d_to]."""


def linear_decoder(encoder: QueryEncoder) -> tuple[Product, Product] | None:
    """Return the product of `decoded_difference`, and that with the transposed matrices.

    None where it is not known to be one: a class may override `decode` or `linear_decode`.
    """
    if type(encoder) is IdentityEncoder:
        return lambda z: z, lambda q: q
    if not isinstance(encoder, QueryHeadSAE):
        return None
    decode = getattr(encoder.linear_decode, "__func__", None)
    scaled = decode is QueryHeadTopKSAE.linear_decode
    if not scaled and decode is not QueryHeadSAE.linear_decode:
        return None
    weight = encoder.W_dec
    if scaled and encoder.cfg.rescale_acts_by_decoder_norm:
        weight = weight / weight.norm(dim=-1, keepdim=True)
    return partial(_product, weight), partial(_product, weight.mT)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def on_device(encoder: QueryEncoder, device: str | torch.device) -> QueryEncoder:
    """Return the encoder itself if it is on the device or has no weights, otherwise a copy."""
    check_device(device)
    if not isinstance(encoder, torch.nn.Module) or device_of(encoder) == torch.device(device):
        return encoder
    return copy.deepcopy(encoder).to(device)


@torch.inference_mode(False)  # kept for longer than a call of `generate`, which is in that mode
@torch.no_grad()
def at_heads(
    encoder: QueryEncoder, heads: Sequence[int], device: str | torch.device
) -> QueryEncoder:
    """Return the encoder of some heads of a site, so that the others cost nothing.

    Args:
        encoder: of all heads.
        heads: which, in this order.
        device: device of its weights.

    Returns:
        The encoder itself if these are all its heads and it is on the device; of a query-head SAE a
        copy of the current weights of these heads, without the hooks on it.
    """
    index = list(heads)
    if index == [*range(encoder.n_heads)]:
        return on_device(encoder, device)
    if isinstance(encoder, IdentityEncoder):
        return dataclasses.replace(encoder, n_heads=len(index))
    if isinstance(encoder, QueryHeadSAE):
        config = dataclasses.replace(encoder.cfg, n_heads=len(index), d_in=0, d_sae=0)
        weights = {name: value[index] for name, value in encoder.state_dict().items()}
        return with_weights(type(encoder), config, weights, device)
    return _SomeHeads(on_device(encoder, device), index)


class _SomeHeads:
    """Some heads of an encoder that can only encode all of them."""

    latent_min: ClassVar[float | None] = None

    def __init__(self, encoder: QueryEncoder, heads: list[int]) -> None:
        self._encoder, self._heads = encoder, heads
        vars(self)["latent_min"] = encoder.latent_min
        self.n_heads, self.d_head, self.d_latent = len(heads), encoder.d_head, encoder.d_latent

    def _of_all(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        whole = x.new_zeros(*x.shape[:-2], self._encoder.n_heads, x.shape[-1])
        whole[..., self._heads, :] = x
        return function(whole)[..., self._heads, :]

    def encode(self, x: Tensor, /) -> Tensor:
        return self._of_all(self._encoder.encode, x)

    def decode(self, feature_acts: Tensor, /) -> Tensor:
        return self._of_all(self._encoder.decode, feature_acts)


def encoder_sites(encoders: Mapping[str, QueryEncoder]) -> dict[str, QuerySite]:
    """Return the site of every encoder, by hook name.

    Raises:
        TypeError: not a mapping of encoders.
        ValueError: it is empty, or a name is not that of a query hook point.
    """
    return {
        name: QuerySite.from_hook_name(name, **sizes) for name, sizes in _sizes(encoders).items()
    }


def any_sites(encoders: Mapping[str, QueryEncoder]) -> dict[str, QuerySite | Site]:
    """Return the site of every encoder, of queries or of another hook point, by hook name.

    Raises:
        TypeError: not a mapping of encoders.
        ValueError: it is empty, or a name is not that of a hook point that can be edited.
    """
    return {
        name: Site(hook_name=name, **sizes)
        if is_other_site(name)
        else QuerySite.from_hook_name(name, **sizes)
        for name, sizes in _sizes(encoders).items()
    }


def _sizes(encoders: Mapping[str, QueryEncoder]) -> dict[str, dict[str, int]]:
    check_kind("saes", encoders, Mapping, "give SAEs by hook name, as train_query_saes returns")
    if not encoders:
        raise ValueError("saes must hold at least one SAE, by hook name, got none")
    for name, encoder in encoders.items():
        remedy = "give a query-head SAE or an IdentityEncoder"
        check_kind(f"the encoder at {name}", encoder, QueryEncoder, remedy)
    return {n: {"n_heads": e.n_heads, "d_head": e.d_head} for n, e in encoders.items()}
