"""Training: SAELens's, head by head, seeded, on whole or packed documents."""

import json
import signal
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import temporary_seed
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

import sae_query_steer as sqs
from sae_query_steer.config import Standard, TopK, TrainingConfig
from sae_query_steer.data.token_rows import token_rows
from sae_query_steer.models.activations import read_activations
from sae_query_steer.progress import SECONDS, progress_bar
from sae_query_steer.training.saelens import HeadwiseMultiTrainer, HeadwiseTrainer

TOPK = TopK(d_sae_per_head=16, k=3)


def small(model, texts, sites=None, **changes):
    settings = {"sae": TOPK, "training_tokens": 1024, "train_batch_size_tokens": 128, "lr": 1e-2}
    settings |= {"metric_tokens": 1024}
    sites = sqs.query_sites(model, [0, 2]) if sites is None else sites
    return sqs.train_query_saes(model, texts, sites, TrainingConfig(**{**settings, **changes}))


@pytest.fixture
def bridge(tiny_models):
    return tiny_models["bridge"]


@pytest.fixture
def texts() -> list[str]:
    words = [f"w{i}" for i in range(48)]
    return [" ".join(words[(i * 7 + j * j) % 48] for j in range(5 + i % 9)) for i in range(60)]


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["gradients below the clip", "clipped"])
def test_one_head_follows_a_solo_saelens_run_on_the_same_batches(scale):
    n_heads, d_head, n_steps = 3, 8, 200
    generator = torch.Generator().manual_seed(0)
    # Unequal heads: a global clip would couple them.
    size = torch.tensor([0.2, 1.0, 5.0])[:, None] * scale
    batches = torch.randn(n_steps, 64, n_heads, d_head, generator=generator) * size
    trainer_config = SAETrainerConfig(
        total_training_samples=n_steps * 64,
        train_batch_size_samples=64,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=20,
        lr_decay_steps=40,
        dead_feature_window=15,
    )
    with temporary_seed(0):
        ours = sqs.sae.QueryHeadTopKTrainingSAE(
            sqs.sae.QueryHeadTopKTrainingSAEConfig(
                n_heads=n_heads, d_head=d_head, d_sae_per_head=24, k=2
            )
        )
    solos = []
    for head in range(n_heads):
        solo = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_head, d_sae=24, k=2))
        with torch.no_grad():
            for name, parameter in solo.named_parameters():
                parameter.copy_(getattr(ours, name)[head])
        solos.append(solo)
    flat = (batch.flatten(-2) for batch in batches)
    trainer = HeadwiseTrainer(cfg=trainer_config, sae=ours, data_provider=flat)
    trainer.fit()
    for head, solo in enumerate(solos):
        theirs = SAETrainer(
            cfg=trainer_config, sae=solo, data_provider=(batch[:, head] for batch in batches)
        )
        theirs.fit()
        for name, parameter in solo.named_parameters():
            mine = getattr(ours, name)[head]
            assert (mine - parameter).norm() / parameter.norm() <= 1e-4
        since = trainer.n_forward_passes_since_fired.unflatten(0, (n_heads, 24))[head]
        assert torch.equal(since, theirs.n_forward_passes_since_fired)
    assert trainer.dead_neurons.any(), "the auxiliary loss was never on: the test shows too little"


def test_equal_seeds_give_equal_weights_and_others_do_not(model, texts):
    first, again, other = (small(model, texts, seed=seed) for seed in (3, 3, 4))
    for name in first:
        assert torch.equal(first[name].W_dec, again[name].W_dec)
        assert not torch.equal(first[name].W_dec, other[name].W_dec)
    assert first.metrics.equals(again.metrics)


def test_the_global_random_state_is_left_as_it_was(model, texts):
    before = torch.get_rng_state()
    small(model, texts)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_around_training_changes_no_number(model, texts):
    plain = small(model, texts)
    with torch.autocast("cpu", torch.bfloat16):
        inside = small(model, texts)
    for name in plain:
        assert torch.equal(plain[name].W_dec, inside[name].W_dec)
    assert plain.metrics.equals(inside.metrics)


def test_training_explains_more_variance_than_the_start(bridge, texts):
    short = small(bridge, texts, lr=1e-2)
    long = small(bridge, texts, lr=1e-2, training_tokens=12_000)
    better = long.metrics["explained_variance"] > short.metrics["explained_variance"] + 0.05
    assert better.all()
    assert (long.metrics["l0"] <= 3).all()
    assert list(long.metrics["head"]) == [0, 1, 2, 3] * 2


def test_the_standard_architecture_trains_and_sparsifies(bridge, texts):
    l0 = [
        small(
            bridge,
            texts,
            sae=Standard(d_sae_per_head=16, l1_coefficient=c),
            lr=1e-2,
            training_tokens=10_000,
        ).metrics["l0"]
        for c in (0.01, 5.0)
    ]
    assert (l0[1] < l0[0]).all()


def test_saes_save_and_load_with_their_metrics(saes, tmp_path, model):
    saes.save(tmp_path / "saes")
    loaded = sqs.QuerySAEs.load(tmp_path / "saes")
    assert list(loaded) == list(saes)
    assert loaded.metrics.equals(saes.metrics)
    queries = read_activations(model, torch.arange(4, 20)[None], list(saes))
    for name, sae in saes.items():
        assert torch.equal(loaded[name](queries[name]), sae(queries[name]))
        assert loaded[name].cfg == sae.cfg
    with pytest.raises(FileExistsError, match="give another folder, or overwrite=True"):
        saes.save(tmp_path / "saes")
    saes.save(tmp_path / "saes", overwrite=True)


def test_saelens_evaluates_our_saes(saes, texts, model):
    name = "blocks.2.attn.hook_q"
    rows = token_rows(model, texts, context_size=16)
    store = ActivationsStore.from_sae(
        model,
        saes[name],
        [{"tokens": row} for row in rows.tolist()],
        context_size=16,
        streaming=False,
        store_batch_size_prompts=4,
        train_batch_size_tokens=16,
        n_batches_in_buffer=4,
        total_tokens=16,
    )
    metrics, _ = run_evals(
        saes[name],
        store,
        model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=4,
            n_eval_reconstruction_batches=1,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
    )
    assert metrics["sparsity"]["l0"] == pytest.approx(4 * 3, abs=0.5)
    assert 0.3 < metrics["reconstruction_quality"]["explained_variance"] < 1


def test_packed_documents_are_joined_with_bos_and_cut_into_full_rows(model):
    rows = token_rows(model, ["w0 w1 w2", "w3", "w4 w5 w6 w7"], context_size=5)
    assert rows.tolist() == [[1, 4, 5, 6, 1], [1, 7, 1, 8, 9]]


def test_every_form_of_texts_is_accepted(bridge, texts, examples):
    rows, data = token_rows(bridge, texts, context_size=16), Dataset.from_dict({"text": texts})
    for given in ((text for text in texts), data, data.to_iterable_dataset(), rows, iter(rows)):
        assert torch.equal(token_rows(bridge, given, context_size=16), rows)
    tokenized = sqs.tokenize_examples(bridge, examples)
    assert len(small(bridge, tokenized, training_tokens=512)) == 2


def test_of_texts_without_an_end_as_many_are_read_as_are_needed(bridge, texts):
    rows, many = token_rows(bridge, texts, context_size=16), 1000  # no end would hang, not fail
    endless = [islice(cycle(texts), many) for _ in range(2)]
    assert torch.equal(token_rows(bridge, endless[0], context_size=16, n_tokens=40), rows[:3])
    saes = small(bridge, endless[1], training_tokens=300, metric_tokens=0, context_size=16)
    assert saes.settings["n_rows"] * 16 == 384  # three steps


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "texts is empty"),
        (torch.ones(2, 6).long(), {"exclude_special_tokens": True}, "must leave tokens"),
        (["w0", "  "], {}, "text 1 is '  ': every document must be a non-empty string"),
        (["w0 w1"], {}, "the texts have fewer than context_size=64 tokens"),
        (["w0 " * 20], {"context_size": 8, "concat_sequences": False}, "document 0 has 21 tokens"),
        (["w0"], {"context_size": 65}, "context_size must be 2 to n_ctx=64, got 65"),
        (torch.tensor([[1, 52]]), {}, "with ids 0 to 51"),
        (torch.ones(2, 3), {}, "must be whole numbers"),
        (Dataset.from_dict({"body": ["w0"]}), {}, "must have a column 'text', got .* read_texts"),
    ],
)
def test_texts_and_settings_that_cannot_work_are_refused(tiny_models, texts, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tiny_models["bridge"], texts, **changes)


def test_metrics_can_be_left_out_and_the_weights_are_the_same(model, texts):
    bare, measured = small(model, texts, metric_tokens=0), small(model, texts, metric_tokens=512)
    assert not bare.measured
    with pytest.raises(ValueError, match="were not measured: train them with metric_tokens above"):
        _ = bare.metrics
    assert (measured.metrics["n_tokens"] == 512).all()
    for name, sae in bare.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value, measured[name].state_dict()[key])


def test_one_string_is_not_taken_for_a_list_of_letters(tiny_models):
    with pytest.raises(TypeError, match="list of texts, .* got 'w0 w1 w2'"):
        small(tiny_models["bridge"], "w0 w1 w2")


def test_sites_and_config_must_fit_the_model(tiny_models, texts):
    model = tiny_models["bridge"]
    with pytest.raises(ValueError, match="the model has 4 heads of 8"):
        small(model, texts, [sqs.QuerySite(layer=0, n_heads=2, d_head=16)])
    with pytest.raises(ValueError, match="no query site at layer 9"):
        small(model, texts, [sqs.QuerySite(layer=9, n_heads=4, d_head=8)])
    with pytest.raises(ValueError, match="sites must have at least one"):
        small(model, texts, [])


def test_training_ends_with_the_progress_bars_switched_off(tiny_models, texts, monkeypatch):
    monkeypatch.setattr("sae_query_steer.training.stream.progress_bar", partial(tqdm, disable=True))
    saes = small(tiny_models["bridge"], texts)
    assert (saes.metrics["n_tokens"] == 1024).all()


def test_bars_update_rarely_and_name_the_loss(tiny_models, texts, monkeypatch):
    bars = []
    update = HeadwiseMultiTrainer._update_pbar

    def seen(self, outputs, bar, update_interval=100):
        update(self, outputs, bar, update_interval=1)
        bars.append((bar.mininterval, bar.postfix))

    monkeypatch.setattr(HeadwiseMultiTrainer, "_update_pbar", seen)
    small(tiny_models["bridge"], texts)
    assert {seconds for seconds, _ in bars} == {SECONDS}
    assert all(text.startswith("loss blocks.") for _, text in bars)
    with progress_bar(total=2) as bar:
        bar.update(2)
    assert bar.last_print_n == 0, "short work shows no bar"


def test_metrics_are_heard_every_hundred_steps_and_at_the_end(bridge, texts):
    heard, sites = [], sqs.query_sites(bridge, [0, 2])
    given = {"training_tokens": 32 * 250, "train_batch_size_tokens": 32, "metric_tokens": 0}
    config = TrainingConfig(sae=TOPK, **given)
    saes = sqs.train_query_saes(bridge, texts, sites, config, on_metrics=heard.append)
    assert [(row["step"], row["tokens"]) for row in heard] == [
        (100, 3200),
        (200, 6400),
        (250, 8000),
    ]
    for name in saes:
        assert heard[-1][f"loss/{name}"] < heard[0][f"loss/{name}"]
        assert 0 <= heard[-1][f"dead_latents/{name}"] <= 4 * 16


def test_training_starts_at_the_mean_query_and_a_poor_end_is_told(tiny_models, texts):
    # From zeros, so short a run explains less than the mean query does.
    saes = small(tiny_models["bridge"], texts, training_tokens=2560, lr=1e-3)
    assert (saes.metrics["explained_variance"] > 0).all()
    with pytest.warns(UserWarning, match="heads explain less variance than the mean query"):
        small(tiny_models["bridge"], texts, training_tokens=1280, lr=3.0)


def test_metrics_that_are_no_numbers_are_saved_and_come_back(saes, tmp_path):
    metrics = saes.metrics.copy()
    metrics.loc[2, "explained_variance"] = float("nan")
    sqs.QuerySAEs(saes, metrics).save(tmp_path / "saes")
    loaded = sqs.QuerySAEs.load(tmp_path / "saes").metrics
    assert loaded["explained_variance"].isna().tolist() == [i == 2 for i in range(8)]


def damage_index(folder, **changes):
    path = folder / "query_saes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_or_hostile_folders_are_refused(saes, tmp_path):
    name = "blocks.0.attn.hook_q"

    def made(number) -> Path:
        folder = tmp_path / str(number)
        saes.save(folder)
        return folder

    for number, (changes, message) in enumerate(
        (
            ({"format": "other/9"}, "format: .*'other/9'"),
            ({"hook_names": None}, "is damaged.*hook_names"),
            ({"metrics": 3}, "is damaged"),
            ({"hook_names": [".."]}, "'..' is no query hook point"),
            ({"hook_names": ["../secret"]}, "is no query hook point"),
        )
    ):
        folder = made(number)
        damage_index(folder, **changes)
        with pytest.raises(ValueError, match=message):
            sqs.QuerySAEs.load(folder)
    weights = made("truncated") / name / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        sqs.QuerySAEs.load(tmp_path / "truncated")
    weights = made("nan") / name / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"b_enc": tensors["b_enc"] * torch.nan}, weights)
    with pytest.raises(ValueError, match="the weights in .* must be finite"):
        sqs.QuerySAEs.load(tmp_path / "nan")
    config = made("architecture") / name / "cfg.json"
    config.write_text(config.read_text().replace("query_head_topk", "nope"))
    with pytest.raises(ValueError, match="architecture in .* must be one of .*nope"):
        sqs.QuerySAEs.load(tmp_path / "architecture")


def test_sites_that_are_no_sites_and_data_sets_that_are_no_split_are_named(tiny_models, untyped):
    model = tiny_models["bridge"]
    with pytest.raises(ValueError, match=r"sites must have .* \[1, 2\]"):
        small(model, ["w0"], [1, 2])
    with pytest.raises(TypeError, match="texts is a DatasetDict: give one split"):
        small(model, DatasetDict({"train": Dataset.from_dict({"text": ["w0"]})}))


def runner_settings(tmp_path: Path) -> dict:
    return {
        "model_name": "tiny",
        "dataset_path": "",
        "is_dataset_tokenized": True,
        "streaming": False,
        "context_size": 16,
        "prepend_bos": False,
        "training_tokens": 1024,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "n_checkpoints": 1,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def token_data_set() -> list[dict[str, list[int]]]:
    rows = torch.randint(4, 52, (400, 16), generator=torch.Generator().manual_seed(0))
    return [{"tokens": row} for row in rows.tolist()]


# SAELens's runners say at the end how to load HookedTransformer models, which a bridge is not.
@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from:UserWarning")
def test_saelens_own_runner_trains_checkpoints_and_saves_our_saes(model, tmp_path):
    config = LanguageModelSAERunnerConfig(
        sae=sqs.sae.QueryHeadTopKTrainingSAEConfig(n_heads=4, d_head=8, d_sae_per_head=16, k=3),
        hook_name="blocks.1.attn.hook_q",
        output_path=str(tmp_path / "out"),
        **runner_settings(tmp_path),
    )
    trained = LanguageModelSAETrainingRunner(
        config, override_dataset=token_data_set(), override_model=model
    ).run()
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert isinstance(loaded, sqs.sae.QueryHeadTopKSAE)
    assert loaded.cfg.metadata.hook_name == "blocks.1.attn.hook_q"
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), trained(x).detach())
    assert len(list((tmp_path / "checkpoints").rglob("sae_weights.safetensors"))) == 1


# SAELens's runners say at the end how to load HookedTransformer models, which a bridge is not.
@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from:UserWarning")
def test_saelens_runner_of_several_saes_trains_ours_in_one_pass(model, tmp_path):
    settings = runner_settings(tmp_path)
    del settings["is_dataset_tokenized"]
    names = {"a": "blocks.0.attn.hook_q", "b": "blocks.2.attn.hook_q"}
    config = MultiSAETrainingRunnerConfig(
        saes={
            "a": sqs.sae.QueryHeadTopKTrainingSAEConfig(
                n_heads=4, d_head=8, d_sae_per_head=16, k=3
            ),
            "b": sqs.sae.QueryHeadStandardTrainingSAEConfig(n_heads=4, d_head=8, d_sae_per_head=12),
        },
        hook_names=names,
        output_path=str(tmp_path / "out"),
        **settings,
    )
    # SAELens's runner takes SIGINT and SIGTERM and does not give them back.
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        MultiSAETrainingRunner(
            config, override_dataset=token_data_set(), override_model=model
        ).run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    kinds = {name: type(SAE.load_from_disk(tmp_path / "out" / name)) for name in names}
    assert kinds == {"a": sqs.sae.QueryHeadTopKSAE, "b": sqs.sae.QueryHeadStandardSAE}
