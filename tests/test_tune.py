"""Tuning: equal operations, the same trials when it is cut, and what is refused."""

import json
import sqlite3
from dataclasses import replace

import pytest
from helpers import cut_at, other_codes, script
from sqlalchemy.exc import OperationalError

from metrics.report import read_run
from models import training
from models.command import InputError

tool = script("tools/tune.py")


@pytest.fixture
def config(world, tmp_path):
    few = {"method": "gpt", "model": "tiny", "batch": 8, "heldout": 20, "trials": 4}
    few |= {"tflop": 1e-6, "device": "cpu"}
    return tool.TuneConfig(codes=world.codes, out=tmp_path / "out", **few)


def test_the_best_of_all_trials_is_told_and_the_first_is_the_defaults(config, capsys):
    found = tool.main(config)
    assert json.loads((config.out / "tuning.json").read_text()) == found
    assert (config.out / "tuning.png").read_bytes().startswith(b"\x89PNG")
    first, *others = found["trials"]
    assert first["settings"] == {name: getattr(config, name) for name in tool.SPACE}
    for row in others:
        for name, space in tool.SPACE.items():
            x = row["settings"][name]
            assert space["low"] <= x <= space["high"] and x != first["settings"][name]
    assert found["best"]["bits"] == min(row["bits"] for row in found["trials"])
    assert f"--lr {found['best']['settings']['lr']:.3g} " in capsys.readouterr().out
    table = script("tools/report.py").tuning({"out": read_run(config.out)})
    for row in (first, found["best"]):
        assert f"| {row['bits']:.3f} |" in table


def test_what_is_tuned_is_what_is_trained_with(config, monkeypatch):
    seen = []
    monkeypatch.setattr(tool, "train_step", lambda cfg, *_: seen.append(cfg))
    found = tool.main(config)
    for trial, cfg in zip(found["trials"], seen[:: found["steps"]], strict=True):
        assert {name: getattr(cfg, name) for name in tool.SPACE} == trial["settings"]
        assert (cfg.steps, cfg.method, cfg.batch) == (found["steps"], "gpt", 8)


def test_all_methods_take_as_many_operations(config):
    counts = {}
    for method in ("gpt", "randar"):
        trials = tool.Trials(replace(config, method=method, tflop=1e-2))
        model = tool.build(method, tool.model_config(trials.cfg, trials.train))
        done = trials.steps * 8 * training.flops(model, 8)
        assert done == pytest.approx(1e10, rel=0.02)
        counts[method] = trials.steps
    assert counts["randar"] < counts["gpt"]  # it reads twice as many slots


def test_a_cut_study_makes_the_trials_of_a_whole_one(config, tmp_path, monkeypatch):
    """Killed in its first trial, and asked for more trials afterwards."""
    whole = tool.main(replace(config, out=tmp_path / "whole"))["trials"]
    assert len({row["settings"]["lr"] for row in whole}) == 4
    with monkeypatch.context() as patch:
        cut_at(patch, tool, "train_step", 3)
        with pytest.raises(KeyboardInterrupt):
            tool.main(config)
    study = tool.open_study(config, config.out / "study.db", tool.Trials(config))
    study.ask()  # as SIGKILL would leave it
    assert tool.main(replace(config, trials=2))["trials"] == whole[:2]
    assert tool.main(config)["trials"] == whole
    monkeypatch.setattr(tool, "train_step", lambda *_: pytest.fail("it trained again"))
    assert tool.main(config)["trials"] == whole


def test_a_trial_without_finite_bits_is_no_best_one(config, monkeypatch):
    """One of them is left out; without any other there is nothing to tell."""
    bits, calls = tool.split_bits, []

    def first_is_nan(*inputs):
        calls.append(inputs)
        return {"bits": float("nan")} if len(calls) == 1 else bits(*inputs)

    monkeypatch.setattr(tool, "split_bits", first_is_nan)
    with pytest.raises(InputError, match="no trial in .* had finite bits"):
        tool.main(replace(config, trials=1))
    found = tool.main(replace(config, trials=2))
    assert found["trials"][0]["pruned"] and found["trials"][0]["bits"] is None
    assert found["best"] == found["trials"][1]


def test_a_trial_worse_than_the_median_is_cut(config, monkeypatch):
    """As soon as it may be: after a quarter of its steps."""
    values = iter([1.0] * 8 * tool.STARTUP + [2.0] * 8)
    monkeypatch.setattr(tool, "split_bits", lambda *_: {"bits": next(values)})
    found = tool.main(replace(config, trials=tool.STARTUP + 1))
    assert [row["pruned"] for row in found["trials"]] == [False] * tool.STARTUP + [True]
    assert len(list(values)) > 4


def test_other_studies_and_impossible_ones_are_refused(config, world, tmp_path):
    tool.main(replace(config, trials=1))
    other = other_codes(world, tmp_path / "other", change=1)
    for changes in ({"seed": 1}, {"tflop": 2e-6}, {"method": "randar"}, {"codes": other}):
        with pytest.raises(InputError, match="was made with another config .* --out"):
            tool.main(replace(config, **changes))
    full = sqlite3.OperationalError("database or disk is full")
    untouched = pytest.raises(OSError, match="disk is full; the trials in it are untouched")
    with untouched, tool.stored(config.out / "study.db"):
        raise OperationalError("COMMIT", {}, full)
    (config.out / "study.db").write_bytes(b"no database")
    with pytest.raises(InputError, match=r"study.db is no study .* rm "):
        tool.main(config)
    for changes, message in (
        ({"order": "adaptive"}, "adaptive cannot be tuned"),
        ({"lr": 0.5}, r"expected --lr in \[0.0003, 0.02\]"),
        ({"order": "random"}, "random needs a method that is told"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(replace(config, **changes))
