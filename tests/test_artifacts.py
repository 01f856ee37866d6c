"""Artifacts: written whole or not at all, read only if they are what they claim to be."""

import contextlib
import json
import os
import pickle
import resource

import numpy as np
import pytest
import torch

from models.artifacts import (
    ROOT,
    header,
    load_array,
    load_checkpoint,
    replace_file,
    save_array,
    save_checkpoint,
    sha256_of,
    sidecar,
)
from models.errors import InputError, one_line_errors

HEAD = header("thing", "tests", {"a": 1})


def test_arrays_and_checkpoints_come_back(tmp_path):
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    save_array(tmp_path / "a.npy", array, HEAD)
    found, about = load_array(tmp_path / "a.npy", "thing", "remake", np.uint16, 2)
    assert np.array_equal(found, array) and found.dtype == np.uint16
    assert about["shape"] == [2, 3] and about["dtype"] == "uint16"
    save_checkpoint(tmp_path / "a.pth", HEAD, x=torch.ones(2), rows=[{"step": 1}])
    found = load_checkpoint(tmp_path / "a.pth", "thing", "remake")
    assert found["header"] == HEAD | {"sha256": sha256_of(tmp_path / "a.pth")} and found[
        "rows"
    ] == [{"step": 1}]


def damage_missing(path):
    path.unlink()


def damage_sidecar(path):
    sidecar(path).unlink()


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_changed(path):
    np.save(path, np.load(path) + 1)


def damage_kind(path):
    about = json.loads(sidecar(path).read_text())
    sidecar(path).write_text(json.dumps(about | {"kind": "other"}))


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_sidecar, damage_cut, damage_changed, damage_kind]
)
def test_damaged_arrays_are_refused_with_the_command_to_rerun(tmp_path, damage):
    save_array(tmp_path / "a.npy", np.arange(100), HEAD)
    damage(tmp_path / "a.npy")
    with pytest.raises(InputError, match="remake it"):
        load_array(tmp_path / "a.npy", "thing", "remake it", np.int64, 1)


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    for write in (
        lambda p: torch.save({"header": HEAD, "x": Bomb(tmp_path / "ran")}, p),
        lambda p: p.write_bytes(pickle.dumps(Bomb(tmp_path / "ran"))),
    ):
        write(tmp_path / "a.pth")
        with pytest.raises(InputError, match="broken or unsafe.*remake it"):
            load_checkpoint(tmp_path / "a.pth", "thing", "remake it")
        assert not (tmp_path / "ran").exists()


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(InputError, match="found nothing"):
        load_checkpoint(path, "thing", "remake it")
    save_checkpoint(path, HEAD, x=torch.ones(1000))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="broken or unsafe"):
        load_checkpoint(path, "thing", "remake it")
    torch.save({"model": torch.ones(1)}, path)
    with pytest.raises(InputError, match="without our header"):
        load_checkpoint(path, "thing", "remake it")
    save_checkpoint(path, HEAD)
    with pytest.raises(InputError, match="expected other, found thing"):
        load_checkpoint(path, "other", "remake it")


@contextlib.contextmanager
def no_file_over_4k():
    """A real limit of the system, here only: writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_does_not_fit_leaves_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "a.pth", HEAD, x=torch.ones(3))
    save_array(tmp_path / "a.npy", np.arange(3), HEAD)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OSError, match="a.pth.*untouched"), no_file_over_4k():
        save_checkpoint(tmp_path / "a.pth", HEAD, x=torch.ones(10_000))
    with pytest.raises(OSError, match="a.npy.*untouched"), no_file_over_4k():
        save_array(tmp_path / "a.npy", np.arange(10_000), HEAD)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    replace_file(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        replace_file(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file/a.pth"):
        save_checkpoint(tmp_path / "file/a.pth", HEAD)


@pytest.mark.parametrize("error", [InputError("expected\n this"), OSError("expected\n this")])
def test_mendable_errors_are_one_line_and_a_status(error):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise error
    assert stopped.value.code == "error: expected this"


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("ours")


def test_a_header_names_no_folder_above_the_project(tmp_path):
    config = {"a": ROOT / "data/codes", "b": tmp_path, "c": {"d": ROOT / "x.pth", "e": None}}
    found = header("thing", "tests", config)["config"]
    assert found == {"a": "data/codes", "b": str(tmp_path), "c": {"d": "x.pth", "e": None}}
