"""tools/measure_inpainting.py: what it measures is of the hidden cells, given what it says."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from helpers import changed, script

from metrics.likelihood import bits_per_code
from models.checkpoint import load_generator
from models.command import InputError
from models.data import load_codes, load_split
from models.orders import ORDERS

tool = script("tools/measure_inpainting.py")


@pytest.fixture
def config(cheap):
    return partial(cheap, tool.InpaintingConfig, mask="bottom")


@pytest.mark.parametrize("method", ["randar", "gpt"])
def test_the_lower_half_given_the_upper_is_given_all_as_well_as_the_past(config, method, capsys):
    cfg = config(method, images=40)
    found = tool.main(cfg)
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
    config, monkeypatch, mask
):
    decoded = []
    monkeypatch.setattr(
        tool, "decode_codes", lambda _, codes_NT: decoded.append(codes_NT) or decode(codes_NT)
    )

    def decode(codes_NT):
        return np.zeros((len(codes_NT), 32, 32, 3), np.uint8)

    found = tool.main(config("randar", images=20, batch=7, mask=mask))
    *completed, own_NT = decoded
    assert len(completed) == 2 and found["images"] == 20
    kept, hidden = (np.s_[:, :32], np.s_[:, 32:])[:: 1 if mask == "bottom" else -1]
    for codes_NT in completed:
        assert torch.equal(codes_NT[kept], own_NT[kept])
        assert not torch.equal(codes_NT[hidden], own_NT[hidden])
    assert torch.equal(*completed) == (mask == "bottom")  # whose past is all there is


def test_the_future_is_worth_what_its_cells_tell(config):
    """Of hidden upper cells a raster model is given nothing; the kept ones come first if it can."""
    cfg = config("randar", images=40)
    found = tool.main(changed(cfg, mask="top"))["bits_per_image"]
    model, test = load_generator(cfg.checkpoint).model, load_codes(cfg.codes, "test")
    cells_T = torch.arange(64).roll(-32)  # the lower half, then the upper
    bits_NS = bits_per_code(model, test.codes_NAT[:, 0], test.label_N, cells_T.expand(40, -1))
    expected = pytest.approx(bits_NS[:, 32:].sum(1).mean().item(), abs=1e-3)
    assert found["given all"]["value"] == expected
    past, future = found["given the past"]["value"], found["what the future saves"]["value"]
    assert future == pytest.approx(past - found["given all"]["value"], abs=1e-3)


def test_codes_of_other_images_and_bad_masks_are_refused(config, tmp_path):
    with pytest.raises(InputError, match="--mask .*nowhere.png: expected centre"):
        tool.main(config("randar", mask=tmp_path / "nowhere.png"))
    with pytest.raises(InputError, match="extract_latent_codes"):
        tool.main(config("randar", codes=tmp_path))
