"""The paper's models: their published configs, and tiny models made from these."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from wheel_check import WORDS

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}
PUBLISHED = {
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL | {"vocab_size": 32768},
    "microsoft/Phi-3-mini-4k-instruct": PHI3,
}
TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
        "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
}
# A window smaller than the texts; 4 query heads, for Mistral over one key head, as 32 over 8.
TINY = {
    "mistral": {"hidden_size": 32, "num_key_value_heads": 1, "sliding_window": 6},
    "phi3": {"hidden_size": 48, "num_key_value_heads": 4, "sliding_window": 6},
}
SMALL = {
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,  # at 0.02 so small a model has next to no preferences
}


def write_config(name: str, folder: Path) -> Path:
    """Write a published config, without weights and tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
    return folder


def write_tiny(name: str, folder: Path, **changes) -> Path:
    """Write a tiny random model with a published config but for its sizes, in bfloat16."""
    kind = PUBLISHED[name]["model_type"]
    tokenizer = _tokenizer(kind)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if kind == "phi3":
        ids["pad_token_id"] = tokenizer.eos_token_id
    settings = PUBLISHED[name] | SMALL | TINY[kind] | ids | changes
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if kind == "phi3":
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words; special tokens, BOS and padding are as the model's own tokenizer has them."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "unk_token": "<unk>"}
    if kind == "mistral":  # puts BOS before every text by itself, and has no padding token
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        special |= {"eos_token": "</s>"}
    else:
        names = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
        tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
        special |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = TEMPLATES[kind]
    return made


def write_bytes(folder: Path, kind: str = "llama") -> Path:
    """Write a tiny random chat model whose tokens are bytes, so that any text can go on."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": len(words), "initializer_range": 0.4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes |= {"num_key_value_heads": 2} if kind == "mistral" else {}
    config = AutoConfig.for_model(kind, max_position_embeddings=2048, **sizes, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


def write_qwen2(folder: Path) -> Path:
    """Write a tiny random Qwen2: biases of q, k and v, byte tokens, ChatML, and no BOS."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = _bytes([*words, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    inner.add_special_tokens([AddedToken(word, special=True) for word in words])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = Qwen2Config(max_position_embeddings=256, initializer_range=0.4, **sizes, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        for name, weights in model.named_parameters():
            if name.endswith("_proj.bias"):  # 0 in a new model
                torch.nn.init.normal_(weights)
    model.save_pretrained(folder)
    return folder


def _bytes(words: list[str]) -> Tokenizer:
    """Tokens of single bytes, in which these words have their places as ids."""
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
