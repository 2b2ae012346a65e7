"""Settings of a training run and of every SAE architecture, as plain values.

The command line is made from these classes, SAELens's config objects are built from them, and
checkpoints store them, so no setting is written twice. This module imports neither torch nor any
other slow library. Names and defaults are SAELens's; sizes are those of one head.
"""

import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args, get_origin

from sae_query_steer.arguments import check_number

_MAY_BE_0 = ("_steps", "_coefficient", "_threshold", "_window", "seed", "metric_tokens")
"""Ends of the names of numbers that may be 0; all others must be above 0."""


def _check_fields(config: Any) -> None:
    """Raise unless each number and each choice is one that its type and name allow."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        kinds = get_args(field.type) or (field.type,)
        if get_origin(field.type) is Literal and value not in kinds:
            raise ValueError(f"{name} must be one of {kinds}, got {value!r}")
        is_none = value is None and type(None) in kinds
        if (int in kinds or float in kinds) and ... not in kinds and not is_none:
            limits = {"least": 0} if name.endswith(_MAY_BE_0) else {"above": 0}
            check_number(name, value, whole=int in kinds, **limits)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Settings shared by all architectures of query-head SAEs."""

    name: ClassVar[str]
    """Name in SAELens's registry."""

    d_sae_per_head: int
    """Latents of each head; a usual choice is 4 to 32 times d_head."""

    dtype: Literal["float32", "float64"] = "float32"
    """Number format in training; Adam's steps would be lost in 16 bits."""

    apply_b_dec_to_input: bool = True
    """Subtract the decoder bias from the query before encoding it."""

    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    """Scale the queries of each head to mean norm sqrt(d_head) in training."""

    decoder_init_norm: float | None = 0.1
    """Norm of the decoder rows at the start; None keeps that of Kaiming's initialisation."""

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("k", "target_l0"):  # of the latents of one head
            if (value := getattr(self, name, None)) is not None:
                whole = isinstance(value, int)
                check_number(name, value, whole=whole, most=self.d_sae_per_head)


@dataclass(frozen=True, kw_only=True)
class Standard(Architecture):
    """ReLU latents with an L1 penalty."""

    name = "query_head_standard"

    l1_coefficient: float = 1.0
    """Weight of the L1 penalty."""

    l1_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""

    lp_norm: float = 1.0
    """p of the norm over the latents of one head that is penalised."""


@dataclass(frozen=True, kw_only=True)
class Gated(Architecture):
    """One half of the encoder decides which latents fire, the other how strongly."""

    name = "query_head_gated"

    l1_coefficient: float = 1.0
    """Weight of the penalty on open gates."""

    l1_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Architecture):
    """Latents above a threshold that each of them learns."""

    name = "query_head_jumprelu"

    jumprelu_init_threshold: float = 0.01
    """Threshold of every latent at the start."""

    jumprelu_bandwidth: float = 0.05
    """Width around a threshold in which pre-activations move it."""

    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    """Penalise the number of firing latents of a head (`step`), a smooth bound on it (`tanh`), or
    its squared distance from `target_l0` (`quadratic`)."""

    l0_coefficient: float = 1.0
    """Weight of the sparsity loss."""

    l0_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""

    pre_act_loss_coefficient: float | None = None
    """Weight of the loss that draws dead latents up to their threshold; None omits it."""

    jumprelu_tanh_scale: float = 4.0
    """Steepness of `tanh`."""

    jumprelu_ste_to_input: bool = False
    """Let the encoder also learn from pre-activations near a threshold."""

    target_l0: float | None = None
    """Latents of one head that should fire at a token; required by `quadratic` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jumprelu_sparsity_loss_mode == "quadratic":
            check_number("target_l0", self.target_l0, above=0)


@dataclass(frozen=True, kw_only=True)
class KLSparse(Architecture):
    """Sigmoid latents with a penalty on the distance of each mean from `rho`."""

    name = "query_head_kl_sparse"

    rho: float = 0.05
    """Mean of a latent over tokens at which the penalty is 0."""

    kl_coefficient: float = 1.0
    """Weight of the penalty."""

    kl_warm_up_steps: int = 0
    """Steps over which the weight grows from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho >= 1:
            raise ValueError(f"rho must be between 0 and 1, got {self.rho}")


@dataclass(frozen=True, kw_only=True)
class TopK(Architecture):
    """The k largest pre-activations of each head."""

    name = "query_head_topk"

    k: int = 32
    """Latents of one head that may fire at a token."""

    aux_loss_coefficient: float = 1.0
    """Weight of the loss by which dead latents learn from the residual."""

    rescale_acts_by_decoder_norm: bool = True
    """Choose and count latents as if every decoder row had norm 1."""


@dataclass(frozen=True, kw_only=True)
class BatchTopK(Architecture):
    """The largest pre-activations of each head over a batch; saved as JumpReLU."""

    name = "query_head_batchtopk"

    k: float = 32.0
    """Latents of one head that fire at a token on average."""

    aux_loss_coefficient: float = 1.0
    """Weight of the loss by which dead latents learn from the residual."""

    rescale_acts_by_decoder_norm: bool = True
    """Choose and count latents as if every decoder row had norm 1."""

    topk_threshold_lr: float = 0.01
    """Share by which a batch moves the running threshold of a head."""


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK with a loss for each of several nested widths; saved as JumpReLU."""

    name = "query_head_matryoshka_batchtopk"

    matryoshka_widths: tuple[int, ...]
    """Latents of one head at each level, rising; the last is `d_sae_per_head`."""

    use_matryoshka_aux_loss: bool = False
    """Let the dead latents of a level learn from the error of that level only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = (0, *self.matryoshka_widths)
        rising = all(narrow < wide for narrow, wide in pairwise(widths))
        if len(widths) < 3 or not rising or widths[-1] != self.d_sae_per_head:
            raise ValueError(
                "matryoshka_widths must be two or more rising widths that end with "
                f"d_sae_per_head={self.d_sae_per_head}, got {self.matryoshka_widths}; for one "
                "width use BatchTopK"
            )


ARCHITECTURES = (TopK, BatchTopK, MatryoshkaBatchTopK, Standard, Gated, JumpReLU, KLSparse)
"""All architectures."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of `train_query_saes`; names are SAELens's.

    For millions of tokens, SAELens's `lr` of 3e-4 with steps of 4096 tokens is a good start; the
    defaults here suit some hundred thousand.
    """

    sae: Architecture
    """Architecture of the SAEs and its settings."""

    training_tokens: int
    """Tokens to train on."""

    seed: int = 0
    """Seed of the weights and of the order of the tokens."""

    context_size: int | None = None
    """Tokens of a row; None means 128, or the context of the model where that is shorter."""

    concat_sequences: bool = True
    """Join documents into full rows as SAELens does; False keeps one document a row."""

    prepend_bos: bool | None = None
    """Begin rows and documents with BOS; None means as the model does by its own setting."""

    exclude_special_tokens: bool | tuple[int, ...] = False
    """Train and measure on other tokens alone: True leaves out BOS, EOS and the tokenizer's other
    structural tokens, as in SAELens; ids leave out those."""

    lr: float = 1e-3
    """Learning rate of Adam."""

    lr_warm_up_steps: int = 0
    """Steps over which the learning rate grows from 0."""

    lr_decay_steps: int = 0
    """Last steps, over which the learning rate falls to a tenth."""

    train_batch_size_tokens: int = 512
    """Tokens of one training step."""

    store_batch_size_prompts: int = 16
    """Rows of one forward pass of the model."""

    n_batches_in_buffer: int = 64
    """Rows whose tokens are shuffled among each other; memory holds their queries."""

    dead_feature_window: int = 1000
    """Steps without firing after which a latent counts as dead."""

    n_batches_for_norm_estimate: int = 100
    """Batches that estimate the mean norm of each head's queries, where `normalize_activations`
    needs it."""

    autocast: bool = False
    """Train the SAEs in mixed precision (bfloat16)."""

    autocast_lm: bool = False
    """Run the model in mixed precision (bfloat16)."""

    act_store_device: str = "with_model"
    """Device on which queries wait for their step, such as cpu; "with_model" is the model's."""

    metric_tokens: int = 16_384
    """Tokens of the training stream on which the final metrics are measured; 0 omits them."""

    checkpoint_every: int = 1000
    """Steps between two checkpoints; one takes three times the memory of the weights."""

    def __post_init__(self) -> None:
        if not isinstance(self.sae, Architecture):
            names = ", ".join(kind.__name__ for kind in ARCHITECTURES)
            raise TypeError(
                f"sae must be the settings of an architecture ({names}), "
                f"got {type(self.sae).__name__}"
            )
        _check_fields(self)
        if self.n_steps < 1:
            raise ValueError(
                f"training_tokens must be at least one step of train_batch_size_tokens="
                f"{self.train_batch_size_tokens}, got {self.training_tokens}"
            )
        if self.lr_warm_up_steps + self.lr_decay_steps > self.n_steps:
            raise ValueError(
                f"lr_warm_up_steps and lr_decay_steps must be at most the {self.n_steps} steps of "
                f"the run together, got {self.lr_warm_up_steps} and {self.lr_decay_steps}"
            )
        if self.autocast and self.sae.dtype != "float32":
            raise ValueError(f"dtype must be 'float32' with autocast, got {self.sae.dtype!r}")

    @property
    def n_steps(self) -> int:
        """Training steps."""
        return self.training_tokens // self.train_batch_size_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the settings that decide the weights of a run, for checkpoints and SAE folders."""
        stored = json.loads(json.dumps(asdict(self)))  # tuples become lists
        stored["sae"] |= {"architecture": self.sae.name}
        without_effect = {"act_store_device", "metric_tokens", "checkpoint_every"}
        return {name: v for name, v in stored.items() if name not in without_effect}


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Sizes of a first trial."""

    seed: int = 0
    """Random seed."""

    n_learned: int = 12
    """Examples of each class that targets are made of."""

    n_cases: int = 36
    """Cases on which strengths are chosen, and cases of the table."""

    max_new_tokens: int = 24
    """Most tokens of a text, and of a response that targets are learned from."""

    training_tokens: int = 8_192
    """Tokens that the SAEs are trained on."""

    d_sae_per_head: int = 128
    """Latents of each head."""

    k: int = 16
    """Latents of a head that are active at a token."""

    n_updates: int = 20
    """Updates of each learned target."""

    max_relative_change: float = 0.5
    """||change of q|| / ||q|| of a head at most."""

    l1: float = 0.1
    """Penalty of sparse targets."""

    def __post_init__(self) -> None:
        least = {"n_learned": 4, "n_cases": 6, "l1": 0}
        for field in fields(self):
            if field.name != "seed":
                limits = {"least": least[field.name]} if field.name in least else {"above": 0}
                check_number(field.name, vars(self)[field.name], whole=field.type is int, **limits)
