"""Load models, and check that a model can be read and steered."""

from pathlib import Path
from typing import Any

import torch
from torch._dynamo import OptimizedModule
from transformer_lens.model_bridge import TransformerBridge

from sae_query_steer.data.tokenized import bos_id

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Number formats of a model's weights."""


def load_model(
    name_or_folder: str, *, device: str | None = None, dtype: torch.dtype | str = torch.float32
) -> TransformerBridge:
    """Return a model booted on TransformerBridge from a local folder or a hub name.

    Args:
        name_or_folder: a Hugging Face folder (config, safetensors, tokenizer), or a name on the
            hub or in its cache.
        device: where to put it; None lets TransformerLens choose.
        dtype: number format of the weights, such as torch.bfloat16 or "bfloat16".

    Raises:
        ValueError: a device that there is not here, or another number format.
        FileNotFoundError: it looks like a path, and there is no model there.

    Source: `HookedTransformer.from_pretrained` does not take a folder; the bridge takes both.
    """
    check_model_folder(name_or_folder)
    if (kind := getattr(torch, dtype, None) if isinstance(dtype, str) else dtype) not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(one)[6:] for one in DTYPES]}, got {dtype!r}")
    check_device(device)
    path = Path(name_or_folder)
    if path.is_dir() and not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise FileNotFoundError(
            f"{path} has no tokenizer files: TransformerLens needs them to boot"
        )
    return TransformerBridge.boot_transformers(name_or_folder, device=device, dtype=kind)


def check_device(device: str | None) -> None:
    """Raise ValueError if a device is none of torch's, or is not on this machine."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device must be one of {here} on this machine, got {device!r}") from error


def check_model_folder(name_or_folder: str) -> None:
    """Raise if a text looks like a path, and there is no model's config.

    Raises:
        FileNotFoundError: the message names the path.
    """
    path = Path(name_or_folder)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: give a Hugging Face model folder")
    if not path.exists() and (path.is_absolute() or name_or_folder.startswith((".", "~"))):
        raise FileNotFoundError(f"no model folder {path}")


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end a text: the tokenizer's EOS, then those of the generation config.

    Some chat models end their turn with a token that only the generation config names (Phi-3:
    <|end|>); the backends stop at one EOS alone.
    """
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    also = getattr(config, "eos_token_id", None)
    found = [None if model.tokenizer is None else model.tokenizer.eos_token_id]
    found += also if isinstance(also, list) else [also]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def model_name(model: Any) -> str:
    """Return the name under which a model was loaded; the folder's own name for a folder."""
    name = str(getattr(model.cfg, "model_name", "") or "custom")
    is_folder = Path(name).is_absolute() or name.startswith(".") or Path(name).is_dir()
    return Path(name).name if is_folder else name


def check_eager(model: Any) -> None:
    """Raise if a model, or a part of it, is compiled: compiled code may skip hooks.

    Raises:
        TypeError: it is no model of TransformerLens.
        ValueError: the message names the part.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "hook_dict"):
        raise TypeError(
            "model must be a HookedTransformer or a TransformerBridge, such as load_model returns, "
            f"got {type(model).__name__}"
        )
    inner = vars(model).get("original_model")  # a TransformerBridge does not register it
    named = [*model.named_modules()]
    if isinstance(inner, torch.nn.Module):
        named += [
            (f"original_model.{name}".rstrip("."), part) for name, part in inner.named_modules()
        ]
    for name, module in named:
        if (
            isinstance(module, OptimizedModule)
            or module._compiled_call_impl is not None
            or hasattr(module.forward, "_torchdynamo_orig_callable")
        ):
            raise ValueError(
                f"{name or 'the model'} is compiled by torch.compile, which may skip hooks: use "
                "the model that is not compiled"
            )


def check_not_steered(model: Any) -> None:
    """Raise if a steerer of this package is in place: it would change what is measured.

    Raises:
        ValueError: the message says to leave the `with` block first.
    """
    for point in model.hook_dict.values():
        if any(getattr(handle.user_hook, "steers_queries", False) for handle in point.fwd_hooks):
            raise ValueError(
                f"the model's queries are being changed at {point.name}: leave the "
                "`with steerer.apply(...)` or `with attached_saes(...)` block before you measure it"
            )


def check_prompts_fit(model: Any, prompts: Any, prepend_bos: bool | None) -> None:
    """Raise if a text has more tokens than a model's context.

    Raises:
        ValueError: the message gives row and length.
    """
    n_ctx = int(model.cfg.n_ctx)
    texts = [prompts] if isinstance(prompts, str) else prompts
    if model.tokenizer is None or not isinstance(texts, list | tuple):
        return
    for row, prompt in enumerate(texts):
        if not isinstance(prompt, str) or 4 * len(prompt) < n_ctx:  # a character is 4 bytes at most
            continue
        ids = model.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        n = len(ids) + (bos_id(model, prepend_bos) is not None)
        if n > n_ctx:
            raise ValueError(
                f"prompt {row} has {n} tokens, more than the model's context of {n_ctx}: the model "
                "would cut it; shorten it, or pass tokens that you cut yourself"
            )
