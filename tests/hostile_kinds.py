"""Valid folders of each kind that this package writes, for the tests that break them.

`KINDS` says how a folder of each kind is made and read; another kind is one more entry.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_cases import CONFIGS, randn, trained_like
from wheel_check import make_model

import sae_query_steer as sqs
from sae_query_steer import sae
from sae_query_steer.models.fingerprint import Fingerprint
from sae_query_steer.sae import to_inference
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.files import steerer_settings
from sae_query_steer.storage.checksums import listed

HOOKS = ("blocks.2.attn.hook_q", "blocks.10.attn.hook_rot_q")
CLASSES = ("remember", "apply", "create")
ARCHITECTURES = ("topk", "jumprelu", "gated", "batchtopk", "standard")


@cache
def some_saes(first: int = 0) -> sqs.QuerySAEs:
    kinds = (ARCHITECTURES[first], "topk, rows as they are")
    saes = {
        hook: to_inference(trained_like(CONFIGS[kind]))
        for hook, kind in zip(HOOKS, kinds, strict=True)
    }
    metrics = pd.DataFrame([{"layer": 2, "head": 0, "l0": 1.5}, {"layer": 2, "head": 1, "l0": 2.5}])
    return sqs.QuerySAEs(saes, metrics, {"lr": 1e-3, "sites": list(HOOKS)})


@cache
def some_targets() -> sqs.CentroidTargets:
    shape, queries = (3, 3, 11), {hook: randn(2, 6, 3, 6, seed=5) for hook in HOOKS}
    return sqs.CentroidTargets(
        classes=CLASSES,
        means={hook: randn(*shape, seed=3).abs() for hook in HOOKS},
        variances={hook: randn(*shape, seed=4).square() for hook in HOOKS},
        counts=torch.tensor([31, 4, 15]),
        span="LastPromptToken()",
        fingerprint=Fingerprint(
            tokens=torch.arange(12).reshape(2, 6), queries=queries, reconstructions=queries
        ),
    )


STEERERS: tuple[dict[str, Any], ...] = (
    {"objective": sqs.PrototypeLogLikelihood(temperature=0.7), "target": "create", "layers": [2]},
    {
        "objective": sqs.objectives.GaussianLogLikelihood(floor=0.3),
        "target": {"apply": 1, "create": -0.5},
        "latents": sqs.control.GivenLatents({HOOKS[0]: {0: [1, 2], 2: [4]}}),
        "gate": sqs.control.PosteriorBelow(0.9),
        "until": 0.8,
        "scope": sqs.LastPromptToken()
        | (sqs.scopes.FirstResponseTokens(3) & ~sqs.scopes.AtPositions([4])),
        "trust_radius": 2.0,
        "max_relative_change": 0.5,
        "heads": {2: [0, 2]},
    },
    {
        "objective": sqs.objectives.LinearProbe(torch.arange(33.0).reshape(3, 11) / 33),
        "target": "apply",
        "scope": sqs.scopes.AfterToken(20) | sqs.scopes.RowMask(torch.eye(2, 9, dtype=torch.bool)),
        "schedule": sqs.control.ExponentialDecay(half_life=2.0),
        "latents": sqs.control.TopLatents(3),
        "gate": sqs.control.LatentAbove(3, 0.2),
    },
)


def make_saes(folder: Path, number: int) -> None:
    some_saes(number % len(ARCHITECTURES)).save(folder)


def make_targets(folder: Path, number: int) -> None:
    some_targets().save(folder)


def make_steerer(folder: Path, number: int) -> None:
    settings = {"n_steps": 4, "step_size": 0.3, **STEERERS[number % len(STEERERS)]}
    saes: Any = some_saes(number % len(ARCHITECTURES))
    if number % 4 == 3:
        saes = {hook: sqs.sae.IdentityEncoder(n_heads=3, d_head=11) for hook in HOOKS}
    sqs.steering.save_steerer(sqs.LatentGradientSteerer(saes, some_targets(), **settings), folder)


def read_saes(folder: Path, out: Path) -> None:
    saes = sqs.QuerySAEs.load(folder)
    for one in saes.values():
        x = randn(2, one.n_heads, one.d_head).to(one.dtype)
        assert one.decode(one.encode(x)).shape == x.shape
    assert repr(saes)
    saes.save(out)


def read_targets(folder: Path, out: Path) -> None:
    targets = sqs.CentroidTargets.load(folder)
    for hook in targets.means:
        assert 0 <= targets.class_share_of_variance(hook) <= 1
    assert repr(targets)
    targets.save(out)


def read_steerer(folder: Path, out: Path) -> None:
    steerer = sqs.steering.load_steerer(folder)
    json.dumps(steerer_settings(steerer), allow_nan=False)
    sqs.steering.save_steerer(steerer, out)
    places = TokenPositions(
        row=torch.arange(2),
        position=torch.arange(2),
        n_rows=2,
        prompt_lengths=torch.ones(2, dtype=torch.int64),
    )
    for hook, at in steerer.where.chosen.items():
        queries = randn(2, 3, steerer.saes[hook].d_head)[:, list(at.heads)]
        change = replace(steerer, n_steps=1).change(queries, at, places)
        assert change.delta.shape == queries.shape


@cache
def bundle_folder() -> Path:
    """A bundle of a tiny model: SAEs that were never trained, centroids, a steerer, a table."""
    folder = Path(tempfile.mkdtemp(prefix="bundle-"))
    atexit.register(shutil.rmtree, folder)
    with torch.random.fork_rng():
        make_model(folder / "model", n_layers=2)
        config = sae.QueryHeadTopKSAEConfig(n_heads=4, d_head=8, d_sae_per_head=9, k=3)
        saes = sqs.QuerySAEs(
            {f"blocks.{n}.attn.hook_q": sae.QueryHeadTopKSAE(config) for n in (0, 1)},
            pd.DataFrame([{"layer": 0, "head": 0, "l0": 1.5, "explained_variance": 0.5}]),
        )
    model = sqs.load_model(str(folder / "model"), device="cpu")
    examples = [
        sqs.LabelledExample(prompt=f"w{i} w{i + k}", label=CLASSES[k])
        for i in range(2)
        for k in range(3)
    ]
    steerer = sqs.LatentGradientSteerer(
        saes,
        sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, examples)),
        target=CLASSES[0],
        objective=sqs.SquaredDistance(),
        n_steps=1,
        step_size=0.5,
    )
    sqs.hub.save_bundle(
        folder / "bundle",
        model,
        saes,
        steerer=steerer,
        evaluation=pd.DataFrame({"layer": [0, 1], "rate": [0.5, float("nan")]}),
    )
    return folder / "bundle"


def make_bundle(folder: Path, number: int) -> None:
    shutil.copytree(bundle_folder(), folder)


def sign(folder: Path) -> None:
    """Bring the list of a bundle up to its files, as the author of a hostile one would."""
    index = folder / "bundle.json"
    try:
        told = json.loads(index.read_bytes())
        for name, entry in told["files"].items():
            path = folder / name
            if path.is_file() and not path.is_symlink():
                entry |= listed(path).model_dump()
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        return
    index.write_text(json.dumps(told))


def read_bundle(folder: Path, out: Path) -> None:
    number = re.search(r"-(\d+)$", folder.parent.name)
    if number is None or int(number[1]) // len(KINDS) % 4:
        sign(folder)
    bundle = sqs.hub.load_bundle(folder)
    for one in bundle.saes.values():
        x = randn(2, one.n_heads, one.d_head)
        assert one.decode(one.encode(x)).shape == x.shape
    if bundle.steerer is not None:
        json.dumps(steerer_settings(bundle.steerer), allow_nan=False)
    sqs.hub.push_to_hub(folder, "alice/bundle", dry_run=True)
    sqs.hub.registry_entry(folder, release="r", repo_id="alice/bundle")
    bundle.saes.save(out)


TEXTS = (".csv", ".tsv", ".jsonl", ".parquet")


def make_texts(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    rows = [{"q": f"Why {n}? \u00e9", "level": "ab"[n % 2], "n": n} for n in range(20)]
    table, path = pd.DataFrame(rows), folder / f"texts{TEXTS[number % len(TEXTS)]}"
    match path.suffix:
        case ".jsonl":
            table.to_json(path, orient="records", lines=True)
        case ".parquet":
            table.to_parquet(path)
        case kind:
            table.to_csv(path, index=False, sep="," if kind == ".csv" else "\t")


def read_texts(folder: Path, out: Path) -> None:
    path = next(folder.glob("texts.*"), folder / "texts.csv")
    for example in sqs.read_examples(path, prompt="{n}: {q}", label="level"):
        example.prompt.encode()
    sqs.read_texts(path, text="q")


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path, Path], None]]] = {
    "saes": (make_saes, read_saes),
    "targets": (make_targets, read_targets),
    "steerer": (make_steerer, read_steerer),
    "bundle": (make_bundle, read_bundle),
    "texts": (make_texts, read_texts),
}
"""By name: write a valid folder (the number picks among variants); read it, and write it again."""
