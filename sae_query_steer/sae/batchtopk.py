"""BatchTopK: the largest pre-activations of each head over a batch, k per token on average."""

from typing import Any

import torch
from einops import rearrange
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.configs import QueryHeadBatchTopKTrainingSAEConfig
from sae_query_steer.sae.core import HeadedLatents, PerHead, QueryHeadTrainingSAE
from sae_query_steer.sae.topk import QueryHeadTopKTrainingSAE


class QueryHeadBatchTopKTrainingSAE(
    QueryHeadTopKTrainingSAE, config=QueryHeadBatchTopKTrainingSAEConfig
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

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep the int(k * tokens) largest of each head over all leading axes, above zero."""
        by_head = rearrange(hidden_pre.relu(), "... h s -> h (...) s")
        flat = by_head.flatten(1)
        top = flat.topk(int(self.cfg.k * by_head.shape[1]), dim=-1)
        kept = torch.zeros_like(flat).scatter(-1, top.indices, top.values)
        return rearrange(kept.reshape(by_head.shape), "h b s -> b h s").reshape(hidden_pre.shape)

    @override
    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        return QueryHeadTrainingSAE.backward(self, step_input)  # the closed form is TopK's

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
