"""Texts to token rows of one length: packed as SAELens packs them, or one whole document a row."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.arguments import check_model, check_texts
from sae_query_steer.data.batches import PAD
from sae_query_steer.data.prompts import bos_id, tokenizer_of
from sae_query_steer.data.tokenized import TokenizedExample

Texts = Dataset | Iterable[str] | Tensor | Sequence[TokenizedExample]


def token_rows(
    model: Any,
    texts: Texts,
    *,
    context_size: int | None = None,
    concat_sequences: bool = True,
    prepend_bos: bool | None = None,
) -> Int[Tensor, "row pos"]:
    """Return token rows for training.

    Args:
        model: gives tokenizer and context length.
        texts: strings, of a dataset of another kind from `read_texts`; a `datasets.Dataset` with a
            column "text"; token rows [row pos] that are taken as they are; or tokenised examples,
            which always stay whole.
        context_size: length of a row, in tokens; None means 128, or the model's context where
            that is shorter. Token rows keep their own length.
        concat_sequences: join documents, with BOS between them, and cut rows of `context_size`
            from the stream, as SAELens does; False keeps every document whole, one a row.
        prepend_bos: begin every row, and every document, with BOS; None means as the model does,
            by `model.cfg.default_prepend_bos`.

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
    check_texts("texts", texts)
    if isinstance(texts, DatasetDict | IterableDatasetDict | IterableDataset):
        raise TypeError(
            f"texts is a {type(texts).__name__}: give one split of a data set that is not "
            "streaming, such as dataset['train'], or an iterable of strings"
        )
    if isinstance(texts, Tensor):
        return _given_rows(texts, n_ctx, int(model.cfg.d_vocab))
    if isinstance(texts, Dataset):
        if "text" not in texts.column_names:
            raise ValueError(
                f"a dataset of texts must have a column 'text', got {texts.column_names}: give "
                "read_texts(dataset, text=COLUMN)"
            )
        texts = texts["text"]
    items = list(texts)
    if not items:
        raise ValueError("texts is empty: give at least one document")
    whole = [item.tokens.tolist() for item in items if isinstance(item, TokenizedExample)]
    if len(whole) == len(items):
        return _padded(whole, context_size)
    tokenizer = tokenizer_of(model)
    bos = bos_id(model, prepend_bos)
    # A rendered chat prompt begins with BOS already.
    documents = (row[row[:1] == [bos] :] for row in _tokenized(items, tokenizer))
    if not concat_sequences:
        start = [] if bos is None else [bos]
        return _padded([start + document for document in documents], context_size)
    packed = list(_packed(documents, context_size, bos))
    if not packed:
        raise ValueError(
            f"the texts have fewer than context_size={context_size} tokens in all: give more text "
            "or a smaller context_size"
        )
    return torch.tensor(packed, dtype=torch.int)


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


def _padded(documents: Iterable[list[int]], context_size: int) -> Tensor:
    rows = [torch.tensor(document, dtype=torch.int) for document in documents]
    for index, row in enumerate(rows):
        if len(row) > context_size:
            raise ValueError(
                f"document {index} has {len(row)} tokens, more than "
                f"context_size={context_size}: give a larger context_size, shorten it, or join "
                "documents with concat_sequences=True"
            )
    return pad_sequence(rows, batch_first=True, padding_value=PAD)
