"""One layer of the paper's models at its true size: forward pass and SAEs, seconds a token.

    python -m benchmarks.true_sizes [--quick] [--model mistral phi3] [--layers 8-20] [--d-sae N]
                                    [--k N] [--batch-tokens N] [--context-size N] [--rounds N]
                                    [--threads N] [--device D] [--dtype T] [--autocast]

A random block of the published width runs `--batch-tokens` tokens; then TopK SAEs of all its heads
take a training step on as many. From both follow the operations a second of the forward pass (for
`train --dry-run --flops`) and what a run takes over the bare forward pass up to the last layer,
reading, shuffling and saving left out. No weight of the models is needed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from sae_lens.config import SAETrainerConfig
from transformers import AutoConfig, AutoModelForCausalLM

import sae_query_steer as sqs
from sae_query_steer.cli.options import index_list
from sae_query_steer.sae import QueryHeadTopKTrainingSAE
from sae_query_steer.training.saelens import HeadwiseTrainer

SIZES = {
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "sliding_window": 2047,
        "pad_token_id": 0,
        "eos_token_id": 0,
    },
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one round of 1,024 tokens")
    parser.add_argument("--model", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--layers", default="8-20", help="layers of the run that is extrapolated")
    parser.add_argument("--d-sae", type=int, default=1024, help="latents of each head")
    parser.add_argument("--k", type=int, default=32, help="latents that may fire")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step, default 4096")
    parser.add_argument("--context-size", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, help="measured rounds, default 3")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="where to run")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the model's weights")
    parser.add_argument("--autocast", action="store_true", help="train SAEs in bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.batch_tokens = args.batch_tokens or (1024 if args.quick else 4096)
    args.rounds = args.rounds or (1 if args.quick else 3)
    layers = index_list(args.layers)
    if layers is None:
        parser.error("--layers all is not allowed: name them, such as 8-20")
    table = [measure(name, max(layers) + 1, len(layers), args) for name in args.model]
    print(pd.DataFrame(table).to_string(index=False, float_format=lambda x: f"{x:.3g}"))


def measure(name: str, n_blocks: int, n_sites: int, args: argparse.Namespace) -> dict[str, object]:
    """Return the row of one model."""
    sizes = SIZES[name]
    config = AutoConfig.for_model(name, num_hidden_layers=1, vocab_size=512, **sizes)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).model
    block = sum(p.numel() for p in model.layers[0].parameters())
    rows = torch.randint(1, 512, (args.batch_tokens // args.context_size, args.context_size))
    rows = rows.to(args.device)

    @torch.no_grad()
    def forward() -> None:
        for part in rows.split(16):
            model(part, use_cache=False)

    n_heads = sizes["num_attention_heads"]
    d_head = sizes["hidden_size"] // n_heads
    sae = QueryHeadTopKTrainingSAE(
        sqs.sae.QueryHeadTopKTrainingSAEConfig(
            n_heads=n_heads,
            d_head=d_head,
            d_sae_per_head=args.d_sae,
            k=args.k,
            device=args.device,
        )
    )
    trainer = HeadwiseTrainer(
        cfg=SAETrainerConfig(
            total_training_samples=args.batch_tokens,
            train_batch_size_samples=args.batch_tokens,
            lr=3e-4,
            lr_end=3e-5,
            lr_warm_up_steps=0,
            lr_decay_steps=0,
            dead_feature_window=1000,
            autocast=args.autocast,
            device=args.device,
        ),
        sae=sae,
        data_provider=iter(()),
    )
    queries = torch.randn(args.batch_tokens, n_heads * d_head, device=args.device)

    def train() -> None:
        trainer.step(queries)

    one, step = [], []
    for taken, work in ((one, forward), (step, train)):
        work()
        taken += [seconds(work) for _ in range(args.rounds)]
    ratios = [1 + n_sites * b / (n_blocks * a) for a, b in zip(one, step, strict=True)]
    return {
        "model": name,
        "weights of a block": block,
        "forward s": statistics.median(one),
        "SAE step s": statistics.median(step),
        "operations a second": 2 * block * args.batch_tokens / statistics.median(one),
        "run / forward": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def seconds(work: Callable[[], None]) -> float:
    """Return how long a function takes, the device's work included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
