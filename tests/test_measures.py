"""tools/calibrate.py, measure_tokenizer.py and measure_inpainting.py: what their numbers are of."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import changed, numbers, other_codes, script

from metrics.extractor import classifier_extractor, reconstruction_report
from metrics.fidelity import features_of, fidelity, psnr
from metrics.likelihood import bits_per_code
from models import sampling
from models.checkpoint import load_generator
from models.command import InputError
from models.data import load_codes, load_split
from models.methods import METHODS
from models.orders import ORDERS
from models.tokenizer import decode_codes, encode_images, load_tokenizer

calibrate = script("tools/calibrate.py")


@pytest.fixture
def calibration(cheap):
    small = {"images": 16, "random_orders": 2, "num_samples": 20, "batch": 10}
    return partial(cheap, calibrate.CalibrateConfig, **small)


@pytest.mark.parametrize("method", ["randar", "gpt", "par"])  # any order, serial, in groups
def test_the_command_measures_every_kind_of_method(calibration, tmp_path, capsys, method):
    found = calibrate.main(calibration(method, class_orders=3, class_views=True))
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


def test_the_command_needs_no_judge_and_repeats_itself(calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("metrics.extractor.ROOT", tmp_path)
    cfg = calibration("randar", extractor=None, random_orders=0, images=8, num_samples=10, batch=5)
    found = calibrate.main(cfg)
    assert found["quality"] == {} and "extractor" not in found["inputs"]
    again = calibrate.main(replace(cfg, batch=8, out=tmp_path / "again"))
    for part in ("tokens", "orders", "classes", "entropy"):
        assert numbers(found[part]) == pytest.approx(numbers(again[part]), rel=1e-3, abs=1e-3), part


of_tokenizer = script("tools/measure_tokenizer.py")


@pytest.fixture
def tokenizer_config(cheap):
    return cheap(of_tokenizer.MeasureTokenizerConfig, images=40)


def test_the_command_measures_both_kinds_of_codes(
    world, tokenizer_config, tmp_path, extractor_file, capsys
):
    folder, extractor = (
        other_codes(world, tmp_path / "codes", change=1),
        classifier_extractor(extractor_file),
    )
    found = of_tokenizer.main(changed(tokenizer_config, codes=folder))
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == found
    assert (tmp_path / "out/reconstructions.png").read_bytes().startswith(b"\x89PNG")
    model, test = load_tokenizer(world.tokenizer)[0], load_split(world.data, "test")
    known = reconstruction_report(model, test, len(test.labels_N))
    nearest, stored = found["codes"]["nearest"], found["codes"]["stored"]
    assert nearest["psnr"]["value"] == pytest.approx(known["psnr"], abs=1e-9)
    assert nearest["perplexity"] == known["perplexity"] and found["images"] == known["images"]
    decoded_NHWC = decode_codes(model, load_codes(folder, "test").codes_NAT[:, 0])
    assert stored["psnr"]["value"] == pytest.approx(psnr(test.images_NHWC, decoded_NHWC).mean())
    assert nearest["search"] == stored["search"] == 0
    features, of_test, of_train = (
        features_of(images, extractor)
        for images in (decoded_NHWC, test.images_NHWC, load_split(world.data, "train").images_NHWC)
    )

    def frechet(*pair):
        return pytest.approx(fidelity(*pair, extractor)["FD_shapes"], rel=1e-3)

    assert stored["rFD_shapes"] == frechet(features, of_test)
    assert stored["as_samples"]["FD_shapes"] == frechet(features, of_train)
    assert found["control"]["FD_shapes"] == frechet(of_test, of_train)
    accuracy = extractor.label_accuracy(features, test.labels_N)
    assert stored["as_samples"]["label_accuracy"] == accuracy
    said = capsys.readouterr().out
    assert f"{stored['rFD_shapes']:.3f}" in said and f"{found['control']['FD_shapes']:.3f}" in said


def test_some_images_are_evenly_spaced(world, tokenizer_config):
    found = of_tokenizer.main(changed(tokenizer_config, images=10, codes="none"))
    assert found["images"] == 10 and list(found["codes"]) == ["nearest"]
    images_NHWC = load_split(world.data, "test").images_NHWC
    images_NHWC = images_NHWC[[0, 4, 9, 13, 17, 22, 26, 30, 35, 39]]
    model = load_tokenizer(world.tokenizer)[0]
    decoded_NHWC = decode_codes(model, encode_images(model, images_NHWC))
    value = found["codes"]["nearest"]["psnr"]["value"]
    assert value == pytest.approx(psnr(images_NHWC, decoded_NHWC).mean())


inpaint = script("tools/measure_inpainting.py")


@pytest.fixture
def inpainting(cheap):
    return partial(cheap, inpaint.InpaintingConfig, mask="bottom")


@pytest.mark.parametrize("method", ["randar", "gpt"])
def test_the_lower_half_given_the_upper_is_given_all_as_well_as_the_past(
    inpainting, method, capsys
):
    cfg = inpainting(method, images=40)
    found = inpaint.main(cfg)
    assert json.loads((cfg.out / "inpainting.json").read_text()) == found
    assert (cfg.out / "inpainting.png").read_bytes().startswith(b"\x89PNG")
    model, test = load_generator(cfg.checkpoint).model, load_codes(cfg.codes, "test")
    order_NS = ORDERS["raster"](8).expand(40, -1)
    bits_NS = bits_per_code(model, test.codes_NAT[:, 0], test.label_N, order_NS)
    bits = {way: one["value"] for way, one in found["bits_per_image"].items()}
    below = pytest.approx(bits_NS[:, 32:].sum(1).mean().item(), abs=1e-3)
    assert bits.pop("given the past") == below and found["hidden_cells"] == 32
    if method == "gpt":  # it can be given nothing else
        assert not bits and "given all" not in found["completed"]
    else:
        assert bits == {"given all": below, "what the future saves": pytest.approx(0, abs=1e-3)}
    reference = cfg.against.load("shapes", torch.device("cpu"))
    filled_NHWC, train = reference.test.images_NHWC.copy(), load_split(cfg.against.data, "train")
    for image_HWC, label in zip(filled_NHWC, reference.test.labels_N, strict=True):
        image_HWC[16:] = train.images_NHWC[train.labels_N == label, 16:].mean(0).round()
    expected = reference.measure(filled_NHWC, reference.test.labels_N)
    assert found["completed"]["class mean"] == expected
    said = capsys.readouterr().out
    assert f"{found['completed']['class mean']['FD_shapes']:.3f}" in said


@pytest.mark.parametrize("mask", ["top", "bottom"])
def test_kept_cells_are_decoded_as_they_are_and_hidden_ones_are_drawn_anew(
    inpainting, monkeypatch, mask
):
    decoded = []
    monkeypatch.setattr(
        inpaint, "decode_codes", lambda _, codes_NT: decoded.append(codes_NT) or decode(codes_NT)
    )

    def decode(codes_NT):
        return np.zeros((len(codes_NT), 32, 32, 3), np.uint8)

    found = inpaint.main(inpainting("randar", images=20, batch=7, mask=mask))
    *completed, own_NT = decoded
    assert len(completed) == 2 and found["images"] == 20
    kept, hidden = (np.s_[:, :32], np.s_[:, 32:])[:: 1 if mask == "bottom" else -1]
    for codes_NT in completed:
        assert torch.equal(codes_NT[kept], own_NT[kept])
        assert not torch.equal(codes_NT[hidden], own_NT[hidden])
    assert torch.equal(*completed) == (mask == "bottom")  # whose past is all there is


def test_the_future_is_worth_what_its_cells_tell(inpainting):
    """Of hidden upper cells a raster model is given nothing; the kept ones come first if it can."""
    cfg = inpainting("randar", images=40)
    found = inpaint.main(changed(cfg, mask="top"))["bits_per_image"]
    model, test = load_generator(cfg.checkpoint).model, load_codes(cfg.codes, "test")
    cells_T = torch.arange(64).roll(-32)  # the lower half, then the upper
    bits_NS = bits_per_code(model, test.codes_NAT[:, 0], test.label_N, cells_T.expand(40, -1))
    expected = pytest.approx(bits_NS[:, 32:].sum(1).mean().item(), abs=1e-3)
    assert found["given all"]["value"] == expected
    past, future = found["given the past"]["value"], found["what the future saves"]["value"]
    assert future == pytest.approx(past - found["given all"]["value"], abs=1e-3)


def test_hidden_cells_are_guided_alike_given_all_and_given_the_past(inpainting, monkeypatch):
    """Else the two ways would differ in their guidance, and not in what they know."""
    generate, scales = sampling.generate, []
    seen = lambda *args: scales.append(set(args[5])) or generate(*args)  # noqa: E731
    monkeypatch.setattr(sampling, "generate", seen)
    inpaint.main(inpainting("randar", images=20, mask="top", cfg_scale=3.0))
    assert scales == [{3.0}, {3.0}]


def test_bad_masks_are_refused(inpainting, tmp_path):
    with pytest.raises(InputError, match="--mask .*nowhere.png: expected centre"):
        inpaint.main(inpainting("randar", mask=tmp_path / "nowhere.png"))
