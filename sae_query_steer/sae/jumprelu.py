"""JumpReLU: latents above a threshold that each latent of each head learns."""

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from sae_query_steer.sae.configs import (
    QueryHeadJumpReLUSAEConfig,
    QueryHeadJumpReLUTrainingSAEConfig,
)
from sae_query_steer.sae.core import (
    HeadedLatents,
    HeadedStep,
    PerHead,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
)


class QueryHeadJumpReLUSAE(QueryHeadSAE[Any], config=QueryHeadJumpReLUSAEConfig):
    """JumpReLU SAEs of all heads of a query site, with `threshold [head d_sae_per_head]`."""

    threshold: nn.Parameter

    in_units_of_pre = ("b_enc", "threshold")

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above its threshold and above zero."""
        return hidden_pre.relu() * (hidden_pre > self.threshold)


class QueryHeadJumpReLUTrainingSAE(
    QueryHeadJumpReLUSAE, QueryHeadTrainingSAE[Any], config=QueryHeadJumpReLUTrainingSAEConfig
):
    """JumpReLU SAEs of all heads of a query site, in training.

    The jumps and their straight-through gradients are SAELens's own functions.
    """

    penalties = ("l0",)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        start = torch.full_like(
            self.threshold, self.cfg.jumprelu_init_threshold, dtype=torch.float32
        )
        self.threshold = nn.Parameter(start)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> "QueryHeadJumpReLUTrainingSAE":
        # As in SAELens, thresholds stay in float32 whatever the SAE is cast to: in bfloat16 a step
        # of Adam would round to nothing.
        super()._apply(*args, **kwargs)
        self.threshold.data = self.threshold.data.float()
        return self

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and outputs of a batch, after clamping negative thresholds to 0."""
        self.threshold.data.clamp_(min=0.0)
        return super().training_forward_pass(step_input)

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above its threshold, with a gradient for the threshold."""
        return self._with_threshold(JumpReLU, hidden_pre)

    @override
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the sparsity loss and, if configured, the pre-activation loss of dead latents."""
        norms, mode = self.W_dec.norm(dim=-1), self.cfg.jumprelu_sparsity_loss_mode
        if mode == "tanh":
            count = (self.cfg.jumprelu_tanh_scale * step.latents * norms).tanh().sum(-1)
        else:
            count = self._with_threshold(Step, step.hidden_pre).sum(-1)
        if mode == "quadratic":
            count = 2 / self.cfg.target_l0 * (count - self.cfg.target_l0) ** 2
        losses = {"l0_loss": step.weights["l0"] * count.mean(0)}
        weight = self.cfg.pre_act_loss_coefficient
        if weight is not None and step.dead is not None:
            below = (self.threshold.to(step.hidden_pre.dtype) - step.hidden_pre).relu()
            losses["pre_act_loss"] = weight * (below * step.dead * norms).sum(-1).mean(0)
        return losses

    def _with_threshold(
        self, function: type[torch.autograd.Function], hidden_pre: HeadedLatents
    ) -> HeadedLatents:
        # SAELens's functions sum the gradient of the threshold over the first axis only.
        out = function.apply(
            hidden_pre.reshape(-1, *hidden_pre.shape[-2:]),
            self.threshold.to(hidden_pre.dtype),
            self.cfg.jumprelu_bandwidth,
            self.cfg.jumprelu_ste_to_input,
        )
        assert isinstance(out, Tensor)
        return out.reshape(hidden_pre.shape)
