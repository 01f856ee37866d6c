"""tools/robustness.py end to end: what it writes, what is known of it, what it refuses."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import cut_at, numbers, script

from metrics.corruptions import CORRUPTIONS, OFFICIAL, corrupt
from metrics.fidelity import psnr
from metrics.likelihood import bits_per_code, orders_for
from metrics.sample_calibration import class_log_p
from models.checkpoint import load_generator
from models.data import load_split
from models.tokenizer import decode_codes, encode_images, load_tokenizer

tool = script("tools/robustness.py")


@pytest.fixture
def config(cheap):
    small = {"images": 5, "num_samples": 20, "corrupted_images": 4, "batch": 60}
    return partial(cheap, tool.RobustnessConfig, **small)


@pytest.fixture
def quick(monkeypatch):
    """One severity and two rhos."""
    monkeypatch.setattr(tool, "SEVERITIES", (5,))
    monkeypatch.setattr(tool, "RHOS", (0.0, 0.4))


def test_the_command_measures_images_context_and_samples(
    world, config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tool, "RHOS", (0.0, 0.4))
    cfg = config("randar", "random", cfg_scale=2.0)
    found = tool.main(cfg)
    assert json.loads((tmp_path / "out/robustness.json").read_text()) == found
    for name in ("corruptions", "context", "misread"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(x) for x in numbers(found))
    assert found["order"] == found["trained_order"] == "random" and found["images"] == 5
    inputs = {"tokenizer", "checkpoint", "test_codes", "test_images", "extractor"}
    assert found["inputs"].keys() == inputs and found["corruptions"]["images"] == 4
    assert "not CIFAR-10-C itself" in found["corruptions"]["source"]

    rows, by_name = found["corruptions"]["by_severity"], found["corruptions"]["by_corruption"]
    assert [row["severity"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert by_name.keys() == CORRUPTIONS.keys()
    assert all([row["severity"] for row in x] == [1, 2, 3, 4, 5] for x in by_name.values())
    for measure in ("bits_per_image", "overconfidence_gap", "class_accuracy", "psnr"):
        for row in rows[1:]:
            parts = [x[row["severity"] - 1][measure]["value"] for x in by_name.values()]
            assert row[measure]["value"] == pytest.approx(np.mean(parts)), measure
            assert row[measure]["images"] == 4
    assert rows[0]["FD_shapes"] < 1e-6 < min(row["FD_shapes"] for row in rows[1:])

    # severity 0 by other means
    model, tokenizer = load_generator(cfg.checkpoint).model, load_tokenizer(world.tokenizer)[0]
    split = load_split(world.data, "test")
    rows_N = [0, 13, 26, 39]
    clean_NHWC, label_N = split.images_NHWC[rows_N], torch.from_numpy(split.labels_N[rows_N])
    codes_NT, order_NS = encode_images(tokenizer, clean_NHWC), orders_for(model, "random", 4)
    bits_N = bits_per_code(model, codes_NT, label_N, order_NS).double().sum(1)
    assert rows[0]["bits_per_image"]["value"] == pytest.approx(bits_N.mean().item(), rel=1e-5)
    decibels = psnr(clean_NHWC, decode_codes(tokenizer, codes_NT)).mean()
    assert rows[0]["psnr"]["value"] == pytest.approx(decibels)
    right_N = class_log_p(model, codes_NT, order_NS).argmax(1) == label_N
    assert rows[0]["class_accuracy"]["value"] == pytest.approx(right_N.double().mean().item())
    # PSNR of a corruption is of its decoding, against the clean image
    dark_NT = encode_images(tokenizer, corrupt(clean_NHWC, "darkness", 5))
    decibels = psnr(clean_NHWC, decode_codes(tokenizer, dark_NT)).mean()
    assert by_name["darkness"][4]["psnr"]["value"] == pytest.approx(decibels)

    assert found["context"]["uniform"] != found["context"]["neighbours"]
    for part in (*found["context"].values(), found["sampling"]):
        assert [row["rho"] for row in part] == list(tool.RHOS)
    assert {"label_accuracy", "FD_shapes"} < found["sampling"][0].keys()
    assert len({row["FD_shapes"] for row in found["sampling"]}) == len(tool.RHOS)
    assert "nan" not in capsys.readouterr().out


def test_the_dear_parts_can_be_left_out(config, quick, capsys):
    found = tool.main(config("randar", "random", images=6, corrupted_images=0, num_samples=0))
    assert found["corruptions"]["by_severity"] == found["sampling"] == []
    assert found["context"]["uniform"][1]["more_bits_per_image"]["images"] == 6
    assert "severity" not in capsys.readouterr().out


def test_a_cut_run_measures_only_what_it_had_not(config, quick, monkeypatch, tmp_path):
    cfg = config("randar", "random")
    whole = tool.main(replace(cfg, out=tmp_path / "whole"))
    taken = cut_at(monkeypatch, tool, "read_images", 2)
    with pytest.raises(KeyboardInterrupt):
        tool.main(cfg)
    found = tool.main(cfg)
    assert len(taken) == 1 + 1 + 1  # severity 0, severity 5 cut, severity 5
    assert all(found[key] == whole[key] for key in ("corruptions", "context", "sampling"))
    assert not list((tmp_path / "out").glob(".partial*"))
    tool.main(replace(cfg, seed=1))
    assert len(taken) == 3 + 2


def test_a_uniform_model_pays_the_same_for_everything(config, quick):
    found = tool.main(config("gpt", uniform=True))
    for rows in (found["corruptions"]["by_severity"], *found["context"].values()):
        for row in rows:
            for end in ("value", "low", "high"):
                assert row["bits_per_image"][end] == pytest.approx(64 * math.log2(32), rel=1e-12)
    assert all(row["more_bits_per_image"]["value"] == 0 for row in found["context"]["uniform"])
    first, last = found["sampling"]  # what is misread changes nothing
    assert first["FD_shapes"] == last["FD_shapes"]


@pytest.mark.parametrize("order", ["raster", "random"])
def test_an_order_of_ones_own_is_measured_and_the_values_of_images_are_kept(config, quick, order):
    cfg = config("randar", "random", images=9, num_samples=0, corrupted_images=0)
    found = tool.main(replace(cfg, order=order))
    assert found["order"] == order and found["trained_order"] == "random"
    values = found["context"]["uniform"][1]["more_bits_per_image"]
    assert np.mean(values["of_images"]) == pytest.approx(values["value"], abs=1e-3)


def test_annealed_runs_are_measured_in_raster_order_and_batches_change_nothing(config, quick):
    cfg = config("rar", "anneal", num_samples=10)
    found = tool.main(cfg)
    assert found["order"] == "raster" and found["trained_order"] == "anneal"
    again = tool.main(replace(cfg, batch=26))
    for part in ("corruptions", "context", "sampling"):
        a, b = (numbers(x[part]) for x in (found, again))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4), part
    other = tool.main(replace(cfg, seed=1))
    for part in ("corruptions", "context", "sampling"):
        assert numbers(other[part]) != numbers(found[part])


def test_an_official_set_that_corrupts_nothing_gives_the_clean_row(world, config, quick, tmp_path):
    split = load_split(world.data, "test")
    rows = np.random.default_rng(0).permutation(len(split.labels_N))  # another order than stage 1's
    for name in OFFICIAL:
        np.save(tmp_path / f"{name}.npy", np.concatenate([split.images_NHWC[rows]] * 5))
    np.save(tmp_path / "labels.npy", np.tile(split.labels_N[rows], 5).astype(np.uint8))
    found = tool.main(config("randar", cifar10_c=tmp_path))
    assert found["corruptions"]["source"] == "CIFAR-10-C"
    assert tuple(found["corruptions"]["by_corruption"]) == OFFICIAL
    clean, *others = found["corruptions"]["by_severity"]
    of_one = [row for rows in found["corruptions"]["by_corruption"].values() for row in rows]
    for row in others + of_one:
        for name in clean.keys() - {"severity", "FD_shapes"}:
            for end in ("value", "low", "high"):
                assert row[name][end] == pytest.approx(clean[name][end], rel=1e-5, abs=1e-6), name
