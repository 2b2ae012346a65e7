"""Several processes: each its share of the layers, together what one process trains."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import invoke
from wheel_check import make_texts

import sae_query_steer as sqs
from sae_query_steer.config import TopK, TrainingConfig
from sae_query_steer.storage.folders import locked
from sae_query_steer.training.distributed import join_ranks, local_device, train_on_ranks

MAIN = "from sae_query_steer.cli.main import main; main()"
CONFIG = TrainingConfig(sae=TopK(d_sae_per_head=16, k=3), training_tokens=1024)


def arguments(folder: Path, texts: Path, out: Path) -> list[str]:
    return [
        "train", "topk", "--model", str(folder), "--device", "cpu",
        "--layers", "all", "--texts", str(texts), "--text", "question",
        "--sae.d-sae-per-head", "16", "--sae.k", "3", "--training-tokens", "2000",
        "--train-batch-size-tokens", "128", "--context-size", "16",
        "--checkpoint-every", "4", "--out", str(out),
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_folder, tmp_path, monkeypatch):
    make_texts(tmp_path / "texts.csv")
    in_one, in_two = (
        arguments(tiny_folder, tmp_path / "texts.csv", tmp_path / out) for out in ("one", "two")
    )
    assert invoke(in_one, catch=False).exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | launch | {"RANK": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", MAIN, *in_two]
    other = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for name, value in (launch | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert invoke(in_two, catch=False).exit_code == 0
    errors = other.communicate(timeout=240)[1]
    assert other.returncode == 0, errors[-2000:]
    one, two = (sqs.QuerySAEs.load(tmp_path / name) for name in ("one", "two"))
    assert list(one) == list(two) == [f"blocks.{layer}.attn.hook_q" for layer in range(3)]
    for name, sae in one.items():
        assert sae.cfg == two[name].cfg
        for key, value in sae.state_dict().items():
            assert torch.equal(value, two[name].state_dict()[key])
    pd.testing.assert_frame_equal(one.metrics, two.metrics)
    assert one.settings == two.settings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "texts.csv", "two"]


def test_more_processes_than_layers_are_refused(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    sites = sqs.query_sites(tiny_models["bridge"])
    with pytest.raises(ValueError, match="at most one per layer, 3, got 4"):
        train_on_ranks(tiny_models["bridge"], ["w0"], sites, CONFIG, out=tmp_path / "saes")


def test_an_existing_folder_is_refused_before_a_rank_trains(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / "query_saes.json").touch()
    sites = sqs.query_sites(tiny_models["bridge"])
    with pytest.raises(FileExistsError, match="saes exists"):
        train_on_ranks(tiny_models["bridge"], ["w0"], sites, CONFIG, out=tmp_path / "saes")


def test_the_first_rank_locks_the_folder_of_all_and_each_its_own(
    tiny_models, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sites = sqs.query_sites(tiny_models["bridge"])
    train = partial(train_on_ranks, tiny_models["bridge"], ["w0"], sites, CONFIG)
    for rank, folder in enumerate(("saes", "saes.rank1of2")):
        monkeypatch.setenv("RANK", str(rank))
        with ThreadPoolExecutor() as other, locked(tmp_path / folder):
            with pytest.raises(BlockingIOError, match=f"{folder} is being written by another"):
                other.submit(train, out=tmp_path / "saes").result()


def test_ranks_that_replace_a_finished_run_train_each_in_its_own_folder(
    tiny_models, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / "query_saes.json").touch()
    sites = sqs.query_sites(tiny_models["bridge"])

    def train(*args, out, resume, overwrite=False):
        if out.name == "saes":
            assert not overwrite, "every rank would replace the folder"
            raise ValueError("with other settings")
        raise InterruptedError(out.name)

    monkeypatch.setattr("sae_query_steer.training.distributed.train_query_saes", train)
    with pytest.raises(InterruptedError, match="saes.rank0of2"):
        train_on_ranks(
            *(tiny_models["bridge"], ["w0"], sites, CONFIG),
            out=tmp_path / "saes",
            resume=True,
            overwrite=True,
        )


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
