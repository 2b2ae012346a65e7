"""Groups of options that commands share; each says what it stands for and reads it.

Nothing slow is imported before a command has checked its options and the columns of its files.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sae_query_steer.arguments import check_number
from sae_query_steer.data.files import check_columns
from sae_query_steer.storage.folders import check_replaceable

if TYPE_CHECKING:
    import pandas as pd

    from sae_query_steer.data.examples import LabelledExample
    from sae_query_steer.data.tokenized import TokenizedExamples
    from sae_query_steer.sae.collection import QuerySAEs
    from sae_query_steer.scopes.positions import Span

FLAT = tyro.conf.arg(name="")
"""The options of a group have no prefix."""

SpanName = Literal[
    "last-prompt-token", "response", "last-response-token", "every", "last-prompt-token+response"
]
ObjectiveName = Literal["prototype", "distance", "contrast", "cosine", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model."""

    model: str
    """Hugging Face model folder, or a name on its hub."""

    device: str | None = None
    """Device to run on; TransformerLens chooses if unset."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights."""

    def load(self, device: str | None = None) -> Any:
        """Return the model; `device` is used where none was given."""
        import torch

        from sae_query_steer.models.loading import load_model

        dtype = getattr(torch, self.dtype)
        return load_model(self.model, device=self.device or device, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Texts without labels."""

    texts: Path
    """CSV, JSON lines, Parquet, plain text, or the folder of a dataset."""

    text: str = "text"
    """Column of the text, or a template over columns."""

    def check(self) -> None:
        """Raise unless the file has the columns."""
        check_columns(self.texts, [self.text])

    def read(self) -> list[str]:
        """Return the texts."""
        from sae_query_steer.data.readers import read_texts

        return read_texts(self.texts, text=self.text)


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Labelled examples."""

    csv: Path
    """File of labelled texts, one a row: CSV, JSON lines or Parquet."""

    prompt: str
    """Column of the prompt, or a template such as 'Q: {question} A:'."""

    label: str
    """Column of the class."""

    response: str | None = None
    """Column or template of the response, if any."""

    bloom: bool = False
    """Read the labels as Bloom levels, 1956 names too."""

    def check(self) -> None:
        """Raise unless the file has the columns."""
        check_columns(self.csv, [self.prompt, self.response, self.label])

    def read(self) -> "list[LabelledExample]":
        """Return the examples."""
        from sae_query_steer.bloom import BloomLevel
        from sae_query_steer.data.readers import read_examples

        return read_examples(
            self.csv,
            prompt=self.prompt,
            response=self.response,
            label=self.label,
            parse_label=BloomLevel.parse if self.bloom else str,
        )


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How examples are tokenised."""

    prepend_bos: bool = True
    """Begin every prompt with BOS."""

    chat_template: bool = False
    """Use the tokenizer's chat template."""


@dataclass(frozen=True, kw_only=True)
class SpanOptions(TokenOptions):
    """How examples are tokenised, and their tokens that count."""

    span: SpanName = "last-prompt-token"
    """Tokens at which queries are read."""

    def tokenize(self, model: Any, examples: "list[LabelledExample]") -> "TokenizedExamples":
        """Return the tokenised examples."""
        from sae_query_steer.data.tokenized import tokenize_examples

        return tokenize_examples(
            model,
            examples,
            span=span_of(self.span),
            prepend_bos=self.prepend_bos,
            chat_template=self.chat_template,
        )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The output folder."""

    out: Path
    """Folder to write."""

    overwrite: bool = False
    """Replace the output folder."""

    def check(self, holding: str) -> None:
        """Raise if the folder exists and may not be replaced."""
        if self.out is not None:
            check_replaceable(self.out, overwrite=self.overwrite, holding=holding)


@dataclass(frozen=True, kw_only=True)
class OptionalOutput(OutputOptions):
    """The output folder, if any."""

    out: Path | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Folder to write; nothing is written if unset."""


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """How to steer."""

    target: str
    """Class to steer towards."""

    objective: ObjectiveName = "prototype"
    """What descent lowers: prototype log-likelihood, distance to the centroid, contrast of
    centroids, cosine or Gaussian."""

    n_steps: int = 20
    """Gradient steps at each token."""

    step_size: float = 1.0
    """Size of a step."""

    scope: SpanName = "last-prompt-token"
    """Tokens at which queries are changed."""

    layers: str = "all"
    """Layers, such as 1,2 or 8-20 or all."""

    def __post_init__(self) -> None:
        check_number("n_steps", self.n_steps, whole=True, least=0)
        check_number("step_size", self.step_size, least=0)
        index_list(self.layers)

    def steerer(self, saes: "QuerySAEs", targets: Path) -> Any:
        """Return the steerer towards centroids in a folder."""
        from sae_query_steer.descent import objectives
        from sae_query_steer.steering.latent_descent import LatentGradientSteerer
        from sae_query_steer.targets.centroids import CentroidTargets

        kinds = {
            "prototype": objectives.PrototypeLogLikelihood,
            "distance": objectives.SquaredDistance,
            "contrast": objectives.CentroidContrast,
            "cosine": objectives.CosineSimilarity,
            "gaussian": objectives.GaussianLogLikelihood,
        }
        return LatentGradientSteerer(
            saes,
            CentroidTargets.load(targets),
            target=self.target,
            objective=kinds[self.objective](),
            n_steps=self.n_steps,
            step_size=self.step_size,
            scope=span_of(self.scope),
            layers=index_list(self.layers),
        )


Model = Annotated[ModelOptions, FLAT]
Texts = Annotated[TextOptions, FLAT]
Examples = Annotated[ExampleOptions, FLAT]
Tokens = Annotated[TokenOptions, FLAT]
Span_ = Annotated[SpanOptions, FLAT]
Output = Annotated[OutputOptions, FLAT]
Optional = Annotated[OptionalOutput, FLAT]
Steering = Annotated[SteeringOptions, FLAT]


def span_of(name: SpanName) -> "Span":
    """Return the span of a name."""
    from sae_query_steer.scopes import named

    return {
        "last-prompt-token": named.LastPromptToken(),
        "response": named.ResponseTokens(),
        "last-response-token": named.LastResponseToken(),
        "every": named.EveryPosition(),
        "last-prompt-token+response": named.LastPromptToken() | named.ResponseTokens(),
    }[name]


def index_list(text: str) -> list[int] | None:
    """Return the layers or heads of a text such as "1,2" or "8-20"; None for "all".

    Raises:
        ValueError: another form, or a range that decreases.
    """
    if text == "all":
        return None
    chosen: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise ValueError(f"layers and heads must be all, or such as 1,2 or 8-20, got {text!r}")
        chosen += range(int(first), int(last) + 1)
    return chosen


def load_saes(folder: Path, model: Any) -> "QuerySAEs":
    """Return the SAEs of a folder, on the model's device."""
    from sae_query_steer.sae.collection import INDEX, QuerySAEs

    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"--saes {folder} was not written by `train`: it has no {INDEX}")
    return QuerySAEs.load(folder, device=str(model.cfg.device))


def say(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show(table: "pd.DataFrame") -> None:
    """Write a table, numbers with three digits."""
    import pandas as pd

    with pd.option_context("display.width", 160, "display.max_columns", None):
        say(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
