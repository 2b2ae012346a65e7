"""SAELens's configs of query-head SAEs, made from the plain settings in `config.py`."""

from abc import ABC
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict
from sae_lens import SAEConfig, TrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

from sae_query_steer.config import (
    Architecture,
    BatchTopK,
    Gated,
    JumpReLU,
    KLSparse,
    MatryoshkaBatchTopK,
    Standard,
    TopK,
)

RESCALE = "rescale_acts_by_decoder_norm"
"""Setting of TopK, in SAELens and here."""


@dataclass(kw_only=True)
class QueryHeadSAEConfig(SAEConfig, ABC):
    """Config shared by all query-head SAEs: number of heads, and sizes of one head.

    `d_in` and `d_sae` are computed from them. For training, `n_heads` and `d_head` may stay 0 until
    the site is known.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # for configs read from folders

    settings: ClassVar[type[Architecture]]
    """Plain settings of the architecture, with its name in SAELens's registry."""

    d_in: int = 0
    d_sae: int = 0
    n_heads: int = 0
    """Query heads of the site."""

    d_head: int = 0
    """Dimension of the query of one head."""

    d_sae_per_head: int
    """Latents of one head; a usual choice is 4 to 32 times `d_head`."""

    metadata: Any = field(default_factory=SAEMetadata)

    @override
    def __post_init__(self) -> None:
        if isinstance(self.metadata, dict):  # SAELens's from_dict passes it as it was saved
            self.metadata = SAEMetadata(**self.metadata)
        super().__post_init__()
        if self.n_heads < 0 or self.d_head < 0 or (self.n_heads == 0) != (self.d_head == 0):
            raise ValueError(
                "n_heads and d_head must both be 1 or more, or both be left out to take them from "
                f"the site, got n_heads={self.n_heads}, d_head={self.d_head}"
            )
        for name, per_head in (("d_in", self.d_head), ("d_sae", self.d_sae_per_head)):
            given, total = getattr(self, name), self.n_heads * per_head
            if given not in (0, total):
                raise ValueError(f"{name} must be left out or {total}, of all heads, got {given}")
            setattr(self, name, total)
        # Training folds the scale of the queries into the weights.
        training = isinstance(self, TrainingSAEConfig)
        for name in ("reshape_activations", *(() if training else ("normalize_activations",))):
            if getattr(self, name) != "none":
                raise ValueError(
                    f"{name} must be 'none' for {'training' if training else 'inference'} of "
                    f"query-head SAEs, got {getattr(self, name)!r}"
                )
        # The plain settings check the rest. They do not allow 16 bits, SAELens's runner does.
        names = {f.name for f in fields(self)} & {f.name for f in fields(self.settings)}
        values = {name: getattr(self, name) for name in names - {"dtype"}}
        if "matryoshka_widths" in values:  # a list after JSON
            values["matryoshka_widths"] = tuple(values["matryoshka_widths"])
        self.settings(**values)

    @override
    @classmethod
    def architecture(cls) -> str:
        return cls.settings.name


@dataclass(kw_only=True)
class QueryHeadTrainingSAEConfig(QueryHeadSAEConfig, TrainingSAEConfig, ABC):
    """Config shared by all query-head SAEs in training."""

    inference: ClassVar[type[QueryHeadSAEConfig]]
    """Config of the SAE that is saved for inference."""

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return self.inference

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        found = super().get_inference_sae_cfg_dict()
        # The norms are folded on saving; not dividing by 1 saves one rounding.
        return found | {RESCALE: False} if RESCALE in found else found


def _made(settings: type[Architecture], base: Any, names: Any, **attributes: Any) -> Any:
    """Return a config class with the named fields of plain settings that its base lacks."""
    kind = base.__name__.removeprefix("QueryHead")
    names = set(names) - {one.name for one in fields(base)}
    added = [one for one in fields(settings) if one.name in names]
    text = f"SAELens's `{kind}` of all heads; fields as in `config.{settings.__name__}`."
    return make_dataclass(
        f"QueryHead{settings.__name__}{kind}",
        [(one.name, one.type, field(default=one.default)) for one in added],
        bases=(base,),
        namespace=attributes | {"settings": settings, "__doc__": text, "__module__": __name__},
        kw_only=True,
    )


def _training(settings: type[Architecture], inference: Any) -> Any:
    names = [one.name for one in fields(settings)]
    return _made(settings, QueryHeadTrainingSAEConfig, names, inference=inference)


def _pair(settings: type[Architecture], *shared: str) -> tuple[Any, Any]:
    """Return the configs for inference, with the `shared` settings only, and for training."""
    inference = _made(settings, QueryHeadSAEConfig, shared)
    return inference, _training(settings, inference)


QueryHeadGatedSAEConfig, QueryHeadGatedTrainingSAEConfig = _pair(Gated)
QueryHeadJumpReLUSAEConfig, QueryHeadJumpReLUTrainingSAEConfig = _pair(JumpReLU)
QueryHeadKLSparseSAEConfig, QueryHeadKLSparseTrainingSAEConfig = _pair(KLSparse)
QueryHeadStandardSAEConfig, QueryHeadStandardTrainingSAEConfig = _pair(Standard)
QueryHeadTopKSAEConfig, QueryHeadTopKTrainingSAEConfig = _pair(TopK, "k", RESCALE)
QueryHeadBatchTopKTrainingSAEConfig = _training(BatchTopK, QueryHeadJumpReLUSAEConfig)
QueryHeadMatryoshkaBatchTopKTrainingSAEConfig = _training(
    MatryoshkaBatchTopK, QueryHeadJumpReLUSAEConfig
)


def training_config(
    settings: Architecture, *, n_heads: int, d_head: int, **others: Any
) -> QueryHeadTrainingSAEConfig:
    """Return SAELens's config of plain settings.

    Args:
        settings: the architecture and its settings.
        n_heads: query heads of the site.
        d_head: dimension of the query of one head.
        others: `device` and `metadata`, if not SAELens's defaults.
    """
    made: Any = get_sae_training_class(settings.name)[1]
    return made(**asdict(settings), n_heads=n_heads, d_head=d_head, **others)
