"""`import sae_query_steer` makes its architectures known to SAELens, whichever comes first."""

import os
import subprocess
import sys

import pytest
from sae_cases import CONFIGS, trained_like

from sae_query_steer.sae import to_inference

ORDERS = {
    "ours first": "import sys, sae_query_steer\nassert 'sae_lens' not in sys.modules\n",
    "theirs first": "import sys, sae_lens, sae_query_steer\n",
}

LOADS = """
from pathlib import Path
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders

def downloaded(repo_id, filename, **_):
    path = Path(sys.argv[1], Path(filename).name)
    if not path.is_file():
        raise EntryNotFoundError(filename)
    return path

loaders.hf_hub_download = downloaded
for sae in (SAE.load_from_disk(sys.argv[1]), SAE.from_pretrained("someone/saes", "layer")):
    assert type(sae).__name__ == "QueryHeadTopKSAE", type(sae)
    assert float(sae.W_enc.detach().sum()) == float(sys.argv[2])
"""

TRAINS = """
import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from transformer_lens.model_bridge import TransformerBridge
import sae_query_steer as sqs
runner = LanguageModelSAETrainingRunner(
    LanguageModelSAERunnerConfig(
        sae=sqs.sae.QueryHeadTopKTrainingSAEConfig(n_heads=4, d_head=8, d_sae_per_head=16, k=3),
        hook_name="blocks.1.attn.hook_q",
        output_path=f"{sys.argv[4]}/out",
        checkpoint_path=f"{sys.argv[4]}/checkpoints",
        model_name="tiny",
        dataset_path="",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=16,
        training_tokens=512,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        logger=LoggingConfig(log_to_wandb=False),
    ),
    override_dataset=[{"tokens": row} for row in torch.randint(4, 52, (400, 16)).tolist()],
    override_model=TransformerBridge.boot_transformers(sys.argv[3], device="cpu"),
)
assert type(runner.run()).__name__ == "QueryHeadTopKTrainingSAE"
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_saelens_loads_and_trains_our_saes(order, tiny_folder, tmp_path):
    sae = to_inference(trained_like(CONFIGS["topk"]))
    sae.save_model(tmp_path / "sae")
    arguments = (tmp_path / "sae", float(sae.W_enc.sum()), tiny_folder, tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            ORDERS[order] + LOADS + TRAINS,
            *map(str, arguments),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
