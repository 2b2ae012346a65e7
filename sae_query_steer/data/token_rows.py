"""Texts to token rows of one length: packed as SAELens packs them, or one whole document a row.

The rows are written to a file that is mapped into memory, so that they may be more than it holds.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from jaxtyping import Int
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_model, check_number, check_texts
from sae_query_steer.data.batches import PAD
from sae_query_steer.data.prompts import bos_id, tokenizer_of
from sae_query_steer.data.tokenized import TokenizedExample
from sae_query_steer.progress import progress_bar

Texts = Dataset | IterableDataset | Tensor | Iterable[str | Tensor | TokenizedExample]


def token_rows(
    model: Any,
    texts: Texts,
    *,
    context_size: int | None = None,
    concat_sequences: bool = True,
    prepend_bos: bool | None = None,
    n_tokens: int | None = None,
    folder: str | Path | None = None,
) -> Int[Tensor, "row pos"]:
    """Return token rows for training.

    Texts are read one after the other and none is kept: the rows are in a file without a name,
    which is gone when the last of them is, and in memory only while they are read.

    Args:
        model: gives tokenizer and context length.
        texts: strings, of a dataset of another kind from `read_texts`; a `datasets.Dataset` or
            `IterableDataset` with a column "text"; token rows [row pos] that are taken as they are;
            or tokenised examples or single rows [pos], which always stay whole. Generators too.
        context_size: length of a row, in tokens; None means 128, or the model's context where
            that is shorter. Token rows [row pos] keep their own length.
        concat_sequences: join documents, with BOS between them, and cut rows of `context_size`
            from the stream, as SAELens does; False keeps every document whole, one a row.
        prepend_bos: begin every row, and every document, with BOS; None means as the model does,
            by `model.cfg.default_prepend_bos`.
        n_tokens: read texts without a length, such as a generator or a streaming dataset, until the
            rows have so many tokens; None reads all, as of texts with a length.
        folder: where the file is, 4 bytes a token; None means the system's folder for temporary
            files.

    Returns:
        Rows of 32-bit ids; where documents stay whole, `PAD` fills them up on the right.

    Raises:
        ValueError: no text, an empty one, a document longer than `context_size` that must stay
            whole, a context longer than the model's, or too little text for one row.
    """
    check_model(model)
    n_ctx = int(model.cfg.n_ctx)
    context_size = min(128, n_ctx) if context_size is None else context_size
    if not 2 <= context_size <= n_ctx:
        raise ValueError(f"context_size must be 2 to n_ctx={n_ctx}, got {context_size}")
    if n_tokens is not None:
        check_number("n_tokens", n_tokens, whole=True, least=1)
    check_texts("texts", texts)
    if isinstance(texts, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f"texts is a {type(texts).__name__}: give one split of it, such as dataset['train']"
        )
    if isinstance(texts, Tensor):
        return _given_rows(texts, n_ctx, int(model.cfg.d_vocab))
    items = iter(_column(texts) if isinstance(texts, Dataset | IterableDataset) else texts)
    first = list(islice(items, 1))
    if isinstance(texts, Sized):
        n_tokens = None
    if not first:
        raise ValueError("texts is empty: give at least one document")
    items = chain(first, items)
    if isinstance(first[0], TokenizedExample | Tensor):
        rows = _whole(items, n_ctx, int(model.cfg.d_vocab))
    else:
        tokenizer = tokenizer_of(model)
        bos = bos_id(model, prepend_bos)
        # A rendered chat prompt begins with BOS already.
        documents = (row[row[:1] == [bos] :] for row in _tokenized(items, tokenizer))
        start = [] if bos is None else [bos]
        rows = (start + document for document in documents)
        if concat_sequences:
            rows = _packed(documents, context_size, bos)
    return _mapped(rows, context_size, n_tokens, folder)


def _column(texts: Dataset | IterableDataset) -> Iterator[Any]:
    # The columns of a stream may be unknown until its first row.
    names = texts.column_names or list(next(iter(texts), {}))
    if "text" not in names:
        raise ValueError(
            f"a dataset of texts must have a column 'text', got {names}: give "
            "read_texts(dataset, text=COLUMN)"
        )
    rows = cast(Iterable[Any], texts.select_columns("text"))
    return (row["text"] for row in rows)


def _given_rows(rows: Tensor, n_ctx: int, d_vocab: int) -> Tensor:
    if rows.ndim != 2 or rows.is_floating_point() or rows.numel() == 0:
        raise ValueError(
            f"token rows must be whole numbers [row pos], got shape {list(rows.shape)} and type "
            f"{rows.dtype}"
        )
    if rows.shape[1] > n_ctx or int(rows.min()) < 0 or int(rows.max()) >= d_vocab:
        raise ValueError(
            f"token rows of {rows.shape[1]} ids from {int(rows.min())} to {int(rows.max())} do not "
            f"fit the model: it reads {n_ctx} tokens with ids 0 to {d_vocab - 1}"
        )
    return rows.cpu().int()


def _whole(items: Iterable[Any], n_ctx: int, d_vocab: int) -> Iterator[list[int]]:
    for index, item in enumerate(items):
        check_kind(f"text {index}", item, (TokenizedExample, Tensor), "or let all be strings")
        if isinstance(item, Tensor):
            yield _given_rows(item[None], n_ctx, d_vocab)[0].tolist()
        else:
            yield item.tokens.tolist()


def _tokenized(items: Iterable[Any], tokenizer: Any) -> Iterator[list[int]]:
    for index, text in enumerate(items):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {index} is {text!r}: every document must be a non-empty string")
        # verbose=False: a document longer than the context is packed, so a warning would mislead.
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _packed(
    documents: Iterable[list[int]], context_size: int, bos: int | None
) -> Iterator[list[int]]:
    """Yield full rows, with BOS at the start of each row and document, as SAELens packs them."""
    row: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            if bos is not None and document[start] != bos:
                row.append(bos)
            taken = document[start : start + context_size - len(row)]
            row, start = row + taken, start + len(taken)
            if len(row) == context_size:
                yield row
                row = []


def _mapped(
    rows: Iterable[list[int]], width: int, n_tokens: int | None, folder: str | Path | None
) -> Tensor:
    """Return rows, at most `width` long, in a file without a name that is mapped into memory."""
    n_rows = n_written = longest = 0
    with (
        tempfile.TemporaryFile(dir=folder) as file,
        progress_bar(total=n_tokens, desc="Reading texts", unit="token") as bar,
    ):
        for row in rows:
            if len(row) > width:
                raise ValueError(
                    f"document {n_rows} has {len(row)} tokens, more than "
                    f"context_size={width}: give a larger context_size, shorten it, or join "
                    "documents with concat_sequences=True"
                )
            padded = np.full(width, PAD, dtype=np.int32)
            padded[: len(row)] = row
            file.write(padded.tobytes())
            n_rows, n_written, longest = n_rows + 1, n_written + len(row), max(longest, len(row))
            bar.update(len(row))
            if n_tokens is not None and n_written >= n_tokens:
                break
        if n_rows == 0:
            raise ValueError(
                f"the texts have fewer than context_size={width} tokens in all: give more text "
                "or a smaller context_size"
            )
        file.flush()
        # Pages that torch would write to are copied first: the rows are the caller's own.
        mapped = np.memmap(file, np.int32, "c", shape=(n_rows, width))
    return torch.from_numpy(mapped)[:, :longest]
