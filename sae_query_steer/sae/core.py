"""Query-head SAEs: one SAELens SAE object holds independent SAEs for all heads of a layer.

`W_enc [head d_head d_sae_per_head]`, `W_dec [head d_sae_per_head d_head]`, biases likewise;
`cfg.d_in` and `cfg.d_sae` are totals over heads, as SAELens's trainer and evals need. An
architecture is a subclass with an activation and, for training, with the loss terms of each head.
`@override` marks methods of SAELens's classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE, SAEConfig, TrainingSAE
from sae_lens.registry import (
    get_sae_class,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor, nn
from typing_extensions import override

from sae_query_steer.sae.configs import QueryHeadSAEConfig, QueryHeadTrainingSAEConfig

HeadedIn = Float[Tensor, "*batch head d_head"]
HeadedLatents = Float[Tensor, "*batch head d_sae_per_head"]
FlatOrHeaded = Float[Tensor, "..."]
PerHead = Float[Tensor, "head"]
PerLatent = Float[Tensor, "head d_sae_per_head"]


T_CONFIG = TypeVar("T_CONFIG", bound=QueryHeadSAEConfig)
T_TRAINING_CONFIG = TypeVar("T_TRAINING_CONFIG", bound=QueryHeadTrainingSAEConfig)


class QueryHeadSAE(SAE[T_CONFIG], ABC):
    """Independent SAEs of all heads of one query site.

    Flat input `[..., n_heads*d_head]` gives flat latents and flat output; headed input
    `[..., n_heads, d_head]` gives headed ones. A subclass that names its config,
    `class MySAE(QueryHeadSAE, config=MyConfig)`, is registered with SAELens.
    """

    b_enc: nn.Parameter

    latent_min: ClassVar[float | None] = 0.0
    """Smallest value of a latent; None if there is none."""

    in_units_of_pre: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters [head d_sae_per_head] that start at 0 and scale with the pre-activations."""

    def __init_subclass__(
        cls, *, config: type[QueryHeadSAEConfig] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if config is not None:
            training = issubclass(cls, TrainingSAE)
            register: Any = register_sae_training_class if training else register_sae_class
            register(config.architecture(), cls, config)

    @override
    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        super().turn_off_forward_pass_hook_z_reshaping()
        self.d_head = self.cfg.d_head  # SAELens sets None: it knows d_head of hook_z only

    @property
    def n_heads(self) -> int:
        """Query heads of the site."""
        return self.cfg.n_heads

    @property
    def d_latent(self) -> int:
        """Latents of one head."""
        return self.cfg.d_sae_per_head

    @override
    def initialize_weights(self) -> None:
        """Initialise the weights of each head as SAELens initialises an SAE of that head."""
        cfg, kind = self.cfg, {"dtype": self.dtype, "device": self.device}
        if cfg.n_heads == 0:
            raise ValueError(
                "n_heads and d_head must be set in the config of an SAE, got 0; train_query_saes "
                "takes them from the site"
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
        """Return the pre-activations of headed queries."""
        return self.linear_encode(x, self.W_enc, self.b_enc)

    def latents_of(self, hidden_pre: HeadedLatents, x: HeadedIn) -> HeadedLatents:
        """Return the latents; overridden by architectures that also read the queries here."""
        del x
        return self.activation(hidden_pre)

    def linear_encode(
        self, x: HeadedIn, weight: Float[Tensor, "head d_head d_sae_per_head"], bias: PerLatent
    ) -> HeadedLatents:
        """Return headed queries, minus `b_dec` if the config says so, times weights plus a bias."""
        return _by_head(x - self.b_dec if self.cfg.apply_b_dec_to_input else x, weight) + bias

    def linear_decode(self, latents: HeadedLatents) -> HeadedIn:
        """Return the decoding of headed latents without the decoder bias."""
        return _by_head(latents, self.W_dec)

    @override
    def encode(self, x: FlatOrHeaded) -> FlatOrHeaded:
        """Return the latents of queries, in the layout of the queries.

        Raises:
            ValueError: the shape is neither flat nor headed for this SAE.
        """
        return self.encode_with_hidden_pre(x)[0]

    def encode_with_hidden_pre(self, x: FlatOrHeaded) -> tuple[FlatOrHeaded, FlatOrHeaded]:
        """Return latents and pre-activations, in the layout of the queries."""
        headed, flat = self._to_heads(x, self.cfg.d_head, "queries")
        headed = self.hook_sae_input(headed.to(self.dtype))
        pre = self.hook_sae_acts_pre(_in_layout(self.hidden_pre(headed), flat))
        latents = self.latents_of(self._to_heads(pre, self.d_latent, "latents")[0], headed)
        return self.hook_sae_acts_post(_in_layout(latents, flat)), pre

    @override
    def decode(self, feature_acts: FlatOrHeaded) -> FlatOrHeaded:
        """Return the reconstructed queries, in the layout of the latents.

        Raises:
            ValueError: the shape is neither flat nor headed for this SAE.
        """
        latents, flat = self._to_heads(feature_acts, self.d_latent, "latents")
        return self.hook_sae_recons(_in_layout(self.linear_decode(latents) + self.b_dec, flat))

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float | PerHead) -> None:
        """Fold the factor by which training scaled the queries, of each head or of all.

        Raises:
            ValueError: a factor that is not finite, or not above 0.
        """
        # At least 32 bits: SAELens multiplies by a Python float.
        kind = torch.promote_types(self.W_enc.dtype, torch.float32)
        factor = torch.as_tensor(scaling_factor, dtype=kind, device=self.W_enc.device)
        if not bool((factor.isfinite() & (factor > 0)).all()):
            raise ValueError(f"scaling_factor must be finite and > 0, got {scaling_factor}")
        self.W_enc.data *= factor.reshape(-1, 1, 1)
        self.W_dec.data /= factor.reshape(-1, 1, 1)
        self.b_dec.data /= factor.reshape(-1, 1)
        self.cfg.normalize_activations = "none"

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> PerLatent:
        """Fold the decoder norms into the encoder, head by head, and return them."""
        norms = self.get_W_dec_norm()
        self.W_dec.data /= norms[..., None]
        self.W_enc.data *= norms[:, None, :]
        for name in self.in_units_of_pre:
            getattr(self, name).data *= norms
        return norms

    def _to_heads(self, x: Tensor, size: int, what: str) -> tuple[Tensor, bool]:
        """Return `x` as [..., head, size] and whether it was flat; sparse latents are dense."""
        n_heads, x = self.cfg.n_heads, x.to_dense() if x.is_sparse else x
        if x.ndim >= 2 and x.shape[-2:] == (n_heads, size):
            return x, False
        if x.ndim >= 1 and x.shape[-1] == n_heads * size:
            return x.unflatten(-1, (n_heads, size)), True
        raise ValueError(
            f"the shape of {what} must be [..., {n_heads}, {size}] (headed) or "
            f"[..., {n_heads * size}] (flat), got {list(x.shape)}"
        )


def _by_head(
    x: Float[Tensor, "*batch head d_from"], weight: Float[Tensor, "head d_from d_to"]
) -> Float[Tensor, "*batch head d_to"]:
    """Return x times the matrix of each head; 25 microseconds faster than einsum."""
    rows = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)
    return torch.bmm(rows, weight).transpose(0, 1).reshape(*x.shape[:-1], -1)


def has_unit_norms(weights: Float[Tensor, "*batch d_latent d_head"]) -> bool:
    """Return whether all decoder rows have norm 1.

    Up to more than the rounding of 32-bit norms, and too little to change a latent.
    """
    return bool(((weights.detach().float().norm(dim=-1) - 1).abs() <= 1e-5).all())


def _in_layout(x: Tensor, flat: bool) -> Tensor:
    return x.flatten(-2) if flat else x


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadedStep:
    """Tensors of one training step by head, from which the loss terms are computed."""

    queries: Float[Tensor, "batch head d_head"]
    reconstructions: Float[Tensor, "batch head d_head"]
    hidden_pre: Float[Tensor, "batch head d_sae_per_head"]
    latents: Float[Tensor, "batch head d_sae_per_head"]
    dead: Bool[Tensor, "head d_sae_per_head"] | None
    """Latents that count as dead; None if no latent does."""

    weights: Mapping[str, float]
    """Weight of each of `penalties` at this step."""


class QueryHeadTrainingSAE(QueryHeadSAE[T_TRAINING_CONFIG], TrainingSAE[T_TRAINING_CONFIG], ABC):
    """A query-head SAE with losses.

    The loss is the sum over heads of SAELens's loss of that head, so the gradient of a head does
    not depend on the other heads.
    """

    penalties: ClassVar[tuple[str, ...]] = ()
    """Loss terms with a weight and a warm-up: `x` reads `x_coefficient` and `x_warm_up_steps`."""

    @abstractmethod
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the loss terms beside the squared error, by name, for each head."""

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {
            name: TrainCoefficientConfig(
                getattr(self.cfg, f"{name}_coefficient"), getattr(self.cfg, f"{name}_warm_up_steps")
            )
            for name in self.penalties
        }

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return the loss terms of `head_losses`, summed over heads."""
        dead = step_input.dead_neuron_mask
        by_head = (self.n_heads, -1)
        step = HeadedStep(
            queries=step_input.sae_in.unflatten(-1, by_head),
            reconstructions=sae_out.unflatten(-1, by_head),
            hidden_pre=hidden_pre.unflatten(-1, by_head),
            latents=feature_acts.unflatten(-1, by_head),
            dead=None if dead is None or not bool(dead.any()) else dead.unflatten(-1, by_head),
            weights=step_input.coefficients,
        )
        return {name: loss.sum() for name, loss in self.head_losses(step).items()}

    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        """Set the gradients of one step; overridden where they have a closed form.

        Returns:
            The loss, and the number of tokens at which each latent fired, [d_sae].
        """
        output = self.training_forward_pass(step_input)
        with torch.autocast(self.device.type, enabled=False):  # only the forward pass uses it
            output.loss.backward()
        return output.loss.detach(), output.feature_acts.detach().bool().float().sum(0)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Refuse to save an SAE of scaled queries: inference does not scale them."""
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.normalize_activations != "none":
            raise ValueError(
                "normalize_activations must be 'none' to save an SAE for inference: call "
                "fold_activation_norm_scaling_factor with the scale of the queries first"
            )

    @override
    def log_histograms(self) -> dict[str, Any]:
        """Return the decoder norms of all latents of all heads."""
        return {"weights/W_dec_norms": self.get_W_dec_norm().float().flatten().cpu().numpy()}


T_SAE = TypeVar("T_SAE", bound=SAE[Any])


def with_weights(
    sae_class: type[T_SAE],
    config: SAEConfig,
    weights: Mapping[str, Tensor],
    device: str | torch.device,
) -> T_SAE:
    """Return a frozen SAE that holds the given tensors, without drawing random weights first."""
    config.device = "meta"
    sae = sae_class(config)
    kinds = {name: value.dtype for name, value in sae.state_dict().items()}
    sae.load_state_dict({name: v.to(kinds[name]) for name, v in weights.items()}, assign=True)
    return sae.to(device=device).requires_grad_(False).eval()


def to_inference(sae: QueryHeadTrainingSAE[Any]) -> QueryHeadSAE[Any]:
    """Return the inference SAE of a trained one, equal to saving and loading it.

    The weights are copies, on the same device, and need no gradient.
    """
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    settings = sae.cfg.get_inference_sae_cfg_dict()
    inference_class, config_class = get_sae_class(settings["architecture"])
    config = config_class.from_dict(settings)
    inference = with_weights(inference_class, config, state, sae.W_dec.device)
    assert isinstance(inference, QueryHeadSAE)
    return inference
