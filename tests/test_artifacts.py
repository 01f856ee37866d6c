"""Artifacts: written whole or not at all, read only if they are what they claim to be; shown."""

import contextlib
import io
import multiprocessing
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import script

from models import artifacts
from models.artifacts import ROOT, header, load_array, load_checkpoint, save_array, save_checkpoint
from models.checkpoint import results_of
from models.command import InputError, one_line_errors
from models.data import SPLITS, load_splits, save_splits

inspect_file = script("tools/inspect_file.py")
HEAD = header("thing", "tests", {"a": 1})


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.pth"

    def refused(message, kind="thing"):
        with pytest.raises(InputError, match=message):
            load_checkpoint(path, kind, "remake it")

    refused("found nothing")
    save_checkpoint(path, HEAD, x=torch.ones(1000))
    path.write_bytes(path.read_bytes()[:700])
    refused("broken or unsafe")
    torch.save({"model": torch.ones(1)}, path)
    refused("without our header")
    save_checkpoint(path, HEAD)
    refused("expected other, found thing", "other")
    for value in (torch.nan, torch.inf):
        save_checkpoint(path, HEAD, model={"w": torch.tensor([1.0, value])})
        refused("model.w holds NaN or infinite")


def test_no_header_can_ask_for_more_than_the_file_holds(tmp_path):
    path = tmp_path / "a.npy"
    save_array(path, np.zeros(10), HEAD)
    raw = path.read_bytes()
    for shape in ("(999999999999,), }", "(-1,), }", "(10, 10), }"):
        head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}".ljust(117) + "\n"
        path.write_bytes(raw[:10] + head.encode() + raw[128:])
        with pytest.raises(InputError, match="remake it"):
            load_array(path, "thing", "remake it", np.float64, 1)
    save_checkpoint(tmp_path / "a.pth", HEAD, x=torch.zeros(1).expand(1 << 40))
    save_checkpoint(tmp_path / "whole.pth", HEAD, x=torch.zeros(1_000_000))
    packed = zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED)
    with packed, zipfile.ZipFile(tmp_path / "whole.pth") as whole:
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    assert torch.load(tmp_path / "b.pth", weights_only=True)["x"].numel() == 1_000_000  # a bomb
    for name, why in (("a.pth", "more than"), ("b.pth", "compressed")):
        with pytest.raises(InputError, match=f"broken or unsafe.*{why}.*remake it"):
            load_checkpoint(tmp_path / name, "thing", "remake it")


def test_two_writers_never_tear_and_leftovers_of_the_dead_go(tmp_path):
    path = tmp_path / "a.bin"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = tmp_path / f".a.bin.{dead.pid}.0a1b.tmp"
    leftover.write_bytes(b"half")
    target = tmp_path / "elsewhere"
    (tmp_path / ".a.bin.tmp").symlink_to(target)  # what an older version would have followed
    writers = [
        multiprocessing.get_context("fork").Process(target=write_often, args=(path, letter))
        for letter in (b"a", b"b")
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            raw = path.read_bytes()
            assert len(raw) == 100_000 and len(set(raw)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert not leftover.exists() and not target.exists()
    assert not list(tmp_path.glob(".a.bin.*.tmp"))


def write_often(path, letter: bytes) -> None:
    for _ in range(50):
        artifacts.replace_file(path, lambda file: [file.write(letter * 1000) for _ in range(100)])


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


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_while_a_checkpoint_is_written_is_one(tmp_path, monkeypatch, at):
    """torch.save makes a RuntimeError of its own out of it, as if the disk were full."""
    save_checkpoint(tmp_path / "a.pth", HEAD, x=torch.ones(3))
    before = (tmp_path / "a.pth").read_bytes()

    class Cut(io.FileIO):
        writes = 0

        def write(self, data) -> int:
            self.writes += 1
            if self.writes == at:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(artifacts, "open", Cut, raising=False)
    with pytest.raises(SystemExit, match="^interrupted: "), one_line_errors():
        save_checkpoint(tmp_path / "a.pth", HEAD, x=torch.zeros(1000), y=torch.ones(3))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.pth", before)]


def test_a_header_names_no_folder_above_the_project(tmp_path):
    config = {"a": ROOT / "data/codes", "b": tmp_path, "c": {"d": ROOT / "x.pth", "e": None}}
    found = header("thing", "tests", config)["config"]
    assert found == {"a": "data/codes", "b": str(tmp_path), "c": {"d": "x.pth", "e": None}}


def test_a_file_shows_its_header_its_shapes_and_what_it_was_made_from(world, monkeypatch, capsys):
    monkeypatch.setattr(inspect_file, "ROOT", world.data.parent)
    monkeypatch.setattr(inspect_file, "PLACES", ("data/*.npy", "*.pth"))
    inspect_file.main(inspect_file.InspectConfig(world.codes / "test_codes.npy"))
    lines = capsys.readouterr().out.splitlines()
    assert "test_codes.npy: codes, intact, sha256 " in lines[0]
    assert lines[1].startswith("  uint16 (40, 2, 64), ")
    made_from = lines[lines.index("made from") + 1 :]
    for start, end in (("  tokenizer ", ": tokenizer.pth"), ("    test_images ", "_images.npy")):
        assert any(line.startswith(start) and line.endswith(end) for line in made_from)
    inspect_file.main(inspect_file.InspectConfig(world.tokenizer))
    text = capsys.readouterr().out
    assert "tokenizer.pth: tokenizer, intact" in text and "config.steps: 6" in text
    assert " tensors, " in text and "NaN" not in text


def test_a_file_that_is_not_intact_is_said_to_be_so(world, tmp_path):
    for source in (world.data / "test_images.npy", world.tokenizer):
        raw = bytearray(source.read_bytes())
        raw[len(raw) // 2] ^= 1
        path = tmp_path / source.name
        path.write_bytes(raw)
        sidecar = source.with_name(source.name + ".json")
        if sidecar.exists():
            (tmp_path / sidecar.name).write_bytes(sidecar.read_bytes())
        with pytest.raises(InputError, match=f"{source.name} is (not the array|broken)"):
            inspect_file.main(inspect_file.InspectConfig(path))


def test_train_and_test_images_of_other_classes_are_refused(tmp_path):
    for folder, classes in (("a", ("cat", "dog")), ("b", ("cat", "fox"))):
        images_NHWC = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
        arrays = {split: (images_NHWC, np.array([0, 1, 0, 1])) for split in SPLITS}
        save_splits(tmp_path / folder, arrays, classes, "pets", "data/load_CIFAR10.py", {})
    assert len(load_splits(tmp_path / "a")) == 2
    for path in (tmp_path / "b").glob("test_*"):
        shutil.copy(path, tmp_path / "a")
    with pytest.raises(InputError, match="train and test images are not of one set"):
        load_splits(tmp_path / "a")


@pytest.mark.parametrize("path", ["last.pth", "../run/last.pth", "sub/../last.pth"])
def test_a_run_has_its_own_folder_of_results_wherever_it_is_named_from(path, tmp_path, monkeypatch):
    (tmp_path / "run/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert results_of(Path(path)) == ROOT / "results/run"
