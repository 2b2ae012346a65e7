"""`train_query_saes`: SAEs for all heads of several layers from one stream of one model."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import pandas as pd
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import temporary_seed
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.hosts.models import model_name
from sae_query_steer.hosts.saelens import (
    HeadwiseMultiTrainer,
    epochs_unannounced,
    token_rows_store,
)
from sae_query_steer.metrics import ReconstructionMoments
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.core import (
    QueryHeadSAE,
    QueryHeadTrainingSAE,
    QueryHeadTrainingSAEConfig,
    to_inference,
)
from sae_query_steer.sites import QuerySite, check_sites
from sae_query_steer.token_rows import Texts, token_rows

METRIC_TOKENS = 16_384
"""Tokens on which the final metrics are measured."""


def train_query_saes(
    model: Any,
    texts: Texts,
    sites: Sequence[QuerySite],
    *,
    sae: QueryHeadTrainingSAEConfig,
    training_tokens: int,
    seed: int = 0,
    context_size: int | None = None,
    concat_sequences: bool = True,
    prepend_bos: bool = True,
    text_column: str = "text",
    lr: float = 1e-3,
    lr_warm_up_steps: int = 0,
    lr_decay_steps: int = 0,
    train_batch_size_tokens: int = 512,
    store_batch_size_prompts: int = 16,
    n_batches_in_buffer: int = 64,
    dead_feature_window: int = 1000,
    metric_tokens: int = METRIC_TOKENS,
) -> QuerySAEs:
    """Train one query-head SAE for each site, all on the same tokens and one forward pass each.

    Every head comes out as if SAELens had trained it alone: losses, clipping and dead-latent
    statistics are its own. Equal seeds give equal weights on one machine; the global random state
    is left as it was found.

    Args:
        model: a HookedTransformer or a TransformerBridge; no weight of it changes.
        texts: a `datasets.Dataset`, strings, token rows [row pos], or tokenised examples; see
            `token_rows` for how they become rows. They are read again as often as needed.
        sites: where to train, from `query_sites`.
        sae: the architecture and its settings; `n_heads` and `d_head` come from the site.
        training_tokens: tokens to train on.
        seed: of the weights and of the order of the tokens.
        context_size: tokens of a row; None means 128, or the model's context where that is less.
        concat_sequences: join documents into full rows (SAELens's way); False keeps each whole.
        prepend_bos: begin rows and documents with BOS.
        text_column: column of a `datasets.Dataset` that holds the text.
        lr: learning rate of Adam. For millions of tokens, SAELens's 3e-4 with steps of 4096 tokens
            is a good start; the defaults here suit some hundred thousand.
        lr_warm_up_steps: steps over which it grows from 0.
        lr_decay_steps: last steps, over which it falls to 0.
        train_batch_size_tokens: tokens of one training step.
        store_batch_size_prompts: rows of one forward pass of the model.
        n_batches_in_buffer: rows that are mixed before they are served.
        dead_feature_window: steps without firing after which a latent counts as dead.
        metric_tokens: tokens on which the metrics are measured; 0 leaves them out.

    Returns:
        The inference SAEs by hook name, with `metrics` per layer and head. The metrics are measured
        as the stream of training goes on, so on texts that were trained on, not on texts held out.
        A warning names heads that explain less than the mean does.

    Raises:
        ValueError: a site that the model does not have, settings that contradict it, or texts
            that can't be used; always before any work starts.

    Source: arXiv 2502.18644 (SAEs on queries); training is SAELens's.
    """
    configs = _site_configs(model, sites, sae)
    for name, value in (
        ("training_tokens", training_tokens),
        ("train_batch_size_tokens", train_batch_size_tokens),
        ("store_batch_size_prompts", store_batch_size_prompts),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} is not allowed: give 1 or more")
    if metric_tokens < 0:
        raise ValueError(f"metric_tokens={metric_tokens} is not allowed: give 0 or more")
    if training_tokens < train_batch_size_tokens:
        raise ValueError(
            f"training_tokens={training_tokens} is less than one step of "
            f"train_batch_size_tokens={train_batch_size_tokens}: give more of the former or less "
            "of the latter"
        )
    rows = token_rows(
        model,
        texts,
        context_size=context_size,
        concat_sequences=concat_sequences,
        prepend_bos=prepend_bos,
        text_column=text_column,
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=training_tokens,
        train_batch_size_samples=train_batch_size_tokens,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=lr_warm_up_steps,
        lr_decay_steps=lr_decay_steps,
        dead_feature_window=dead_feature_window,
        device=str(model.cfg.device),
    )
    with temporary_seed(seed), epochs_unannounced():
        store = token_rows_store(
            model,
            rows,
            {site.hook_name: site.d_in for site in sites},
            total_training_tokens=training_tokens,
            store_batch_size_prompts=store_batch_size_prompts,
            train_batch_size_tokens=train_batch_size_tokens,
            # The buffer counts rows; it must hold one step at least.
            n_batches_in_buffer=max(
                n_batches_in_buffer, 2 * -(-train_batch_size_tokens // len(rows[0]))
            ),
            device=str(model.cfg.device),
        )
        stream = store.get_multi_hook_data_loader()
        first = next(stream)
        saes = {name: get_sae_training_class(c.architecture())[0](c) for name, c in configs.items()}
        for config in configs.values():
            config.metadata.context_size = len(rows[0])
            config.metadata.prepend_bos = prepend_bos
            config.metadata.training_tokens = training_tokens
            config.metadata.seed = seed
        for name, training_sae in saes.items():
            assert isinstance(training_sae, QueryHeadTrainingSAE)
            start_at_mean(training_sae, first[name])
        HeadwiseMultiTrainer(
            cfg=trainer_config,
            saes=saes,
            hook_names={name: name for name in saes},
            data_provider=chain([first], stream),
        ).fit()
        trained = {name: to_inference(trained) for name, trained in saes.items()}  # pyright: ignore
        if not metric_tokens:
            return QuerySAEs(trained)
        metrics = reconstruction_metrics(trained, stream, n_tokens=metric_tokens)
    poor = metrics[~(metrics["explained_variance"] > 0)]
    if len(poor):
        heads = zip(poor["layer"][:3], poor["head"][:3], strict=True)
        where = ", ".join(f"layer {layer} head {head}" for layer, head in heads)
        warnings.warn(
            f"{len(poor)} of {len(metrics)} heads' SAEs explain less than the mean query does "
            f"({where}{', ...' if len(poor) > 3 else ''}): raise training_tokens or lr, or lower "
            "train_batch_size_tokens for more steps",
            UserWarning,
            stacklevel=2,
        )
    return QuerySAEs(trained, metrics)


@torch.no_grad()
def start_at_mean(sae: QueryHeadTrainingSAE[Any], queries: Tensor) -> None:
    """Set the decoder bias to the mean query of each head, before training begins.

    Queries lie far from 0 around a mean that is large beside a step of Adam: from zeros, as SAELens
    starts, a run of a few hundred steps ends before the bias has come there, and explains less
    than the mean does. Source: our choice, the departure from SAELens that we measured to matter.

    Args:
        sae: the SAE to train.
        queries: the first batch, flat, [token head*d_head].
    """
    sae.b_dec.copy_(queries.to(sae.b_dec).mean(0).reshape(sae.b_dec.shape))


@torch.no_grad()
def reconstruction_metrics(
    saes: Mapping[str, QueryHeadSAE[Any]],
    batches: Iterator[Mapping[str, Tensor]],
    *,
    n_tokens: int = METRIC_TOKENS,
) -> pd.DataFrame:
    """Return L0, explained variance and share of dead latents of every head.

    Args:
        saes: the SAEs, by hook name.
        batches: flat queries [token head*d_head] by hook name.
        n_tokens: tokens to measure on.

    Returns:
        One row per layer and head with the columns layer, head, l0, explained_variance,
        dead_share (latents that fired at none of these tokens) and n_tokens.
    """
    moments = {name: ReconstructionMoments() for name in saes}
    with tqdm(total=n_tokens, desc="Measuring SAEs", unit="token") as bar:
        seen = 0  # not the bar's count: a user may have switched the bars off
        while seen < n_tokens:
            batch = next(batches)
            for name, sae in saes.items():
                x = batch[name].unflatten(-1, (sae.n_heads, sae.cfg.d_head))
                latents = sae.encode(x)
                moments[name].update(x, sae.decode(latents), latents)
            seen += len(next(iter(batch.values())))
            bar.update(len(next(iter(batch.values()))))
    tables = []
    for name, moment in moments.items():
        sae = saes[name]
        tables.append(
            pd.DataFrame(
                {
                    "layer": QuerySite.from_hook_name(
                        name, n_heads=sae.n_heads, d_head=sae.cfg.d_head
                    ).layer,
                    "head": range(sae.n_heads),
                    "l0": moment.l0().tolist(),
                    "explained_variance": moment.explained_variance().tolist(),
                    "dead_share": moment.dead_share().tolist(),
                    "n_tokens": moment.n_tokens,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _site_configs(
    model: Any, sites: Sequence[QuerySite], sae: QueryHeadTrainingSAEConfig
) -> dict[str, QueryHeadTrainingSAEConfig]:
    """Return the config of every site, filled in from the site and checked against it."""
    if not isinstance(sae, QueryHeadTrainingSAEConfig):
        raise TypeError(
            f"sae={type(sae).__name__} is no training config of a query-head SAE: give one such as "
            "QueryHeadTopKTrainingSAEConfig"
        )
    check_sites(sites)
    configs = {}
    for site in sites:
        site.check(model)
        if (sae.n_heads, sae.d_head) not in ((0, 0), (site.n_heads, site.d_head)):
            raise ValueError(
                f"the SAE config has {sae.n_heads} heads of {sae.d_head}: the site at layer "
                f"{site.layer} has {site.n_heads} heads of {site.d_head}; leave n_heads and d_head "
                "out to take them from the site"
            )
        configs[site.hook_name] = dataclasses.replace(
            sae,
            n_heads=site.n_heads,
            d_head=site.d_head,
            d_in=site.d_in,
            d_sae=site.n_heads * sae.d_sae_per_head,
            device=str(model.cfg.device),
            metadata=SAEMetadata(model_name=model_name(model), hook_name=site.hook_name),
        )
    return configs
