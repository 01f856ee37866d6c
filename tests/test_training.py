"""Stage 4: resuming, refusals, and the arithmetic that all training shares."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from helpers import script
from hypothesis import given
from hypothesis import strategies as st

from models.artifacts import ROOT, load_checkpoint
from models.checkpoint import KIND
from models.command import InputError
from models.data import draw_batch, load_codes, split_heldout
from models.methods import METHODS
from models.orders import SCANS, scan
from models.training import batch_rows, lr_at, seed_step

stage = script("train_c2i.py")


def config(world, out, **changes):
    nowhere = world.codes / "none.pth"  # without a tokenizer no sample grids are drawn
    plain = stage.TrainConfig(
        codes=world.codes, tokenizer=nowhere, out=out, model="nano", device="cpu"
    )
    small = {"steps": 4, "batch": 8, "eval_every": 2, "heldout": 20, "warmup": 0.25}
    return replace(plain, **{**small, **changes})


def last(out):
    return load_checkpoint(out / "last.pth", KIND, rerun="")


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def results(out) -> dict:
    """Everything in last.pth that must not depend on a cut: all but speeds, memory and the date."""
    found = last(out)
    for row in found["rows"]:
        del row["images_per_second"], row["peak_memory_gb"]
    del found["header"]
    return found


def cut_and_resumed(whole, out, monkeypatch):
    """The same run into `out`, cut at step 3 and started again; return its config."""
    taken, train_step = [], stage.train_step

    def cut_at_step_3(*args):
        taken.append(args[-1])
        if len(taken) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(stage, "train_step", cut_at_step_3)
    cut = replace(whole, out=out)
    with pytest.raises(KeyboardInterrupt):
        stage.main(cut)
    stage.main(cut)
    assert taken == [0, 1, 2, 3, 2, 3]
    return cut


@pytest.mark.parametrize(
    ("method", "optimizer"), [*((method, "adamw") for method in METHODS), ("randar", "muon")]
)
def test_two_and_two_steps_are_four_bit_for_bit(world, tmp_path, monkeypatch, method, optimizer):
    order = "random" if METHODS[method].any_order else METHODS[method].scans[0]
    whole = config(world, tmp_path / "whole", method=method, order=order, optimizer=optimizer)
    stage.main(whole)
    cut_and_resumed(whole, tmp_path / "cut", monkeypatch)
    assert same(results(tmp_path / "whole"), results(tmp_path / "cut"))
    log = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [2, 4]


def test_a_run_of_another_version_is_not_trained_on(world, tmp_path, monkeypatch):
    cfg = config(world, tmp_path / "run", method="rar", order="random")
    stage.main(cfg)
    before = (tmp_path / "run/last.pth").read_bytes()
    monkeypatch.setattr(METHODS["rar"], "no_decay", ())  # its optimizer had other groups then
    with pytest.raises(InputError, match="trained by another version"):
        stage.main(cfg)
    assert (tmp_path / "run/last.pth").read_bytes() == before


def test_a_killed_run_is_finished_by_the_same_command(world, tmp_path):
    whole = config(world, tmp_path / "whole", steps=12, eval_every=3)
    stage.main(whole)
    flags = [f"--codes={world.codes}", "--tokenizer=nowhere.pth", "--model=nano"]
    flags += [f"--out={tmp_path / 'killed'}", "--steps=12", "--batch=8", "--eval-every=3"]
    flags += ["--heldout=20", "--warmup=0.25", "--device=cpu"]
    command = [sys.executable, str(ROOT / "train_c2i.py"), *flags]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=one_thread, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed/last.pth").exists() and time.time() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL  # it was still at work
    assert last(tmp_path / "killed")["step"] < 12
    stage.main(replace(whole, out=tmp_path / "killed"))
    assert same(results(tmp_path / "whole"), results(tmp_path / "killed"))


def test_a_run_writes_what_it_should(world, tmp_path):
    out = stage.main(config(world, tmp_path / "run", order="random", tokenizer=world.tokenizer))
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "curves.png",
        "last.pth",
        "metrics.jsonl",
        "samples/0000002.png",
        "samples/0000004.png",
    }
    head = json.loads((out / "config.json").read_text())
    assert head["method"] == "randar" and head["config"]["order"] == "random"
    assert head["inputs"]["tokenizer"] and head["inputs"]["codes"]
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"train_bits", "heldout_bits", "test_bits", "lr", "images_per_second"} < row.keys()
    assert 4 < row["test_bits"] < 6  # of 32 codes: log2 is 5


def test_steps_draw_differently_and_seeds_too(world):
    codes = load_codes(world.codes, "train")

    def drawn(step: int, seed: int = 0):
        generator = seed_step(seed, step, torch.device("cpu"))
        return draw_batch(codes, batch_rows(120, 16, step, seed), 0.1, generator)

    assert same(drawn(0), drawn(0))
    assert not torch.equal(drawn(0)[0], drawn(1)[0])
    assert not torch.equal(drawn(0)[0], drawn(0, seed=1)[0])


def test_labels_are_dropped_as_often_as_asked(world):
    codes = load_codes(world.codes, "train")
    dropped = 0
    for step in range(50):
        generator = seed_step(0, step, torch.device("cpu"))
        rows_B = batch_rows(120, 100, step, 0)
        dropped += (draw_batch(codes, rows_B, 0.2, generator)[1] == 10).sum()
    assert 880 < dropped < 1120  # binomial(5000, 0.2): four standard deviations are 113


def test_both_views_are_drawn(world):
    codes = load_codes(world.codes, "train")
    generator = seed_step(0, 0, torch.device("cpu"))
    rows_B = batch_rows(120, 120, 0, 0)  # one epoch
    drawn_BT, _ = draw_batch(codes, rows_B, 0.1, generator)
    straight = (drawn_BT == codes.codes_NAT[rows_B, 0]).all(1)
    mirrored = (drawn_BT == codes.codes_NAT[rows_B, 1]).all(1)
    assert (straight | mirrored).all() and straight.sum() > 30 and mirrored.sum() > 30


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
def test_every_epoch_visits_every_row_once(rows, batch, seed):
    drawn = torch.cat(
        [batch_rows(rows, batch, step, seed) for step in range(-(-2 * rows // batch))]
    )
    for epoch in range(2):
        assert drawn[epoch * rows : (epoch + 1) * rows].sort().values.tolist() == list(range(rows))


def test_epochs_differ():
    assert not torch.equal(batch_rows(50, 50, 0, 0), batch_rows(50, 50, 1, 0))
    assert not torch.equal(batch_rows(50, 50, 0, 0), batch_rows(50, 50, 0, 1))


def test_heldout_images_are_kept_out(world):
    codes = load_codes(world.codes, "train")
    train, heldout = split_heldout(codes, 20, seed=0)
    seen = {tuple(row) for row in train.codes_NAT.flatten(0, 1).tolist()}
    kept = [tuple(row) for row in heldout.codes_NAT.flatten(0, 1).tolist()]
    assert len(train.label_N) == 100 and len(kept) == 40
    assert not seen & set(kept)
    for bad in (0, 120):
        with pytest.raises(InputError, match="heldout"):
            split_heldout(codes, bad, seed=0)


def test_learning_rate_rises_then_falls_to_its_floor():
    found = [lr_at(step, 1.0, 10, 110, floor=0.05) for step in range(110)]
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[60] == pytest.approx(0.05 + 0.95 / 2)
    assert found[-1] == pytest.approx(0.05, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(found[10:]))


def test_anneal_and_scans_train(world, tmp_path):
    for order in ("anneal", "spiral_in"):
        cfg = config(world, tmp_path / order, order=order, steps=2)
        assert math.isfinite(last(stage.main(cfg))["rows"][-1]["test_bits"])
    policy, raster_T = config(world, None, order="anneal").policy, scan("raster", 8)
    drawn = [policy.draw(raster_T, 9, p, 0.0, torch.Generator()) for p in (0, 0.5, 0.75, 0.99)]
    assert [(order_BS == raster_T).all(1).sum() for order_BS in drawn] == [0, 0, 9, 9]
    assert {config(world, None, order=order).policy.asked for order in SCANS} == set(SCANS)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    world, tmp_path, monkeypatch
):
    train_step = stage.train_step

    def poisoned(*args):
        nats = train_step(*args)
        return nats * math.nan if args[-1] == 2 else nats

    monkeypatch.setattr(stage, "train_step", poisoned)
    with pytest.raises(InputError, match="loss is nan at step 4.*last good checkpoint.*last.pth"):
        stage.main(config(world, tmp_path / "run"))
    found = last(tmp_path / "run")
    assert found["step"] == 2
    assert all(torch.isfinite(value).all() for value in found["model"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": math.nan}, "--lr in"),
        ({"drop_label": 1.0}, "--drop-label in"),
        ({"method": "gpt", "order": "random"}, "random needs a method that is told"),
        ({"devices": 3}, "--devices to divide --batch 8"),
        ({"heldout": 120}, "--heldout in 1..119"),
        ({"device": "tpu"}, "--device to be auto or cpu"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(world, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        stage.main(config(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_another_config_method_or_codes_is_refused_by_name(world, tmp_path):
    stage.main(config(world, tmp_path / "run", steps=2))
    before = (tmp_path / "run/last.pth").read_bytes()
    for changes, message in (
        ({"seed": 1}, "seed 0 -> 1"),
        ({"method": "gpt"}, "method randar -> gpt"),
        ({"lr": 0.5}, "lr 0.001 -> 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            stage.main(config(world, tmp_path / "run", **{"steps": 2, **changes}))
    assert (tmp_path / "run/last.pth").read_bytes() == before


def test_missing_and_broken_inputs_are_refused(world, tmp_path):
    with pytest.raises(InputError, match="extract_latent_codes"):
        stage.main(config(replace(world, codes=tmp_path), tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="broken or unsafe"):
        stage.main(config(world, tmp_path / "run"))
    assert (tmp_path / "run/last.pth").read_bytes() == b"not a checkpoint"
