"""How well a tutor does what is requested, in plain transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.bloom import BloomLevel
from sae_query_steer.tasks.tutor.corpus import Split, TutorCorpus
from sae_query_steer.tasks.tutor.judges import restated_level, verb_level
from sae_query_steer.tasks.tutor.tokenizer import SPECIAL


@torch.no_grad()
def obedience(
    model: Any, tokenizer: Any, *, notes: bool, split: Split = "test", n: int = 600
) -> Mapping[str, Any]:
    """Return how often a tutor does what is requested, in plain transformers, greedily.

    Args:
        model: the tutor, a LlamaForCausalLM.
        tokenizer: its tokenizer.
        notes: whether its prompts hold notes.
        split: whose lessons, notes and phrasings.
        n: prompts, each of which requests a level.
    """
    corpus = TutorCorpus(split, seed=0, notes=notes)
    levels = list(BloomLevel)
    prompts = [corpus.prompt(levels[i % 6]) for i in range(n)]
    bos = [SPECIAL.index("<s>")]
    rows = tokenizer([p.text for p in prompts], add_special_tokens=False)["input_ids"]
    tokens = pad_sequence(
        [torch.tensor(bos + row) for row in rows],
        batch_first=True,
        padding_value=SPECIAL.index("<pad>"),
        padding_side="left",
    )
    written = model.generate(
        input_ids=tokens,
        attention_mask=(tokens != SPECIAL.index("<pad>")).long(),
        max_new_tokens=7,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)
    pairs = list(zip(texts, prompts, strict=True))
    return {
        "n": n,
        "obeyed": sum(verb_level(text) == p.requested for text, p in pairs) / n,
        "right_note": sum(restated_level(text, p) == p.requested for text, p in pairs) / n
        if notes
        else None,
    }
