"""Sites: the hook point of a layer's queries, or other activations, and its heads."""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ALL_HEADS = "all"
"""Value of the column `head` of a table for all heads of a layer together."""


@dataclass(frozen=True, kw_only=True, order=True)
class QuerySite:
    """The queries of all heads of one layer: `blocks.L.attn.hook_q`, or `hook_rot_q`."""

    layer: int
    """Index of the layer, from 0."""

    n_heads: int
    """Query heads of the layer (not key heads, of which grouped-query attention has fewer)."""

    d_head: int
    """Dimension of one head's query."""

    rotated: bool = False
    """After the rotary embedding (`hook_rot_q`) instead of before it (`hook_q`)."""

    @property
    def hook_name(self) -> str:
        """Name of the hook point, on HookedTransformer and TransformerBridge alike."""
        return f"blocks.{self.layer}.attn.{'hook_rot_q' if self.rotated else 'hook_q'}"

    @classmethod
    def from_hook_name(cls, hook_name: str, *, n_heads: int, d_head: int) -> "QuerySite":
        """Return the site with a hook name such as `blocks.3.attn.hook_q`.

        Raises:
            ValueError: the name is not that of a query hook point.
        """
        match = re.fullmatch(r"blocks\.(0|[1-9]\d*)\.attn\.hook_(rot_)?q", hook_name)
        if match is None:
            raise ValueError(
                f"{hook_name!r} is no query hook point: the names are blocks.L.attn.hook_q and, "
                "after rotary embedding, blocks.L.attn.hook_rot_q"
            )
        return cls(layer=int(match[1]), n_heads=n_heads, d_head=d_head, rotated=bool(match[2]))

    @property
    def d_in(self) -> int:
        """Size of all heads' queries together."""
        return self.n_heads * self.d_head

    def check(self, model: Any) -> None:
        """Raise unless a model has this site.

        Args:
            model: a HookedTransformer or a TransformerBridge.

        Raises:
            ValueError: the model has no such layer or hook point, or other heads there.
        """
        check_layer(self.layer, int(model.cfg.n_layers))
        if self.hook_name not in model.hook_dict:
            which = "rotated" if self.rotated else "its"
            raise ValueError(
                f"no hook point {self.hook_name}: this architecture does not expose {which} "
                f"queries; its attention has {_attention_hooks(model, self.layer)}"
            )
        here = (int(model.cfg.n_heads), int(model.cfg.d_head))
        if (self.n_heads, self.d_head) != here:
            raise ValueError(
                f"the site at layer {self.layer} has {self.n_heads} heads of {self.d_head}: the "
                f"model has {here[0]} heads of {here[1]}; use the model that the site belongs to"
            )


@dataclass(frozen=True, kw_only=True, order=True)
class Site:
    """Other activations that an edit can change, [batch pos head d_head]; see `Site.of`."""

    hook_name: str
    """Such as `blocks.3.attn.hook_k`, `hook_rot_k`, `hook_v`, `hook_z` or
    `blocks.3.hook_resid_pre`, `hook_resid_mid`, `hook_resid_post`."""

    n_heads: int
    """Heads of the activation: key heads of `hook_k` and `hook_v`; 1 for the residual stream."""

    d_head: int
    """Dimension of one head; d_model for the residual stream."""

    def __post_init__(self) -> None:
        if _OTHER.fullmatch(self.hook_name) is None:
            raise ValueError(
                f"hook_name must be blocks.L.attn.hook_k, hook_rot_k, hook_v or hook_z, or "
                f"blocks.L.hook_resid_pre, hook_resid_mid or hook_resid_post, got "
                f"{self.hook_name!r}; queries are a QuerySite"
            )

    @classmethod
    def of(cls, model: Any, hook_name: str) -> "Site":
        """Return the site with a hook name, with the sizes that a model has there.

        Raises:
            ValueError: the name is not that of such a hook point, or the model has none there.
        """
        n_heads, d_head = int(model.cfg.n_heads), int(model.cfg.d_head)
        if ".hook_resid_" in hook_name:
            n_heads, d_head = 1, int(model.cfg.d_model)
        elif not hook_name.endswith("hook_z"):
            n_heads = int(getattr(model.cfg, "n_key_value_heads", None) or n_heads)
        site = cls(hook_name=hook_name, n_heads=n_heads, d_head=d_head)
        check_layer(site.layer, int(model.cfg.n_layers))
        if hook_name not in model.hook_dict:
            raise ValueError(f"no hook point {hook_name}: this architecture does not expose it")
        return site

    @property
    def layer(self) -> int:
        """Index of the layer, from 0."""
        return int(self.hook_name.split(".")[1])

    def check(self, model: Any) -> None:
        """Raise unless a model has this site.

        Raises:
            ValueError: the model has no such layer or hook point, or other sizes there.
        """
        here = Site.of(model, self.hook_name)
        if self != here:
            raise ValueError(
                f"the site {self.hook_name} has {self.n_heads} heads of {self.d_head}: the model "
                f"has {here.n_heads} heads of {here.d_head}"
            )


_OTHER = re.compile(r"blocks\.(0|[1-9]\d*)\.(attn\.hook_(k|rot_k|v|z)|hook_resid_(pre|mid|post))")


def query_sites(
    model: Any, layers: Iterable[int] | None = None, *, rotated: bool = False
) -> tuple[QuerySite, ...]:
    """Return the query sites of a model, one a layer, in the order of the layers.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        layers: which layers; None means all.
        rotated: the queries after the rotary embedding, as attention compares them with keys. They
            depend on the position: the same latent stands for another query at every position.

    Returns:
        The sites, each checked against the model.

    Raises:
        ValueError: a layer that the model does not have, a layer named twice, or none at all.

    Source: arXiv 2502.18644 trains its SAEs on the query activations.
    """
    if isinstance(layers, int | float | str):
        raise TypeError(f"layers must be a list, such as [{layers}], got {layers!r}")
    every = range(int(model.cfg.n_layers))
    chosen = [operator.index(layer) for layer in (every if layers is None else layers)]
    if not chosen:
        raise ValueError("layers must have at least one layer, or be None for all, got []")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers must have each layer once, got {chosen}")
    sites = tuple(
        QuerySite(
            layer=n, n_heads=int(model.cfg.n_heads), d_head=int(model.cfg.d_head), rotated=rotated
        )
        for n in sorted(chosen)
    )
    for site in sites:
        site.check(model)
    return sites


def check_layer(layer: int, n_layers: int) -> None:
    """Raise ValueError unless a model with `n_layers` layers has this one."""
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"no query site at layer {layer}: the model has {n_layers} layers (0 to {n_layers - 1})"
        )


def check_sites(sites: Iterable[QuerySite]) -> None:
    """Raise unless this is a list of one or more sites.

    Raises:
        TypeError: it has something else, such as the index of a layer.
        ValueError: it is empty.
    """
    if isinstance(sites, QuerySite) or not all(isinstance(site, QuerySite) for site in sites):
        raise TypeError(
            f"sites must be a list of sites, from query_sites(model, layers=[...]), got {sites!r}"
        )
    if not list(sites):
        raise ValueError("sites must have at least one site, from query_sites(model), got none")


def _attention_hooks(model: Any, layer: int) -> list[str]:
    prefix = f"blocks.{layer}.attn."
    return sorted(name.removeprefix(prefix) for name in model.hook_dict if name.startswith(prefix))
