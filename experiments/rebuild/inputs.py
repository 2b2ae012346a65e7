"""What both sides read: models, SAE weights, token rows and texts, made once with the old code."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

SITES_OF = {"tutor": (1, 2), "stories": (1, 3)}
"""The two layers of each model that are compared."""

NOUNS = {
    "animal": ["dog", "cat", "bird", "frog", "bear", "fish"],
    "food": ["cake", "soup", "bread", "apple", "cookie", "egg"],
    "sky": ["sun", "moon", "star", "cloud", "rain", "wind"],
}


def as_hooked_transformer(folder: str) -> HookedTransformer:
    """Return a Hugging Face Llama as a HookedTransformer, nothing folded or centred."""
    hf = AutoModelForCausalLM.from_pretrained(folder)
    c = hf.config
    config = HookedTransformerConfig(
        d_model=c.hidden_size,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        d_head=c.head_dim,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=c.max_position_embeddings,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        n_key_value_heads=c.num_key_value_heads,
        eps=c.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
        default_prepend_bos=True,
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_llama_weights(hf, model.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def story_texts(n: int) -> list[dict[str, str]]:
    """Return labelled beginnings of stories of different lengths."""
    draw = random.Random(5)
    made = []
    for i in range(n):
        label = sorted(NOUNS)[i % 3]
        noun, other = draw.sample(NOUNS[label], 2)
        ends = ["", " It was big.", f" Near it was a {other}. They were happy."]
        made.append(
            {
                "prompt": f"Once upon a time, there was a {noun}.{draw.choice(ends)}",
                "response": f" The {other} saw the {noun}.",
                "label": label,
            }
        )
    return made


def make_inputs(folder: Path, tutor: str, stories: str) -> None:
    """Write all inputs to a folder."""
    import adapter_old as old  # the old code alone makes inputs
    from sae_query_steer.tasks.tutor.corpus import TutorCorpus
    from settings import ARCHITECTURES

    corpus = TutorCorpus("train", seed=1)
    lessons = [
        {"prompt": e.prompt, "response": e.response, "label": str(e.label)}
        for e in corpus.examples(36)
    ]
    texts: dict[str, Any] = {}
    folders = {"tutor": tutor, "stories": stories}
    rows, cfgs = {}, {}
    for name, examples in (("tutor", lessons), ("stories", story_texts(36))):
        model = old.load_model(folders[name])
        documents = [e["prompt"] + e["response"] for e in examples]
        by_length = sorted({e["prompt"] for e in examples}, key=len)
        prompts = [by_length[0], by_length[-1], by_length[len(by_length) // 2]]
        ids = model.to_tokens(prompts[0])[0].tolist()
        texts[name] = {
            "examples": examples,
            "prompts": prompts,
            "texts": documents[:12],
            "marker": ids[5],
        }
        drawn = old.token_rows(model, documents * 3, context_size=32)
        rows[name] = drawn.contiguous()
        sites = old.query_sites(model, SITES_OF[name])
        turned = old.query_sites(model, SITES_OF[name], rotated=True)
        given = [(a, a, options, sites) for a, options in ARCHITECTURES.items()]
        given.append(("topk-rotated", "topk", "k=4", turned))
        for key, arch, options, where in given:
            saes = old.train(
                model,
                drawn,
                where,
                (arch, {"d_sae_per_head": 32, **eval(f"dict({options})")}),
                training_tokens=200 * 128,
                train_batch_size_tokens=128,
                lr=3e-3,
                metric_tokens=0,
            )
            cfgs[f"{name}-{key}"] = {
                n: sae.cfg.to_dict() | {"metadata": {}} for n, sae in saes.items()
            }
            weights = {
                f"{n}|{k}": v for n, sae in saes.items() for k, v in sae.state_dict().items()
            }
            save_file(weights, folder / f"{name}-{key}.safetensors")
    save_file(rows, folder / "rows.safetensors")
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "saes.json").write_text(json.dumps(cfgs))
    (folder / "models.json").write_text(json.dumps(folders))


def read_inputs(folder: Path) -> dict[str, Any]:
    """Return what `make_inputs` wrote."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("texts", "models")}
    saes: dict[str, Any] = {}
    for key, by_site in json.loads((folder / "saes.json").read_text()).items():
        tensors = load_file(folder / f"{key}.safetensors")
        saes[key] = {
            name: (cfg, {k.split("|")[1]: v for k, v in tensors.items() if k.split("|")[0] == name})
            for name, cfg in by_site.items()
        }
    return {**read, "saes": saes, "rows": load_file(folder / "rows.safetensors")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_inputs(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
