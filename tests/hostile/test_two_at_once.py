"""A folder that a training writes to: no reader finds a torn file, no second training starts."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import last, log_of, results, same, script, train_config

from models.artifacts import ROOT
from models.checkpoint import locked
from models.command import InputError

TRAIN = """
import conftest  # --model tiny
from helpers import script
from metrics import plots
from models import command
plots.plot_curves = plots.save_figure = lambda *_: None
train = script("train_c2i.py")
command.run(train.main, train.TrainConfig)
"""


def test_a_training_is_read_and_not_joined(world, tmp_path, pytestconfig, no_pictures):
    out, alone, train = tmp_path / "run", tmp_path / "alone", script("train_c2i.py")
    steps, reads = 30 * pytestconfig.getoption("--kills"), 0
    flags = [f"--codes={world.codes}", f"--out={out}", "--tokenizer=none", "--model=tiny"]
    flags += [f"--steps={steps}", "--eval-every=1", "--heldout=20", "--batch=8", "--warmup=0.25"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    length = {"steps": steps, "eval_every": 1}
    line = [sys.executable, "-c", TRAIN, *flags, "--device=cpu"]
    with subprocess.Popen(line, cwd=ROOT, env=env) as first:
        while first.poll() is None:
            if not (out / "metrics.jsonl").exists():
                continue
            if not reads:
                with pytest.raises(InputError, match=f"written by process {first.pid};"):
                    train.main(train_config(world, out, **length))
            assert last(out)["step"] - 1 <= len(log_of(out / "metrics.jsonl")) <= steps
            reads += 1
    print(f"{reads} reads of {steps} saves")
    assert first.returncode == 0 and reads > 2
    assert same(results(out), results(train.main(train_config(world, alone, **length))))


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_on_a_file_that_its_holder_just_removed_is_none(tmp_path, monkeypatch, again):
    """A third process would lock the new file of that name, and both would write."""
    flock = fcntl.flock

    def late(file, how):
        Path(file.name).unlink()
        if again:
            Path(file.name).touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="being written by"), locked(tmp_path / "run"):
        pytest.fail("two trainings would write here")
