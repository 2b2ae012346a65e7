"""Generations as the table that AxBench's evaluators read."""

import math
from collections.abc import Sequence
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
    """The target."""

    input_id: int
    """Number of the prompt among those of the concept, from 0 without gaps; the same for all
    methods. AxBench chooses a factor on the lower half of the numbers and reports the upper."""

    prompt: str
    """The instruction as a person gave it, without target or chat template."""

    text: str
    """What was generated, without the prompt."""

    factor: float | None = None
    """The multiplier that is swept. None for a method without one, such as the unsteered model:
    its text then stands at every factor."""

    strength: float | None = None
    """Strength in the method's own unit. None means the factor, or 0 without."""

    perplexity: float | None = None
    """As AxBench's: the unsteered model's, of prompt and text together."""

    text_perplexity: float | None = None
    """The unsteered model's of the text alone, given the prompt."""

    model_input: str | None = None
    """The prompt as the model read it, chat template included. None means the prompt itself."""

    steered_input: str | None = None
    """The same with AxBench's instruction to write about the concept; None without one."""

    def __post_init__(self) -> None:
        for name in ("method", "concept"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be blank, got {getattr(self, name)!r}")
        if self.input_id < 0:
            raise ValueError(f"input_id must be 0 or more, got {self.input_id}")
        for name in ("factor", "strength"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite or None, got {value}")
        for name in ("perplexity", "text_perplexity"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0 or None, got {value}")


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
        dataset_name: of the prompts. AxBench inverts ratings for names of suppression data sets.
        concepts: all concepts in the order of their numbers, where several tables are to agree.
            None means those that occur, Bloom's levels in their order, others by name.
        complete: refuse a table in which a method lacks a row, because AxBench's judges would rate
            the gap as a text; otherwise the gap is None and NaN.

    Returns:
        By concept, prompt and factor in ascending order, with the columns dataset_name; concept_id;
        input_concept; input_id; factor; original_prompt; steered_input; input; and for each method
        M, in the order in which the methods come, M_steered_generation, M_perplexity, M_strength,
        and, where measured, M_text_perplexity (ours, which AxBench does not read). `input` is what
        a steered model was given and `steered_input` what a prompted one was.

    Raises:
        ValueError: no generations, two of one method for the same concept, prompt and factor,
            methods that disagree on a prompt, a concept that is not among `concepts`, or a method
            that lacks a row.

    Source: the columns are those of stanfordnlp/axbench, as its evaluators read them.
    """
    if not generations:
        raise ValueError("generations must hold at least one, got []")
    present = ordered_classes(generation.concept for generation in generations)
    names = list(present if concepts is None else concepts)
    for name in present:
        if name not in names:
            raise ValueError(f"concepts must hold all concepts, got {names} without {name!r}")
    inputs = _inputs(generations)
    factors: dict[tuple[str, int], set[float]] = {place: set() for place in inputs}
    for g in generations:
        factors[g.concept, g.input_id] |= set() if g.factor is None else {float(g.factor)}
    cells: dict[tuple[str, int, float], dict[str, Generation]] = {}
    for g in generations:
        here = factors[g.concept, g.input_id] or {0.0}
        for factor in here if g.factor is None else {float(g.factor)}:
            cell = cells.setdefault((g.concept, g.input_id, factor), {})
            if g.method in cell:
                raise ValueError(f"two generations of {_place(g.method, g, factor)}: give one")
            cell[g.method] = g
    methods = list(dict.fromkeys(g.method for g in generations))
    with_text = {g.method for g in generations if g.text_perplexity is not None}
    rows = []
    for concept, input_id, factor in sorted(cells, key=lambda c: (names.index(c[0]), *c[1:])):
        row: dict[str, Any] = {
            "dataset_name": dataset_name,
            "concept_id": names.index(concept),
            "input_concept": concept,
            "input_id": input_id,
            "factor": factor,
            **inputs[concept, input_id],
        }
        cell = cells[concept, input_id, factor]
        for method in methods:
            if method not in cell and complete:
                raise ValueError(
                    f"no generation of {_place(method, next(iter(cell.values())), factor)}: give "
                    "it, factor=None for a method without a factor, or complete=False"
                )
            row |= _columns(method, cell.get(method), factor, with_text=method in with_text)
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


def _inputs(generations: Sequence[Generation]) -> dict[tuple[str, int], dict[str, str | None]]:
    """Return what all methods were given, by concept and number of the prompt."""
    found: dict[tuple[str, int], dict[str, str | None]] = {}
    for g in generations:
        columns = {
            "original_prompt": g.prompt,
            "steered_input": g.steered_input,
            "input": g.model_input,
        }
        here = found.setdefault((g.concept, g.input_id), dict.fromkeys(columns))
        for column, text in columns.items():
            if text is not None and here[column] not in (None, text):
                raise ValueError(
                    f"{column} must be the same for all methods of concept {g.concept!r}, prompt "
                    f"{g.input_id}, got {here[column]!r} and {text!r}"
                )
            here[column] = here[column] if text is None else text
    for here in found.values():
        here["input"] = here["original_prompt"] if here["input"] is None else here["input"]
    return found


def _place(method: str, of: Generation, factor: float) -> str:
    return f"{method!r} for concept {of.concept!r}, prompt {of.input_id} and factor {factor}"
