"""SAELens alone loads every head of a bundle and scores it; where this package is not installed.

Usage: python plain_check.py BUNDLE MODEL, two folders.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge


def main() -> None:
    """Load, score, and compare with the metrics that the bundle tells."""
    assert importlib.util.find_spec("sae_query_steer") is None
    bundle, folder = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model = TransformerBridge.boot_transformers(folder, device="cpu")
    rows = torch.randint(4, 52, (16, 16), generator=torch.Generator().manual_seed(3)).tolist()
    told = json.loads((bundle / "layers" / "query_saes.json").read_text())["metrics"]
    paths = sorted((bundle / "heads").iterdir())
    assert len(paths) == len(told), (paths, told)
    for path in paths:
        sae = SAE.load_from_disk(path)
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=[{"tokens": row} for row in rows],
            streaming=False,
            store_batch_size_prompts=8,
            context_size=16,
        )
        scores, _ = run_evals(
            sae,
            store,
            model,
            ActivationScaler(),
            EvalConfig(
                batch_size_prompts=8,
                n_eval_sparsity_variance_batches=2,
                compute_l2_norms=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
            ),
            exclude_special_tokens=False,
        )
        head = int(path.name.rsplit(".", 1)[1])
        assert sae.cfg.metadata.hook_head_index == head
        layer = int(path.name.split(".")[1])
        row = next(r for r in told if (r["layer"], r["head"]) == (layer, head))
        l0 = scores["sparsity"]["l0"]
        assert abs(l0 - row["l0"]) < 0.05 * row["l0"], (path.name, l0, row)
        variance = scores["reconstruction_quality"]["explained_variance"]
        assert abs(variance - row["explained_variance"]) < 0.25, (path.name, variance, row)
        assert "sae_query_steer" not in sys.modules
    sys.stdout.write(f"SAELens alone read and scored the SAEs of {len(paths)} heads\n")


if __name__ == "__main__":
    main()
