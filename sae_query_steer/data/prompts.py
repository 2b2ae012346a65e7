"""What stands around a prompt: BOS, and the turns of a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sae_query_steer.arguments import check_model

ChatTemplate = bool | Sequence[Mapping[str, str]]
"""True: put each prompt into the tokenizer's chat template, as the user's turn. A list of messages,
such as [{"role": "system", "content": "Be brief."}]: the same, after these turns."""


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        ValueError: the model was made without one.
    """
    check_model(model)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: give it one, or pass token rows")
    return model.tokenizer


def bos_id(model: Any, prepend_bos: bool | None = None) -> int | None:
    """Return the BOS id that a model's prompts begin with, or None if they begin without.

    Args:
        model: gives the tokenizer and `cfg.default_prepend_bos`, by which `generate` goes.
        prepend_bos: True or False overrides that setting.

    Raises:
        ValueError: `prepend_bos` is True and the tokenizer has no BOS token.
    """
    bos = tokenizer_of(model).bos_token_id
    if prepend_bos is None:
        prepend_bos = bos is not None and bool(getattr(model.cfg, "default_prepend_bos", True))
    if prepend_bos and bos is None:
        raise ValueError("the tokenizer has no BOS token: pass prepend_bos=False")
    return cast(int, bos) if prepend_bos else None


def chat_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = True
) -> str:
    """Return a prompt as the user's turn in the tokenizer's chat template, with special tokens.

    Args:
        prompt: the user's turn.
        tokenizer: has the template.
        chat_template: True, or the turns before it.

    Raises:
        ValueError: the tokenizer has no chat template, or one that drops or changes a turn; or a
            turn has no role or no content.
    """
    before = [] if isinstance(chat_template, bool) else list(chat_template)
    for turn in before:
        if not isinstance(turn, Mapping) or {"role", "content"} - set(turn):
            raise ValueError(
                "chat_template must be True, False or messages such as "
                f"{{'role': 'system', 'content': '...'}}, got {turn!r:.80}"
            )
    turns = [*before, {"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: pass chat_template=False, or set "
            "tokenizer.chat_template to the one that the model was trained with"
        )
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    for form in (turns, parts):  # some templates expect parts
        try:
            written = tokenizer.apply_chat_template(
                cast(Any, form), add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError):
            continue
        if isinstance(written, str) and all(turn["content"].strip() in written for turn in turns):
            return written
    raise ValueError(
        f"the tokenizer's chat template must write every turn of {str(turns)[:200]}, but drops or "
        "changes one: set tokenizer.chat_template to one that writes them as they are"
    )
