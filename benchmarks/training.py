"""All heads at once against SAELens head by head: seconds for equal tokens, and peak memory.

    python -m benchmarks.training [--quick] [--rows heads forward layers smollm2 processes]
                                  [--json FILE] [--rounds N] [--threads N] [--device D]

Both sides run in this process, alternating, after one unmeasured round; "ratio" is other / ours,
its median over rounds with its range. `equal` says that in this same run heads of ours were found
to follow SAELens's trainer on equal batches. Peak memory is that of a process for each side, in
which SAELens trains a single head.

The row smollm2, which only `--rows` measures, is all 270 heads of SmolLM2 against the bare forward
pass through all layers without logits. Its floor is 1 / (1 + operations of the SAEs / operations of
the pass), and its memory that of a process above the loaded model, the weights, gradients and
moments.

The rows of `--rows processes`, which must be named, compare two processes of a launch with one
process, all forked here with one thread each, on the CPU. Their ceiling is what two unconnected
copies of the run in one process reach together; `equal` says that the weights are bitwise the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_query_steer as sqs
from benchmarks.processes import two_processes
from benchmarks.rounds import faster, seconds_of, show
from sae_query_steer.sae import QueryHeadTopKTrainingSAE
from sae_query_steer.training.saelens import HeadwiseTrainer

SAMPLED = "(*)"
ROWS = ("heads", "forward", "layers")
SMOLLM2, PROCESSES = "smollm2", "processes"
N_LAYERS, N_HEADS, D_HEAD, LAYER = 6, 8, 64, 4
D_SAE, K, CONTEXT, BATCH, LR = 512, 16, 128, 2048, 3e-4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS, SMOLLM2, PROCESSES], default=ROWS, help="some rows"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--peak", choices=["ours", "other", SMOLLM2], help="print the memory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = 2 * BATCH if args.quick else 16 * BATCH
    rounds = args.rounds or (2 if args.quick else 5)
    if args.peak == SMOLLM2:
        return print(memory_on_smollm2())
    model = make_model(args.device)
    rows = torch.randint(0, model.cfg.d_vocab, (tokens // CONTEXT, CONTEXT))
    if args.peak:
        train = ours if args.peak == "ours" else saelens
        train(model, rows, [LAYER], range(1))
        return print(mebibytes("VmHWM"))

    if PROCESSES in args.rows:
        work = partial(ours, model, rows, list(range(N_LAYERS)), range(N_HEADS))
        return show(two_processes(work, args.rounds or (1 if args.quick else 5)), args.json)
    equal = follows_saelens(args.device)
    one, all_heads = range(1), range(N_HEADS)
    layer, model_layers = [LAYER], list(range(N_LAYERS))
    mark = f" {SAMPLED}" if args.quick else ""
    by_head = one if args.quick else all_heads
    compared = {
        "heads": (f"8 heads of one layer; SAELens head by head{mark}", layer, saelens, by_head),
        "forward": ("8 heads of one layer; the bare forward pass", layer, forward, by_head),
        "layers": (
            f"48 heads of six layers; SAELens head by head {SAMPLED}",
            model_layers,
            saelens,
            one,
        ),
    }
    if args.quick:
        del compared["layers"]
    table = [
        compare(name, model, rows, layers, other, heads, rounds, equal)
        for name, layers, other, heads in (compared[row] for row in args.rows if row in compared)
    ]
    if SMOLLM2 in args.rows:
        table.append(on_smollm2(2048 if args.quick else 8192, rounds, equal))
    show(table, args.json)
    print(f"{SAMPLED}: SAELens trained one head of each layer; its seconds are times 8")
    if not args.quick:
        for side in ("ours", "other", *({SMOLLM2} & {*args.rows})):
            print(f"peak memory, {side}: {peak_memory(side, args):.0f} MiB")


def make_model(device: str) -> HookedTransformer:
    """Return a random model of six layers with eight heads of 64."""
    torch.manual_seed(0)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=N_HEADS * D_HEAD,
            n_heads=N_HEADS,
            d_head=D_HEAD,
            d_vocab=8192,
            n_ctx=CONTEXT,
            act_fn="gelu",
            device=device,
            default_prepend_bos=False,
        )
    )


def ours(
    model: Any,
    rows: torch.Tensor,
    layers: list[int],
    heads: range,
    d_sae: int = D_SAE,
    batch: int = BATCH,
    train: Callable[..., Any] = sqs.train_query_saes,
) -> None:
    """Train all heads of the layers in one pass."""
    del heads
    train(
        model,
        rows,
        sqs.query_sites(model, layers),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=d_sae, k=K),
            training_tokens=rows.numel(),
            train_batch_size_tokens=batch,
            n_batches_in_buffer=min(64, len(rows)),
            lr=LR,
            prepend_bos=False,
            metric_tokens=0,
        ),
    )


def saelens(model: Any, rows: torch.Tensor, layers: list[int], heads: range) -> None:
    """Train one head after the other, layer after layer, by SAELens's runner."""
    data = Dataset.from_dict({"tokens": rows.tolist()})
    for layer in layers:
        for head in heads:
            with tempfile.TemporaryDirectory() as folder:
                config = LanguageModelSAERunnerConfig(
                    sae=TopKTrainingSAEConfig(d_in=D_HEAD, d_sae=D_SAE, k=K),
                    hook_name=f"blocks.{layer}.attn.hook_q",
                    hook_head_index=head,
                    is_dataset_tokenized=True,
                    streaming=False,
                    prepend_bos=False,
                    context_size=CONTEXT,
                    training_tokens=rows.numel(),
                    train_batch_size_tokens=BATCH,
                    store_batch_size_prompts=16,
                    n_batches_in_buffer=64,
                    lr=LR,
                    n_checkpoints=0,
                    checkpoint_path=None,
                    save_final_checkpoint=False,
                    output_path=folder,
                    device=str(model.cfg.device),
                    logger=LoggingConfig(log_to_wandb=False),
                )
                runner = LanguageModelSAETrainingRunner(
                    config, override_dataset=data, override_model=model
                )
                runner.run()


@torch.no_grad()
def forward(model: Any, rows: torch.Tensor, layers: list[int], heads: range) -> None:
    """Run the model up to the last layer that is trained, and nothing else."""
    del heads
    for part in rows.split(16):
        model(part.to(model.cfg.device), stop_at_layer=max(layers) + 1)


def on_smollm2(n_tokens: int, n_rounds: int, equal: bool) -> dict[str, Any]:
    """Return the row of all heads of SmolLM2 against its forward pass without logits."""
    model, rows = sqs.load_smollm2(), torch.randint(0, 49152, (n_tokens // CONTEXT, CONTEXT))
    layers = list(range(model.cfg.n_layers))

    @torch.no_grad()
    def bare(rows: torch.Tensor) -> None:
        for part in rows.split(16):
            model.original_model.model(part, use_cache=False)

    train = partial(ours, model, layers=layers, heads=range(1), d_sae=256, batch=1024)
    train(rows[:8])
    bare(rows[:8])
    seconds = seconds_of(partial(train, rows), partial(bare, rows), n_rounds, warm_up=False)
    return faster("270 heads of SmolLM2; the bare forward pass", seconds, equal=equal)


def compare(
    name: str,
    model: Any,
    rows: torch.Tensor,
    layers: list[int],
    other: Callable[..., None],
    heads: range,
    n_rounds: int,
    equal: bool,
) -> dict[str, Any]:
    """Return the row of one comparison."""
    warm = rows[: 2 * BATCH // CONTEXT]
    ours(model, warm, layers, heads)
    other(model, warm, layers[:1], range(1))
    times = N_HEADS // len(heads) if other is saelens else 1
    given = (model, rows, layers, heads)
    seconds = seconds_of(partial(ours, *given), partial(other, *given), n_rounds, warm_up=False)
    return faster(name, [(a, b * times) for a, b in seconds], equal=equal)


def follows_saelens(device: str, n_steps: int = 30) -> bool:
    """Return whether the first and the last head follow SAELens's trainer on equal batches."""
    config = SAETrainerConfig(
        total_training_samples=n_steps * 256,
        train_batch_size_samples=256,
        lr=LR,
        lr_end=LR / 10,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=10,
        device=device,
    )
    batches = torch.randn(n_steps, 256, N_HEADS, D_HEAD, device=device)
    sae = QueryHeadTopKTrainingSAE(
        sqs.sae.QueryHeadTopKTrainingSAEConfig(
            n_heads=N_HEADS, d_head=D_HEAD, d_sae_per_head=D_SAE, k=K, device=device
        )
    )
    alone = {}
    for head in (0, N_HEADS - 1):
        solo = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_HEAD, d_sae=D_SAE, k=K, device=device))
        solo.load_state_dict({name: p.detach()[head] for name, p in sae.named_parameters()})
        SAETrainer(cfg=config, sae=solo, data_provider=iter(batches[:, :, head].clone())).fit()
        alone[head] = solo
    HeadwiseTrainer(cfg=config, sae=sae, data_provider=iter(batches.flatten(-2))).fit()
    weights = sae.state_dict()
    return all(
        float((weights[name][head] - value).norm() / value.norm()) < 1e-4
        for head, solo in alone.items()
        for name, value in solo.state_dict().items()
    )


def mebibytes(what: str) -> float:
    """Return a size of this process from the system's status file."""
    # Not getrusage: there a process starts with the peak of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{what}:")[1].split()[0]) / 2**10


def memory_on_smollm2() -> float:
    """Return the peak of training all heads above model, weights, gradients and moments."""
    model, rows = sqs.load_smollm2(), torch.randint(0, 49152, (128, CONTEXT))
    with torch.no_grad():
        model.original_model.model(rows[:1])  # which reads the weights into memory
    before = mebibytes("VmRSS")
    ours(model, rows, list(range(30)), range(1), d_sae=256, batch=1024)
    return mebibytes("VmHWM") - before - 4 * 2 * 256 * 64 * 270 * 4 / 2**20


def peak_memory(side: str, args: argparse.Namespace) -> float:
    """Return the peak memory in MiB of a process that trains by one side alone."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.training",
        "--peak",
        side,
        "--threads",
        str(args.threads),
    ]
    command += ["--device", args.device]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(said.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()
