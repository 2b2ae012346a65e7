"""The gridworld's tokenizer: one token for each word, number, cell and punctuation mark."""

from transformers import PreTrainedTokenizerFast

from experiments.gridworld.corpus import SIZE, cell_name
from experiments.gridworld.words import (
    COLOURS,
    GREETINGS,
    NAMES,
    OPENERS,
    READ_OUTS,
    REQUESTS,
)
from experiments.word_tokens import word_tokenizer

TOKEN = " ?[a-z][0-9]+| ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]"
"""A token as a regular expression; a cell is a letter with a number."""


def grid_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; a word with the space before it is one token."""
    cells = [cell_name((column, row)) for column in range(SIZE) for row in range(SIZE)]
    counts = [str(n) for n in range(SIZE * SIZE)]
    inside = [*COLOURS, *GREETINGS, *NAMES, *READ_OUTS, *cells, *counts, *OPENERS]
    inside += [core for cores in REQUESTS.values() for core in cores]
    frame = (
        "Grid: 6 by 6, from a1 to a2, walls at a3, a4.\n"
        "Routes: 2 steps and 0 by a wall along red; 1 step and 1 by a wall along red.\n"
        "Guide: Hello Mia, now go along"
    )
    return word_tokenizer([frame, *OPENERS, *(f" {text}" for text in inside)], word=TOKEN)
