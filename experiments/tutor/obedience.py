"""How well a tutor does what is requested, in plain transformers."""

from collections.abc import Mapping
from typing import Any

from experiments.tiny_llama import greedy_texts
from sae_query_steer.bloom import BloomLevel
from sae_query_steer.toy.corpus import Split, TutorCorpus
from sae_query_steer.toy.judges import restated_level, verb_level


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
    texts = greedy_texts(model, tokenizer, [p.text for p in prompts], max_new_tokens=7)
    pairs = list(zip(texts, prompts, strict=True))
    return {
        "n": n,
        "obeyed": sum(verb_level(text) == p.requested for text, p in pairs) / n,
        "right_note": sum(restated_level(text, p) == p.requested for text, p in pairs) / n
        if notes
        else None,
    }
