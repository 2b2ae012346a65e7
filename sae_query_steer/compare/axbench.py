"""Generations as the table that AxBench's evaluators read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sae_query_steer.data.examples import ordered_classes


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one method wrote for one prompt, steered towards one concept."""

    method: str
    """Name of the method; its columns begin with it."""

    concept: str
    """What the text should be steered to: the target."""

    input_id: int
    """Number of the prompt among those of the concept, from 0; the same for all methods. AxBench
    takes the lower half of the numbers to choose a factor and the upper half to report, so number
    them without gaps."""

    prompt: str
    """The instruction as a person gave it, without target or chat template."""

    text: str
    """What was generated, without the prompt."""

    factor: float | None = None
    """The multiplier that is swept. None for a method that has none, such as the unsteered model:
    its text then stands at every factor."""

    strength: float | None = None
    """How strong the steer was, in the method's own unit. None means the factor, or 0 without."""

    perplexity: float | None = None
    """As AxBench's: the unsteered model's, of prompt and text together."""

    text_perplexity: float | None = None
    """The unsteered model's of the text alone, given the prompt."""

    model_input: str | None = None
    """The prompt as the model met it, chat template included. None means the prompt itself."""

    steered_input: str | None = None
    """The same with an instruction to write of the concept, which AxBench's prompt baseline gives
    the model. None where there is none."""

    def __post_init__(self) -> None:
        for name in ("method", "concept"):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is blank: every generation needs a {name}"
                )
        if self.input_id < 0:
            raise ValueError(f"input_id={self.input_id} is not allowed: number prompts from 0")
        for name in ("factor", "strength"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value} is not allowed: give a finite number, or None")
        for name in ("perplexity", "text_perplexity"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} is not allowed: give one above 0, or None")


def axbench_table(
    generations: Sequence[Generation],
    *,
    dataset_name: str = "custom",
    concepts: Sequence[str] | None = None,
    complete: bool = True,
) -> pd.DataFrame:
    """Return generations as AxBench's wide table: a row for each concept, prompt and factor.

    Args:
        generations: in any order.
        dataset_name: what the prompts are called. AxBench turns ratings round for data sets whose
            name tells that a concept is to be suppressed.
        concepts: all concepts in the order of their numbers, where several tables are to agree.
            None means those that occur, Bloom's levels in their order, others by name.
        complete: refuse a table in which a method lacks a row. AxBench's judges would rate the gap
            as if it were a text; where this is False it is None, and its numbers are NaN.

    Returns:
        By concept, prompt and factor in ascending order, with the columns
        dataset_name; concept_id, a number from 0; input_concept, the concept's name; input_id;
        factor; original_prompt; steered_input; input; and for each method M, in the order in which
        the methods come, M_steered_generation, M_perplexity and M_strength, and M_text_perplexity
        (ours, which AxBench does not read) where any of its generations has one. `input` is
        what a steered model was given and `steered_input` what a prompted one was.

    Raises:
        ValueError: no generations, two of one method for the same concept, prompt and factor,
            methods that disagree on a prompt, a concept that is not among `concepts`, or a method
            that lacks a row.

    Source: the columns are those of stanfordnlp/axbench, as its evaluators read them.
    """
    if not generations:
        raise ValueError("there are no generations: give at least one")
    concept_ids = _concept_ids(generations, concepts)
    inputs = _inputs(generations)
    factors: dict[tuple[str, int], set[float]] = {place: set() for place in inputs}
    for generation in generations:
        if generation.factor is not None:
            factors[generation.concept, generation.input_id].add(float(generation.factor))

    cells: dict[tuple[str, int, float], dict[str, Generation]] = {}
    for generation in generations:
        concept, input_id = generation.concept, generation.input_id
        here = factors[concept, input_id] or {0.0}
        for factor in here if generation.factor is None else {float(generation.factor)}:
            methods = cells.setdefault((concept, input_id, factor), {})
            if generation.method in methods:
                raise ValueError(
                    f"two generations of {_place(generation.method, concept, input_id, factor)}: "
                    "give one, and number different prompts differently"
                )
            methods[generation.method] = generation

    names = list(dict.fromkeys(generation.method for generation in generations))
    with_text = {g.method for g in generations if g.text_perplexity is not None}
    rows = []
    for concept, input_id, factor in sorted(cells, key=lambda c: (concept_ids[c[0]], *c[1:])):
        row: dict[str, Any] = {
            "dataset_name": dataset_name,
            "concept_id": concept_ids[concept],
            "input_concept": concept,
            "input_id": input_id,
            "factor": factor,
            **inputs[concept, input_id],
        }
        for name in names:
            found = cells[concept, input_id, factor].get(name)
            if found is None and complete:
                raise ValueError(
                    f"no generation of {_place(name, concept, input_id, factor)}: generate it, "
                    "give factor=None to a method that has no factor, or pass complete=False"
                )
            row |= _columns(name, found, factor, with_text=name in with_text)
        rows.append(row)
    return pd.DataFrame(rows)


def _columns(
    name: str, found: Generation | None, factor: float, *, with_text: bool
) -> dict[str, str | float | None]:
    numbers: dict[str, float | None] = {"perplexity": None, "strength": None}
    if found is not None:
        plain = 0.0 if found.factor is None else factor
        strength = plain if found.strength is None else float(found.strength)
        numbers = {"perplexity": found.perplexity, "strength": strength}
    if with_text:
        numbers["text_perplexity"] = None if found is None else found.text_perplexity
    nan = float("nan")
    return {f"{name}_steered_generation": None if found is None else found.text} | {
        f"{name}_{key}": nan if value is None else float(value) for key, value in numbers.items()
    }


def _concept_ids(
    generations: Sequence[Generation], concepts: Sequence[str] | None
) -> dict[str, int]:
    present = ordered_classes(generation.concept for generation in generations)
    names = present if concepts is None else tuple(concepts)
    for name in present:
        if name not in names:
            raise ValueError(f"concept {name!r} is not among concepts={list(names)}: add it")
    return {name: i for i, name in enumerate(names)}


def _inputs(
    generations: Sequence[Generation],
) -> dict[tuple[str, int], Mapping[str, str | None]]:
    """Return what all methods were given, by concept and number of the prompt."""
    found: dict[tuple[str, int], dict[str, str | None]] = {}
    for generation in generations:
        told = {
            "original_prompt": generation.prompt,
            "steered_input": generation.steered_input,
            "input": generation.model_input,
        }
        here = found.setdefault((generation.concept, generation.input_id), dict.fromkeys(told))
        for column, text in told.items():
            if text is not None and here[column] not in (None, text):
                raise ValueError(
                    f"two values of {column} for concept {generation.concept!r}, prompt number "
                    f"{generation.input_id}: {here[column]!r} and {text!r}; it is the same for "
                    "every method and factor, and another prompt has another number"
                )
            here[column] = here[column] if text is None else text
    for here in found.values():
        here["input"] = here["original_prompt"] if here["input"] is None else here["input"]
    return dict(found)


def _place(method: str, concept: str, input_id: int, factor: float) -> str:
    return f"{method!r} for concept {concept!r}, prompt number {input_id} and factor {factor}"
