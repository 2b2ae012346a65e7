"""The block-diagonal core: one SAELens SAE object that holds an SAE for every head of a layer.

`W_enc [head d_head d_sae_per_head]`, `W_dec [head d_sae_per_head d_head]`, biases likewise;
`cfg.d_in` and `cfg.d_sae` are totals over heads, as SAELens's trainer and evals need. Heads share
nothing: what one head reads, loses and learns never touches another. An architecture is a small
class beside this one: its activation, its losses, its config.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from torch import Tensor, nn
from typing_extensions import override

HeadedIn = Float[Tensor, "*batch head d_head"]
HeadedLatents = Float[Tensor, "*batch head d_sae_per_head"]
FlatOrHeaded = Float[Tensor, "..."]
PerHead = Float[Tensor, "head"]


@dataclass(kw_only=True)
class QueryHeadSAEConfig(SAEConfig, ABC):
    """What every query-head SAE is told: heads, and sizes per head.

    `d_in` and `d_sae` follow from these and need not be given. At training `n_heads` and `d_head`
    may stay 0: they are then taken from the site.
    """

    d_in: int = 0
    d_sae: int = 0
    n_heads: int = 0
    """Heads of the site."""

    d_head: int = 0
    """Width of the query of one head."""

    d_sae_per_head: int = 0
    """Latents of one head; must be given. A usual choice is 4 to 32 times `d_head`."""

    metadata: Any = field(default_factory=SAEMetadata)

    @override
    def __post_init__(self) -> None:
        if isinstance(self.metadata, dict):  # SAELens's from_dict passes it as it was saved
            self.metadata = SAEMetadata(**self.metadata)
        super().__post_init__()
        if self.d_sae_per_head < 1:
            raise ValueError(
                f"d_sae_per_head={self.d_sae_per_head} is not allowed: give the number of latents "
                "of one head, 1 or more (a usual choice is 4 to 32 times d_head)"
            )
        if self.n_heads < 0 or self.d_head < 0 or (self.n_heads == 0) != (self.d_head == 0):
            raise ValueError(
                f"n_heads={self.n_heads} with d_head={self.d_head} is not allowed: give both as "
                "1 or more, or neither to take them from the site"
            )
        for name, per_head in (("d_in", self.d_head), ("d_sae", self.d_sae_per_head)):
            given, total = getattr(self, name), self.n_heads * per_head
            if given not in (0, total):
                raise ValueError(
                    f"{name}={given} contradicts {self.n_heads} heads of {per_head} = {total}: "
                    f"leave {name} out, it is the total over heads"
                )
            setattr(self, name, total)
        training = ("expected_average_only_in",) if isinstance(self, TrainingSAEConfig) else ()
        if self.normalize_activations not in (allowed := ("none", *training)):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} is not supported for "
                f"{type(self).__name__}: allowed are {list(allowed)}; all else would mix the heads "
                "of a layer, and what training scales is folded into the weights of inference"
            )
        if self.reshape_activations != "none":
            raise ValueError(
                f"reshape_activations={self.reshape_activations!r} is not supported: query-head "
                "SAEs take flat and headed queries as they are; use 'none'"
            )


@dataclass(kw_only=True)
class QueryHeadTrainingSAEConfig(QueryHeadSAEConfig, TrainingSAEConfig, ABC):
    """What every query-head SAE is told for training, SAELens's `decoder_init_norm` included."""


T_CONFIG = TypeVar("T_CONFIG", bound=QueryHeadSAEConfig)
T_TRAINING_CONFIG = TypeVar("T_TRAINING_CONFIG", bound=QueryHeadTrainingSAEConfig)


class QueryHeadSAE(SAE[T_CONFIG], ABC):
    """SAEs of all heads of one query site, side by side and independent.

    Flat in (`[..., n_heads*d_head]`) gives flat latents and flat output; headed in
    (`[..., n_heads, d_head]`) gives headed. No shape is both, but with a single head, where the
    two are the same numbers in the same shape.
    """

    b_enc: nn.Parameter

    latent_min: ClassVar[float | None] = 0.0
    """Least value a latent can take; None if there is none."""

    in_units_of_pre: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters [head d_sae_per_head] that start at 0 and scale with the pre-activations."""

    @override
    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        super().turn_off_forward_pass_hook_z_reshaping()
        self.d_head = self.cfg.d_head  # SAELens sets None, for it knows d_head of hook_z only

    @property
    def n_heads(self) -> int:
        """Heads of the site."""
        return self.cfg.n_heads

    @property
    def d_latent(self) -> int:
        """Latents of one head."""
        return self.cfg.d_sae_per_head

    @override
    def initialize_weights(self) -> None:
        """Make the weights as SAELens makes those of each head on its own."""
        cfg, kind = self.cfg, {"dtype": self.dtype, "device": self.device}
        if cfg.n_heads == 0:
            raise ValueError(
                "n_heads and d_head are not set: give them in the config, or train with "
                "train_query_saes, which takes them from the site"
            )
        w_dec = torch.empty(cfg.n_heads, cfg.d_sae_per_head, cfg.d_head, **kind)
        for head in w_dec:
            nn.init.kaiming_uniform_(head)
        norm = getattr(cfg, "decoder_init_norm", None)
        if norm is not None:
            w_dec *= norm / w_dec.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(w_dec)
        self.W_enc = nn.Parameter(w_dec.mT.clone(memory_format=torch.contiguous_format))
        for name in self.in_units_of_pre:
            zeros = torch.zeros(cfg.n_heads, cfg.d_sae_per_head, **kind)
            self.register_parameter(name, nn.Parameter(zeros))
        self.b_dec = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head, **kind))

    @abstractmethod
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Return the latents of pre-activations, each head on its own."""

    def hidden_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return the pre-activations of headed input."""
        return self.linear_encode(x, self.W_enc, self.b_enc)

    def latents_of(self, hidden_pre: HeadedLatents, x: HeadedIn) -> HeadedLatents:
        """Return the latents; an architecture that reads its input twice overrides this."""
        del x
        return self.activation(hidden_pre)

    def linear_encode(
        self,
        x: HeadedIn,
        weight: Float[Tensor, "head d_head d_sae_per_head"],
        bias: Float[Tensor, "head d_sae_per_head"],
    ) -> HeadedLatents:
        """Return headed input, centred where the config says so, times weights, plus a bias."""
        sae_in = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        return _by_head(sae_in, weight) + bias

    def linear_decode(self, latents: HeadedLatents) -> HeadedIn:
        """Return the decoding of headed latents without the decoder bias."""
        return _by_head(latents, self.W_dec)

    @override
    def encode(self, x: FlatOrHeaded) -> FlatOrHeaded:
        """Return the latents of queries, in the layout in which the queries came.

        Args:
            x: queries, flat or headed, of any number of leading axes.

        Raises:
            ValueError: the shape is neither flat nor headed for this SAE.
        """
        return self.encode_with_hidden_pre(x)[0]

    def encode_with_hidden_pre(self, x: FlatOrHeaded) -> tuple[FlatOrHeaded, FlatOrHeaded]:
        """Return latents and pre-activations, in the layout in which the queries came."""
        headed, flat = self._to_heads(x, self.cfg.d_head, "queries")
        headed = self.hook_sae_input(headed.to(self.dtype))
        pre = self.hook_sae_acts_pre(_as_came(self.hidden_pre(headed), flat))
        latents = self.latents_of(self.heads_of_latents(pre), headed)
        return self.hook_sae_acts_post(_as_came(latents, flat)), pre

    @override
    def decode(self, feature_acts: FlatOrHeaded) -> FlatOrHeaded:
        """Return the queries that latents stand for, in the layout in which the latents came.

        Raises:
            ValueError: the shape is neither flat nor headed for this SAE.
        """
        latents, flat = self._to_heads(feature_acts, self.cfg.d_sae_per_head, "latents")
        return self.hook_sae_recons(_as_came(self.linear_decode(latents) + self.b_dec, flat))

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float | PerHead) -> None:
        """Fold what training multiplied the queries of each head by: the SAE then takes raw ones.

        Raises:
            ValueError: it is neither one finite number above 0 nor one for each head.
        """
        # Not in half precision: SAELens multiplies by a Python float.
        kind = torch.promote_types(self.W_enc.dtype, torch.float32)
        factor = torch.as_tensor(scaling_factor, dtype=kind, device=self.W_enc.device)
        if factor.shape not in ((), (self.n_heads,)) or not factor.log().isfinite().all():
            raise ValueError(
                f"scaling_factor={scaling_factor}: give 1 or {self.n_heads} finite numbers above 0"
            )
        self.W_enc.data *= factor.reshape(-1, 1, 1)
        self.W_dec.data /= factor.reshape(-1, 1, 1)
        self.b_dec.data /= factor.reshape(-1, 1)
        self.cfg.normalize_activations = "none"

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, "head d_sae_per_head"]:
        """Fold the decoder norms into the encoder, head by head, and return them."""
        norms = self.get_W_dec_norm()
        self.W_dec.data /= norms[..., None]
        self.W_enc.data *= norms[:, None, :]
        for name in self.in_units_of_pre:
            getattr(self, name).data *= norms
        return norms

    def heads_of_latents(self, latents: FlatOrHeaded) -> HeadedLatents:
        """Return latents, or what has their layout, as [..., head, d_sae_per_head]."""
        return self._to_heads(latents, self.cfg.d_sae_per_head, "latents")[0]

    def heads_of_queries(self, x: FlatOrHeaded) -> HeadedIn:
        """Return queries as [..., head, d_head]."""
        return self._to_heads(x, self.cfg.d_head, "queries")[0]

    def _to_heads(self, x: Tensor, size: int, what: str) -> tuple[Tensor, bool]:
        """Return `x` as [..., head, size] and whether it came flat."""
        n_heads = self.cfg.n_heads
        if x.ndim >= 2 and x.shape[-2:] == (n_heads, size):
            return x, False
        if x.ndim >= 1 and x.shape[-1] == n_heads * size:
            return x.unflatten(-1, (n_heads, size)), True
        raise ValueError(
            f"{what} of shape {list(x.shape)} fit neither layout of this SAE: allowed are "
            f"[..., {n_heads}, {size}] (headed) and [..., {n_heads * size}] (flat)"
        )


def _by_head(
    x: Float[Tensor, "*batch head d_from"], weight: Float[Tensor, "head d_from d_to"]
) -> Float[Tensor, "*batch head d_to"]:
    """Return x times the matrix of each head: einsum's product, without its 25 microseconds."""
    rows = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)
    return torch.bmm(rows, weight).transpose(0, 1).reshape(*x.shape[:-1], -1)


def _as_came(x: Tensor, flat: bool) -> Tensor:
    return x.flatten(-2) if flat else x


class QueryHeadTrainingSAE(QueryHeadSAE[T_TRAINING_CONFIG], TrainingSAE[T_TRAINING_CONFIG], ABC):
    """Adds the losses: each is summed over heads, so that a head's gradient is its own.

    With equal weights and batches a head's part of every loss is SAELens's loss of that head.
    """

    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        """Set the gradient of one step; an architecture may have a faster way to the same numbers.

        Returns:
            The loss, and at how many tokens each latent fired, [d_sae].
        """
        output = self.training_forward_pass(step_input)
        with torch.autocast(self.device.type, enabled=False):  # it is for the way there only
            output.loss.backward()
        return output.loss.detach(), output.feature_acts.detach().bool().float().sum(0)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Refuse to save what takes scaled queries: inference scales none."""
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.normalize_activations != "none":
            raise ValueError(
                "an SAE that takes scaled queries can't be saved for inference: first call "
                "fold_activation_norm_scaling_factor with their scale, as fit does at its end"
            )

    @override
    def log_histograms(self) -> dict[str, Any]:
        """Return the decoder norms of all latents of all heads."""
        return {"weights/W_dec_norms": self.get_W_dec_norm().float().flatten().cpu().numpy()}
