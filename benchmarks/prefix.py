"""What prompts that run once save: tables of patches, and sweeps over conditions.

    python -m benchmarks.prefix [--quick] [--rows NAME ...] [--json FILE] [--rounds N] [--threads N]

On SmolLM2, or with --quick on a random HookedTransformer (6 layers of width 256, 4,096 words), half
of the pairs and a quarter of the prompts of the sweep. HookedTransformer rotates all cached keys in
every pass and copies the cache for every patch, so that its ratios are lower. The tokens of the
prompts are random. Rows, in seconds:

- interchange: `interchange_effect` with every head at six layers, 16 pairs of 8 prompts of 70
  tokens, patches of the last one, against whole passes over the prompts. Both sides have the same
  pairs, 16 prompts a batch, logits of the patched tokens only, and read the queries of the sources
  and the next tokens of all prompts in the same way; ours counts the pass over the prompts. These
  passes bound the ratio: there must be many patches for a prompt. `equal`: within 1e-4.
- sweep: 12 prompts of 200 tokens, 24 new ones under 8 changes of a layer's queries: from prompts
  that run once in each round, on TransformerBridge with copies side by side, against `generate`
  for each change. `equal`: the same tokens.
- layers, heads (by name only): seconds of the whole table of 48 pairs, at all layers and with all
  heads too, beside those that are wanted. Not a row: there is no other side.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import sae_query_steer as sqs
from benchmarks.rounds import faster, seconds_of, show
from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.data.tokenized import TokenizedExample, TokenizedExamples
from sae_query_steer.diagnostics import trial
from sae_query_steer.learning import no_moves
from sae_query_steer.models.partial_passes import hooks_of_a_pass
from sae_query_steer.models.prefix import PrefixedRows, PromptCaches
from sae_query_steer.steering.side_by_side import SideBySide

PROMPT, LONG_PROMPT, NEW, N_CONDITIONS, N_PROMPTS, BATCH = 70, 200, 24, 8, 12, 16
WANTED = {"layers": 45.0, "heads": 300.0}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a random model")
    names = ["interchange", "sweep", *WANTED]
    parser.add_argument("--rows", nargs="+", choices=names, default=names[:2])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = random_model() if args.quick else sqs.load_smollm2()
    rounds, share = args.rounds or 1, 4 if args.quick else 1
    rows = []
    for name in args.rows:
        if name in WANTED:
            table = effects(model, 48, per_head=name == "heads")
            ((seconds, _),) = seconds_of(table, int, 1, warm_up=False)
            print(f"table of {name}, 48 pairs: {seconds:.1f} s, wanted {WANTED[name]:.0f}")
        else:
            measured = interchange if name == "interchange" else sweep
            rows.append(measured(model, rounds, share))
    if rows:
        show(rows, args.json)


def random_model() -> HookedTransformer:
    """Return the model of --quick."""
    config = HookedTransformerConfig(
        n_layers=6,
        d_model=256,
        n_heads=8,
        d_head=32,
        d_vocab=4096,
        n_ctx=LONG_PROMPT + NEW,
        act_fn="gelu",
        positional_embedding_type="rotary",
        rotary_dim=32,
        device="cpu",
    )
    return HookedTransformer(config)


def effects(
    model: Any, n_pairs: int, layers: range | None = None, *, n_prompts: int = 48, per_head: bool
) -> Callable[[], pd.DataFrame]:
    """Return what makes the table of some layers or all, of prompts with random tokens."""
    tokens = torch.randint(4, 4096, (n_prompts, PROMPT))
    made = [
        TokenizedExample(tokens=row, prompt_length=PROMPT, label="ab"[i % 2])
        for i, row in enumerate(tokens)
    ]
    examples = TokenizedExamples(examples=made, span=sqs.LastPromptToken(), batch_size=BATCH)
    sites = sqs.query_sites(model, layers)
    return lambda: sqs.diagnostics.interchange_effect(
        model, sites, examples, n_pairs=n_pairs, per_head=per_head
    )


class WholeRows(PrefixedRows):
    """Rows of which every pass runs all tokens through all layers."""

    def unchanged(self, rows: Any, positions: Any, layers: Any, **_: Any) -> Any:
        """Return log probabilities, and keep nothing."""
        del layers
        return super().unchanged(rows, positions, ())


def whole_rows(model: Any, batch: TokenBatch, mask: Any) -> WholeRows:
    """Stand for `prefixed_rows`."""
    del mask
    return WholeRows(model, batch, torch.zeros_like(batch.lengths))


def interchange(model: Any, rounds: int, share: int) -> dict[str, Any]:
    """Return the row of the table of patches."""
    layers = range(0, int(model.cfg.n_layers), int(model.cfg.n_layers) // 6)
    n_pairs = BATCH if share == 1 else BATCH // 2
    ours = effects(model, n_pairs, layers, n_prompts=8, per_head=True)
    found = {}

    def kept() -> None:
        found["ours"] = ours()

    def whole() -> None:
        with patch.multiple(trial, prefixed_rows=whole_rows, PASS_TOKENS=0):
            found["other"] = ours()

    pairs = seconds_of(kept, whole, rounds, warm_up=False)
    both = [table.drop(columns="head").astype(float) for table in found.values()]
    equal = bool((both[0] - both[1]).abs().max().max() < 1e-4)
    return faster("interchange_effect, prompts of 70 tokens", pairs, equal=equal)


def sweep(model: Any, rounds: int, share: int) -> dict[str, Any]:
    """Return the row of the sweep."""
    n_prompts = N_PROMPTS // share
    tokens = torch.randint(4, 4096, (n_prompts, LONG_PROMPT))
    lengths = torch.full((n_prompts,), LONG_PROMPT)
    batch = TokenBatch(
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=lengths,
        labels=("",) * n_prompts,
        indices=tuple(range(n_prompts)),
    )
    steerers, found = list(map(partial(offset, model), range(N_CONDITIONS))), {}

    def kept() -> None:
        caches = PromptCaches(model, 2**31)
        some = caches.rows(batch)
        some.unchanged(torch.arange(n_prompts), lengths - 1, (), copies=True)
        if some.shares_cache:
            copies = some.repeated(N_CONDITIONS)
            with hooks_of_a_pass(model, SideBySide(steerers, copies).hooks()):
                found["ours"] = copies.generate(NEW, ()).split(n_prompts)
            return
        found["ours"] = []
        for steerer in steerers:
            with steerer.apply(model, prompt_lengths=lengths.tolist()):
                found["ours"].append(caches.rows(batch).generate(NEW, ()))

    def anew() -> None:
        found["other"] = []
        for steerer in steerers:
            with steerer.apply(model):
                written = model.generate(
                    tokens,
                    max_new_tokens=NEW,
                    do_sample=False,
                    stop_at_eos=False,
                    prepend_bos=False,
                    return_type="tokens",
                    verbose=False,
                )
            found["other"].append(written[:, LONG_PROMPT:])

    pairs = seconds_of(kept, anew, rounds, warm_up=rounds > 1)
    equal = all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))
    name = f"sweep of {N_CONDITIONS} conditions, {n_prompts} x (200 + 24) tokens"
    return faster(name, pairs, equal=equal)


def offset(model: Any, strength: int) -> sqs.LatentGradientSteerer:
    """Return a steerer that adds a constant to the queries of a layer at every new token."""
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [3]))
    moves = no_moves(model, encoders, ["a", "b"])
    ((name, mean),) = moves.means.items()
    generator = torch.Generator().manual_seed(0)
    return sqs.LatentGradientSteerer(
        encoders,
        replace(moves, means={name: torch.randn(mean.shape, generator=generator)}),
        target="a",
        objective=sqs.objectives.FixedMove(),
        n_steps=1,
        step_size=float(strength),
        scope=sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
    )


if __name__ == "__main__":
    main()
