"""Several processes: each its share of the passes and layers, together what one trains."""

import csv
import dataclasses
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import invoke
from test_resume import TOPK, Stopped, assert_equal, stopped_after, train
from wheel_check import make_texts

import sae_query_steer as sqs
from sae_query_steer.models.launch import local_device
from sae_query_steer.storage.folders import locked
from sae_query_steer.training.ranks import join_ranks
from sae_query_steer.training.saelens import HeadwiseMultiTrainer
from sae_query_steer.training.train import train_on_ranks

MAIN = "from sae_query_steer.cli.main import main; main()"
FORK = multiprocessing.get_context("fork")  # with the model in memory: imports take longest
# A forward pass of 2 rows; padded rows; norms from a pass of their own.
CONFIG = {
    "texts": [" ".join(f"w{(7 * i + j * j) % 48}" for j in range(5 + i % 9)) for i in range(40)],
    "concat_sequences": False,
    "sae": dataclasses.replace(TOPK, normalize_activations="expected_average_only_in"),
    "n_batches_for_norm_estimate": 5,
    "store_batch_size_prompts": 2,
}


def arguments(folder: Path, texts: Path, out: Path) -> list[str]:
    return [
        "train", "topk", "--model", str(folder), "--device", "cpu",
        "--layers", "all", "--texts", str(texts), "--text", "question",
        "--sae.d-sae-per-head", "16", "--sae.k", "3", "--training-tokens", "2000",
        "--train-batch-size-tokens", "128", "--context-size", "16", "--metric-tokens", "512",
        "--checkpoint-every", "4", "--out", str(out),
    ]  # fmt: skip


def launch_of(n: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def on_ranks(n: int, model, **changes) -> list[str]:
    """Train in the processes of a launch; return what each of them raised."""
    return in_processes(n, lambda: train(model, run=train_on_ranks, **CONFIG, **changes))


def in_processes(n: int, run) -> list[str]:
    """Call a function in each process of a launch; return what each of them raised."""
    raised, launch = FORK.SimpleQueue(), launch_of(n)

    def work(rank: int) -> None:
        os.environ.update(launch, RANK=str(rank))
        error = None
        try:
            run()
        except Exception as found:
            error = found
        raised.put((rank, "" if error is None else repr(error)))

    processes = [FORK.Process(target=work, args=[rank], daemon=True) for rank in range(n)]
    with warnings.catch_warnings():  # of threads, which do nothing here
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, "it hangs"
    found = dict(raised.get() for _ in processes)
    return [found[rank] for rank in range(n)]


def in_two_processes(arguments: list[str], monkeypatch) -> None:
    """Run a command as the two ranks of a launch: here, and in a new process."""
    launch = launch_of(2)
    environment = os.environ | launch | {"RANK": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", MAIN, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    other = subprocess.Popen(command, env=environment, **pipes)
    with monkeypatch.context() as here:
        for name, value in (launch | {"RANK": "0"}).items():
            here.setenv(name, value)
        assert invoke(arguments, catch=False).exit_code == 0
    said, errors = other.communicate(timeout=240)
    assert other.returncode == 0, errors[-2000:]
    assert said == ""  # the first rank speaks for all


def crash_at_13(monkeypatch, rank: int) -> None:
    """Let one rank fail after 13 steps; the last checkpoint is that of step 10."""
    step = HeadwiseMultiTrainer._maybe_log_sparsity

    def crash(self, final=False):
        step(self, final=final)
        if self.n_training_steps == 13 and os.environ["RANK"] == str(rank):
            raise Stopped

    monkeypatch.setattr(HeadwiseMultiTrainer, "_maybe_log_sparsity", crash)


@pytest.fixture(scope="module")
def whole(tiny_models):
    """What one process trains, at two layers."""
    return train(tiny_models["bridge"], **CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3], ids=["a layer each", "one without a layer"])
def test_ranks_train_what_one_process_trains(tiny_models, whole, tmp_path, n):
    assert on_ranks(n, tiny_models["bridge"], out=tmp_path / "saes") == [""] * n
    found = sqs.QuerySAEs.load(tmp_path / "saes")
    assert_equal(whole, found)
    assert whole.settings == found.settings
    assert [path.name for path in tmp_path.iterdir()] == ["saes"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 2)])
def test_another_number_of_ranks_continues_a_stopped_run(
    tiny_models, whole, tmp_path, monkeypatch, before, after
):
    model, again = tiny_models["bridge"], {"out": tmp_path / "saes", "resume": True}
    if before == 1:
        stopped_after(monkeypatch, 13, model, out=tmp_path / "saes", **CONFIG)
    else:
        with monkeypatch.context() as patch:
            crash_at_13(patch, rank=1)
            errors = on_ranks(before, model, out=tmp_path / "saes")
        assert errors.pop(1) == "Stopped()"
        for rank, error in zip((0, 2), errors, strict=False):
            assert f"rank {rank} of {before} stops because another rank has ended" in error
    steps = sorted(path.name for path in (tmp_path / "saes.unfinished").glob("step-*"))
    assert steps == ["step-10", "step-5"]
    assert on_ranks(after, model, **again) == [""] * after
    assert_equal(whole, sqs.QuerySAEs.load(tmp_path / "saes"))


def test_a_folder_that_another_writes_is_refused_and_all_ranks_end(tiny_models, tmp_path):
    lock = locked(tmp_path / "saes")
    with ThreadPoolExecutor(1) as other:  # what this thread locks, its forks hold too
        other.submit(lock.__enter__).result()
        errors = on_ranks(2, tiny_models["bridge"], out=tmp_path / "saes")
        other.submit(lock.__exit__, None, None, None).result()
    assert "BlockingIOError" in errors[0] and "is being written by another" in errors[0]
    assert "rank 1 of 2 stops because another rank has ended" in errors[1]


def test_an_existing_folder_is_refused_by_all_ranks(tiny_models, tmp_path):
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / "query_saes.json").touch()
    for error in on_ranks(2, tiny_models["bridge"], out=tmp_path / "saes"):
        assert "FileExistsError" in error and "saes exists" in error


def test_a_rank_that_ends_before_all_are_connected_is_named(tiny_models, monkeypatch):
    def reset(*_args, **_settings):
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(torch.distributed, "init_process_group", reset)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="rank 1 of 2 stops because another rank has ended"):
        train(tiny_models["bridge"], run=train_on_ranks, out="none", **CONFIG)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_folder, tmp_path, monkeypatch):
    make_texts(tmp_path / "texts.csv")
    in_one, in_two = (
        arguments(tiny_folder, tmp_path / "texts.csv", tmp_path / out) for out in ("one", "two")
    )
    assert invoke(in_one, catch=False).exit_code == 0
    in_two_processes(in_two, monkeypatch)
    one, two = (sqs.QuerySAEs.load(tmp_path / name) for name in ("one", "two"))
    assert list(one) == list(two) == [f"blocks.{layer}.attn.hook_q" for layer in range(3)]
    for name, sae in one.items():
        assert sae.cfg == two[name].cfg
        for key, value in sae.state_dict().items():
            assert torch.equal(value, two[name].state_dict()[key])
    pd.testing.assert_frame_equal(one.metrics, two.metrics)
    assert one.settings == two.settings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "texts.csv", "two"]


@pytest.mark.slow
def test_two_processes_share_the_methods_of_a_sweep_and_the_layers_of_sites(
    tiny_folder, saes, tmp_path, monkeypatch
):
    saes.save(tmp_path / "saes")
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer", "level"])
        for i in range(60):
            words = [f"w{16 * (i % 3) + j}" for j in random.Random(i).choices(range(16), k=5)]
            level = ("apply", "create", "remember")[i % 3]
            rows.writerow([" ".join(words), " " + " ".join(words[::-1]), level])
    given = [
        *("--model", tiny_folder, "--csv", tmp_path / "texts.csv", "--prompt", "question"),
        *("--label", "level", "--saes", tmp_path / "saes", "--device", "cpu"),
    ]
    sweep = [
        *("--response", "answer", "--objectives", "squared distance", "--layers", "0,2"),
        *("--n-cases", "6", "--max-new-tokens", "3"),
    ]
    for command, more in (("sweep", sweep), ("sites", ["--per-head"])):
        in_one, in_two = (
            [command, *map(str, (*given, *more, "--out", tmp_path / f"{command} in {n}"))]
            for n in ("one", "two")
        )
        assert invoke(in_one, catch=False).exit_code == 0
        in_two_processes(in_two, monkeypatch)
    for name in ("table.csv", "curves.csv", "texts.csv"):
        one, two = (pd.read_csv(tmp_path / f"sweep in {n}" / name) for n in ("one", "two"))
        # Other methods share the passes: equal but for rounding.
        pd.testing.assert_frame_equal(one, two, rtol=1e-5, check_exact=False)
    one, two = (pd.read_csv(tmp_path / f"sites in {n}" / "sites.csv") for n in ("one", "two"))
    assert len(one) == 10
    pd.testing.assert_frame_equal(one, two, atol=1e-5)
    left = {path.name for path in tmp_path.iterdir()} - {"saes", "texts.csv"}
    assert left == {f"{command} in {n}" for command in ("sites", "sweep") for n in ("one", "two")}


def test_shares_are_joined_in_the_order_of_the_sites(tiny_models, saes):
    sites = sqs.query_sites(tiny_models["bridge"], [0, 2])
    parts = [
        sqs.QuerySAEs(
            {site.hook_name: saes[site.hook_name]},
            saes.metrics[saes.metrics["layer"] == site.layer],
            saes.settings,
        )
        for site in sites
    ]
    for order in (parts, parts[::-1]):
        whole = join_ranks(order, sites)
        assert list(whole) == list(saes)
        assert whole.metrics.equals(saes.metrics)
        assert whole.settings == saes.settings


def test_without_a_launch_transformer_lens_chooses_the_device(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device() is None
