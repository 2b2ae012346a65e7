"""TopK: the k largest pre-activations of each head, above zero."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.core import (
    HeadedIn,
    HeadedLatents,
    QueryHeadSAE,
    QueryHeadSAEConfig,
    QueryHeadTrainingSAE,
    QueryHeadTrainingSAEConfig,
)
from sae_query_steer.sae.fused_topk import fused_topk

ARCHITECTURE = "query_head_topk"


@dataclass(kw_only=True)
class QueryHeadTopKSAEConfig(QueryHeadSAEConfig):
    """TopK over the latents of each head."""

    k: int = 32
    """Latents of one head that may fire at a token."""

    rescale_acts_by_decoder_norm: bool = True
    """Choose and count latents as if every decoder row had norm 1, as SAELens does."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_k()

    def _check_k(self) -> None:
        if not isinstance(self.k, int) or not 1 <= self.k <= self.d_sae_per_head:
            raise ValueError(
                f"k={self.k} is not allowed: give 1 to d_sae_per_head={self.d_sae_per_head}"
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


T_TOPK = TypeVar("T_TOPK", bound=QueryHeadTopKSAEConfig)


class QueryHeadTopKSAE(QueryHeadSAE[T_TOPK]):
    """TopK SAEs of all heads of a query site."""

    @override
    def hidden_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return pre-activations, scaled by the decoder norms where the config says so."""
        pre = super().hidden_pre(x)
        return pre * self._norms() if self.cfg.rescale_acts_by_decoder_norm else pre

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep the k largest of each head, above zero."""
        top = hidden_pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(hidden_pre).scatter_(-1, top.indices, top.values.relu())

    @override
    def linear_decode(self, latents: HeadedLatents) -> HeadedIn:
        """Return latents times unit decoder rows, where the config says so."""
        if self.cfg.rescale_acts_by_decoder_norm:
            latents = latents * (1 / self._norms())
        return super().linear_decode(latents)

    @override
    def fold_W_dec_norm(self) -> None:
        """Fold the decoder norms, as SAELens does only where they leave the choice as it is."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "decoder norms can't be folded with rescale_acts_by_decoder_norm=False: they would "
                "change which latents are the k largest"
            )
        super().fold_W_dec_norm()

    def _norms(self) -> Float[Tensor, "head d_sae_per_head"]:
        return self.W_dec.norm(dim=-1)


@dataclass(kw_only=True)
class QueryHeadTopKTrainingSAEConfig(QueryHeadTopKSAEConfig, QueryHeadTrainingSAEConfig):
    """TopK with SAELens's auxiliary loss, which lets dead latents learn from the residual."""

    aux_loss_coefficient: float = 1.0
    """Weight of the auxiliary loss."""

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        # The norms are folded on saving, and one division by 1 less is one rounding less.
        return super().get_inference_sae_cfg_dict() | {"rescale_acts_by_decoder_norm": False}


class QueryHeadTopKTrainingSAE(
    QueryHeadTopKSAE[QueryHeadTopKTrainingSAEConfig],
    QueryHeadTrainingSAE[QueryHeadTopKTrainingSAEConfig],
):
    """TopK SAEs of all heads of a query site, in training."""

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        """Do what `training_forward_pass` and `backward` of its loss do, without autograd.

        The auxiliary loss alone goes by autograd, in steps in which a latent is dead.
        """
        if torch.is_autocast_enabled(self.device.type):
            # The faster way names the type of every product itself.
            return QueryHeadTrainingSAE.backward(self, step_input)
        cfg = self.cfg
        x = rearrange(step_input.sae_in.to(self.dtype), "b (h d) -> h b d", h=cfg.n_heads)
        found = fused_topk(
            x.contiguous(),
            self.W_enc.detach(),
            self.b_enc.detach(),
            self.W_dec.detach(),
            self.b_dec.detach(),
            k=cfg.k,
            apply_b_dec_to_input=cfg.apply_b_dec_to_input,
            rescale_by_decoder_norm=cfg.rescale_acts_by_decoder_norm,
        )
        for name, parameter in self.named_parameters():
            parameter.grad = getattr(found, name)
        dead, loss = step_input.dead_neuron_mask, found.loss
        if dead is not None and bool(dead.any()):
            auxiliary = self._aux_loss(
                residual=rearrange(found.residual, "h b d -> b h d"),
                hidden_pre=self.hidden_pre(rearrange(x, "h b d -> b h d")),
                dead=rearrange(dead, "(h s) -> h s", h=cfg.n_heads),
            )
            auxiliary.backward()
            loss = loss + auxiliary.detach()
        return loss, found.fired.flatten()

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return SAELens's auxiliary loss of each head, summed over heads."""
        dead = step_input.dead_neuron_mask
        if dead is None or not bool(dead.any()):
            return {"auxiliary_reconstruction_loss": sae_out.new_tensor(0.0)}
        heads = {"h": self.cfg.n_heads}
        return {
            "auxiliary_reconstruction_loss": self._aux_loss(
                residual=rearrange(step_input.sae_in - sae_out, "b (h d) -> b h d", **heads),
                hidden_pre=rearrange(hidden_pre, "b (h s) -> b h s", **heads),
                dead=rearrange(dead, "(h s) -> h s", **heads),
            )
        }

    def _aux_loss(
        self,
        residual: Float[Tensor, "batch head d_head"],
        hidden_pre: Float[Tensor, "batch head d_sae_per_head"],
        dead: Bool[Tensor, "head d_sae_per_head"],
    ) -> Float[Tensor, ""]:
        n_dead = dead.sum(-1).to(residual.dtype)
        k_aux = self.cfg.d_head // 2
        # A head with fewer dead latents than k_aux fills the rest of its top-k with -inf: these
        # carry nothing, which leaves the k_aux = min(k_aux, n_dead) of a solo run.
        top = hidden_pre.masked_fill(~dead, -torch.inf).topk(
            min(k_aux, self.cfg.d_sae_per_head), dim=-1, sorted=False
        )
        values = top.values.where(top.values > -torch.inf, 0.0)
        acts = torch.zeros_like(hidden_pre).scatter_(-1, top.indices, values)
        error = (self.linear_decode(acts) - residual.detach()).square().sum(-1).mean(0)
        return self.cfg.aux_loss_coefficient * ((n_dead / k_aux).clamp(max=1.0) * error).sum()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the decoder norms, so that every row of the saved decoder has norm 1."""
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = self.get_W_dec_norm()
            state_dict["W_enc"] = state_dict["W_enc"] * norms[:, None, :]
            state_dict["b_enc"] = state_dict["b_enc"] * norms
            state_dict["W_dec"] = state_dict["W_dec"] / norms[..., None]


register_sae_class(ARCHITECTURE, QueryHeadTopKSAE, QueryHeadTopKSAEConfig)
register_sae_training_class(ARCHITECTURE, QueryHeadTopKTrainingSAE, QueryHeadTopKTrainingSAEConfig)
