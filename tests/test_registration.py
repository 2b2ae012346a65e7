"""`import sae_query_steer` makes its architectures known to SAELens, whichever comes first."""

import os
import subprocess
import sys

import pytest
from sae_cases import CONFIGS, randn, trained_like

from sae_query_steer.sae import split_heads, to_inference
from sae_query_steer.storage.tensors import write_tensors

OURS_FIRST = """
import sys
import sae_query_steer
assert "sae_lens" not in sys.modules
"""

THEIRS_FIRST = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file
from sae_lens import SAE

expected = load_file(Path(sys.argv[5], "expected.safetensors"))
for head in range(3):  # single heads, exported by split_heads, need no package of ours
    sae = SAE.load_from_disk(Path(sys.argv[5], str(head)))
    assert type(sae).__module__.startswith("sae_lens."), type(sae)
    x = expected["queries"][:, head].contiguous()
    for name, got in (("latents", sae.encode(x)), ("reconstructions", sae(x))):
        torch.testing.assert_close(got, expected[name][:, head], rtol=0, atol=1e-5)
assert not any(name.startswith("sae_query_steer") for name in sys.modules)
import sae_query_steer
"""

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
@pytest.mark.parametrize("first", [OURS_FIRST, THEIRS_FIRST], ids=["ours first", "theirs first"])
def test_saelens_loads_and_trains_our_saes(first, tiny_folder, tmp_path):
    sae, queries = to_inference(trained_like(CONFIGS["topk"])), randn(40, 3, 6)
    sae.save_model(tmp_path / "sae")
    for head, one in enumerate(split_heads(sae)):
        one.save_model(tmp_path / "heads" / str(head))
    latents = sae.encode(queries)
    tensors = {"queries": queries, "latents": latents, "reconstructions": sae.decode(latents)}
    write_tensors(tmp_path / "heads" / "expected.safetensors", tensors)
    arguments = (tmp_path / "sae", float(sae.W_enc.sum()), tiny_folder, tmp_path)
    script = first + LOADS + TRAINS
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments), tmp_path / "heads"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
