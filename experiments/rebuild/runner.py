"""Runs settings with one side's code, in a process of its own; `compare.py` starts it."""

import argparse
import importlib
import json
import sys
import time
import traceback
import warnings
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from compare import file_of
from inputs import SITES_OF, as_hooked_transformer, read_inputs
from safetensors.torch import save_file
from settings import Setting, every_setting
from transformer_lens.model_bridge import TransformerBridge

NEW_TOKENS = 6


class Names:
    """What expressions may use beside the names of the adapter, for one model and backend."""

    def __init__(self, adapter: Any, inputs: dict[str, Any], setting: Setting, models: Any) -> None:
        self.adapter, self.inputs, self.setting = adapter, inputs, setting
        self.model = models(setting.model, setting.backend)
        self.reference = models(setting.model, "bridge")
        own = inputs["texts"][setting.model]
        self.examples = [adapter.LabelledExample(**e) for e in own["examples"]]
        self.prompts, self.texts = own["prompts"], own["texts"]
        self.rows = inputs["rows"][setting.model].clone()
        self.a, self.b, self.c = sorted({e["label"] for e in own["examples"]})[:3]
        self.first, self.second = SITES_OF[setting.model]
        self.site = f"blocks.{self.second}.attn.hook_q"
        self.marker = own["marker"]
        self.row_mask = torch.zeros(3, 60, dtype=torch.bool)
        for row, position in enumerate((4, 9, 2)):
            self.row_mask[row, position :: 7 + row] = True
        self.WIDE = adapter.LastPromptToken() | adapter.FirstResponseTokens(3)

    def namespace(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in dir(self) if not name.startswith("__")}
        return {"torch": torch, **vars(self.adapter), **own}

    @property
    def sites(self) -> Any:
        return self.adapter.query_sites(self.model, [self.first, self.second])

    def saes(self, arch: str) -> Any:
        if arch == "dense":
            return self.adapter.identity_encoders(self.sites)
        return _saes(self.adapter, self.inputs["saes"], self.setting.model, arch)

    def targets(self, arch: str) -> Any:
        return _targets(self, self.setting.model, arch)

    def new_targets(self, arch: str, span: Any) -> Any:
        return self.adapter.centroid_targets(self.model, self.saes(arch), self.examples, span)

    def steer(self, arch: str = "topk", **changes: Any) -> Any:
        settings = {
            "target": self.a,
            "objective": self.adapter.PrototypeLogLikelihood(),
            "n_steps": 8,
            "step_size": 0.4,
            **changes,
        }
        return self.adapter.LatentGradientSteerer(self.saes(arch), self.targets(arch), **settings)

    def attached(self, saes: Any, **changes: Any) -> Any:
        return lambda model: self.adapter.attached_saes(model, saes, **changes)

    @property
    def residual(self) -> Any:
        return self.adapter.residual_means(self.model, self.examples, [self.first, self.second])

    def probe(self, arch: str) -> torch.Tensor:
        saes = self.saes(arch)
        shape = (saes[self.site].n_heads, saes[self.site].d_latent)
        return torch.randn(*shape, generator=torch.Generator().manual_seed(2))

    def centroid_values(self, targets: Any) -> dict[str, Any]:
        parts = {"counts": targets.counts}
        for name in targets.means:
            parts[f"mean {name}"] = targets.means[name]
            parts[f"variance {name}"] = targets.variances[name]
        return parts

    def token_values(self, examples: Any) -> dict[str, Any]:
        tokenized = self.adapter.tokenized(self.model, examples)
        return {
            "lengths": torch.tensor([e.prompt_length for e in tokenized]),
            "tokens": torch.cat([torch.as_tensor(e.tokens) for e in tokenized]),
        }

    def moved_by(self, steerer: Any) -> Any:
        with steerer.apply(self.model, record=True) as trace:
            generate(self)
        return self.adapter.moved_latents(steerer, trace)

    def attention_change_by(self, steerer: Any) -> Any:
        with steerer.apply(self.model, record_attention=True) as trace:
            generate(self)
        return trace.attention_change(self.model)

    def trained(self, arch: str, options: dict, *, data: Any = None, **how: Any) -> Any:
        saes = self.adapter.train(
            self.model,
            self.rows if data is None else data,
            self.sites,
            (arch, {"d_sae_per_head": 32, **options}),
            training_tokens=50 * 128,
            train_batch_size_tokens=128,
            lr=3e-3,
            metric_tokens=1024,
            n_batches_for_norm_estimate=5,
            **how,
        )
        weights = {f"{n} {k}": v for n, sae in saes.items() for k, v in sae.state_dict().items()}
        return {**weights, "metrics": saes.metrics}

    def sweep_tables(self) -> dict[str, Any]:
        return self.adapter.sweep_tables(self)


_KEPT: dict[Any, Any] = {}


def _saes(adapter: Any, given: dict[str, Any], model: str, arch: str) -> Any:
    key = ("saes", model, arch)
    if key not in _KEPT:
        _KEPT[key] = adapter.make_saes(given[f"{model}-{arch}"])
    return _KEPT[key]


def _targets(names: Names, model: str, arch: str) -> Any:
    key = ("targets", model, arch)
    if key not in _KEPT:
        _KEPT[key] = names.adapter.centroid_targets(
            names.reference, names.saes(arch), names.examples, None
        )
    return _KEPT[key]


def generate(names: Names) -> dict[str, Any]:
    """Return tokens and logits of a greedy generation."""
    setting = names.setting
    output = names.model.generate(
        names.prompts if setting.padded else names.prompts[0],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        verbose=False,
        stop_at_eos=False,
        return_type="tokens",
        output_logits=True,
        use_past_kv_cache=setting.use_cache,
    )
    return {"tokens": output.sequences[:, -NEW_TOKENS:], "logits": torch.stack(output.logits, 1)}


def stream(names: Names) -> dict[str, Any]:
    """Return what `generate_stream` yields for one prompt."""
    found = names.model.generate_stream(
        names.model.to_tokens(names.prompts[1]),
        max_new_tokens=NEW_TOKENS,
        max_tokens_per_yield=2,
        do_sample=False,
        verbose=False,
        stop_at_eos=False,
        return_type="tokens",
    )
    return {f"tokens {i}": tokens for i, tokens in enumerate(found)}


def run(setting: Setting, names: Names) -> dict[str, Any]:
    """Return the results of one setting."""
    value = eval(setting.expression, names.namespace())
    if setting.kind == "value":
        return value if isinstance(value, dict) else {"value": value}
    steerers = value if isinstance(value, list) else [value]
    rows, lengths = names.rows[:3, :24].long(), [9, 20, 14]
    with torch.inference_mode():
        if setting.kind == "hooks":
            mask = torch.ones_like(rows)
            mask[1, :4] = 0
            hooks = steerers[0].fwd_hooks(
                names.model, prompt_lengths=[9, 18, 14], attention_mask=mask, tokens=rows
            )
            return {"logits": names.model.run_with_hooks(rows, fwd_hooks=hooks, prepend_bos=False)}
        how = {"record": True} if setting.kind == "trace" else {}
        if setting.kind in ("forward", "cache"):
            how = {"prompt_lengths": lengths}
        with ExitStack() as stack:
            traces = [
                stack.enter_context(
                    s.apply(names.model, **how) if hasattr(s, "apply") else s(names.model)
                )
                for s in steerers
            ]
            if setting.kind == "forward":
                return {"logits": names.model(rows, prepend_bos=False)}
            if setting.kind == "cache":
                wanted = [names.site, f"blocks.{names.second}.attn.hook_pattern"]
                kept = names.model.run_with_cache(rows, names_filter=wanted, prepend_bos=False)[1]
                return {name: kept[name] for name in wanted}
            results = stream(names) if setting.kind == "stream" else generate(names)
        if setting.kind == "trace":
            results["trace"] = traces[0].to_dataframe()
        return results


def stored(results: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors, and the rest as JSON; floats keep every digit in it."""
    tensors, rest = {}, {}
    for name, value in results.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
        elif isinstance(value, pd.DataFrame):
            rest[name] = {str(column): [_plain(v) for v in value[column]] for column in value}
        else:
            rest[name] = _plain(value)
    return tensors, rest


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, str)):
        return value if not isinstance(value, str) else str(value)
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else str(value)


def main() -> None:
    """Run the settings named in a file, each into files of its own, and say how long each took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["old", "new"])
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("wanted", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    adapter = importlib.import_module(f"adapter_{given.side}")
    inputs = read_inputs(given.inputs)
    folders = {name: str(folder) for name, folder in inputs["models"].items()}

    @cache
    def models(name: str, backend: str) -> Any:
        if backend == "bridge":
            return TransformerBridge.boot_transformers(folders[name], device="cpu")
        return as_hooked_transformer(folders[name])

    wanted = set(json.loads(given.wanted.read_text()))
    for setting in every_setting():
        if setting.name not in wanted:
            continue
        begun = time.process_time()
        path = given.out / file_of(setting.name)
        try:
            names = Names(adapter, inputs, setting, models)
            tensors, rest = stored(run(setting, names))
            problem = ""
        except Exception as error:
            tensors, rest = {}, {}
            problem = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
        save_file(tensors, f"{path}.safetensors")
        seconds = time.process_time() - begun
        report = {"error": problem, "values": rest, "seconds": seconds}
        Path(f"{path}.json").write_text(json.dumps(report))
        print(f"{given.side} {seconds:5.1f} s  {setting.name}  {problem[:300]}", file=sys.stderr)


if __name__ == "__main__":
    main()
