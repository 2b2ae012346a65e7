"""Groups of options that commands share, and how they are read.

The names of the package load on first use: nothing slow is imported before a command has checked
its options and the columns of its files.
"""

import operator
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import sae_query_steer as sqs
from sae_query_steer.data.examples import Long, check_classes
from sae_query_steer.data.files import check_columns
from sae_query_steer.storage.folders import (
    check_holds,
    check_model_folder,
    check_replaceable,
    new_folder,
    size_of,
)

FLAT = tyro.conf.arg(name="")
"""The options of a group have no prefix."""

SpanName = Literal[
    "last-prompt-token",
    "response-tokens",
    "last-prompt-token+response-tokens",
    "last-response-token",
    "every-position",
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model."""

    model: str
    """Hugging Face model folder, GGUF file, "smollm2", or a name on the hub."""

    device: str | None = None
    """Device to run on; TransformerLens chooses if unset."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights."""

    def __post_init__(self) -> None:
        if self.model.lower().endswith(".gguf"):
            size_of(Path(self.model))
        elif "/" in self.model or Path(self.model).exists():  # the others may be aliases
            check_model_folder(self.model)

    def load(self) -> Any:
        """Return the model; in a launch without a device on the GPU of the process."""
        import torch

        from sae_query_steer.models.launch import local_device

        dtype = getattr(torch, self.dtype)
        return sqs.load_model(self.model, device=self.device or local_device(), dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class SmallModelOptions(ModelOptions):
    """The language model."""

    model: str = "smollm2"
    """Hugging Face model folder, GGUF file, "smollm2", or a name on the hub."""


@dataclass(frozen=True, kw_only=True)
class ModelWithSAEsOptions(ModelOptions):
    """The language model and its SAEs."""

    saes: Path
    """Folder that `train` wrote."""

    def __post_init__(self) -> None:
        check_holds(self.saes, "query_saes.json", "a folder that train wrote")
        super().__post_init__()

    def load_both(self) -> "tuple[Any, sqs.QuerySAEs]":
        """Return the model and the SAEs, on one device."""
        saes = sqs.QuerySAEs.load(self.saes)  # before the model, which takes longer
        model = self.load()
        return model, saes.to(str(model.cfg.device))


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How a file of texts is read."""

    skip_blank: bool = False
    """Leave out rows with a blank cell."""

    encoding: str = "utf-8"
    """Encoding of a text file."""

    sep: str | None = None
    """Separator of a CSV file; a comma, or in .tsv a tab, if unset."""

    def given(self, *names: str) -> dict[str, Any]:
        """Return some options by name, with those of every file."""
        names = (*names, *(field.name for field in fields(FileOptions)))
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TextOptions(FileOptions):
    """Texts without labels."""

    texts: Path
    """CSV, JSON lines, Parquet, plain text, or the folder of a dataset."""

    text: str = "text"
    """Column of the text, or a template over columns."""

    def __post_init__(self) -> None:
        check_columns(self.texts, [self.text], encoding=self.encoding, sep=self.sep)

    def read(self) -> list[str]:
        """Return the texts."""
        return sqs.read_texts(self.texts, **self.given("text"))


@dataclass(frozen=True, kw_only=True)
class ExampleOptions(FileOptions):
    """Labelled examples, and their tokens at which centroids are taken."""

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

    span: SpanName = "last-prompt-token"
    """Tokens at which queries are read."""

    chat_template: bool = False
    """Use the tokenizer's chat template."""

    system: str | None = None
    """System prompt of the chat template; implies --chat-template."""

    where: tuple[str, ...] = ()
    """Keep only rows with these values, such as lang=english."""

    strip: bool = False
    """Remove white space around prompts."""

    merge_labels: bool = False
    """Read labels that differ only in case or white space as the first of them."""

    min_class_size: int = 1
    """Leave out classes with fewer texts."""

    long: Long = "refuse"
    """What to do with texts that are longer than the model's context."""

    def __post_init__(self) -> None:
        if wrong := [pair for pair in self.where if "=" not in pair]:
            raise ValueError(f"--where must be COLUMN=VALUE, got {wrong[0]!r}")
        columns = [self.prompt, self.response, self.label, *self._conditions]
        check_columns(self.csv, columns, encoding=self.encoding, sep=self.sep)

    @property
    def turns(self) -> Any:
        """Return `chat_template` for `tokenize_examples`."""
        if self.system is None:
            return self.chat_template
        return [{"role": "system", "content": self.system}]

    @property
    def _conditions(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.where)

    def read(self) -> "list[sqs.LabelledExample]":
        """Return the examples, of two or more classes."""
        names = ("prompt", "response", "label", "strip", "merge_labels", "min_class_size")
        examples = sqs.read_examples(
            self.csv,
            parse_label=sqs.BloomLevel.parse if self.bloom else str,
            where=self._conditions,
            **self.given(*names),
        )
        check_classes(example.label for example in examples)
        return examples

    def fitting(
        self, model: Any, examples: "list[sqs.LabelledExample]"
    ) -> "list[sqs.LabelledExample]":
        """Show a report on the examples, and return those that fit the model's context."""
        from sae_query_steer.data.tokenized import tokenize_example

        self.tokenized(model, examples)  # refuses long ones unless they are to be left out

        def fits(example: sqs.LabelledExample) -> bool:
            read = tokenize_example(model, example, chat_template=self.turns)
            return len(read.tokens) <= int(model.cfg.n_ctx)

        return list(filter(fits, examples))

    def tokenized(self, model: Any, examples: "list[sqs.LabelledExample]") -> Any:
        """Show a report on the examples, and return them as tokens."""
        chosen = {"span": span_of(self.span), "chat_template": self.turns}
        show(sqs.diagnostics.example_report(model, examples, **chosen))
        return sqs.tokenize_examples(model, examples, **chosen, long=self.long)


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

    def write(self, files: Mapping[str, str]) -> None:
        """Write texts to the folder by file name; by the first name the folder is known."""
        if self.out is not None:
            holding = next(iter(files))
            with new_folder(self.out, overwrite=self.overwrite, holding=holding) as new:
                for name, text in files.items():
                    (new / name).write_text(text, encoding="utf-8")
            say(f"wrote {self.out}")


Model = Annotated[ModelOptions, FLAT]
SmallModel = Annotated[SmallModelOptions, FLAT]
ModelWithSAEs = Annotated[ModelWithSAEsOptions, FLAT]
Texts = Annotated[TextOptions, FLAT]
Examples = Annotated[ExampleOptions, FLAT]
Output = Annotated[OutputOptions, FLAT]
Optional = Annotated[OptionalOutput, FLAT]


def class_named(name: str, module: Any) -> Any:
    """Return the class of a module by its name in words: last-prompt-token is LastPromptToken."""
    return getattr(module, name.title().replace("-", ""))


def span_of(name: SpanName) -> Any:
    """Return the scope of a name."""
    parts = [class_named(part, sqs.scopes)() for part in name.split("+")]
    return reduce(operator.or_, parts)


def index_list(text: str) -> list[int] | None:
    """Return the layers or heads of a text such as "1,2" or "8-20"; None for "all".

    Raises:
        ValueError: another form.
    """
    if text == "all":
        return None
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text) is None:
        raise ValueError(f"layers and heads must be all, or such as 1,2 or 8-20, got {text!r}")
    ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
    if any(end[0] > end[-1] for end in ends):
        raise ValueError(f"layers and heads must rise, such as 8-20, got {text!r}")
    return [n for end in ends for n in range(end[0], end[-1] + 1)]


def say(text: str) -> None:
    """Write a line to standard output; in a launch only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def show(table: Any) -> None:
    """Write a table of pandas, numbers with three digits."""
    say(table.to_string(index=False, float_format="{:.3f}".format))
