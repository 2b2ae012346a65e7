"""Sites: the hook point of a layer's queries, or other activations, and its heads."""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sae_query_steer.arguments import check_model, whole_numbers

ALL_HEADS = "all"
"""Value of the column `head` of a table for all heads of a layer together."""

_QUERIES = re.compile(r"blocks\.(0|[1-9]\d*)\.attn\.hook_(rot_)?q")
_OTHER = re.compile(r"blocks\.(0|[1-9]\d*)\.(attn\.hook_(k|rot_k|v|z)|hook_resid_(pre|mid|post))")


class _Checked:
    def check(self: Any, model: Any, points: Container[str] | None = None) -> None:
        """Raise unless a model has this site; its `hook_dict` is read once if `points` is that.

        Raises:
            ValueError: the model has no such layer or hook point, or other sizes there.
        """
        check_model(model)
        check_layer(self.layer, int(model.cfg.n_layers))
        check_hook_point(model, self.hook_name, points)
        n_heads, d_head = _sizes(model, self.hook_name)
        if (self.n_heads, self.d_head) != (n_heads, d_head):
            raise ValueError(
                f"the site at layer {self.layer} has {self.n_heads} heads of {self.d_head}: the "
                f"model has {n_heads} heads of {d_head}; use the model that the site belongs to"
            )


@dataclass(frozen=True, kw_only=True, order=True)
class QuerySite(_Checked):
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
        match = _QUERIES.fullmatch(hook_name)
        if match is None:
            raise ValueError(
                f"{hook_name!r} is no query hook point: those are blocks.L.attn.hook_q and, after "
                "rotary embedding, blocks.L.attn.hook_rot_q"
            )
        return cls(layer=int(match[1]), n_heads=n_heads, d_head=d_head, rotated=bool(match[2]))

    @property
    def d_in(self) -> int:
        """Size of all heads' queries together."""
        return self.n_heads * self.d_head


@dataclass(frozen=True, kw_only=True, order=True)
class Site(_Checked):
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
        n_heads, d_head = _sizes(model, hook_name)
        site = cls(hook_name=hook_name, n_heads=n_heads, d_head=d_head)
        site.check(model)
        return site

    @property
    def layer(self) -> int:
        """Index of the layer, from 0."""
        return int(self.hook_name.split(".")[1])


def is_other_site(hook_name: str) -> bool:
    """Return whether a name is that of a `Site`, and not of queries."""
    return _OTHER.fullmatch(hook_name) is not None


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
        TypeError: no model of TransformerLens, or `layers` is no list of whole numbers.
        ValueError: a layer that the model does not have, a layer named twice, or none at all.

    Source: arXiv 2502.18644 trains its SAEs on the query activations.
    """
    check_model(model)
    chosen = whole_numbers("layers", range(int(model.cfg.n_layers)) if layers is None else layers)
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ValueError(f"layers must have at least one layer, and each once, got {chosen}")
    sizes = {"n_heads": int(model.cfg.n_heads), "d_head": int(model.cfg.d_head)}
    sites = tuple(QuerySite(layer=n, rotated=rotated, **sizes) for n in sorted(chosen))
    check_sites(model, sites)
    return sites


def check_layer(layer: int, n_layers: int) -> None:
    """Raise ValueError unless a model with `n_layers` layers has this one."""
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"no query site at layer {layer}: the model has {n_layers} layers (0 to {n_layers - 1})"
        )


def check_sites(model: Any, sites: Sequence[QuerySite]) -> None:
    """Raise ValueError unless this is a list of one or more sites of a model, and not of layers."""
    if not sites or not all(isinstance(site, QuerySite) for site in sites):
        raise ValueError(
            "sites must have at least one site, and sites alone, from query_sites(model, "
            f"layers=[...]), got {sites!r:.80}"
        )
    check_model(model)
    points = model.hook_dict  # on the bridge 10 ms
    for site in sites:
        site.check(model, points)


def _sizes(model: Any, hook_name: str) -> tuple[int, int]:
    """Return heads and dimension of a head at a hook point."""
    if "hook_resid_" in hook_name:
        return 1, int(model.cfg.d_model)
    grouped = hook_name.endswith(("_k", "_v")) and getattr(model.cfg, "n_key_value_heads", None)
    return int(grouped or model.cfg.n_heads), int(model.cfg.d_head)


def check_hook_point(model: Any, name: str, points: Container[str] | None = None) -> None:
    """Raise unless a model has a hook point; `points` are its own, if they were read already.

    Raises:
        ValueError: the message lists the hook points of the same module, or says that SAELens's
            `add_sae` took its place.
    """
    check_model(model)
    if name in getattr(model, "acts_to_saes", {}):
        raise ValueError(
            f"an SAE is attached at {name} by add_sae, in the place of the hook point: take it "
            f"off with model.reset_saes({name!r}) first"
        )
    if name not in (model.hook_dict if points is None else points):
        prefix = name.rpartition(".")[0] + "."
        near = sorted(n.removeprefix(prefix) for n in model.hook_dict if n.startswith(prefix))
        raise ValueError(f"no hook point {name}: this architecture has {near} at {prefix[:-1]}")
