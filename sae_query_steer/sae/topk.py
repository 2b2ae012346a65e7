"""TopK: the k largest pre-activations of each head, above zero."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.configs import QueryHeadTopKSAEConfig, QueryHeadTopKTrainingSAEConfig
from sae_query_steer.sae.core import (
    HeadedIn,
    HeadedLatents,
    HeadedStep,
    PerHead,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
)
from sae_query_steer.sae.fused_topk import fused_topk


class QueryHeadTopKSAE(QueryHeadSAE[Any], config=QueryHeadTopKSAEConfig):
    """TopK SAEs of all heads of a query site."""

    @override
    def hidden_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return pre-activations, scaled by the decoder norms if the config says so."""
        pre = super().hidden_pre(x)
        return pre * self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        top = hidden_pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(hidden_pre).scatter_(-1, top.indices, top.values.relu())

    @override
    def linear_decode(self, latents: HeadedLatents) -> HeadedIn:
        """Return latents times decoder rows, of unit norm if the config says so."""
        if self.cfg.rescale_acts_by_decoder_norm:
            latents = latents * (1 / self.W_dec.norm(dim=-1))
        return super().linear_decode(latents)

    @override
    def fold_W_dec_norm(self) -> None:
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "decoder norms can't be folded with rescale_acts_by_decoder_norm=False: they would "
                "change which latents are the k largest"
            )
        super().fold_W_dec_norm()


class QueryHeadTopKTrainingSAE(
    QueryHeadTopKSAE, QueryHeadTrainingSAE[Any], config=QueryHeadTopKTrainingSAEConfig
):
    """TopK SAEs of all heads of a query site, in training."""

    @override
    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        """Do the same as the inherited method without autograd.

        Only the auxiliary loss uses autograd, in steps in which a latent is dead.
        """
        if torch.is_autocast_enabled(self.device.type):
            # The closed form chooses the number format of every product itself.
            return super().backward(step_input)
        heads = {"h": self.n_heads}
        x = rearrange(step_input.sae_in.to(self.dtype), "b (h d) -> h b d", **heads)
        found = fused_topk(
            x.contiguous(),
            **{name: parameter.detach() for name, parameter in self.named_parameters()},
            k=self.cfg.k,
            apply_b_dec_to_input=self.cfg.apply_b_dec_to_input,
            rescale_by_decoder_norm=self.cfg.rescale_acts_by_decoder_norm,
        )
        for name, parameter in self.named_parameters():
            parameter.grad = getattr(found, name)
        dead, loss = step_input.dead_neuron_mask, found.loss
        if dead is not None and bool(dead.any()):
            auxiliary = self.aux_loss(
                rearrange(found.residual, "h b d -> b h d"),
                self.hidden_pre(rearrange(x, "h b d -> b h d")),
                rearrange(dead, "(h s) -> h s", **heads),
            ).sum()
            auxiliary.backward()
            loss = loss + auxiliary.detach()
        return loss, found.fired.flatten()

    @override
    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        loss = step.queries.new_zeros(self.n_heads)
        if step.dead is not None:
            loss = self.aux_loss(step.queries - step.reconstructions, step.hidden_pre, step.dead)
        return {"auxiliary_reconstruction_loss": loss}

    def aux_loss(
        self,
        residual: Float[Tensor, "batch head d_head"],
        hidden_pre: Float[Tensor, "batch head d_sae_per_head"],
        dead: Bool[Tensor, "head d_sae_per_head"],
    ) -> PerHead:
        """Return SAELens's auxiliary loss: dead latents reconstruct the residual."""
        n_dead = dead.sum(-1).to(residual.dtype)
        k_aux = self.cfg.d_head // 2
        # A head with fewer dead latents than k_aux fills its top-k with -inf, which is replaced by
        # 0: the same as k_aux = min(k_aux, n_dead) of an SAE of that head.
        top = hidden_pre.masked_fill(~dead, -torch.inf).topk(
            min(k_aux, self.d_latent), dim=-1, sorted=False
        )
        values = top.values.where(top.values > -torch.inf, 0.0)
        acts = torch.zeros_like(hidden_pre).scatter_(-1, top.indices, values)
        error = (self.linear_decode(acts) - residual.detach()).square().sum(-1).mean(0)
        return self.cfg.aux_loss_coefficient * ((n_dead / k_aux).clamp(max=1.0) * error)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the decoder norms, so that every row of the saved decoder has norm 1."""
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = self.get_W_dec_norm()
            state_dict["W_enc"] = state_dict["W_enc"] * norms[:, None, :]
            state_dict["b_enc"] = state_dict["b_enc"] * norms
            state_dict["W_dec"] = state_dict["W_dec"] / norms[..., None]
