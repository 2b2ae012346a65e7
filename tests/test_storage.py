import csv
import pickle
import re
import shutil
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import pandas as pd
import pytest
import torch

from sae_query_steer.storage.checksums import check_files, list_files
from sae_query_steer.storage.csv_files import csv_text, read_csv_text
from sae_query_steer.storage.folders import locked, new_folder
from sae_query_steer.storage.records import read_json, write_json
from sae_query_steer.storage.tensors import read_tensors, write_tensors

TENSORS = {
    "half": torch.tensor([[1.5, -2.0, 0.1]], dtype=torch.bfloat16),
    "whole": torch.arange(6),
    "mask": torch.tensor([True, False]),
}


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_folder_has_its_name_only_once_its_writer_is_done(tmp_path):
    path = tmp_path / "not" / "there" / "yet"
    with new_folder(path, holding="a.txt") as new:
        (new / "a.txt").write_text("new")
        assert not path.exists()
    assert contents(tmp_path) == {"not/there/yet/a.txt": "new"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_no_folder_and_nothing_beside_it(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "made", holding="a.txt") as new:
        (new / "a.txt").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    (path / "a.txt").write_text("old")
    with (
        pytest.raises(ValueError, match="^half way$"),
        new_folder(path, overwrite=True, holding="a.txt") as new,
    ):
        (new / "a.txt").write_text("half")
        raise ValueError("half way")
    assert contents(tmp_path) == {"made/a.txt": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_comes_back_when_the_new_folder_can_not_take_its_name(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    (path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError), new_folder(path, overwrite=True, holding="a.txt") as new:
        shutil.rmtree(new)
    assert contents(tmp_path) == {"made/a.txt": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_replaces_all_that_was_there(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with new_folder(path, overwrite=True, holding="old.txt") as new:
        (new / "new.txt").write_text("new")
        assert contents(path) == {"old.txt": "old"}
    assert contents(tmp_path) == {"made/new.txt": "new"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_exists_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    text = f"{path} exists: give another folder, or overwrite=True"
    with (
        pytest.raises(FileExistsError, match=f"^{re.escape(text)}$"),
        new_folder(path, holding="a.txt"),
    ):
        pytest.fail("the writer must not run")
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_folder_can_be_read_by_whom_any_other_can(tmp_path):
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "made", holding="a.txt"):
        pass
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"naïve": [1, 2.5, None], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know_are_not_written(tmp_path, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": [number]})
    assert not (tmp_path / "a.json").exists()


def test_reading_json_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'a.json'}")):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": 1', r"is not JSON: .+"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ('"a"', "must hold a JSON object, got str"),
    ],
)
def test_reading_json_says_what_is_wrong_with_the_file(tmp_path, text, what):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {what}$"):
        read_json(path)


def test_tensors_come_back_bit_for_bit_with_their_types(tmp_path):
    turned = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).T.requires_grad_()
    write_tensors(tmp_path / "a.safetensors", TENSORS | {"turned": turned})
    read = read_tensors(tmp_path, "a.safetensors")
    assert set(read) == {*TENSORS, "turned"}
    for name, tensor in (TENSORS | {"turned": turned.detach()}).items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_missing_tensor_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a.safetensors", "folder"):
        with pytest.raises(FileNotFoundError, match=f"^no file {re.escape(str(tmp_path / name))}$"):
            read_tensors(tmp_path, name)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_tensor_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    text = f"{path} is not a readable safetensors file: "
    with pytest.raises(ValueError, match=f"^{re.escape(text)}.+"):
        read_tensors(tmp_path, path.name)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "a.safetensors", tmp_path / "was-run"
    path.write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(ValueError, match="is not a readable safetensors file: "):
        read_tensors(tmp_path, path.name)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the pickle must be able to act for this to say anything"


def test_two_names_for_one_tensor_are_written_as_two(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"a": tensor, "b": tensor.mT})
    loaded = read_tensors(tmp_path, "t.safetensors")
    assert torch.equal(loaded["a"], tensor)
    assert torch.equal(loaded["b"], tensor.mT)


def test_a_folder_that_appears_while_another_is_written_is_not_replaced(tmp_path):
    with (
        pytest.raises(FileExistsError, match="exists: give another folder"),
        new_folder(tmp_path / "out", holding="a.txt") as new,
    ):
        (new / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_overwrite_replaces_no_folder_or_file_of_another_kind(tmp_path, what):
    path = tmp_path / "results"
    if what == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("years of work")
    else:
        path.write_text("years of work")
    before = contents(tmp_path)
    with (
        pytest.raises(FileExistsError, match="is not replaced: it has no a.txt"),
        new_folder(path, overwrite=True, holding="a.txt"),
    ):
        pass
    assert contents(tmp_path) == before


def test_overwrite_replaces_an_empty_folder(tmp_path):
    (tmp_path / "made").mkdir()
    with new_folder(tmp_path / "made", overwrite=True, holding="a.txt") as new:
        (new / "a.txt").write_text("new")
    assert contents(tmp_path) == {"made/a.txt": "new"}


def test_what_a_process_left_that_was_killed_between_the_renames_comes_back(tmp_path):
    left = tmp_path / ".made.new"
    for name in ("old", "new"):
        (left / name).mkdir(parents=True)
        (left / name / "a.txt").write_text(name)
    with (
        pytest.raises(FileExistsError, match="exists: give another folder"),
        new_folder(tmp_path / "made", holding="a.txt"),
    ):
        pass
    assert contents(tmp_path) == {"made/a.txt": "old"}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path, n: write_json(path, {"a": n})),
        ("a.safetensors", lambda path, n: write_tensors(path, {"a": torch.tensor(n)})),
    ],
)
def test_a_full_disk_costs_no_file_that_was_there(tmp_path, monkeypatch, name, write):
    path = tmp_path / name
    write(path, 1)
    before = path.read_bytes()

    def fill(data, path, **settings):
        with Path(path).open("wb") as file:
            file.write(b"half")
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr("sae_query_steer.storage.tensors.save_file", fill)
    monkeypatch.setattr(Path, "write_text", lambda self, text, encoding: fill(text, self))
    with pytest.raises(OSError, match="No space left"):
        write(path, 2)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


HOLD = """
import sys
from sae_query_steer.storage.folders import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_other_processes_out_until_its_own_is_killed(tmp_path):
    path = tmp_path / "made"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        for write in (locked(path), new_folder(path, overwrite=True, holding="a.txt")):
            with (
                pytest.raises(BlockingIOError, match=f"^{path} is being written by another"),
                write,
            ):
                pass
        other.kill()
    with locked(path), locked(path):  # again in one thread
        assert [file.name for file in tmp_path.iterdir()] == [".made.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_until_the_outer_block_ends(tmp_path):
    with locked(tmp_path / "made"):
        with locked(tmp_path / "made"):
            pass
        assert (tmp_path / ".made.lock").exists()


def test_files_that_differ_from_their_list_are_named(tmp_path):
    path = tmp_path / "a" / "b.txt"
    path.parent.mkdir()
    path.write_text("good")
    files = list_files(tmp_path)
    check_files(tmp_path, files)
    for text, error in (("gold", "the SHA-256"), ("goo", "must have 4 bytes, got 3")):
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            check_files(tmp_path, files)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks a/b.txt"):
        check_files(tmp_path, files)


def test_texts_that_begin_like_a_formula_are_text_in_a_csv_and_come_back_as_they_were(tmp_path):
    texts = ["=1+1", "+1", "-x", "@a", "\ta", "\ra", "'=1", "plain", "'s", "a=b", ""]
    table = pd.DataFrame({"=name": texts, "score": [-1.5] * 11, "n": range(-1, 10)})
    path = tmp_path / "table.csv"
    path.write_text(csv_text(table), encoding="utf-8", newline="")
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["'=name", "score", "n"]
    assert [row[0] for row in rows[:7]] == [f"'{text}" for text in texts[:7]]
    assert [row[0] for row in rows[7:]] == texts[7:]
    assert (rows[0][1], rows[0][2]) == ("-1.5", "-1")
    pd.testing.assert_frame_equal(read_csv_text(path).fillna(""), table)
