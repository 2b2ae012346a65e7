"""Which model and which data a bundle was made on, and whether those at hand are the same."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.models.fingerprint import (
    Fingerprint,
    default_tolerance,
    dtype_name,
    relative_difference,
)
from sae_query_steer.models.loading import model_name, queries_at, without_hooks

_SIZES = ("n_layers", "n_heads", "d_head", "d_model", "d_vocab")


def model_facts(model: Any, name: str | None = None) -> dict[str, Any]:
    """Return a model's name, sizes and number format."""
    sizes = {size: int(getattr(model.cfg, size)) for size in _SIZES}
    return {"name": name or model_name(model), **sizes, "dtype": dtype_name(model)}


def data_facts(examples: Iterable[LabelledExample]) -> dict[str, Any]:
    """Return the number of labelled examples, of each class, and a hash that ignores their order.

    Raises:
        TypeError: something else than labelled examples.
    """
    given = list(examples)
    if not all(isinstance(example, LabelledExample) for example in given):
        kinds = sorted({type(example).__name__ for example in given})
        raise TypeError(f"examples must be LabelledExample, so that others can make them: {kinds}")
    texts = sorted(json.dumps([str(e.label), e.prompt, e.response]) for e in given)
    return {
        "n_examples": len(given),
        "classes": dict(sorted(Counter(str(e.label) for e in given).items())),
        "sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    }


def check_model(facts: Mapping[str, Any], stored: Fingerprint, model: Any) -> None:
    """Raise unless a model is the one that a bundle was made on.

    The name does not matter: a model has one on the hub and another in a folder.

    Raises:
        ValueError: another model; the message shows both sides.
    """
    here = model_facts(model)
    sides = f"\n  in the bundle: {_sentence(facts)}\n  here:          {_sentence(here)}"
    remedy = "\nLoad the model that the bundle names, or train SAEs on yours"
    if any(facts.get(size) != here[size] for size in _SIZES):
        raise ValueError(f"another model than the bundle's:{sides}{remedy}")
    if int(stored.tokens.min()) < 0 or int(stored.tokens.max()) >= here["d_vocab"]:
        raise ValueError(f"the bundle's fingerprint has tokens outside the vocabulary:{sides}")
    with without_hooks(model):
        queries = queries_at(model, stored.tokens, list(stored.queries))
    tolerance = default_tolerance(here["dtype"], stored.dtype)
    lines = []
    for name, query in queries.items():
        difference = relative_difference(query, stored.queries[name])
        if not difference <= tolerance:  # NaN too
            lines.append(
                f"\n  at {name} the queries differ by {difference:.3g} (relative), allowed is "
                f"{tolerance:g}; their norm is {float(stored.queries[name].norm()):.4g} in the "
                f"bundle, {float(query.float().norm()):.4g} here"
            )
    if lines:
        raise ValueError(f"another model than the bundle's:{sides}{''.join(lines[:3])}{remedy}")


def check_data(facts: Mapping[str, Any] | None, examples: Iterable[LabelledExample]) -> None:
    """Raise unless examples are those that a bundle's centroids were made of, in any order.

    Raises:
        ValueError: other data, or none are recorded; the message shows both sides.
    """
    here = data_facts(examples)
    if facts is None:
        raise ValueError("the bundle records no examples: it was saved without examples=")
    if dict(facts) != here:
        raise ValueError(
            f"other examples than the bundle's:\n  in the bundle: {json.dumps(facts)}\n  here:    "
            f"      {json.dumps(here)}\nTake the same texts and labels, or make new centroids"
        )


def _sentence(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {facts.get(name)}" for name in ("name", *_SIZES, "dtype"))
