"""`write_dashboards`: a self-contained page for each site, with all its latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from sae_query_steer.arguments import check_number
from sae_query_steer.dashboards.attention_effect import attention_effect
from sae_query_steer.dashboards.neuronpedia import write_batches
from sae_query_steer.dashboards.site_data import site_data
from sae_query_steer.dashboards.statistics import key_matches, read_again
from sae_query_steer.data.token_rows import Texts
from sae_query_steer.diagnostics.latent_texts import top_tokens
from sae_query_steer.models.activations import check_hook_point, key_hook, pattern_hook
from sae_query_steer.models.loading import check_eager, model_name
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites
from sae_query_steer.steering.where import chosen_heads
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import write_json
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_belongs, check_shapes

INDEX = "dashboards.json"
"""The file that every folder of dashboards holds."""

PAGES = Environment(loader=PackageLoader("sae_query_steer.dashboards", ""), autoescape=True)
PAGES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}


def write_dashboards(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    texts: Texts,
    folder: str | Path,
    *,
    targets: CentroidTargets | None = None,
    k: int = 10,
    context: int = 12,
    n_attention: int = 2,
    n_keys: int = 8,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    neuronpedia: bool = False,
    overwrite: bool = False,
    batch_size: int = 16,
    **reading: Any,
) -> dict[str, Path]:
    """Write a page for each site that shows what its latents fire at, look for and tell apart.

    A page needs no network and nothing beside it. It lists all latents, with search and order, and
    shows of each: the texts where it is most active, every token shaded by its activation; the
    histogram of its activations and at how many tokens it fires; the attention of its head at its
    top tokens, with the latent and without; the tokens whose keys its decoder row matches; and with
    `targets` its mean in each class. `PAGE.html#2-118` opens at head 2, latent 118, and
    `PAGE.html?q=word` with a search.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: query-head SAEs or identity encoders by hook name.
        texts: in any form that `train_query_saes` takes.
        folder: the folder to make, whole or not at all.
        targets: centroids of classes that were made with these SAEs on this model.
        k: texts of each latent; the size of a page grows with it.
        context: tokens on either side of a top token.
        n_attention: top tokens of each latent at which its attention is looked at; 0 for none.
        n_keys: tokens with matching keys of each latent; 0 for none.
        layers: which layers; None means all that have an SAE.
        heads: which heads: the same in each layer, or by layer; None means all.
        neuronpedia: also write `neuronpedia/`, batches of features as SAEDashboard writes them.
        overwrite: replace dashboards that are there.
        batch_size: rows of one forward pass.
        reading: how to read the texts, as in `top_tokens`: n_tokens, context_size,
            concat_sequences, prepend_bos.

    Returns:
        The file of each page, by hook name; `index.html` beside them has links to all.

    Raises:
        BlockingIOError: another process writes to the folder.
        FileExistsError: the folder exists and `overwrite` is False, or is something else.
        ValueError: a number, site, head or layer that is not allowed, texts that can't be used,
            centroids of another model or SAE, or an architecture that does not show its attention
            or keys; all before work starts.

    Source: our choice, after sae_vis and Neuronpedia; what they show of logits is left out, because
    a query writes none.
    """
    for name, value in (("context", context), ("n_attention", n_attention), ("n_keys", n_keys)):
        check_number(name, value, whole=True, least=0)
    folder = Path(folder)
    every = encoder_sites(saes)
    picked = chosen_heads(every, layers, heads)
    saes, sites = {n: saes[n] for n in picked}, {n: every[n] for n in picked}
    for site in sites.values():
        site.check(model)
        _check_shown(model, key_hook(site), "n_keys", n_keys)
        _check_shown(model, pattern_hook(site.layer), "n_attention", n_attention)
    if n_attention:
        check_eager(model)
    if targets is not None:
        check_shapes(targets, saes)
        check_belongs(model, saes, targets)
    by_layer = {sites[name].layer: own for name, own in picked.items()}
    with new_folder(folder, overwrite=overwrite, holding=INDEX) as new:
        tops = top_tokens(model, saes, texts, k=k, heads=by_layer, batch_size=batch_size, **reading)
        statistics, keys = read_again(
            model, saes, tops, context=context, keys=n_keys > 0, batch_size=batch_size
        )
        pages = {name: f"{name}.html" for name in sites}
        settings = {
            "model": model_name(model),
            "tokens": tops.n_tokens,
            "texts": len(tops.rows),
            "top texts of a latent": k,
            "classes": ", ".join(map(str, targets.classes)) if targets else "none given",
        }
        for name, site in sites.items():
            attention = None
            if n_attention:
                attention = attention_effect(
                    model, site, saes[name], tops, n_tokens=n_attention, batch_size=batch_size
                )
            data = site_data(
                site,
                model_name(model),
                tops,
                statistics[name],
                attention=attention,
                keys=key_matches(keys[name], saes[name], picked[name], n=n_keys) if keys else None,
                targets=targets,
            )
            page = PAGES.get_template("page.html").render(data=data)
            (new / pages[name]).write_text(page, encoding="utf-8")
            if neuronpedia:
                write_batches(data, new / "neuronpedia" / name)
        index = PAGES.get_template("index.html").render(pages=pages, settings=settings)
        (new / "index.html").write_text(index, encoding="utf-8")
        write_json(new / INDEX, {"pages": pages, "settings": settings})
    return {name: folder / file for name, file in pages.items()}


def _check_shown(model: Any, hook_name: str, option: str, n: int) -> None:
    try:
        if n:
            check_hook_point(model, hook_name)
    except ValueError as error:
        raise ValueError(f"{error}; to leave this out give {option}=0") from error
