"""Bytes sent, time and memory of training on several GPUs, computed from a few constants.

    python -m benchmarks.scaling [--flops X] [--sae-share X] [--link X] [--gpu-gib N]
                                 [--context-size N] [--d-sae N]

Nothing is measured here. `benchmarks.true_sizes` measures the first two constants on your device:
"operations a second", and the share of it that the SAEs reach (operations of a step, 12 x d_sae x
width x tokens, by its seconds).
"""

import argparse
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, of which SAEs are trained at every layer."""

    name: str
    layers: int
    width: int  # of the queries of a layer, which equals that of the residual stream here
    mlp: int
    keys: int  # width of the keys of a layer
    vocabulary: int

    @property
    def block(self) -> int:
        """Weights of a layer."""
        return self.width * (2 * self.width + 2 * self.keys + 3 * self.mlp)

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers * self.block + 2 * self.vocabulary * self.width


SHAPES = (
    Shape(name="7B", layers=32, width=4096, mlp=14336, keys=1024, vocabulary=32000),
    Shape(name="70B", layers=80, width=8192, mlp=28672, keys=1024, vocabulary=128256),
)


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flops", type=float, default=3e14, help="operations a second, forward")
    parser.add_argument("--sae-share", type=float, default=0.25, help="share that SAEs reach of it")
    parser.add_argument("--link", type=float, default=25e9, help="bytes a second out of a GPU")
    parser.add_argument("--gpu-gib", type=int, default=80, help="memory of a GPU")
    parser.add_argument("--context-size", type=int, default=256, help="tokens of a row")
    parser.add_argument("--d-sae", type=int, default=1024, help="latents of each head")
    args = parser.parse_args()
    print("| model | GPUs | ranks | MB sent a token | us a token | times one rank | GiB a rank |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        one = needs(shape, 1, args)["us"]
        for gpus in (8, 64, 512):
            found = needs(shape, gpus, args)
            print(
                f"| {shape.name} | {gpus} | {found['ranks']:.0f} x {found['a_rank']:.0f} | "
                f"{found['MB']:.2f} | {found['us']:.3g} | {one / found['us']:.1f} | "
                f"{found['GiB']:.0f} |"
            )


def needs(shape: Shape, gpus: int, args: argparse.Namespace) -> dict[str, float]:
    """Return what a run on some GPUs needs, each rank with the fewest GPUs that hold its part.

    A rank of several GPUs runs its layers one after the other, as fast as one GPU. Queries are sent
    while the next batch runs, so a step takes the longer of sending and the forward pass, and the
    SAEs of the rank with the most layers.
    """
    batch = 16 * args.context_size  # tokens of a forward pass
    sae = 2 * args.d_sae * shape.width  # weights of the SAEs of a layer
    all_queries = 2 * shape.layers * shape.width  # bytes of a token in bfloat16
    a_rank = 0
    while True:
        a_rank += 1
        ranks = max(1, gpus // a_rank)
        own = ceil(shape.layers / ranks)
        waiting = 4 * batch * 2 * own * shape.width  # queries of a chunk of 64 rows
        sent = 4 * batch * all_queries * (ranks > 1)  # two groups, sent and received
        size = 2 * shape.weights + 16 * sae * own + waiting + sent
        if size < 0.9 * 2**30 * args.gpu_gib * a_rank:
            break
    forward = 2 * shape.layers * shape.block / args.flops / ranks
    send = all_queries * (ranks - 1) / ranks / ranks / args.link
    train = 6 * sae * own / (args.sae_share * args.flops)
    return {
        "ranks": ranks,
        "a_rank": a_rank,
        "MB": all_queries * (ranks - 1) / ranks / 1e6,
        "us": 1e6 * (max(forward, send) + train),
        "GiB": size / 2**30,
    }


if __name__ == "__main__":
    main()
