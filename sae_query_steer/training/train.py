"""`train_query_saes`: SAEs for all heads of several layers from one stream of one model."""

import warnings
from collections.abc import Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.data.token_rows import Texts, token_rows
from sae_query_steer.models.activations import read_activations, without_hooks
from sae_query_steer.models.fingerprint import dtype_name, fingerprint_tokens
from sae_query_steer.sae.collection import INDEX, QuerySAEs
from sae_query_steer.sae.core import QueryHeadTrainingSAEConfig
from sae_query_steer.sae.inference import to_inference
from sae_query_steer.sites import QuerySite
from sae_query_steer.storage.folders import check_replaceable
from sae_query_steer.training.checkpoints import Checkpoints, check_same_run
from sae_query_steer.training.plan import (
    TrainingPlan,
    check_resources,
    site_configs,
    training_settings,
)
from sae_query_steer.training.reconstruction import reconstruction_metrics
from sae_query_steer.training.saelens import HeadwiseMultiTrainer
from sae_query_steer.training.scaling import HeadNorms
from sae_query_steer.training.stream import QueryStream

METRIC_TOKENS = 16_384
"""Tokens on which the final metrics are measured."""


def train_query_saes(
    model: Any,
    texts: Texts,
    sites: Sequence[QuerySite],
    *,
    sae: QueryHeadTrainingSAEConfig,
    training_tokens: int,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int = 1000,
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
    n_batches_for_norm_estimate: int = 100,
    autocast: bool = False,
    autocast_lm: bool = False,
    act_store_device: str = "with_model",
    prefetch: bool = False,
    metric_tokens: int = METRIC_TOKENS,
) -> QuerySAEs:
    """Train one query-head SAE for each site, all on the same tokens and one forward pass each.

    Every head comes out as if SAELens had trained it alone: losses, clipping and dead-latent
    statistics are its own. A site's SAE does not depend on which other sites are trained with it.
    Equal seeds give equal weights on one machine; the global random state is left as it was found.

    With `out` the run can be stopped at any moment, by an interrupt, a kill or a crash, and loses
    at most the steps since its last state; `resume=True` goes on there and ends with the weights of
    a run that was never stopped.

    Args:
        model: a HookedTransformer or a TransformerBridge; no weight of it changes.
        texts: a `datasets.Dataset`, strings, token rows [row pos], or tokenised examples; see
            `token_rows` for how they become rows. They are read again as often as needed.
        sites: where to train, from `query_sites`.
        sae: the architecture and its settings; `n_heads` and `d_head` come from the site.
        training_tokens: tokens to train on.
        out: folder to write the SAEs to, whole or not at all; until then the state of the run lies
            in `<out>.unfinished`. None writes nothing.
        resume: go on with the run in `<out>.unfinished`, if there is one, or return the SAEs in
            `out`, if they were trained with these settings.
        overwrite: replace what is in `out`, and a run that was stopped.
        checkpoint_every: steps between two states; a state takes three times the memory of the
            weights.
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
        n_batches_in_buffer: rows whose tokens are shuffled among each other; their queries are
            held in memory.
        dead_feature_window: steps without firing after which a latent counts as dead.
        n_batches_for_norm_estimate: batches from which the mean norm of each head's queries is
            estimated, if the SAE's `normalize_activations` asks for it (SAELens takes 1000).
        autocast: train the SAEs in mixed precision (bfloat16).
        autocast_lm: run the model in mixed precision (bfloat16).
        act_store_device: where queries wait for their step; "with_model" means with the model.
        prefetch: read the next queries while the SAEs train. It pays where model and SAEs do not
            want the same processor; it changes no number.
        metric_tokens: tokens on which the metrics are measured; 0 leaves them out.

    Returns:
        The inference SAEs by hook name, with `metrics` per layer and head. The metrics are measured
        as the stream of training goes on, so on texts that were trained on, not on texts held out.
        A warning names heads that explain less than the mean does.

    Raises:
        FileExistsError: `out` exists, or a run that was stopped, and neither `resume` nor
            `overwrite` says what to do with it.
        ValueError: a site that the model does not have, settings that contradict it or each other
            or a run that is to be resumed, texts that can't be used, too little memory or disk;
            always before any work starts.

    Source: arXiv 2502.18644 (SAEs on queries); training is SAELens's.
    """
    configs = site_configs(model, sites, sae, autocast=autocast)
    plan = TrainingPlan(
        training_tokens=training_tokens,
        seed=seed,
        lr=lr,
        lr_warm_up_steps=lr_warm_up_steps,
        lr_decay_steps=lr_decay_steps,
        train_batch_size_tokens=train_batch_size_tokens,
        store_batch_size_prompts=store_batch_size_prompts,
        n_batches_in_buffer=n_batches_in_buffer,
        dead_feature_window=dead_feature_window,
        n_batches_for_norm_estimate=n_batches_for_norm_estimate,
        autocast=autocast,
        autocast_lm=autocast_lm,
    )
    if metric_tokens < 0:
        raise ValueError(f"metric_tokens={metric_tokens} is not allowed: give 0 or more")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every} is not allowed: give 1 or more")
    if out is None and (resume or overwrite):
        raise ValueError("resume and overwrite speak of a folder: give out=")
    if out is not None:
        check_replaceable(Path(out), overwrite=overwrite or resume, holding=INDEX)
    rows = token_rows(
        model,
        texts,
        context_size=context_size,
        concat_sequences=concat_sequences,
        prepend_bos=prepend_bos,
        text_column=text_column,
    )
    device = str(model.cfg.device)
    stream = QueryStream(
        model=model,
        rows=rows,
        sites=sites,
        batch_tokens=train_batch_size_tokens,
        seed=seed,
        rows_per_forward=store_batch_size_prompts,
        rows_per_chunk=n_batches_in_buffer,
        device=device if act_store_device == "with_model" else act_store_device,
        autocast=autocast_lm,
        prefetch=prefetch,
    )
    settings = training_settings(plan, model, rows, sites, sae, prepend_bos=prepend_bos)
    if out is not None and resume and (Path(out) / INDEX).is_file():
        finished = QuerySAEs.load(out, device=device)
        if not overwrite or finished.settings == settings:
            check_same_run(Path(out), {"settings": finished.settings}, settings)
            return finished
    check_resources(list(configs.values()), stream, None if out is None else Path(out))
    checkpoints = None
    if out is not None:
        with without_hooks(model):
            tokens = fingerprint_tokens(int(model.cfg.d_vocab))
            queries = read_activations(model, tokens, [site.hook_name for site in sites])
        checkpoints = Checkpoints(
            Path(out).with_name(f"{Path(out).name}.unfinished"),
            settings,
            queries,
            dtype=dtype_name(model),
            every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
        )
    saes = {}
    for site in sites:
        config = configs[site.hook_name]
        config.metadata.context_size = rows.shape[1]
        config.metadata.prepend_bos = prepend_bos
        config.metadata.training_tokens = training_tokens
        config.metadata.seed = seed
        # A seed of its own: the weights of a site do not depend on the sites before it.
        with temporary_seed(int(np.random.SeedSequence([seed, site.layer]).generate_state(1)[0])):
            saes[site.hook_name] = get_sae_training_class(config.architecture())[0](config)
    trainer = HeadwiseMultiTrainer(plan.trainer_config(device), saes, checkpoints)
    if checkpoints is not None:
        checkpoints.restore(trainer)
    begins = trainer.n_training_steps == 0
    if begins:
        _estimate_norms(trainer, stream, n_batches_for_norm_estimate)
    # Closed before anything else runs the model: a thread may be reading ahead.
    with closing(stream.batches(trainer.n_training_steps)) as batches:
        first = [next(batches)] if begins else []
        for name, one in trainer.trainers.items() if begins else ():
            start_at_mean(one, first[0][name])
        trainer.data_provider = chain(first, batches)
        trainer.fit()
    trained = {name: to_inference(one) for name, one in saes.items()}
    metrics = None
    if metric_tokens:
        # The stream goes on behind the batches of the training, resumed or not.
        with closing(stream.batches(trainer.n_training_steps)) as behind:
            metrics = reconstruction_metrics(trained, behind, n_tokens=metric_tokens)
        _warn_of_poor_heads(metrics)
    result = QuerySAEs(trained, metrics, settings)
    if out is not None and checkpoints is not None:
        result.save(out, overwrite=overwrite)
        checkpoints.remove()
    return result


@torch.no_grad()
def start_at_mean(trainer: SAETrainer[Any, Any], queries: Float[Tensor, "token d_in"]) -> None:
    """Set the decoder bias to the mean query of each head, before training begins.

    Queries lie far from 0 around a mean that is large beside a step of Adam: from zeros, as SAELens
    starts, a run of a few hundred steps ends before the bias has come there, and explains less
    than the mean does. Source: our choice, the departure from SAELens that we measured to matter.

    Args:
        trainer: the trainer of an SAE, which knows how queries are scaled.
        queries: the first batch, flat.
    """
    sae = trainer.sae
    scaled = trainer.activation_scaler(queries.to(device=sae.device, dtype=sae.dtype))
    sae.b_dec.copy_(scaled.mean(0).reshape(sae.b_dec.shape))


def _estimate_norms(trainer: HeadwiseMultiTrainer, stream: QueryStream, n_batches: int) -> None:
    """Give every trainer that scales its queries their mean norm, all from one pass."""
    norms = {
        name: HeadNorms(sae.cfg.n_heads, sae.cfg.d_in)
        for name, sae in trainer.saes.items()
        if sae.cfg.normalize_activations != "none"
    }
    if not norms:
        return
    with closing(stream.batches()) as batches:
        wanted = tqdm(islice(batches, n_batches), "Estimating norms", n_batches, unit="batch")
        for batch in wanted:
            for name, found in norms.items():
                found.update(batch[name].to(trainer.saes[name].dtype))
    for name, found in norms.items():
        scaler = trainer.trainers[name].activation_scaler
        scaler.scaling_factor = found.factors()  # pyright: ignore[reportAttributeAccessIssue]


def _warn_of_poor_heads(metrics: pd.DataFrame) -> None:
    poor = metrics[~(metrics["explained_variance"] > 0)]
    if len(poor):
        heads = zip(poor["layer"][:3], poor["head"][:3], strict=True)
        where = ", ".join(f"layer {layer} head {head}" for layer, head in heads)
        warnings.warn(
            f"{len(poor)} of {len(metrics)} heads' SAEs explain less than the mean query does "
            f"({where}{', ...' if len(poor) > 3 else ''}): raise training_tokens or lr, or lower "
            "train_batch_size_tokens for more steps",
            UserWarning,
            stacklevel=3,
        )
