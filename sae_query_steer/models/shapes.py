"""The sizes of a model, from its config and without its weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sae_query_steer.arguments import whole_numbers
from sae_query_steer.models.gguf import converted
from sae_query_steer.sites import QuerySite, check_layer
from sae_query_steer.storage.folders import check_model_folder

try:
    from transformer_lens.model_bridge.sources.transformers import (
        map_default_transformer_lens_config,
    )
except ImportError:  # TransformerLens 4
    from transformer_lens.model_bridge.sources._hf_format import (  # pyright: ignore[reportMissingImports]
        map_default_transformer_lens_config,
    )


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a language model."""

    n_heads: int
    """Query heads of a layer."""

    n_key_heads: int
    """Heads of keys and values of a layer; fewer than query heads where these share them."""

    d_head: int
    """Dimension of one head's query."""

    n_ctx: int
    """Most tokens that it reads."""

    n_parameters: int
    """All weights, embeddings too."""

    block_parameters: tuple[int, ...]
    """Weights of each layer."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.block_parameters)

    @property
    def key_value_numbers(self) -> int:
        """Numbers that the KV cache keeps for each token of a row, over all layers."""
        return 2 * self.n_layers * self.n_key_heads * self.d_head

    def sites(self, layers: Iterable[int] | None = None) -> tuple[QuerySite, ...]:
        """Return the query sites of some layers, None for all; as `query_sites` would.

        Raises:
            ValueError: a layer that the model does not have.
        """
        chosen = sorted(whole_numbers("layers", range(self.n_layers) if layers is None else layers))
        for layer in chosen:
            check_layer(layer, self.n_layers)
        return tuple(QuerySite(layer=n, n_heads=self.n_heads, d_head=self.d_head) for n in chosen)


def model_shape(name_or_folder: str) -> ModelShape:
    """Return the sizes of a model, from its config; of a name on the hub that alone is fetched.

    Args:
        name_or_folder: as for `load_model`, but the folder needs no weights and no tokenizer.

    Raises:
        FileNotFoundError: it looks like a path, and there is no config.
    """
    name_or_folder = converted(name_or_folder)
    check_model_folder(name_or_folder)
    config = AutoConfig.from_pretrained(name_or_folder)
    host = map_default_transformer_lens_config(config)
    # On the meta device tensors have shapes and no memory.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = next(
        part
        for part in model.modules()
        if isinstance(part, nn.ModuleList) and len(part) == host.n_layers
    )
    return ModelShape(
        n_heads=int(host.n_heads),
        n_key_heads=int(getattr(host, "n_key_value_heads", None) or host.n_heads),
        d_head=int(host.d_head),
        n_ctx=int(host.n_ctx),
        n_parameters=_count(model),
        block_parameters=tuple(_count(block) for block in blocks),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
