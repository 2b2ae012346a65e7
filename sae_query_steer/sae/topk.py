"""TopK: the k largest pre-activations of each head above zero; BatchTopK and Matryoshka on it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae import configs
from sae_query_steer.sae.core import (
    HeadedIn,
    HeadedLatents,
    HeadedStep,
    PerHead,
    QueryHeadSAE,
    QueryHeadTrainingSAE,
    has_unit_norms,
)
from sae_query_steer.sae.fused_topk import fused_topk


class QueryHeadTopKSAE(QueryHeadSAE[Any], config=configs.QueryHeadTopKSAEConfig):
    """TopK SAEs of all heads of a query site."""

    def hidden_pre(self, x: HeadedIn) -> HeadedLatents:
        """Return pre-activations, scaled by the decoder norms if the config says so."""
        pre = super().hidden_pre(x)
        return pre * self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep the k largest of each head, above zero."""
        top = hidden_pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(hidden_pre).scatter_(-1, top.indices, top.values.relu())

    def linear_decode(self, latents: HeadedLatents) -> HeadedIn:
        """Return latents times decoder rows, of unit norm if the config says so."""
        if self.cfg.rescale_acts_by_decoder_norm:
            latents = latents * (1 / self.W_dec.norm(dim=-1))
        return super().linear_decode(latents)

    @override
    def fold_W_dec_norm(self) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            super().fold_W_dec_norm()
        elif not has_unit_norms(self.W_dec):
            raise NotImplementedError(
                "decoder norms other than 1 can't be folded with rescale_acts_by_decoder_norm="
                "False: they would change which latents are the k largest; train with True"
            )


class QueryHeadTopKTrainingSAE(
    QueryHeadTopKSAE, QueryHeadTrainingSAE, config=configs.QueryHeadTopKTrainingSAEConfig
):
    """TopK SAEs of all heads of a query site, in training."""

    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        """Do the same as the inherited method without autograd.

        Only the auxiliary loss uses autograd, in steps in which a latent is dead.
        """
        if torch.is_autocast_enabled(self.device.type):
            # The closed form chooses the number format of every product itself.
            return super().backward(step_input)
        heads = {"h": self.n_heads}
        x = rearrange(step_input.sae_in.to(self.dtype), "b (h d) -> h b d", **heads)
        loss, residual, fired, grads = fused_topk(
            x,
            **{name: parameter.detach() for name, parameter in self.named_parameters()},
            k=self.cfg.k,
            apply_b_dec_to_input=self.cfg.apply_b_dec_to_input,
            rescale_by_decoder_norm=self.cfg.rescale_acts_by_decoder_norm,
        )
        for name, parameter in self.named_parameters():
            parameter.grad = grads[name]
        dead = step_input.dead_neuron_mask
        if dead is not None and bool(dead.any()):
            auxiliary = self.aux_loss(
                rearrange(residual, "h b d -> b h d"),
                self.hidden_pre(rearrange(x, "h b d -> b h d")),
                rearrange(dead, "(h s) -> h s", **heads),
            ).sum()
            auxiliary.backward()
            loss = loss + auxiliary.detach()
        return loss, fired.flatten()

    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the auxiliary loss, 0 while no latent is dead."""
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


class QueryHeadBatchTopKTrainingSAE(
    QueryHeadTopKTrainingSAE, config=configs.QueryHeadBatchTopKTrainingSAEConfig
):
    """BatchTopK SAEs of all heads of a query site, in training; inference is JumpReLU.

    Which latents fire depends on the batch. `topk_threshold [head]` follows the smallest latent of
    a head that fired in a batch; for inference it is the threshold of all latents of the head.
    """

    topk_threshold: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # In double precision, as in SAELens: small steps would round to nothing.
        zeros = torch.zeros(self.n_heads, dtype=torch.double, device=self.device)
        self.register_buffer("topk_threshold", zeros)

    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep the int(k * tokens) largest of each head over all leading axes, above zero."""
        by_head = rearrange(hidden_pre.relu(), "... h s -> h (...) s")
        flat = by_head.flatten(1)
        top = flat.topk(int(self.cfg.k * by_head.shape[1]), dim=-1)
        kept = torch.zeros_like(flat).scatter(-1, top.indices, top.values)
        return rearrange(kept.reshape(by_head.shape), "h b s -> b h s").reshape(hidden_pre.shape)

    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        """Use autograd: the closed form is TopK's."""
        return QueryHeadTrainingSAE.backward(self, step_input)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and outputs of a batch, and move the running thresholds."""
        output = super().training_forward_pass(step_input)
        with torch.no_grad():
            latents = output.feature_acts.unflatten(-1, (self.n_heads, -1))
            least = latents.where(latents > 0, torch.inf).amin((0, 2)).double()
            lr, before = self.cfg.topk_threshold_lr, self.topk_threshold
            # A head in which no latent fired keeps its threshold.
            self.topk_threshold = ((1 - lr) * before + lr * least).where(least < torch.inf, before)
        output.metrics["topk_threshold"] = self.topk_threshold.mean()  # SAELens logs numbers
        return output

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float | PerHead) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # The threshold is in units of latents times decoder norms, which the fold divided.
            factor = torch.as_tensor(scaling_factor, dtype=torch.double, device=self.device)
            self.topk_threshold /= factor

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the decoder norms, and give every latent of a head the threshold of the head."""
        super().process_state_dict_for_saving_inference(state_dict)
        running = state_dict.pop("topk_threshold").to(self.b_enc.dtype)
        state_dict["threshold"] = running[:, None].expand_as(self.b_enc).contiguous()


class QueryHeadMatryoshkaBatchTopKTrainingSAE(
    QueryHeadBatchTopKTrainingSAE, config=configs.QueryHeadMatryoshkaBatchTopKTrainingSAEConfig
):
    """Matryoshka BatchTopK SAEs of all heads of a query site, in training; inference is JumpReLU.

    Source: arXiv 2503.17547 as SAELens implements it.
    """

    def head_losses(self, step: HeadedStep) -> dict[str, PerHead]:
        """Return the auxiliary loss, of all latents or of each level, and each inner error."""
        levels = list(self._levels(step.latents))
        losses = super().head_losses(step)
        if self.cfg.use_matryoshka_aux_loss and step.dead is not None:
            by_level = [
                self.aux_loss(step.queries - decoded, step.hidden_pre, step.dead & here)
                for _, here, decoded in levels
            ]
            losses = {"auxiliary_reconstruction_loss": torch.stack(by_level).sum(0)}
        for width, _, decoded in levels[:-1]:
            error = (decoded - step.queries).square().sum(-1)
            losses[f"inner_mse_loss_{width}"] = error.mean(0)
        return losses

    def _levels(
        self, latents: Float[Tensor, "batch head d_sae_per_head"]
    ) -> Iterator[tuple[int, Bool[Tensor, "d_sae_per_head"], Float[Tensor, "batch head d_head"]]]:
        """Yield each level's width, its own latents, and the decoding of all latents up to it."""
        place, decoded = torch.arange(self.d_latent, device=latents.device), self.b_dec
        for start, width in pairwise([0, *self.cfg.matryoshka_widths]):
            here = (place >= start) & (place < width)
            decoded = self.linear_decode(latents * here) + decoded
            yield width, here, decoded
