"""The sweep over guidance: every combination once, resumed, its best measured on fresh samples."""

import json

import pytest
from helpers import changed, cut_at, script

from models.checkpoint import locked
from models.command import InputError

tool = script("tools/sweep_cfg.py")


@pytest.fixture
def config(cheap):
    few = {"cfg_scale": (1.0, 4.0), "decode_steps": (4, 8), "num_samples": 20, "batch": 20}
    return cheap(tool.SweepConfig, "randar", "random", final=30, **few)


def test_all_are_measured_and_the_best_again_with_another_seed(config, tmp_path):
    found = tool.main(config)
    assert json.loads((tmp_path / "out/sweep.json").read_text()) == found
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    swept, final = found["rows"][:-1], found["final"]
    settings = [(row["plan"]["decode_steps"], row["plan"]["cfg_scale"]) for row in swept]
    assert settings == [(4, 1.0), (4, 4.0), (8, 1.0), (8, 4.0)]
    assert {(row["num_samples"], row["seed"], row["plan"]["order"]) for row in swept} == {
        (20, 0, "random")
    }
    distances = [row["samples"]["FD_shapes"] for row in swept]
    assert len(set(distances)) == 4
    assert found["best"] == swept[distances.index(min(distances))]["plan"] == final["plan"]
    assert (final["num_samples"], final["seed"]) == (30, 1)
    highest = tool.main(changed(config, metric="IS_shapes", final=0))
    scores = [row["samples"]["IS_shapes"] for row in swept]
    assert highest["best"] == swept[scores.index(max(scores))]["plan"]


def test_a_cut_sweep_goes_on_where_it_was(config, tmp_path, monkeypatch):
    whole = tool.main(changed(config, out=tmp_path / "whole"))
    taken = cut_at(monkeypatch, tool.evaluation, "sample_images", 3)
    with pytest.raises(KeyboardInterrupt):
        tool.main(config)
    assert len(json.loads((tmp_path / "out/sweep.json").read_text())["rows"]) == 2
    found = tool.main(config)
    assert len(taken) == 3 + 3  # two points left, and the final one
    for row in (*found["rows"], *whole["rows"]):
        del row["images_per_second"]
    assert found["rows"] == whole["rows"]


def test_impossible_sweeps_are_refused_before_sampling(config, monkeypatch):
    monkeypatch.setattr(tool.evaluation, "sample_images", lambda *args: pytest.fail("it sampled"))
    for changes, message in (
        ({"decode_steps": (65,)}, "steps in 1..64, got 65"),
        ({"metric": "FID"}, "expected --metric FD_shapes.* got FID"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(changed(config, **changes))
    assert not config.out.exists()


def test_two_sweeps_do_not_write_one_folder(config):
    with locked(config.out), pytest.raises(InputError, match="is being written by"):
        tool.main(config)


def test_a_sweep_of_something_else_is_not_mixed_in(config):
    tool.main(changed(config, cfg_scale=(1.0,), decode_steps=(), final=0))
    with pytest.raises(InputError, match="sweep of another checkpoint, tokenizer or reference"):
        tool.main(changed(config, reference=30))
    (config.out / "sweep.json").write_text("[")
    with pytest.raises(InputError, match="holds no sweep"):
        tool.main(config)
