"""The two tutors that are shipped with the package."""

from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from sae_query_steer.models.loading import load_model

TUTOR_FOLDER = Path(__file__).parent / "bloom_tutor"
"""The tutor: a Hugging Face folder of Llama architecture."""

NULL_TUTOR_FOLDER = Path(__file__).parent / "bloom_tutor_null"
"""The null: the same without notes in its prompts, so that a query has nothing to choose."""


def load_tutor(*, notes: bool = True, device: str = "cpu") -> TransformerBridge:
    """Return a shipped tutor on TransformerBridge; nothing is downloaded.

    It is a Llama of 4 layers with 4 heads of 32; `tutor.json` in its folder says how it was trained
    and how well it obeys. Use `TUTOR_FOLDER` itself where a folder is wanted, as by `--model` or
    plain transformers.

    Args:
        notes: False gives the null, whose prompts hold no notes.
        device: where to put it.
    """
    return load_model(str(TUTOR_FOLDER if notes else NULL_TUTOR_FOLDER), device=device)
