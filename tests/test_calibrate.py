"""tools/calibrate.py end to end, over every kind of method: what it writes, what it refuses."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
from helpers import numbers, other_codes, script

from models.command import InputError
from models.methods import METHODS

tool = script("tools/calibrate.py")


@pytest.fixture
def config(cheap):
    small = {"images": 16, "random_orders": 2, "num_samples": 20, "batch": 10}
    return partial(cheap, tool.CalibrateConfig, **small)


@pytest.mark.parametrize("method", ["randar", "gpt", "par"])  # any order, serial, in groups
def test_the_command_measures_every_kind_of_method(config, tmp_path, capsys, method):
    found = tool.main(config(method, class_orders=3, class_views=True))
    assert json.loads((tmp_path / "out/calibration.json").read_text()) == found
    for name in ("reliability", "class_reliability", "likelihood_by_order", "steps", "risk"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert found["tokens"]["overall"]["tokens"] == 16 * 64
    by_step = found["tokens"]["by_step"]
    assert [row["tokens"] // 16 for row in by_step.values()] == [8, 25, 31]
    several = found["class_orders"]  # of six draws, or two: each order reads the mirrored image too
    assert [*several] == (["1", "2", "4"] if METHODS[method].any_order else ["1", "2"])
    assert several["1"]["logs"] != several["2"]["logs"] != several.get("4", {}).get("logs")
    own = METHODS[method].scans[0]
    bits = found["orders"]["bits_per_image"]
    held_out = found["entropy"]["held_out_bits_per_image"]["value"]
    assert held_out == pytest.approx(bits[own]["value"], rel=1e-5)
    assert found["tokens"]["overall"]["nll_bits"]["value"] * 64 == pytest.approx(held_out)
    assert found["inputs"].keys() == {"tokenizer", "checkpoint", "test_codes", "extractor"}
    assert len(found["quality"]) == 2 and found["git_commit"] and found["command"]
    assert "nan" not in capsys.readouterr().out
    assert all(math.isfinite(x) for x in numbers(found))


def test_the_command_needs_no_judge_and_repeats_itself(config, tmp_path, monkeypatch):
    monkeypatch.setattr("metrics.extractor.ROOT", tmp_path)
    cfg = config("randar", extractor=None, random_orders=0, images=8, num_samples=10, batch=5)
    found = tool.main(cfg)
    assert found["quality"] == {} and "extractor" not in found["inputs"]
    again = tool.main(replace(cfg, batch=8, out=tmp_path / "again"))
    for part in ("tokens", "orders", "classes", "entropy"):
        assert numbers(found[part]) == pytest.approx(numbers(again[part]), rel=1e-3, abs=1e-3), part


def test_codes_of_another_tokenizer_and_missing_files_are_refused(
    world, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(tool, "logit_batches", lambda *args, **more: pytest.fail("it measured"))
    with pytest.raises(InputError, match="codes of another tokenizer"):
        tool.main(config("randar", codes=other_codes(world, tmp_path, tokenizer="0" * 64)))
    for flag in ("checkpoint", "tokenizer", "extractor"):
        with pytest.raises(InputError, match="nowhere.pth"):
            tool.main(config("randar", **{flag: tmp_path / "nowhere.pth"}))
