"""Architectures with a sparsity penalty: Standard, Gated, JumpReLU and KL-sparse."""

import math
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from sae_query_steer.sae import configs
from sae_query_steer.sae.core import (
    HeadedIn,
    HeadedLatents,
    HeadedStep,
    PerHead,
    PerLatent,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
)


class QueryHeadStandardSAE(QueryHeadSAE[Any], config=configs.QueryHeadStandardSAEConfig):
    """ReLU SAEs of all heads of a query site."""

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Return what is above zero."""
        return hidden_pre.relu()


class QueryHeadStandardTrainingSAE(
    QueryHeadStandardSAE, QueryHeadTrainingSAE, config=configs.QueryHeadStandardTrainingSAEConfig
):
    """ReLU SAEs of all heads of a query site, in training."""

    penalties = ("l1",)

    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the Lp norm of each token's latents, weighted by their decoder norms."""
        weighted = step.latents * self.W_dec.norm(dim=-1)
        sparsity = weighted.norm(p=self.cfg.lp_norm, dim=-1)
        return {"l1_loss": step.weights["l1"] * sparsity.mean(0)}


class QueryHeadGatedSAE(QueryHeadSAE[Any], config=configs.QueryHeadGatedSAEConfig):
    """Gated SAEs of all heads of a query site.

    One half of the encoder decides which latents fire, the other how strongly. Both share `W_enc`:
    the gate adds `b_gate`; the magnitude scales by `exp(r_mag)` and adds `b_mag`, each
    [head d_sae_per_head]. There is no `b_enc`. Pre-activations are magnitudes.
    """

    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    in_units_of_pre = ("b_gate", "b_mag")

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_mag))

    def gate_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return the pre-activations of the gate; a latent fires where they are above zero."""
        return self.linear_encode(x, self.W_enc, self.b_gate)

    def hidden_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return the magnitudes before ReLU."""
        return self.linear_encode(x, self.W_enc * self.r_mag.exp()[:, None], self.b_mag)

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Return the magnitudes, regardless of the gate."""
        return hidden_pre.relu()

    def latents_of(self, hidden_pre: HeadedLatents, x: HeadedIn) -> HeadedLatents:
        """Return the magnitudes whose gate is open."""
        return self.activation(hidden_pre) * (self.gate_pre(x) > 0)


class QueryHeadGatedTrainingSAE(
    QueryHeadGatedSAE, QueryHeadTrainingSAE, config=configs.QueryHeadGatedTrainingSAEConfig
):
    """Gated SAEs of all heads of a query site, in training."""

    penalties = ("l1",)

    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the L1 norm of the gates, and the squared error of what the gates alone decode.

        The gate learns from these two only, since its step has no gradient. As in SAELens, the
        decoder also learns from the second.
        """
        gate = self.gate_pre(step.queries).relu()
        sparsity = (gate * self.W_dec.norm(dim=-1)).sum(-1)
        error = self.linear_decode(gate) + self.b_dec - step.queries
        return {
            "l1_loss": step.weights["l1"] * sparsity.mean(0),
            "auxiliary_reconstruction_loss": error.square().sum(-1).mean(0),
        }


class QueryHeadJumpReLUSAE(QueryHeadSAE[Any], config=configs.QueryHeadJumpReLUSAEConfig):
    """JumpReLU SAEs of all heads of a query site, with `threshold [head d_sae_per_head]`."""

    threshold: nn.Parameter

    in_units_of_pre = ("b_enc", "threshold")

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above its threshold and above zero."""
        return hidden_pre.relu() * (hidden_pre > self.threshold)


class QueryHeadJumpReLUTrainingSAE(
    QueryHeadJumpReLUSAE, QueryHeadTrainingSAE, config=configs.QueryHeadJumpReLUTrainingSAEConfig
):
    """JumpReLU SAEs of all heads of a query site, in training.

    The jumps and their straight-through gradients are SAELens's own functions.
    """

    penalties = ("l0",)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        start = self.cfg.jumprelu_init_threshold
        threshold = torch.full_like(self.threshold, start, dtype=torch.float32)
        self.threshold = nn.Parameter(threshold)

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

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep what is above its threshold, with a gradient for the threshold."""
        return self._with_threshold(JumpReLU, hidden_pre)

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

    def _with_threshold(self, function: Any, hidden_pre: HeadedLatents) -> HeadedLatents:
        # SAELens's functions sum the gradient of the threshold over the first axis only.
        rows = hidden_pre.reshape(-1, *hidden_pre.shape[-2:])
        threshold = self.threshold.to(hidden_pre.dtype)
        width, to_input = self.cfg.jumprelu_bandwidth, self.cfg.jumprelu_ste_to_input
        return function.apply(rows, threshold, width, to_input).reshape(hidden_pre.shape)


class QueryHeadKLSparseSAE(QueryHeadSAE[Any], config=configs.QueryHeadKLSparseSAEConfig):
    """Sigmoid SAEs of all heads of a query site: every latent lies between 0 and 1."""

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Return values between 0 and 1."""
        return hidden_pre.sigmoid()

    @override
    def fold_and_get_W_dec_norm(self) -> PerLatent:
        raise NotImplementedError(
            "decoder norms can't be folded into an encoder with sigmoid latents, which do not "
            "scale with their pre-activations: scale the decoder rows where you read them"
        )


class QueryHeadKLSparseTrainingSAE(
    QueryHeadKLSparseSAE, QueryHeadTrainingSAE, config=configs.QueryHeadKLSparseTrainingSAEConfig
):
    """Sigmoid SAEs of all heads of a query site, in training.

    Latents are never 0, so each fires at every token and none counts as dead.

    Source: arXiv 2502.18644 for the penalty; the mean is over the batch of a step (our choice).
    """

    penalties = ("kl",)

    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the divergence of the mean of each latent from `rho`, summed over latents."""
        penalty = bernoulli_kl(self.cfg.rho, step.latents.mean(0))
        return {"kl_loss": step.weights["kl"] * penalty.sum(-1)}


def bernoulli_kl(rho: float, means: Float[Tensor, "*latent"]) -> Float[Tensor, "*latent"]:
    """Return the Kullback-Leibler divergence of Bernoulli distributions from one of mean `rho`.

        rho log(rho / mean) + (1 - rho) log((1 - rho) / (1 - mean))

    In nats. Means of 0 and 1 are replaced by the nearest representable numbers between them.
    """
    tiny = torch.finfo(means.dtype).eps / 2
    means = means.clamp(tiny, 1 - tiny)
    entropy = rho * math.log(rho) + (1 - rho) * math.log(1 - rho)
    return entropy - rho * means.log() - (1 - rho) * (-means).log1p()
