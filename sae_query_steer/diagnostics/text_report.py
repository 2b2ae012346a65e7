"""A report on labelled examples before any work: what is in them, and what would go wrong."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from sae_query_steer.arguments import check_kind, check_texts
from sae_query_steer.data.batches import example_batches
from sae_query_steer.data.examples import LabelledExample, ordered_classes, place_of
from sae_query_steer.data.prompts import ChatTemplate, tokenizer_of
from sae_query_steer.data.tokenized import tokenize_example
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Span, select

NOTHING = {"none", "na", "n/a", "nan", "null"}
"""Words that often stand for a missing value, and are read as text."""

TOO_LONG = "longer than the context"
NO_BOUNDARY = "no exact boundary between prompt and response"
NO_TOKEN = "no token in the span"

N_TOKENS = 5
"""Most frequent tokens of the span that are listed."""


def example_report(
    model: Any,
    examples: Sequence[LabelledExample],
    *,
    span: Span | None = None,
    prepend_bos: bool | None = None,
    chat_template: ChatTemplate = False,
) -> pd.DataFrame:
    """Return what is in labelled examples, and what would go wrong with them. Nothing is run.

    Args:
        model: gives the tokenizer and the largest number of tokens.
        examples: the texts.
        span: the positions to read; None means the last prompt token.
        prepend_bos: as for `tokenize_examples`.
        chat_template: as for `tokenize_examples`.

    Returns:
        A row for each finding, with

        - finding: "examples"; "left out: REASON" for rows that `read_examples` left out; "class C",
          "class C (too few: 1)"; "prompt or label is a word for nothing" (None, NA, nan, null);
          "duplicate text"; "text with several labels"; "prompt ends in white space"; "longer than
          the context"; "no exact boundary between prompt and response"; "no token in the span"; and
          "span falls on T" for the most frequent tokens
        - n: examples, or tokens of the span, to which it applies
        - first: where the first of them was read, or its index
    """
    span = LastPromptToken() if span is None else span
    check_texts("examples", examples)
    for index, example in enumerate(examples):
        check_kind(f"example {index}", example, LabelledExample, "read them with read_examples")
    tokenizer, n_ctx = tokenizer_of(model), int(model.cfg.n_ctx)
    found: dict[str, list[int]] = {"examples": list(range(len(examples)))}
    labels = [example.label for example in examples]
    for name in ordered_classes(labels):
        own = [i for i, label in enumerate(labels) if label == name]
        found[f"class {name}" + (" (too few: 1)" if len(own) == 1 else "")] = own
    found["prompt or label is a word for nothing"] = [
        i for i, e in enumerate(examples) if {e.prompt.strip().lower(), e.label.lower()} & NOTHING
    ]
    texts = [(example.prompt, example.response) for example in examples]
    times = Counter(texts)
    in_classes = Counter(text for text, _ in set(zip(texts, labels, strict=True)))
    found["duplicate text"] = [i for i, text in enumerate(texts) if times[text] > 1]
    found["text with several labels"] = [i for i, t in enumerate(texts) if in_classes[t] > 1]
    found["prompt ends in white space"] = [
        i for i, (prompt, _) in enumerate(texts) if prompt != prompt.rstrip()
    ]
    for name in (TOO_LONG, NO_BOUNDARY, NO_TOKEN):
        found[name] = []
    places: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        try:
            tokens = tokenize_example(
                model, example, prepend_bos=prepend_bos, chat_template=chat_template
            )
        except ValueError:
            found[NO_BOUNDARY].append(index)
            continue
        if len(tokens.tokens) > n_ctx:
            found[TOO_LONG].append(index)
            continue
        batch = next(example_batches([tokens], 1))
        ids = batch.tokens[select(span, batch.positions)].tolist()
        if not ids:
            found[NO_TOKEN].append(index)
        for token in ids:
            places.setdefault(token, []).append(index)
    for token, indices in sorted(places.items(), key=lambda item: -len(item[1]))[:N_TOKENS]:
        found[f"span falls on {tokenizer.decode([token])!r}"] = indices
    rows = [
        {"finding": name, "n": len(indices), "first": place_of(examples[i := min(indices)], i)}
        for name, indices in found.items()
        if indices
    ]
    left_out = getattr(examples, "left_out", {})
    rows[1:1] = [
        {"finding": f"left out: {why}", "n": n, "first": ""} for why, n in left_out.items()
    ]
    return pd.DataFrame(rows, columns=["finding", "n", "first"])
