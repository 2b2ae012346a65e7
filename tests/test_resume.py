"""Runs that are stopped: whatever stops them, they end with the weights of one that was not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from wheel_check import make_texts

import sae_query_steer as sqs
from sae_query_steer.config import (
    BatchTopK,
    Gated,
    JumpReLU,
    KLSparse,
    Standard,
    TopK,
    TrainingConfig,
)
from sae_query_steer.storage.checksums import listed
from sae_query_steer.storage.records import read_record, write_record
from sae_query_steer.storage.tensors import read_tensors, write_tensors
from sae_query_steer.training.checkpoints import CheckpointIndex, Checkpoints
from sae_query_steer.training.saelens import HeadwiseMultiTrainer

TOPK = TopK(d_sae_per_head=16, k=3)
NAME = "blocks.2.attn.hook_q"
N_STEPS = 24


class Stopped(Exception):
    """What stands for a crash in these tests."""


def train(
    model,
    texts=None,
    sites=None,
    out=None,
    resume=False,
    overwrite=False,
    start=None,
    run=sqs.train_query_saes,
    **changes,
):
    if texts is None:
        texts = torch.randint(4, 52, (40, 12), generator=torch.Generator().manual_seed(0))
    sites = sqs.query_sites(model, [0, 2]) if sites is None else sites
    settings = {
        "sae": TOPK,
        "training_tokens": N_STEPS * 40,
        "train_batch_size_tokens": 40,
        "n_batches_in_buffer": 7,
        "checkpoint_every": 5,
        "lr": 1e-2,
        "lr_warm_up_steps": 6,
        "lr_decay_steps": 6,
        "dead_feature_window": 4,
        "metric_tokens": 100,
        "n_batches_for_norm_estimate": 8,
    }
    config = TrainingConfig(**{**settings, **changes})
    again = {"resume": resume, "overwrite": overwrite, "start": start}
    return run(model, texts, sites, config, out=out, **again)


def stopped_after(monkeypatch, n_steps: int, model, **changes) -> None:
    """Begin a run that crashes when it has done some steps."""
    step = HeadwiseMultiTrainer._maybe_log_sparsity

    def crash(self, final=False):
        step(self, final=final)
        if self.n_training_steps == n_steps:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(HeadwiseMultiTrainer, "_maybe_log_sparsity", crash)
        with pytest.raises(Stopped):
            train(model, **changes)


def assert_equal(first, second) -> None:
    assert list(first) == list(second)
    for name, sae in first.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value, second[name].state_dict()[key]), key
    assert first.metrics.equals(second.metrics)


CONFIGS = {
    "topk": TOPK,
    "standard": Standard(d_sae_per_head=16, l1_coefficient=0.5, l1_warm_up_steps=15),
    "batchtopk": BatchTopK(d_sae_per_head=16, k=3.0),
    "jumprelu": JumpReLU(d_sae_per_head=16, l0_coefficient=0.5, l0_warm_up_steps=15),
    "gated": Gated(d_sae_per_head=16, l1_coefficient=0.5),
    "kl-sparse": KLSparse(d_sae_per_head=16, kl_coefficient=0.5),
    "scaled": dataclasses.replace(TOPK, normalize_activations="expected_average_only_in"),
}


def test_the_curves_of_a_resumed_run_are_those_of_one_never_stopped(
    tiny_models, tmp_path, monkeypatch
):
    update, model = HeadwiseMultiTrainer._update_pbar, tiny_models["bridge"]
    often = partialmethod(update, update_interval=4)
    monkeypatch.setattr(HeadwiseMultiTrainer, "_update_pbar", often)
    train(model, out=tmp_path / "whole")
    stopped_after(monkeypatch, 13, model, out=tmp_path / "saes")  # continues from step 10
    train(model, out=tmp_path / "saes", resume=True)
    told = [
        pd.read_json(tmp_path / name / "metrics.jsonl", lines=True) for name in ("whole", "saes")
    ]
    assert [list(table["step"]) for table in told] == [
        [4, 8, 12, 16, 20, 24],
        [4, 8, 12, 12, 16, 20, 24],
    ]
    whole, resumed = (sqs.plots.plot_metrics(table).to_json() for table in told)
    assert whole == resumed


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(
    tiny_models, tmp_path, monkeypatch, kind
):
    model, sae = tiny_models["bridge"], CONFIGS[kind]
    whole = train(model, sae=sae)
    # After 13 steps the last state is that of step 10; then again in the midst of the decay.
    stopped_after(monkeypatch, 13, model, sae=sae, out=tmp_path / "saes")
    steps = sorted(p.name for p in (tmp_path / "saes.unfinished").glob("step-*"))
    assert steps == ["step-10", "step-5"]
    stopped_after(monkeypatch, 22, model, sae=sae, out=tmp_path / "saes", resume=True)
    resumed = train(model, sae=sae, out=tmp_path / "saes", resume=True)
    assert_equal(whole, resumed)
    assert_equal(resumed, sqs.QuerySAEs.load(tmp_path / "saes"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saes"]


def test_a_resumed_run_takes_the_rows_of_a_stream_that_is_used_up(
    tiny_models, tmp_path, monkeypatch
):
    model, texts = tiny_models["bridge"], [f"w{i} w{i * i % 40} w3 w{40 - i}" for i in range(40)]
    whole = train(model, texts=(text for text in texts), context_size=12)
    first = {"texts": (text for text in texts), "out": tmp_path / "saes", "context_size": 12}
    stopped_after(monkeypatch, 13, model, **first)
    resumed = train(model, **first, resume=True)
    assert_equal(whole, resumed)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_starts_from_given_weights(tiny_models, kind):
    model, settings = tiny_models["bridge"], {"sae": CONFIGS[kind], "lr_warm_up_steps": 0}
    first = train(model, **settings)
    one_step = {"training_tokens": 40, "lr_decay_steps": 0, "lr": 1e-12}
    again = train(model, **settings, **one_step, start=first)
    for name, sae in first.items():
        for key, value in sae.state_dict().items():
            # The threshold of BatchTopK moves by a share of its own.
            near = 0.2 if kind == "batchtopk" and key == "threshold" else 1e-4
            torch.testing.assert_close(again[name].state_dict()[key], value, rtol=near, atol=1e-5)


def test_a_start_of_another_kind_is_refused_and_told_apart(tiny_models, tmp_path, monkeypatch):
    model, out = tiny_models["bridge"], tmp_path / "saes"
    start = train(model)
    for sae, message in (
        (TopK(d_sae_per_head=8, k=3), "d_sae_per_head of start at blocks.0.* must be 8, got 16"),
        (KLSparse(d_sae_per_head=16), "architecture of .* 'query_head_kl_sparse', got 'query_head"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, sae=sae, start=start)
    with pytest.raises(ValueError, match=r"start must have .* got none at blocks\.1\.attn"):
        train(model, sites=sqs.query_sites(model, [1]), start=start)
    stopped_after(monkeypatch, 13, model, out=out, start=start)
    with pytest.raises(ValueError, match="start_sha256 was '"):
        train(model, out=out, resume=True)


def test_a_run_stopped_while_it_is_measured_trains_no_step_again(
    tiny_models, tmp_path, monkeypatch
):
    model = tiny_models["bridge"]
    with monkeypatch.context() as patch:
        patch.setattr("sae_query_steer.training.train.reconstruction_metrics", crash)
        with pytest.raises(Stopped):
            train(model, out=tmp_path / "saes", checkpoint_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr("sae_query_steer.training.saelens.HeadwiseTrainer.step", crash)
        resumed = train(model, out=tmp_path / "saes", resume=True, checkpoint_every=1000)
    assert_equal(train(model), resumed)


def crash(*args, **kwargs):
    raise Stopped


def test_a_site_does_not_depend_on_the_sites_trained_beside_it(tiny_models):
    model = tiny_models["bridge"]
    both, alone = train(model), train(model, sites=sqs.query_sites(model, [2]))
    for key, value in both[NAME].state_dict().items():
        assert torch.equal(value, alone[NAME].state_dict()[key])


def test_a_finished_run_is_returned_and_not_trained_again(tiny_models, tmp_path, monkeypatch):
    model = tiny_models["bridge"]
    first = train(model, out=tmp_path / "saes")
    with monkeypatch.context() as patch:
        patch.setattr("sae_query_steer.training.train.HeadwiseMultiTrainer", crash)
        assert_equal(first, train(model, out=tmp_path / "saes", resume=True))
    with pytest.raises(ValueError, match=r"with other settings: lr was 0.01 and is 0.02\. Give"):
        train(model, out=tmp_path / "saes", resume=True, lr=0.02)
    with pytest.raises(FileExistsError, match="saes exists: give another folder, or overwrite"):
        train(model, out=tmp_path / "saes")
    other = train(model, out=tmp_path / "saes", resume=True, overwrite=True, lr=0.02)
    assert other.settings["lr"] == 0.02
    assert_equal(other, sqs.QuerySAEs.load(tmp_path / "saes"))


def test_another_run_is_never_gone_on_with(tiny_models, tmp_path, monkeypatch):
    model, out = tiny_models["bridge"], tmp_path / "saes"
    stopped_after(monkeypatch, 13, model, out=out)
    before = sorted(out.with_name("saes.unfinished").rglob("*"))
    with pytest.raises(FileExistsError, match="holds a stopped run: continue it with resume=True"):
        train(model, out=out)
    for changes, message in (
        ({"lr": 0.5}, "lr was 0.01 and is 0.5"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"texts": torch.ones(9, 12, dtype=torch.long)}, "n_rows was 40 and is 9; rows_sha256 was"),
        ({"sae": dataclasses.replace(TOPK, k=2)}, "sae was .*'k': 3.* and is .*'k': 2"),
        ({"sites": sqs.query_sites(model, [2])}, "hook_names was"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, out=out, resume=True, **changes)
    assert sorted(out.with_name("saes.unfinished").rglob("*")) == before
    anew = train(model, out=out, overwrite=True, seed=7)
    assert anew.settings["seed"] == 7


def test_a_state_of_another_model_is_refused(tiny_models, tmp_path, monkeypatch):
    model, out = tiny_models["bridge"], tmp_path / "saes"
    stopped_after(monkeypatch, 13, model, out=out)
    weight = model.blocks[0].attn.q.original_component.weight
    with torch.no_grad():
        weight *= 1.1
    try:
        with pytest.raises(ValueError, match="holds a run on another model: fingerprint/blocks"):
            train(model, out=out, resume=True)
    finally:
        with torch.no_grad():
            weight /= 1.1


def test_a_folder_of_something_else_is_refused(tiny_models, tmp_path):
    unfinished = tmp_path / "saes.unfinished"
    unfinished.mkdir()
    (unfinished / "thesis.tex").write_text("of great value")
    with pytest.raises(FileExistsError, match="it has no run.json, so something else wrote it"):
        train(tiny_models["bridge"], out=tmp_path / "saes", overwrite=True)


@pytest.fixture(scope="module")
def stopped(tiny_models, tmp_path_factory):
    """The folder of a run with the checkpoints of steps 5 and 10."""
    out = tmp_path_factory.mktemp("stopped") / "saes"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, 13, tiny_models["bridge"], out=out)
    return out.with_name("saes.unfinished")


@pytest.fixture
def unfinished(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "saes.unfinished"))


def open_checkpoints(folder: Path, run: Path) -> Checkpoints:
    settings = json.loads((run / "run.json").read_text())
    return Checkpoints(folder, settings, {}, every=5, resume=True, overwrite=False)


STATE = f"{NAME}.safetensors"
FILES = ("run.json", "step-10/checkpoint.json", f"step-10/{STATE}")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found(stopped, unfinished, name):
    open_checkpoints(unfinished, stopped)
    good = (unfinished / name).read_bytes()
    for bit in range(0, 8 * len(good), max(1, 8 * len(good) // 199)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        (unfinished / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="^a checkpoint is damaged: .*delete .*unfinished to"):
            open_checkpoints(unfinished, stopped)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "missing", "exchanged"])
def test_a_file_that_is_cut_missing_or_exchanged_is_named(stopped, unfinished, name, damage):
    path = unfinished / name
    if damage == "missing":
        path.unlink()
    else:
        other = stopped / name.replace("step-10", "step-5")
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else other.read_bytes())
        if damage == "exchanged" and name == "run.json":
            path.write_text(path.read_text().replace("0.01", "0.02"))
    with pytest.raises(ValueError, match=f"a checkpoint is damaged: .*{Path(name).stem}"):
        open_checkpoints(unfinished, stopped)


def test_a_damaged_checkpoint_is_named_with_the_sound_one_before_it(
    tiny_models, unfinished, tmp_path
):
    model, out, last = tiny_models["bridge"], tmp_path / "saes", unfinished / "step-10"
    state = last / STATE
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"or delete {last} to continue from step 5$"):
        train(model, out=out, resume=True)
    shutil.rmtree(last)
    assert_equal(train(model), train(model, out=out, resume=True))


@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(
    tiny_models, unfinished, tmp_path, kind
):
    last = unfinished / "step-10"
    tensors = read_tensors(last, STATE)
    tensors[f"{NAME}/{kind}/W_enc"][0, 0, 0] = torch.nan
    write_tensors(last / STATE, tensors)
    index = read_record(last, "checkpoint.json", CheckpointIndex)
    files = index.files | {STATE: listed(last / STATE)}
    write_record(last / "checkpoint.json", index.model_copy(update={"files": files}))
    with pytest.raises(ValueError, match=f"damaged: {NAME}/{kind}/W_enc must be finite.*delete"):
        train(tiny_models["bridge"], out=tmp_path / "saes", resume=True)


@pytest.mark.parametrize("out", [None, "saes"])
def test_a_run_that_diverges_ends_with_an_error_and_keeps_the_last_checkpoint(
    tiny_models, tmp_path, monkeypatch, out
):
    step = HeadwiseMultiTrainer._maybe_log_sparsity

    def diverge(self, final=False):
        step(self, final=final)
        if self.n_training_steps == 7:
            self.saes[NAME].W_dec.data[0] = torch.inf

    monkeypatch.setattr(HeadwiseMultiTrainer, "_maybe_log_sparsity", diverge)
    with pytest.raises(ValueError, match=f"training diverged .*{NAME}/.* finite.*a lower lr"):
        train(tiny_models["bridge"], out=out and tmp_path / out)
    assert [path.name for path in tmp_path.rglob("step-*")] == ["step-5"] * bool(out)


def test_a_folder_that_another_is_writing_is_refused_at_once(tiny_models, tmp_path, monkeypatch):
    out, errors = tmp_path / "saes", []

    def attempt():
        try:
            train(tiny_models["bridge"], out=out, overwrite=True)
        except BlockingIOError as error:
            errors.append(str(error))

    step = HeadwiseMultiTrainer._maybe_log_sparsity

    def meet(self, final=False):
        step(self, final=final)
        if self.n_training_steps == 13:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()

    monkeypatch.setattr(HeadwiseMultiTrainer, "_maybe_log_sparsity", meet)
    train(tiny_models["bridge"], out=out)
    text = "is being written by another process: wait until that has ended, or give another folder"
    assert errors == [f"{out} {text}"]
    assert [path.name for path in tmp_path.iterdir()] == ["saes"]


def test_what_a_killed_process_was_writing_is_passed_over_and_cleared_away(
    tiny_models, tmp_path, monkeypatch
):
    model, out = tiny_models["bridge"], tmp_path / "saes"
    stopped_after(monkeypatch, 13, model, out=out)
    unfinished = tmp_path / "saes.unfinished"
    (unfinished / ".step-15.new" / "new").mkdir(parents=True)
    (unfinished / "step-5" / STATE).unlink()  # killed while it was removed
    assert_equal(train(model), train(model, out=out, resume=True))


def test_resuming_needs_a_folder(tiny_models):
    with pytest.raises(ValueError, match="give out="):
        train(tiny_models["bridge"], resume=True)


def test_too_little_memory_or_disk_is_told_before_any_work(tiny_models, tmp_path, monkeypatch):
    model, out = tiny_models["bridge"], tmp_path / "deep" / "saes"
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**10))
        with pytest.raises(
            ValueError,
            match=r"needs at least \S+ GiB of memory on cpu, where 9.54e-07 GiB are free: train",
        ):
            train(model, out=out)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**10))
        with pytest.raises(ValueError, match="GiB of disk at .*, where 9.54e-07 GiB are free"):
            train(model, out=out)
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]


def test_the_checkpoints_of_a_run_that_continues_count_as_free_disk(
    tiny_models, unfinished, tmp_path, monkeypatch
):
    held = sum(file.stat().st_size for file in unfinished.rglob("*.safetensors"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=held // 3))
    train(tiny_models["bridge"], out=tmp_path / "saes", resume=True)


@pytest.mark.slow
def test_mixed_precision_trains_about_as_well(tiny_models):
    model = tiny_models["bridge"]
    longer = {"training_tokens": 8000, "lr_decay_steps": 0}
    full = train(model, **longer)
    half = train(model, **longer, autocast=True, autocast_lm=True)
    gap = full.metrics["explained_variance"] - half.metrics["explained_variance"]
    assert not torch.equal(full[NAME].W_dec, half[NAME].W_dec)
    assert gap.abs().max() < 0.05
    assert half[NAME].W_dec.dtype == torch.float32


def test_the_device_on_which_activations_wait_changes_no_number(tiny_models):
    model = tiny_models["bridge"]
    assert_equal(train(model), train(model, act_store_device="cpu"))


def run_of_60_steps(folder: Path, texts: Path, out: Path) -> None:
    model = sqs.load_model(str(folder), device="cpu")
    config = TrainingConfig(
        sae=TOPK,
        training_tokens=60 * 32,
        train_batch_size_tokens=32,
        context_size=16,
        n_batches_in_buffer=4,
        checkpoint_every=7,
        metric_tokens=64,
    )
    texts = sqs.read_texts(texts, text="question")
    sqs.train_query_saes(model, texts, sqs.query_sites(model), config, out=out, resume=True)


SCRIPT = f"""
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_resume import run_of_60_steps
from sae_query_steer.training.checkpoints import Checkpoints

seen = Checkpoints.__call__
def told(self, trainer):
    seen(self, trainer)
    print(trainer.n_training_steps, flush=True)
Checkpoints.__call__ = told
run_of_60_steps(*map(Path, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_is_resumed_and_ends_with_the_weights_of_one_never_stopped(
    tiny_folder, tmp_path
):
    texts, out, whole = (tmp_path / name for name in ("texts.csv", "saes", "whole"))
    make_texts(texts)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, (tiny_folder, texts, out))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert any(int(line) == 16 for line in process.stdout)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        steps = []
        step = HeadwiseMultiTrainer._maybe_log_sparsity
        patch.setattr(
            HeadwiseMultiTrainer,
            "_maybe_log_sparsity",
            lambda self, **final: steps.append(self.n_training_steps) or step(self, **final),
        )
        run_of_60_steps(tiny_folder, texts, out)
    assert 14 <= steps[0] <= 28, "more was lost than the steps since a checkpoint"
    run_of_60_steps(tiny_folder, texts, whole)
    assert_equal(sqs.QuerySAEs.load(out), sqs.QuerySAEs.load(whole))


def test_no_signal_handler_is_left_behind(tiny_models, tmp_path):
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    train(tiny_models["bridge"], out=tmp_path / "saes")
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before
