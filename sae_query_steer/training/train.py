"""`train_query_saes`: SAEs for all heads of several layers from one stream of queries."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_query_steer.config import TrainingConfig
from sae_query_steer.data.prompts import bos_id
from sae_query_steer.data.token_rows import Texts, token_rows
from sae_query_steer.models.activations import read_activations, without_hooks
from sae_query_steer.models.fingerprint import dtype_name, fingerprint_tokens
from sae_query_steer.models.launch import ALONE, Ranks, launched
from sae_query_steer.models.loading import model_name
from sae_query_steer.progress import OnMetrics
from sae_query_steer.sae.collection import INDEX, QuerySAEs
from sae_query_steer.sae.configs import training_config
from sae_query_steer.sae.core import to_inference
from sae_query_steer.sites import QuerySite, check_sites
from sae_query_steer.storage.folders import check_replaceable, locked, new_file
from sae_query_steer.training.checkpoints import (
    Checkpoints,
    check_not_diverged,
    check_same_run,
)
from sae_query_steer.training.estimate import check_resources
from sae_query_steer.training.ranks import joined
from sae_query_steer.training.reconstruction import reconstruction_metrics
from sae_query_steer.training.saelens import HeadwiseMultiTrainer, trainer_config
from sae_query_steer.training.start import check_start, load_start
from sae_query_steer.training.stream import QueryStream

ROWS = "rows.npy"
"""The token rows of a stream, in the folder of a stopped run."""

METRICS = "metrics.jsonl"
"""What `on_metrics` is called with, a line for each call; moves from the run to its result."""


def train_query_saes(
    model: Any,
    texts: Texts,
    sites: Sequence[QuerySite],
    config: TrainingConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    start: QuerySAEs | None = None,
    on_metrics: OnMetrics | None = None,
    ranks: Ranks = ALONE,
) -> QuerySAEs:
    """Train one query-head SAE for each site, all on the same tokens and one forward pass each.

    Every head is trained as if SAELens had trained it alone: it has its own losses, clipping and
    dead-latent statistics. The SAE of a site does not depend on which other sites are trained with
    it. Equal seeds give equal weights on one machine; the global random state is not changed.

    With `out`, a run that is stopped at any moment (interrupt, kill, crash) loses at most the steps
    since its last checkpoint; `resume=True` continues there and ends with the weights of a run that
    was never stopped.

    Args:
        model: a HookedTransformer or a TransformerBridge; its weights do not change.
        texts: a `datasets.Dataset` or `IterableDataset`, strings, token rows [row pos], or
            tokenised examples; see `token_rows`. Of texts without a length, such as a generator or
            a streaming dataset, as many are read as the run needs; a resumed run takes the rows
            that were stored and does not read them again.
        sites: where to train, from `query_sites`.
        config: architecture and settings of the run.
        out: folder to write the SAEs to, atomically, with `metrics.jsonl`, a line for each call of
            `on_metrics`; until then both and the checkpoints are in `<out>.unfinished`. None writes
            nothing.
        resume: continue the run in `<out>.unfinished`, if there is one, or return the SAEs in
            `out`, if they were trained with these settings.
        overwrite: replace what is in `out`, and a stopped run.
        start: SAEs from whose weights training starts, such as those of other texts; of all sites,
            and of the config's architecture and sizes. None starts from random weights.
        on_metrics: called every 100 steps and after the last one with a mapping of "step",
            "tokens", and of each site this process trains "loss/HOOK", the loss of the batch, and
            "dead_latents/HOOK", latents that did not fire in the last `dead_feature_window` steps.
        ranks: the processes that share the work, see `train_on_ranks`; by default this one alone.

    Returns:
        The inference SAEs by hook name, with `metrics` per layer and head, measured on the next
        tokens of the training stream, not on held-out texts. A warning names heads that explain
        less variance than the mean query does.

    Raises:
        BlockingIOError: another process writes to `out`.
        FileExistsError: `out` exists, or a stopped run, and neither `resume` nor `overwrite` is
            given.
        ValueError: a site that the model does not have, SAEs to start from that differ, settings
            that contradict a run to resume, texts that can't be used, a damaged checkpoint, or too
            little memory or disk, all before training starts; or training has diverged.

    Source: arXiv 2502.18644 (SAEs on queries); training is SAELens's.
    """
    check_sites(model, sites)
    if out is None and (resume or overwrite or ranks.n > 1):
        raise ValueError("resume, overwrite and several ranks need a folder: give out=")
    if start is not None:
        check_start(start, config.sae, sites)
    out = None if out is None else Path(out)
    unfinished = None if out is None else out.with_name(f"{out.name}.unfinished")
    finished = out is not None and resume and (out / INDEX).is_file()
    free = ranks.rank > 0 or (finished and not overwrite)
    with nullcontext() if out is None or free else locked(out):
        if out is not None:
            check_replaceable(out, overwrite=overwrite or resume, holding=INDEX)
        stored = None if unfinished is None or isinstance(texts, Sized) else unfinished / ROWS
        if resume and stored is not None and stored.is_file():
            rows = torch.from_numpy(np.load(stored, mmap_mode="c", allow_pickle=False))
        else:
            rows = _read_rows(model, texts, config, out)
        stream = QueryStream(model=model, rows=rows, sites=sites, config=config, ranks=ranks)
        settings = _settings(stream, start)
        if out is not None and resume and (out / INDEX).is_file():
            finished = QuerySAEs.load(out, device=str(model.cfg.device))
            if not overwrite or finished.settings == settings:
                check_same_run(out, finished.settings or {}, settings)
                return finished
        check_resources(stream, out)
        checkpoints = None
        if unfinished is not None:
            tokens = fingerprint_tokens(int(model.cfg.d_vocab))
            with without_hooks(model):
                queries = read_activations(model, tokens, [site.hook_name for site in sites])
            checkpoints = Checkpoints(
                unfinished,
                settings,
                queries,
                every=config.checkpoint_every,
                resume=resume,
                overwrite=overwrite,
                ranks=ranks,
            )
            on_metrics = _logged(unfinished / METRICS, on_metrics)
        if stored is not None and ranks.rank == 0 and not stored.is_file():
            with new_file(stored) as new, new.open("wb") as file:
                np.save(file, rows.numpy(), allow_pickle=False)
        result = _trained(stream, settings, checkpoints, start, on_metrics)
        if out is not None and checkpoints is not None:
            result = joined(ranks, result, sites, checkpoints.folder)
            if ranks.rank == 0:
                result.save(out, overwrite=overwrite)
                with suppress(FileNotFoundError):
                    (checkpoints.folder / METRICS).rename(out / METRICS)
                checkpoints.remove()
            ranks.wait()
        assert result is not None, "a rank without a site has `out`"
        return result


def train_on_ranks(model: Any, *args: Any, out: str | Path, **again: Any) -> QuerySAEs:
    """Train the sites in all processes of a launch, or in this one if there is no launch.

        torchrun --nproc-per-node N --no-python sae-query-steer train ...

    Rank r of n runs the model over forward batches r, r + n, ... and trains the sites r, r + n, ...
    Every SAE sees the same queries in the same order as in one process, so the result equals that
    of one process: bitwise, where device, number format and number of threads are equal. There may
    be more ranks than sites. A stopped run can be continued by another number of ranks.

    Args:
        model: this process's copy. On a GPU queries are sent by NCCL, else by gloo.
        args: `texts`, `sites` and `config` as for `train_query_saes`, the same in every process.
        out: the folder of all SAEs, on a disk that all processes share.
        again: `resume`, `overwrite`, `start` and `on_metrics` as for `train_query_saes`; the last
            is called in each process.

    Returns:
        The SAEs of all sites, in every process.

    Raises:
        BlockingIOError: as `train_query_saes`.
        FileExistsError: as `train_query_saes`.
        RuntimeError: another process has ended, or can't be reached.
        ValueError: as `train_query_saes`.
    """
    with launched(torch.device(model.cfg.device)) as ranks:
        return train_query_saes(model, *args, out=out, **again, ranks=ranks)


def _read_rows(
    model: Any, texts: Texts, config: TrainingConfig, out: Path | None
) -> Int[Tensor, "row pos"]:
    size = config.train_batch_size_tokens
    n_batches = -(-config.training_tokens // size) - (-config.metric_tokens // size)
    return token_rows(
        model,
        texts,
        context_size=config.context_size,
        concat_sequences=config.concat_sequences,
        prepend_bos=config.prepend_bos,
        n_tokens=n_batches * size,
        folder=None if out is None else out.absolute().parent,
    )


def _logged(file: Path, on_metrics: OnMetrics | None) -> OnMetrics:
    """Return an `OnMetrics` that appends to a file first; of several processes in turn."""

    def tell(found: Mapping[str, float | int]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
        if on_metrics is not None:
            on_metrics(found)

    return tell


def _trained(
    stream: QueryStream,
    settings: dict[str, Any],
    checkpoints: Checkpoints | None,
    start: QuerySAEs | None,
    on_metrics: OnMetrics | None,
) -> QuerySAEs | None:
    """Return the SAEs of this rank's sites, None if it has none."""
    config, device = stream.config, str(stream.model.cfg.device)
    saes = {site.hook_name: _new_sae(site, stream, settings["model"]) for site in stream.own}
    trainer = HeadwiseMultiTrainer(trainer_config(config, device), saes, checkpoints, on_metrics)
    if checkpoints is not None:
        checkpoints.restore(trainer)
    begins = trainer.n_training_steps == 0
    if begins and config.sae.normalize_activations != "none":
        _estimate_norms(trainer, stream)
    n_steps = -(-config.training_tokens // config.train_batch_size_tokens)
    batches = stream.batches(trainer.n_training_steps, n_steps - trainer.n_training_steps)
    if begins:
        first = next(batches)
        for name, one in trainer.trainers.items():
            if start is None:
                _start_at_mean(one, first[name])
            else:
                scale: Any = one.activation_scaler.scaling_factor  # HeadwiseScaler's
                load_start(one.sae, start[name], scale)
        batches = chain([first], batches)
    trainer.data_provider = batches
    trainer.fit()
    check_not_diverged(trainer)
    trained = {name: to_inference(one) for name, one in saes.items()}
    metrics = None
    if config.metric_tokens:
        n_batches = -(-config.metric_tokens // config.train_batch_size_tokens)
        after = stream.take(n_batches, "Measuring SAEs", start=trainer.n_training_steps)
        with torch.autocast(torch.device(device).type, enabled=False):
            metrics = reconstruction_metrics(trained, after)
        if trained:
            _warn_of_poor_heads(metrics)
    return QuerySAEs(trained, metrics, settings) if trained else None


def _settings(stream: QueryStream, start: QuerySAEs | None) -> dict[str, Any]:
    """Return all that decides the weights of a run, as JSON; texts and start by their hash."""
    rows = stream.rows
    tensors = [v.cpu() for sae in (start or {}).values() for v in sae.state_dict().values()]
    found = {"start_sha256": _sha256(tensors)} if tensors else {}
    return found | {
        **stream.config.to_json(),
        "model": model_name(stream.model),
        "model_dtype": dtype_name(stream.model),
        "hook_names": [site.hook_name for site in stream.sites],
        "context_size": rows.shape[1],
        "n_rows": len(rows),
        "rows_sha256": _sha256(rows.split(2**16)),
    }


def _sha256(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def _new_sae(site: QuerySite, stream: QueryStream, name: str) -> Any:
    """Return the SAE of a site before training; it does not depend on the other sites."""
    config, model = stream.config, stream.model
    has_bos = bool(config.prepend_bos)
    if model.tokenizer is not None:
        has_bos = bos_id(model, config.prepend_bos) is not None
    metadata = SAEMetadata(
        model_name=name,
        hook_name=site.hook_name,
        context_size=stream.rows.shape[1],
        prepend_bos=has_bos,
        training_tokens=config.training_tokens,
        seed=config.seed,
        exclude_special_tokens=config.exclude_special_tokens,
    )
    cfg = training_config(
        config.sae,
        n_heads=site.n_heads,
        d_head=site.d_head,
        device=str(stream.model.cfg.device),
        metadata=metadata,
    )
    seed = np.random.SeedSequence([config.seed, site.layer]).generate_state(1)[0]
    with temporary_seed(int(seed)):
        return get_sae_training_class(config.sae.name)[0](cfg)


@torch.no_grad()
def _start_at_mean(trainer: SAETrainer[Any, Any], queries: Float[Tensor, "token d_in"]) -> None:
    """Set the decoder bias to the mean query of each head in the first batch.

    Queries lie far from 0, around a mean that is large compared with a step of Adam. From zeros, as
    in SAELens, the bias does not reach it in a run of a few hundred steps, which then explains less
    variance than the mean does. Source: our choice; the only departure from SAELens that we
    measured to matter.
    """
    sae = trainer.sae
    scaled = trainer.activation_scaler(queries.to(device=sae.device, dtype=sae.dtype))
    sae.b_dec.copy_(scaled.mean(0).reshape(sae.b_dec.shape))


def _estimate_norms(trainer: HeadwiseMultiTrainer, stream: QueryStream) -> None:
    """Set the scale of every site's queries, all from one pass."""
    scalers: Any = {name: one.activation_scaler for name, one in trainer.trainers.items()}
    for batch in stream.take(stream.config.n_batches_for_norm_estimate, "Estimating norms"):
        for name, scaler in scalers.items():
            scaler.update(batch[name].to(trainer.saes[name].dtype))
    for name, scaler in scalers.items():
        scaler.set_factors(trainer.saes[name].cfg.d_head)


def _warn_of_poor_heads(metrics: pd.DataFrame) -> None:
    poor = metrics[~(metrics["explained_variance"] > 0)]
    if len(poor):
        warnings.warn(
            f"the SAEs of {len(poor)} of {len(metrics)} heads explain less variance than the mean "
            f"query, such as layer {poor['layer'].iloc[0]} head {poor['head'].iloc[0]}: raise "
            "training_tokens or lr, or lower train_batch_size_tokens for more steps",
            UserWarning,
            stacklevel=4,
        )
