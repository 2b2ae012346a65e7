"""A tokenizer for a task's texts: one token for each word, punctuation mark and line break."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


def word_tokenizer(
    texts: Iterable[str], *, word: str = " ?[A-Za-z]+|[^A-Za-z]"
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows every word of some texts.

    A word with the space before it is one token, so decoding is exact.

    Args:
        texts: which hold every word in every place where it may stand.
        word: a regular expression of one token; every character has to be in one.
    """
    split = pre_tokenizers.Split(Regex(word), behavior="isolated")
    pieces = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
