"""The model card of a bundle: what it is, how it was made, and how to load it, for a hub's page."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from huggingface_hub import ModelCardData

from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.storage.markdown import markdown_table
from sae_query_steer.targets.centroids import CentroidTargets

TAGS = (
    *("saelens", "sparse-autoencoder", "mechanistic-interpretability"),
    *("transformer-lens", "attention-queries", "steering", "sae-query-steer"),
)

REPOSITORY = "USER/REPOSITORY"
"""What a card says until `push_to_hub` knows the name."""

_ROWS = 200
"""Rows of a table that a card shows; the files have all."""


_USE = (
    "## Intended use and limits\n\n"
    "For research into what queries of attention heads carry, and for steering generation by them. "
    "A query adds no information, it chooses where a head looks: where nothing in the prompt "
    "carries what you want, no query will. Which sites steer at all must be measured "
    "(`interchange_effect`, `separability`). A steered model may say what the unsteered one would "
    "not; nothing here makes it safer.\n\n"
    'Method: arXiv 2502.18644, "Steered Generation via Gradient Descent on Sparse Features"; '
    "follow-up arXiv 2605.23040."
)


def model_card(
    saes: QuerySAEs,
    model: Mapping[str, Any],
    *,
    data: Mapping[str, Any] | None,
    targets: CentroidTargets | None,
    steerer: Mapping[str, Any] | None,
    evaluation: pd.DataFrame | None,
    heads: Mapping[str, str],
    license: str | None = None,
    note: str = "",
) -> str:
    """Return the README.md of a bundle.

    Args:
        saes: its SAEs, with their metrics and settings where these are known.
        model: what `model_facts` says of the model.
        data: what `data_facts` says of the labelled examples.
        targets: its centroids.
        steerer: the settings of its steerer.
        evaluation: its table of scores.
        heads: the folder of the plain SAE of each head, by its id; empty where there are none.
        license: name of the licence on the hub.
        note: a paragraph of the author's.
    """
    name = str(model["name"])
    about = ModelCardData(
        library_name="saelens",
        tags=list(TAGS),
        base_model=name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None,
        license=license,
    )
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# Sparse autoencoders on the attention queries of {name}",
        f"SAEs of every query head at {', '.join(f'`{hook}`' for hook in saes)}, made with "
        "sae_query_steer. A query decides where its head looks: the latents say what for.",
        note.strip(),
        _load(saes, heads, steerer is not None),
        _training(saes, model),
    ]
    if saes.measured:
        parts += [
            "## Metrics of each head",
            "`l0`: latents that fire on a token; `explained_variance`: of the query; `dead_share`: "
            "of the latents, those that fired on none of the `n_tokens`.",
            _table(saes.metrics),
        ]
    if targets is not None:
        parts += ["## Centroids", _centroids(targets, data)]
    if steerer is not None:
        parts += ["## Steerer", f"```json\n{json.dumps(steerer, indent=1)}\n```"]
    if evaluation is not None:
        parts += ["## Evaluation", _table(evaluation)]
    return "\n\n".join(part for part in (*parts, _USE) if part) + "\n"


def _load(saes: QuerySAEs, heads: Mapping[str, str], has_steerer: bool) -> str:
    steering = (
        "with bundle.steerer.apply(model, record=True) as trace:\n"
        '    print(model.generate("...", max_new_tokens=40))\n'
        if has_steerer
        else f'sae = bundle.saes["{next(iter(saes))}"]  # all heads of the layer\n'
    )
    text = (
        "## Load\n\nWith sae_query_steer, which checks files and model first:\n\n```python\n"
        "import sae_query_steer as sqs\n\n"
        'model = sqs.load_model("...")\n'
        f'bundle = sqs.from_pretrained("{REPOSITORY}", model=model)\n'
        f"{steering}```\n\n"
    )
    if not heads:
        return text + "SAELens has no architecture for one head of these SAEs."
    return text + (
        "With SAELens alone, one head:\n\n```python\nfrom sae_lens import SAE\n\n"
        f'sae = SAE.from_pretrained("{REPOSITORY}", "{next(iter(heads.values()))}")\n```\n\n'
        "It takes the queries of its head, `[..., d_head]`; `sae.cfg.metadata` has `hook_name` and "
        "`hook_head_index`. Beware of SAELens's `model.add_sae`: it ignores `hook_head_index`."
    )


def _training(saes: QuerySAEs, model: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in model.items() if key != "name")
    lines = ["## How they were trained", f"Model: {model['name']} ({sizes})."]
    kinds = {(s.cfg.architecture(), s.n_heads, s.d_head, s.d_latent) for s in saes.values()}
    lines += [
        f"SAE: {kind}, {n_heads} heads of {d_head}, {d_latent} latents a head."
        for kind, n_heads, d_head, d_latent in sorted(kinds)
    ]
    if saes.settings is not None:
        lines.append(f"```json\n{json.dumps(saes.settings, indent=1)}\n```")
    return "\n\n".join(lines)


def _centroids(targets: CentroidTargets, data: Mapping[str, Any] | None) -> str:
    counts = ", ".join(
        f"{label} {int(n)}" for label, n in zip(targets.classes, targets.counts, strict=True)
    )
    text = f"Mean and variance of each class's latents; span `{targets.span}`; tokens: {counts}."
    if data is not None:
        text += f" Of {data['n_examples']} labelled examples (SHA-256 `{data['sha256']}`)."
    return text


def _table(table: pd.DataFrame) -> str:
    text = markdown_table(table.head(_ROWS))
    left = len(table) - _ROWS
    return text + (f"\n\n{left} more rows are in the files." if left > 0 else "")
