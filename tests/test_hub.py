"""Bundles over HTTP: to a hub on loopback and back, then from its cache without any network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Repository, running_hub

import sae_query_steer as sqs

pytestmark = pytest.mark.slow

# What `huggingface_hub` and SAELens settle when they are imported needs processes of their own.
ONLINE = """
import sys
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from sae_lens import SAE
import sae_query_steer as sqs

folder, second, model = sys.argv[1:]
sent = sqs.hub.push_to_hub(folder, "alice/bundle", private=True)
assert sent.url.startswith(HUB), sent.url
tutor = sqs.load_model(model, device="cpu")
here, there = sqs.hub.load_bundle(folder), sqs.from_pretrained("alice/bundle", model=tutor)
for name, sae in here.saes.items():
    for key, value in sae.state_dict().items():
        assert torch.equal(there.saes[name].state_dict()[key], value)
    assert torch.equal(there.targets.means[name], here.targets.means[name])
    assert torch.equal(there.targets.variances[name], here.targets.variances[name])
    assert torch.equal(there.fingerprint.queries[name], here.fingerprint.queries[name])
assert there.steerer.step_size == here.steerer.step_size
try:
    sqs.from_pretrained("alice/bundle", model=sqs.load_tutor())
except ValueError as error:
    assert "in the bundle" in str(error) and "here:" in str(error)
else:
    raise AssertionError("another model was accepted")
for index in range(8):
    layer, head = (0, 2)[index // 4], index % 4
    name = f"blocks.{layer}.attn.hook_q"
    plain = SAE.from_pretrained("alice/bundle", f"heads/{name}.{head}")
    assert torch.equal(plain.W_dec, here.saes[name].W_dec[head])
sqs.hub.push_to_hub(second, "alice/second")
sqs.hub.push_to_hub(folder, "alice/second", message="more of it")
sqs.hub.push_to_hub(second, "alice/second", message="less of it")
sqs.hub.push_to_hub(folder, "alice/second", revision="v2", message="elsewhere")
assert sqs.from_pretrained("alice/second").steerer is None
assert sqs.from_pretrained("alice/second", revision="v2").steerer is not None

def refused(kind, call, *said):
    try:
        call()
    except kind as error:
        assert all(text in str(error) for text in said), str(error)
    else:
        raise AssertionError(f"{said} was accepted")

refused(ValueError, lambda: sqs.from_pretrained("alice/oversized"),
        "steerer.json of alice/oversized has", "nothing was fetched")
refused(ValueError, lambda: sqs.from_pretrained("alice/huge"),
        "bundle.json of alice/huge has 16777217 bytes")
refused(ValueError, lambda: sqs.from_pretrained("alice/upwards"),
        "bundle.json is damaged", "got '../up.json'")
refused(FileExistsError, lambda: sqs.hub.push_to_hub(folder, "alice/theirs"),
        "alice/theirs holds 2 other files, such as heads/their_work.bin, and no bundle")
refused(FileExistsError, lambda: sqs.hub.push_to_hub(folder, "alice/theirs", revision="v2"),
        "and no bundle")
refused(ValueError, lambda: sqs.hub.push_to_hub(folder, "alice/second", private=True),
        "alice/second exists and is public: nothing was sent")
refused(FileNotFoundError, lambda: sqs.from_pretrained("alice/theirs"), "is no bundle")
refused(RepositoryNotFoundError, lambda: sqs.from_pretrained("alice/nobody"), "404")
refused(HfHubHTTPError, lambda: sqs.hub.push_to_hub(folder, "alice/new", token="wrong"), "401")
print("equal, and the rest refused")
"""

OFFLINE = """
import sys
from pathlib import Path
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_saes_directory as directory
assert "sae_query_steer" not in sys.modules

folder, entry, copy = sys.argv[1:]
# A copy of SAELens's registry, with our block at its end.
registry = Path(directory.__file__).parents[1] / "pretrained_saes.yaml"
Path(copy, registry.name).write_text(registry.read_text() + Path(entry).read_text())
directory.files = lambda package: Path(copy)
released = {}
for head in range(4):
    name = f"blocks.2.attn.hook_q.{head}"
    released[head] = SAE.from_pretrained("tiny-llama-queries", name)
    assert released[head].cfg.metadata.hook_head_index == head
found = directory.get_pretrained_saes_directory()["tiny-llama-queries"]
assert found.expected_l0["blocks.2.attn.hook_q.3"] == 3.0
assert 0 < found.expected_var_explained["blocks.2.attn.hook_q.3"] < 1
assert "sae_query_steer" not in sys.modules

import sae_query_steer as sqs
here, there = sqs.hub.load_bundle(folder), sqs.from_pretrained("alice/bundle")
for name, sae in here.saes.items():
    for key, value in sae.state_dict().items():
        assert torch.equal(there.saes[name].state_dict()[key], value)
    assert torch.equal(there.targets.means[name], here.targets.means[name])
for head, plain in released.items():
    assert torch.equal(plain.W_enc, there.saes["blocks.2.attn.hook_q"].W_enc[head])
print("equal without a network")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_models, saes, targets):
    """Two bundles: of all, and of SAEs alone."""
    root = tmp_path_factory.mktemp("hub")
    model = tiny_models["bridge"]
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=0.625
    )
    sqs.hub.save_bundle(root / "bundle", model, saes, steerer=steerer)
    sqs.hub.save_bundle(root / "second", model, saes)
    return root


def run(code: str, *arguments: object, hub_url: str, home: Path, **variables: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"HUB = {hub_url!r}\n{code}", *map(str, arguments)],
        env=env | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def offered(**files: bytes) -> Repository:
    """What another owner may have put on the hub."""
    repository = Repository()
    repository.commit(files, "by another")
    return repository


def test_a_bundle_goes_to_the_hub_and_comes_back_equal(folders, tiny_folder, tmp_path):
    home, bundle = tmp_path / "home", folders / "bundle"
    here = contents(bundle)
    with running_hub() as hub:
        upwards = here["bundle.json"].replace(b'"steerer.json"', b'"../up.json"')
        hub.repositories |= {
            "alice/oversized": offered(**here | {"steerer.json": here["steerer.json"] + b" " * 99}),
            "alice/huge": offered(**{"bundle.json": b" " * (16 * 2**20 + 1)}),
            "alice/theirs": offered(**{"heads/their_work.bin": b"1", "steerer.json": b"{}"}),
            "alice/upwards": offered(**{"bundle.json": upwards}),
        }
        arguments = (bundle, folders / "second", tiny_folder)
        said = run(ONLINE, *arguments, hub_url=hub.url, home=home, HF_TOKEN=hub.token)
        assert "equal, and the rest refused" in said

        there = hub.repositories["alice/bundle"]
        assert there.private
        files = there.commits[there.head]
        assert {n: c for n, c in files.items() if n != "README.md"} == {
            n: c for n, c in here.items() if n != "README.md"
        }
        assert b"alice/bundle" in files["README.md"]
        assert b"USER/REPOSITORY" not in files["README.md"]
        assert len(there.commits) == 2  # the first, empty one, and one with everything

        second = hub.repositories["alice/second"]
        n = [len(commit) for commit in second.commits.values()]
        assert second.messages[2:] == ["more of it", "less of it", "elsewhere"]
        assert n == [0, n[1], n[1] + 3, n[1], n[1] + 3]  # parts that it lacks are deleted
        theirs = hub.repositories["alice/theirs"]
        assert theirs.messages == ["by another"]
        assert list(theirs.branches) == ["main"]
        assert "steerer.json" not in second.commits[second.head]

        asked = [line for line in hub.asked if line.startswith("GET")]
        assert not any("oversized" in line and line.endswith("steerer.json") for line in asked)
        assert not any("huge" in line and line.endswith("bundle.json") for line in asked)
        assert "alice/new" not in hub.repositories

    entry = tmp_path / "entry.yaml"
    text = sqs.hub.registry_entry(bundle, release="tiny-llama-queries", repo_id="alice/bundle")
    entry.write_text(text)
    (tmp_path / "registry").mkdir()
    said = run(
        OFFLINE,
        *(bundle, entry, tmp_path / "registry"),
        hub_url=hub.url,
        home=home,
        HF_HUB_OFFLINE="1",
    )
    assert "equal without a network" in said
