"""JumpReLU: what is above a threshold that every latent of every head learns for itself."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.jumprelu_sae import JumpReLU, Step, calculate_pre_act_loss
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from sae_query_steer.sae.core import (
    HeadedLatents,
    QueryHeadSAE,
    QueryHeadSAEConfig,
    QueryHeadTrainingSAE,
    QueryHeadTrainingSAEConfig,
)
from sae_query_steer.sae.penalty import check_steps, check_weight

ARCHITECTURE = "query_head_jumprelu"


@dataclass(kw_only=True)
class QueryHeadJumpReLUSAEConfig(QueryHeadSAEConfig):
    """Latents of each head above their thresholds."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


T_JUMPRELU = TypeVar("T_JUMPRELU", bound=QueryHeadJumpReLUSAEConfig)


class QueryHeadJumpReLUSAE(QueryHeadSAE[T_JUMPRELU]):
    """JumpReLU SAEs of all heads of a query site, with `threshold [head d_sae_per_head]`."""

    threshold: nn.Parameter

    in_units_of_pre = ("b_enc", "threshold")

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above its threshold, and above zero."""
        return hidden_pre.relu() * (hidden_pre > self.threshold)


@dataclass(kw_only=True)
class QueryHeadJumpReLUTrainingSAEConfig(QueryHeadJumpReLUSAEConfig, QueryHeadTrainingSAEConfig):
    """JumpReLU with SAELens's sparsity losses; its names, and its values for each head."""

    jumprelu_init_threshold: float = 0.01
    """Every threshold at the start."""

    jumprelu_bandwidth: float = 0.05
    """Width around a threshold in which pre-activations move it."""

    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    """What is penalised: the count of latents of a head that fire (`step`), a smooth bound on it
    (`tanh`), or its squared distance from `target_l0` (`quadratic`)."""

    l0_coefficient: float = 1.0
    """Weight of the sparsity loss."""

    l0_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""

    pre_act_loss_coefficient: float | None = None
    """Weight of the loss that draws dead latents up to their threshold; None is without."""

    jumprelu_tanh_scale: float = 4.0
    """Steepness of `tanh`."""

    jumprelu_ste_to_input: bool = False
    """Let the encoder, too, learn from pre-activations near a threshold."""

    target_l0: float | None = None
    """Latents of one head that should fire at a token; needed by `quadratic` alone."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        mode = self.jumprelu_sparsity_loss_mode
        if mode not in ("step", "tanh", "quadratic"):
            raise ValueError(
                f"jumprelu_sparsity_loss_mode={mode!r} is not allowed: give 'step', 'tanh' or "
                "'quadratic'"
            )
        if mode == "quadratic" and not 0 < (self.target_l0 or 0) <= self.d_sae_per_head:
            raise ValueError(
                f"target_l0={self.target_l0} is not allowed with 'quadratic': give more than 0, "
                f"at most d_sae_per_head={self.d_sae_per_head}"
            )
        if not (math.isfinite(self.jumprelu_bandwidth) and self.jumprelu_bandwidth > 0):
            raise ValueError(
                f"jumprelu_bandwidth={self.jumprelu_bandwidth} is not allowed: give a finite "
                "number above 0 (SAELens's is 0.05), or no threshold can learn"
            )
        check_weight("jumprelu_init_threshold", self.jumprelu_init_threshold)
        check_weight("jumprelu_tanh_scale", self.jumprelu_tanh_scale)
        check_weight("l0_coefficient", self.l0_coefficient)
        check_weight("pre_act_loss_coefficient", self.pre_act_loss_coefficient or 0.0)
        check_steps("l0_warm_up_steps", self.l0_warm_up_steps)


class QueryHeadJumpReLUTrainingSAE(
    QueryHeadJumpReLUSAE[QueryHeadJumpReLUTrainingSAEConfig],
    QueryHeadTrainingSAE[QueryHeadJumpReLUTrainingSAEConfig],
):
    """JumpReLU SAEs of all heads of a query site, in training.

    The jumps and their straight-through gradients are SAELens's own functions.
    """

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold = nn.Parameter(
            torch.full_like(self.threshold, self.cfg.jumprelu_init_threshold, dtype=torch.float32)
        )

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> "QueryHeadJumpReLUTrainingSAE":
        # As in SAELens, thresholds stay in float32 whatever the SAE is cast to: in bfloat16 a step
        # of Adam would round away.
        super()._apply(*args, **kwargs)
        self.threshold.data = self.threshold.data.float()
        return self

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and outputs of a batch, after lifting negative thresholds to 0."""
        self.threshold.data.clamp_(min=0.0)
        return super().training_forward_pass(step_input)

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above its threshold, with a gradient for the threshold."""
        return self._with_threshold(JumpReLU, hidden_pre)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l0": TrainCoefficientConfig(self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps)}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return the sparsity and pre-activation losses of each head, summed over heads."""
        norms, weight = self.W_dec.norm(dim=-1), step_input.coefficients["l0"]
        count = self._soft_count(
            self.heads_of_latents(feature_acts), self.heads_of_latents(hidden_pre), norms
        )
        losses = {"l0_loss": weight * count.sum(-1).mean()}
        if self.cfg.pre_act_loss_coefficient is not None:
            # Flat, SAELens's sum over latents is the sum over heads.
            losses["pre_act_loss"] = calculate_pre_act_loss(
                self.cfg.pre_act_loss_coefficient,
                self.threshold.to(hidden_pre.dtype).flatten(),
                hidden_pre,
                step_input.dead_neuron_mask,
                norms.flatten(),
            )
        return losses

    def _soft_count(
        self,
        latents: Float[Tensor, "batch head d_sae_per_head"],
        hidden_pre: Float[Tensor, "batch head d_sae_per_head"],
        norms: Float[Tensor, "head d_sae_per_head"],
    ) -> Float[Tensor, "batch head"]:
        """Return what the mode penalises, at every token of every head."""
        if self.cfg.jumprelu_sparsity_loss_mode == "tanh":
            return (self.cfg.jumprelu_tanh_scale * latents * norms).tanh().sum(-1)
        l0 = self._with_threshold(Step, hidden_pre).sum(-1)
        if self.cfg.jumprelu_sparsity_loss_mode == "step":
            return l0
        assert self.cfg.target_l0 is not None
        return 2 / self.cfg.target_l0 * (l0 - self.cfg.target_l0) ** 2

    def _with_threshold(
        self, function: type[torch.autograd.Function], hidden_pre: HeadedLatents
    ) -> HeadedLatents:
        # SAELens's functions sum the threshold's gradient over the first axis alone.
        out = function.apply(
            hidden_pre.reshape(-1, *hidden_pre.shape[-2:]),
            self.threshold.to(hidden_pre.dtype),
            self.cfg.jumprelu_bandwidth,
            self.cfg.jumprelu_ste_to_input,
        )
        assert isinstance(out, Tensor)
        return out.reshape(hidden_pre.shape)


register_sae_class(ARCHITECTURE, QueryHeadJumpReLUSAE, QueryHeadJumpReLUSAEConfig)
register_sae_training_class(
    ARCHITECTURE, QueryHeadJumpReLUTrainingSAE, QueryHeadJumpReLUTrainingSAEConfig
)
