"""What steering costs: greedy generation, steered by each way of the descent, against none.

    python -m benchmarks.steering [--quick] [--json FILE] [--plot FILE] [--rounds N] [--threads N]

A random model (6 layers of width 256, 8 heads of 32, rotary), SAEs of 512 latents a head of which
16 fire, six random centroids; 128 tokens (32 with --quick) after a prompt of 16, every one of them
steered. All sides run in this process, each right after a run of plain generation, with which it is
compared: shared machines change their speed within seconds. "ours" and "other" are tokens per
second, the ratio is ours / other, its median over rounds with its range; a first round does not
count. `equal` says that in this run the logits of the way were within 1e-3 of those of the same
objective whose gradient comes from autograd, step by step.

Rows "attention target" steer two of six layers of a random model as wide as SmolLM2-135M (9 heads
of 64 over 3, a fifth of its layers and words) with SAEs of 256 latents a head: 10 steps towards
eight tokens of prompts of 100, 32 new tokens (12 with --quick), at the last prompt token alone, and
at every token after it too. Both sides read the prompt.

Rows "until" and "radius" compare descents of 50 steps at one token and layer, in seconds, with the
loop that takes the same steps one by one; `equal` then says that latents are within 1e-5.

Rows "added time" compare how much longer a token takes than unsteered, in shares of plain
generation: of the autograd loop over ours, as "ratio".
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import plotly.express as px
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_query_steer as sqs
from benchmarks.rounds import faster, row_of, seconds_of, show
from sae_query_steer.descent.control import Bounds
from sae_query_steer.descent.goals import Goal
from sae_query_steer.descent.loop import fast_descent, plain_descent
from sae_query_steer.sae import QueryHeadTopKSAE, QueryHeadTopKSAEConfig
from sae_query_steer.scopes.positions import Scope
from sae_query_steer.steering import AttentionSteerer, LookAt
from sae_query_steer.storage.folders import new_file
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import take_fingerprint

N_LAYERS, N_HEADS, D_HEAD, D_SAE, K = 6, 8, 32, 512, 16
PROMPT, NEW, QUICK_NEW, SWEEP_NEW, LAYER = 16, 128, 32, 16, 3
CLASSES = ("remember", "understand", "apply", "analyze", "evaluate", "create")
SCOPE = sqs.LastPromptToken() | sqs.scopes.ResponseTokens()


LOOK_PROMPT, LOOK_NEW, QUICK_LOOK_NEW, LOOK_LAYERS = 100, 32, 12, (3, 4)


class ByAutograd(QueryHeadTopKSAE):
    """An SAE with a decoder of its own, which is not looked into: steps take autograd."""

    def linear_decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the inherited decoding."""
        return super().linear_decode(latents)


class Unbounded(QueryHeadTopKSAE):
    """An SAE whose latents may go below zero: what the way without projection needs."""

    latent_min: ClassVar[float | None] = None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the rows that decide")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="file for a figure of cost against steps")
    parser.add_argument("--rounds", type=int, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.rounds or (2 if args.quick else 5), QUICK_NEW if args.quick else NEW)
    rows = bench.compare([LAYER], 1, 50, with_autograd=True)
    rows.append(bench.sweep(1 if args.quick else bench.rounds))
    rows += bench.controls()
    for batch in (1,) if args.quick else (1, 8):
        rows += attention_rows(batch, bench.rounds, quick=args.quick)
    if not args.quick:
        everywhere = list(range(N_LAYERS))
        for n_steps in (1, 10, 200):
            rows += bench.compare([LAYER], 1, n_steps)
        for layers, batch in (([LAYER], 16), (everywhere, 1), (everywhere, 16)):
            rows += bench.compare(layers, batch, 50)
    show(rows, args.json)
    if args.plot:
        table = pd.DataFrame(rows)
        found = table["name"].str.extract(r"(?P<way>.*), 1 layer, batch 1, (?P<steps>\d+) steps$")
        shown = table.join(found).dropna(subset=["steps"])
        shown["steps"] = shown["steps"].astype(int)
        figure = px.line(
            shown.sort_values("steps"),
            x="steps",
            y="ratio_median",
            color="way",
            log_x=True,
            markers=True,
            labels={"ratio_median": "speed, as a share of plain generation"},
        )
        with new_file(args.plot) as new:
            figure.write_html(new)


def attention_rows(batch: int, rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Return the rows of attention targets; with `quick` of few tokens, and none by autograd."""
    new = QUICK_LOOK_NEW if quick else LOOK_NEW
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=6,
            d_model=576,
            n_heads=9,
            n_key_value_heads=3,
            d_head=64,
            d_mlp=1536,
            gated_mlp=True,
            d_vocab=9830,
            n_ctx=LOOK_PROMPT + LOOK_NEW,
            act_fn="silu",
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=64,
            device="cpu",
        )
    )
    config = QueryHeadTopKSAEConfig(
        n_heads=9, d_head=64, d_sae_per_head=256, k=K, rescale_acts_by_decoder_norm=False
    )
    fast, slow = {}, {}
    for site in sqs.query_sites(model, LOOK_LAYERS):
        fast[site.hook_name], slow[site.hook_name] = QueryHeadTopKSAE(config), ByAutograd(config)
        slow[site.hook_name].load_state_dict(fast[site.hook_name].state_dict())
    prompts = torch.randint(0, 9830, (batch, LOOK_PROMPT))
    look = LookAt(sqs.scopes.AtPositions([list(range(40, 48))] * batch))

    def generate(n_new: int = new, **changes: Any) -> Any:
        return model.generate(
            prompts,
            max_new_tokens=n_new,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            prepend_bos=False,
            **changes,
        )

    def steered(encoders: Any, scope: Scope, *given: int, **changes: Any) -> Any:
        with AttentionSteerer(encoders, look, scope=scope).apply(model):
            return generate(*given, **changes)

    rows = []
    for name, scope in (("every token", SCOPE), ("last prompt token", sqs.LastPromptToken())):
        logits = [
            torch.stack(steered(saes, scope, 3, return_type="tokens", output_logits=True).logits)
            for saes in (fast, slow)
        ]
        equal = bool((logits[0] - logits[1]).abs().max() < 1e-3)
        for way, saes in (("closed form", fast), ("autograd", slow))[: 1 if quick else 2]:
            times = seconds_of(partial(steered, saes, scope), generate, rounds)
            rows.append(
                speeds(
                    f"attention target, {way}, {name}, batch {batch}",
                    [batch * new / ours for ours, _ in times],
                    [batch * new / bare for _, bare in times],
                    equal,
                )
            )
    return rows


def speeds(name: str, ours: list[float], other: list[float], equal: bool) -> dict[str, Any]:
    """Return the row of two speeds."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return row_of(name, ours, other, ratios, equal=equal)


class Bench:
    """The model, its SAEs and centroids, and the clock.

    Args:
        rounds: measured rounds.
        new: tokens to generate.
    """

    def __init__(self, rounds: int, new: int) -> None:
        self.rounds, self.new = rounds, new
        torch.manual_seed(0)
        self.model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=N_LAYERS,
                d_model=N_HEADS * D_HEAD,
                n_heads=N_HEADS,
                d_head=D_HEAD,
                d_vocab=4096,
                n_ctx=PROMPT + NEW,
                act_fn="gelu",
                positional_embedding_type="rotary",
                rotary_dim=D_HEAD,
                device="cpu",
            )
        )
        sites = sqs.query_sites(self.model)
        config = QueryHeadTopKSAEConfig(
            n_heads=N_HEADS,
            d_head=D_HEAD,
            d_sae_per_head=D_SAE,
            k=K,
            rescale_acts_by_decoder_norm=False,  # folded, as training leaves it
        )
        self.saes = {site.hook_name: QueryHeadTopKSAE(config) for site in sites}
        self.unbounded = {name: Unbounded(config) for name in self.saes}
        for name, sae in self.saes.items():
            self.unbounded[name].load_state_dict(sae.state_dict())
        self.prompts = torch.randint(0, 4096, (16, PROMPT))
        self.targets = self._targets()

    def _targets(self) -> CentroidTargets:
        """Return random centroids, as sparse as means over a class are."""
        means = {}
        for name in self.saes:
            mean = torch.rand(len(CLASSES), N_HEADS, D_SAE)
            means[name] = mean * (torch.rand_like(mean) < 0.3)
        return CentroidTargets(
            classes=CLASSES,
            means=means,
            variances={name: mean * 0.1 for name, mean in means.items()},
            counts=torch.full((len(CLASSES),), 100),
            span="random",
            fingerprint=take_fingerprint(self.model, self.saes),
        )

    def steerer(
        self, way: str, layers: list[int], n_steps: int, **changes: Any
    ) -> sqs.LatentGradientSteerer:
        """Return the steerer of a way."""
        objective: sqs.objectives.Objective = sqs.PrototypeLogLikelihood()
        encoders: Any = self.saes
        if way.startswith("closed form"):
            objective = sqs.SquaredDistance()
        if way.startswith("Gram"):
            encoders = self.unbounded
        if way.endswith("autograd"):
            objective = sqs.objectives.AutogradObjective(objective.loss)
        return sqs.LatentGradientSteerer(
            encoders,
            self.targets,
            objective=objective,
            n_steps=n_steps,
            scope=SCOPE,
            layers=layers,
            **{"target": "create", "step_size": 0.02, **changes},
        )

    def mean_difference(self, layers: list[int]) -> Callable[[int], None]:
        """Return the cheapest steer there is: a bare hook that adds a constant."""
        added = torch.randn(N_HEADS, D_HEAD) * 0.1

        def add(q: torch.Tensor, hook: Any) -> torch.Tensor:
            del hook
            return q + added

        hooks: list[Any] = [(f"blocks.{n}.attn.hook_q", add) for n in layers]

        def run(batch: int) -> None:
            with self.model.hooks(fwd_hooks=hooks):
                self.generate(batch)

        return run

    def generate(self, batch: int, **changes: Any) -> Any:
        """Generate greedily."""
        given = {"max_new_tokens": self.new, "do_sample": False, "verbose": False}
        return self.model.generate(
            self.prompts[:batch], stop_at_eos=False, prepend_bos=False, **{**given, **changes}
        )

    def steered(self, steerer: sqs.LatentGradientSteerer) -> Callable[[int], None]:
        """Return what generates with a steerer in place."""

        def run(batch: int) -> None:
            with steerer.apply(self.model):
                self.generate(batch)

        return run

    def logits(self, steerer: sqs.LatentGradientSteerer) -> torch.Tensor:
        """Return the logits of the first steered steps."""
        with steerer.apply(self.model):
            output = self.generate(2, max_new_tokens=4, return_type="tokens", output_logits=True)
        return torch.stack(output.logits)

    def compare(
        self, layers: list[int], batch: int, n_steps: int, *, with_autograd: bool = False
    ) -> list[dict[str, Any]]:
        """Return the rows of one setting."""
        sides: dict[str, Callable[[int], Any]] = {"plain": self.generate}
        equal = {"mean difference by a bare hook": True}
        sides["mean difference by a bare hook"] = self.mean_difference(layers)
        for way in ("closed form", "Gram", "projected loop"):
            steerer = self.steerer(way, layers, n_steps)
            sides[way] = self.steered(steerer)
            slow = self.logits(self.steerer(f"{way} by autograd", layers, n_steps))
            difference = (self.logits(steerer) - slow).abs().max()
            equal[way] = bool(difference < 1e-3)
        if with_autograd:
            sides["autograd loop"] = self.steered(
                self.steerer("projected loop by autograd", layers, n_steps)
            )
            equal["autograd loop"] = True
        plain = sides.pop("plain")
        pairs = {
            name: seconds_of(partial(run, batch), partial(plain, batch), self.rounds)
            for name, run in sides.items()
        }
        where = f"{len(layers)} layer{'s' * (len(layers) > 1)}, batch {batch}, {n_steps} steps"
        rows = [
            speeds(
                f"{name}, {where}",
                [batch * self.new / ours for ours, _ in times],
                [batch * self.new / bare for _, bare in times],
                equal[name],
            )
            for name, times in pairs.items()
        ]
        if with_autograd:
            added = {
                name: [ours / bare - 1 for ours, bare in times] for name, times in pairs.items()
            }
            slow = statistics.median(added["autograd loop"])
            for name in ("closed form", "Gram", "projected loop"):
                row = speeds(
                    f"added time: autograd loop over {name}, {where}",
                    added[name],
                    added["autograd loop"],
                    equal[name],
                )
                # Of medians: in a single round noise may be all that a fast way adds.
                more = statistics.median(added[name])
                ratio = slow / more if more > 0 else None
                rows.append(row | {"ratio_median": ratio, "ratio_min": None, "ratio_max": None})
        return rows

    def sweep(self, rounds: int) -> dict[str, Any]:
        """Return the row of 6 targets x 4 strengths as one batch against one by one."""
        cases = [(target, size) for target in CLASSES for size in (0.01, 0.02, 0.05, 0.1)]
        prompt = self.prompts[:1]
        one = [
            self.steerer("projected loop", [LAYER], 10, target=target, step_size=size)
            for target, size in cases
        ]
        together = self.steerer(
            "projected loop",
            [LAYER],
            10,
            target=[target for target, _ in cases],
            step_size=[size for _, size in cases],
        )

        def apart(_: int) -> list[Any]:
            found = []
            for steerer in one:
                with steerer.apply(self.model):
                    found.append(self._of(prompt))
            return found

        def joined(_: int) -> Any:
            with together.apply(self.model):
                return self._of(prompt.repeat(len(cases), 1))

        equal = all(torch.equal(a[0], b) for a, b in zip(apart(0), joined(0), strict=True))
        pairs = seconds_of(partial(joined, 0), partial(apart, 0), rounds, warm_up=rounds > 1)
        return speeds(
            "6 targets x 4 strengths, one batch against one by one",
            [len(cases) * SWEEP_NEW / ours for ours, _ in pairs],
            [len(cases) * SWEEP_NEW / other for _, other in pairs],
            equal,
        )

    def controls(self) -> list[dict[str, Any]]:
        """Return the rows of descents that end at a posterior or a trust radius."""
        sae_like = (30 * (torch.rand(1, N_HEADS, D_SAE) - 0.97)).relu()
        goal = Goal.towards(self.targets.means[f"blocks.{LAYER}.attn.hook_q"], 5).prepared()
        rows = []
        objectives = (sqs.SquaredDistance(), sqs.objectives.CentroidContrast())
        controls = (Bounds(until=0.9), Bounds(radius=0.5, lower=None))
        for objective, bounds in product((*objectives, sqs.PrototypeLogLikelihood()), controls):
            size = 0.012 if objective not in objectives else 0.006
            given = (sae_like, goal, objective, 50, size, bounds)
            fast, loop = partial(fast_descent, *given), partial(plain_descent, *given)
            found = fast()
            equal = found is not None and bool((found - loop().z).abs().max() < 1e-5)
            name = "until" if bounds.radius is None else "radius"
            pairs = seconds_of(fast, loop, 20 * self.rounds)
            rows.append(faster(f"{name}, {objective!r}, 50 steps", pairs, equal=equal))
        return rows

    def _of(self, tokens: torch.Tensor) -> Any:
        return self.model.generate(
            tokens,
            max_new_tokens=SWEEP_NEW,
            do_sample=False,
            verbose=False,
            stop_at_eos=False,
            prepend_bos=False,
            return_type="tokens",
        )


if __name__ == "__main__":
    main()
