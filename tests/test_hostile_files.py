"""Files from elsewhere: refused by name and reason, or usable; never more read than is allowed."""

import json
import os
import struct
import time
from pathlib import Path

import psutil
import pytest
import torch
from hostile_files import limits, outcome
from hostile_kinds import HOOKS, KINDS, some_saes, some_targets
from safetensors.torch import load_file, save_file

import sae_query_steer as sqs
from sae_query_steer.storage.folders import inside, new_folder
from sae_query_steer.storage.records import MAX_DEPTH, MAX_JSON, read_json, write_json
from sae_query_steer.storage.tensors import MAX_HEADER, read_shapes, read_tensors

CASES = int(os.environ.get("SAE_QUERY_STEER_FUZZ", "60"))
"""Mutated folders of each kind."""


@pytest.fixture(autouse=True)
def as_users_run_it(untyped):
    """Without the tests' type checks, whose errors users never see."""


@pytest.fixture
def folders(tmp_path):
    """A sound folder of each kind."""
    for kind, (make, _) in KINDS.items():
        make(tmp_path / kind, 0)
    return tmp_path


def load(folder: Path):
    kinds = {
        "saes": sqs.QuerySAEs.load,
        "targets": sqs.CentroidTargets.load,
        "steerer": sqs.steering.load_steerer,
        "bundle": sqs.hub.load_bundle,
    }
    return kinds[folder.name](folder)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def bytes_read() -> int:
    return psutil.Process().io_counters().read_chars


@pytest.mark.parametrize(
    "kind", sorted(KINDS.keys() - {"bundle", "texts"})
)  # bundle: tests/test_publish.py
def test_what_nobody_touched_is_read_and_written_again_as_it_was(tmp_path, kind):
    make, read = KINDS[kind]
    for number in range(6):
        one, two = tmp_path / str(number), tmp_path / f"{number}-again"
        make(one, number)
        read(one, two)
        files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
        assert len(files) > 1
        for file in files:
            if file.suffix == ".json":
                assert json.loads((one / file).read_text()) == json.loads((two / file).read_text())
            else:
                a, b = load_file(one / file), load_file(two / file)
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_broken_folders_are_usable_or_refused_and_nothing_else(tmp_path, kind):
    found = [outcome(kind, number, 2, tmp_path) for number in range(CASES)]
    assert [why for how, why in found if how == "crashed"] == []
    assert not [why for how, why in found if how == "refused" and str(tmp_path) not in why]
    assert {how for how, _ in found} == {"loaded", "refused"}


JSON_FILES = ("saes/query_saes.json", f"saes/{HOOKS[0]}/cfg.json", "targets/centroids.json")
TENSOR_FILES = (f"saes/{HOOKS[0]}/sae_weights.safetensors", "targets/centroids.safetensors")
FILES = (*JSON_FILES, *TENSOR_FILES, "steerer/steerer.json")


@pytest.mark.parametrize("name", (*JSON_FILES, "steerer/steerer.json"))
def test_json_that_is_too_large_is_refused_before_it_is_read(folders, name):
    os.truncate(folders / name, 2**40)  # a hole: it takes no room
    before = bytes_read()
    with pytest.raises(
        ValueError, match=rf"{name} has {2**40} bytes, JSON files must have at most {MAX_JSON}"
    ):
        load(folders / name.split("/")[0])
    assert bytes_read() - before < 4 * MAX_JSON


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensors_larger_than_the_memory_are_refused_before_they_are_read(folders, name):
    path, length = folders / name, 2**41
    key = "W_enc" if "W_enc" in load_file(path) else f"mean.{HOOKS[0]}"
    shapes = {
        n: (d, s) for n, (d, s) in read_shapes(path.parent, path.name).items() if n != key
    } | {key: ("F32", (3, 6, 2**40 // 72 * 2))}
    header, end = {}, 0
    for n, (dtype, shape) in shapes.items():
        size = {"F32": 4, "I64": 8}[dtype] * int(torch.tensor(shape).prod())
        header[n] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    assert end > length, "more than any machine that runs this"
    before, start = bytes_read(), time.perf_counter()
    with pytest.raises(ValueError, match="GiB of memory are free"), limits():
        load(folders / name.split("/")[0])
    assert bytes_read() - before < 2**20
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["pipe", "device", "loop", "folder"])
def test_what_is_no_regular_file_is_refused_and_blocks_nothing(folders, name, what):
    path = folders / name
    path.unlink()
    match what:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case _:
            path.mkdir()
    error, text = {
        "pipe": (ValueError, "is a pipe, a device or a socket"),
        "device": (ValueError, "is a link to /dev/zero, outside of"),
        "loop": (ValueError, "can't be read"),
        "folder": (FileNotFoundError, "no file"),
    }[what]
    with pytest.raises(error, match=text), limits():
        load(folders / name.split("/")[0])


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_not_followed_and_the_remedy_is_said(folders, name):
    path = folders / name
    elsewhere = path.rename(folders / "elsewhere")
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere, outside of .*\(cp -L\)"):
        load(folders / name.split("/")[0])
    path.unlink()
    path.write_bytes(elsewhere.read_bytes())
    assert load(folders / name.split("/")[0]) is not None


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"texts"}))
def test_a_folder_that_the_user_names_may_itself_be_a_link_and_hold_links_within(folders, kind):
    (folders / "disk").mkdir()
    (folders / kind).rename(folders / "disk" / kind)
    (folders / kind).symlink_to(folders / "disk" / kind)
    for path in sorted((folders / kind).rglob("*.json")):
        path.rename(path.with_suffix(".kept"))
        path.symlink_to(path.with_suffix(".kept").name)
    assert load(folders / kind) is not None


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"texts"}))
def test_a_snapshot_in_the_cache_of_the_hub_is_read_through_its_links_to_blobs(folders, kind):
    repository = folders / "hub" / "models--someone--something"
    snapshot = repository / "snapshots" / "0a1b2c"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folders / kind).rename(snapshot / kind)
    for number, path in enumerate(p for p in sorted(snapshot.rglob("*")) if p.is_file()):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(number), path.parent))
    assert load(snapshot / kind) is not None
    path = next(p for p in sorted((snapshot / kind).rglob("*.json")))
    path.unlink()
    (folders / "hub" / "secret.json").write_text("{}")
    path.symlink_to(folders / "hub" / "secret.json")
    with pytest.raises(ValueError, match="outside of .*models--someone--something: "):
        load(snapshot / kind)


def test_names_that_lead_out_of_a_folder_are_refused(tmp_path):
    for name in (
        *("", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", "\\x", "..\\x"),
        *("C:x", "C:/x", "a\0b", "a\nb", "\ud800", 3, None, ["a"]),
    ):
        with pytest.raises(ValueError, match="refers to .*: names must be relative paths in"):
            inside(tmp_path, name)
    with pytest.raises(ValueError, match="can't be read"):
        read_json(tmp_path / ("x" * 5000))
    assert inside(tmp_path, "a/b.json") == tmp_path / "a" / "b.json"
    (tmp_path / "up").symlink_to(tmp_path.parent)
    with pytest.raises(ValueError, match="is a link to"):
        inside(tmp_path, "up")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a finite number"),
        (b'{"a": 1e400}', "1e400 is not a finite number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "an object has the key 'c' twice"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000, f"more than {MAX_DEPTH} levels"),
        (b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH, ""),
        (
            b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
            f"more than {MAX_DEPTH} levels",
        ),
    ],
)
def test_json_is_plain_finite_and_shallow(tmp_path, text, why):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    if not why:
        assert read_json(path)
        return
    with pytest.raises(ValueError, match=rf"a\.json is not JSON: .*{why}"):
        read_json(path)


def test_json_may_be_anything_but_an_object_is_asked_for(tmp_path):
    for text in ("3", "null", '"a"', "[[]]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="must hold a JSON object, got "):
            read_json(tmp_path / "a.json")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="would have .* bytes, JSON files must have at most"):
        write_json(tmp_path / "a.json", {"a": "x" * MAX_JSON})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (b"PK\3\4" + b"\0" * 3 + b"\1" * 99, "it is a zip archive, which torch.save writes"),
        (b"\x80\4\x95" + b"\1" * 99, "it is a pickle"),
        (
            struct.pack("<Q", MAX_HEADER + 1) + b"{}",
            rf"would have {MAX_HEADER + 1} bytes \(at most",
        ),
        (struct.pack("<Q", 99) + b"{}", "is not a readable safetensors file: .+"),
        (b"{}", "it is truncated or of another kind"),
    ],
)
def test_what_is_no_safetensors_file_is_told_by_its_first_bytes(tmp_path, start, why):
    path = tmp_path / "a.safetensors"
    path.write_bytes(start)
    for reader in (read_shapes, read_tensors):
        with pytest.raises(ValueError, match=why):
            reader(tmp_path, path.name)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F32", [2**40, 0]), ("F32", [1] * 9), ("C64", [0]), ("F8_E4M3", [0])]
)
def test_shapes_that_no_file_of_ours_has_are_refused(tmp_path, dtype, shape):
    size = {"F32": 4}.get(dtype, 1) * int(torch.tensor(shape).prod())
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)
    with pytest.raises(ValueError, match=f"'a' must be one of .*, got {dtype} "):
        read_tensors(tmp_path, "a.safetensors")


def test_shapes_are_read_from_the_header_alone(tmp_path):
    save_file({"a": torch.zeros(7, 500_000), "b": torch.ones(3, dtype=torch.int64)}, tmp_path / "x")
    before = bytes_read()
    assert read_shapes(tmp_path, "x") == {"a": ("F32", (7, 500_000)), "b": ("I64", (3,))}
    assert bytes_read() - before < 100_000


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"architecture": "standard"}, "one of .*query_head_topk.*, got 'standard'"),
        ({"architecture": ["query_head_topk"]}, r"got \['query_head_topk'\]"),
        (
            {"d_sae_per_head": 10**9, "d_sae": 3 * 10**9},
            r"shape of W_enc, .*, got \[3, 6, 1000000000\]",
        ),
        ({"n_heads": 10**30}, "d_in must be .* got 18"),
        ({"n_heads": True}, "n_heads: .*got True"),
        ({"n_heads": -3, "d_head": -6}, "n_heads and d_head must both be 1 or more"),
        ({"k": 1e3}, "k: .*got 1000.0"),
        ({"k": 10**6}, "k must be .*got 1000000"),
        ({"dtype": "int8"}, "Invalid dtype: int8"),
        ({"dtype": ["float32"]}, r"dtype: .*got \[\'float32\'\]"),
        ({"colour": "red"}, "colour: "),
        ({"metadata": []}, "metadata must be an object"),
        ({"metadata": {"to_dict": 1}}, "metadata must not have the name 'to_dict'"),
        ({"metadata": {"__class__": 1}}, "metadata must not have the name '__class__'"),
    ],
)
def test_a_config_is_checked_before_anything_is_made_of_it(folders, settings, why):
    change(folders / "saes" / HOOKS[0] / "cfg.json", **settings)
    with pytest.raises(ValueError, match=rf"hook_q/cfg\.json .*{why}"), limits():
        sqs.QuerySAEs.load(folders / "saes")


def test_the_device_that_a_config_names_does_not_count(folders):
    change(folders / "saes" / HOOKS[0] / "cfg.json", device="cuda:7")
    assert sqs.QuerySAEs.load(folders / "saes")[HOOKS[0]].W_dec.device.type == "cpu"


def test_metrics_with_a_column_for_each_row_are_refused(folders):
    rows = [{f"c{i}": 0} for i in range(20_000)]
    change(folders / "saes" / "query_saes.json", metrics=rows)
    with pytest.raises(ValueError, match="the rows of the table have different columns"), limits():
        sqs.QuerySAEs.load(folders / "saes")


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("counts", torch.tensor([True, True, True]), "counts must be I64, got BOOL"),
        ("counts", torch.ones(3, 2, dtype=torch.int64), "must be 3 whole numbers above 0"),
        (f"mean.{HOOKS[0]}", torch.ones(3, 3, 11, dtype=torch.int64), "mean.* must be .*, got I64"),
        ("mean.9", torch.ones(1), "an unknown tensor 'mean.9'"),
        (f"variance.{HOOKS[0]}", -torch.ones(3, 3, 11), "a variance below 0"),
        (f"query.{HOOKS[0]}", torch.full((2, 6, 3, 6), torch.nan), "fingerprint .* not finite"),
        (
            f"query.{HOOKS[1]}",
            torch.ones(2, 5, 3, 6),
            r"queries \[2, 5, 3, 6\] and recon",
        ),
        ("fingerprint.tokens", torch.ones(40, 40, dtype=torch.int64), "1 to 1024 in rows"),
        ("fingerprint.tokens", -torch.ones(2, 6, dtype=torch.int64), "none negative"),
    ],
)
def test_centroids_that_no_builder_makes_are_refused(folders, name, tensor, why):
    path = folders / "targets" / "centroids.safetensors"
    save_file(load_file(path) | {name: tensor}, path)
    with pytest.raises(ValueError, match=why):
        sqs.CentroidTargets.load(folders / "targets")


def test_a_steerer_reads_outside_its_folder_only_if_told_to(folders):
    some_saes().save(folders / "other")
    path = folders / "steerer" / "steerer.json"
    for elsewhere in ("../other", str(folders / "other")):
        change(path, saes=elsewhere)
        with pytest.raises(ValueError, match=r"refers to .*follow_references=True\) reads"):
            sqs.steering.load_steerer(folders / "steerer")
        assert sqs.steering.load_steerer(folders / "steerer", follow_references=True)
    (folders / "steerer" / "link").symlink_to(folders / "other")
    change(path, saes="link")
    with pytest.raises(ValueError, match=r"is a link to .*follow_references=True\) reads"):
        sqs.steering.load_steerer(folders / "steerer")
    (folders / "other").rename(folders / "steerer" / "moved")
    change(path, saes="moved")
    assert sqs.steering.load_steerer(folders / "steerer")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"until": "1"}, "has until='1'"),
        ({"keep_norm": 1}, "has keep_norm=1"),
        ({"n_steps": 2.0}, "n_steps must be a whole number"),
        ({"objective": {"tensor": 10**40, "dtype": "float64"}}, " is damaged"),
        ({"latents": {"kind": "GivenLatents", "fields": {"latents": {"mapping": [["x", 1]]}}}}, ""),
    ],
)
def test_settings_of_other_types_are_refused(folders, settings, why):
    path = folders / "steerer" / "steerer.json"
    change(path, settings=json.loads(path.read_text())["settings"] | settings)
    with pytest.raises(ValueError, match=rf"steerer\.json.*{why}"):
        sqs.steering.load_steerer(folders / "steerer")


def test_nothing_is_written_beside_the_target(tmp_path):
    sae = some_saes()[HOOKS[0]]
    for name in ("../outside", "/tmp/outside", "x"):
        with pytest.raises(ValueError, match="is no query hook point"):
            sqs.QuerySAEs({name: sae}).save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_never_a_target(tmp_path, there):
    target, link = tmp_path / "theirs", tmp_path / "link"
    if there:
        some_targets().save(target)
    link.symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(FileExistsError, match="is a link: give the folder it points to"),
        new_folder(link, overwrite=True, holding="centroids.json"),
    ):
        pytest.fail("the writer must not run")
    assert sorted(tmp_path.rglob("*")) == before
    assert link.is_symlink()
