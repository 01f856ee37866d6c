"""Features of layers and their linear probes: over every method, and on classes that are known."""

import json

import pytest
import torch
from helpers import draw, script, tiny

from models.artifacts import load_array
from models.command import InputError
from models.data import evenly, load_codes
from models.orders import ORDERS

tool = script("tools/features.py")


def test_features_are_the_means_of_what_each_block_returns_where_it_predicts(method):
    model = tiny(method)
    codes_BT, _, order_BS = draw(model)
    features_BLD = tool.layer_features(model, codes_BT, order_BS, 2, "test")
    assert features_BLD.shape == (3, 2, 16) and features_BLD.isfinite().all()
    one_1LD = tool.layer_features(model, codes_BT[2:], order_BS[2:], 1, "test")
    torch.testing.assert_close(features_BLD[2:], one_1LD)
    assert not any(module._forward_hooks for module in model.modules())

    last = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)][-1][-1]
    returned = []
    last.register_forward_hook(lambda _, __, x_BSD: returned.append(x_BSD))
    model(codes_BT, torch.full((3,), model.null_label), order_BS)
    torch.testing.assert_close(features_BLD[:, -1], returned[0][:, -16:].mean(1).float())


def test_the_second_reading_has_seen_every_code_in_every_layer():
    """The code visited last is not fed the first time; RandAR's blocks see it wherever they ask."""
    model = tiny("randar")
    codes_BT, _, order_BS = draw(model)
    other_BT = codes_BT.scatter(1, order_BS[:, -1:], (codes_BT.gather(1, order_BS[:, -1:]) + 1) % 7)
    once, twice = (order_BS, order_BS.repeat(1, 2))
    torch.testing.assert_close(
        *(tool.layer_features(model, x, once, 3, "test") for x in (codes_BT, other_BT))
    )
    returned = []
    model.layers[0].register_forward_hook(lambda _, __, x_BSD: returned.append(x_BSD))
    before, after = (tool.layer_features(model, x, twice, 3, "test") for x in (codes_BT, other_BT))
    changed_BS = (returned[0] - returned[1]).abs().amax(2) > 1e-6
    asked_BT = changed_BS[:, 33::2]  # slots of [c, p, x, .., p, x, p, x, ..]
    assert asked_BT.shape[1] == 16 and asked_BT.all() and not changed_BS[:, :32].any()
    torch.testing.assert_close(before[:, 0], returned[0][:, 33::2].mean(1).float())
    assert ((before - after).abs().amax(2) > 1e-6).all()


def test_a_probe_learns_a_linear_map_and_no_more():
    generator = torch.Generator().manual_seed(0)
    x_NF = 5 + 3 * torch.randn(600, 4, generator=generator)
    linear_N = (x_NF - 5)[:, :3].argmax(1)
    found_M = tool.probe(x_NF[:400], linear_N[:400], x_NF[400:])
    assert (found_M == linear_N[400:]).double().mean() > 0.95
    folded_N = ((x_NF[:, 0] - 5).abs() > 2).long()  # on both sides: no linear map tells it
    found_M = tool.probe(x_NF[:400], folded_N[:400], x_NF[400:])
    most = folded_N[400:].bincount().max() / 200
    assert (found_M == folded_N[400:]).double().mean() < most + 0.05


@pytest.mark.parametrize("method", ["randar", "gpt"])
def test_the_command_writes_features_and_what_they_tell(cheap, world, tmp_path, capsys, method):
    cfg = cheap(tool.FeaturesConfig, method, out=tmp_path, train_images=40, images=20)
    record = tool.main(cfg)
    assert json.loads((tmp_path / "features.json").read_text()) == record
    layers = sum(name.startswith("layer ") for name in record["accuracy"])
    features, labels = [], []
    for split, images, count in (("train", 120, 40), ("test", 40, 20)):
        path = tmp_path / f"features_{split}.npy"
        array_NLD, head = load_array(path, "layer features", "", "float32", 3)
        assert array_NLD.shape[:2] == (count, layers) and head["inputs"] == record["inputs"]
        features.append(torch.from_numpy(array_NLD))
        labels.append(load_codes(world.codes, split).label_N[evenly(images, count)])
    for layer in range(layers):
        found_M = tool.probe(features[0][:, layer], labels[0], features[1][:, layer])
        right = (found_M == labels[1]).double().mean().item()
        assert record["accuracy"][f"layer {layer + 1}"]["value"] == pytest.approx(right)
    assert all(0 <= value["low"] <= value["high"] <= 1 for value in record["accuracy"].values())
    assert "| codes, counted | " in capsys.readouterr().out


def test_what_the_method_cannot_read_is_refused(cheap, monkeypatch):
    monkeypatch.setattr(tool, "layer_features", lambda *args: pytest.fail("it ran"))
    other = next(name for name in ORDERS if name != "raster")
    with pytest.raises(InputError, match="raster"):
        tool.main(cheap(tool.FeaturesConfig, "gpt", order=other))
    with pytest.raises(InputError, match="only RandAR reads twice"):
        tool.main(cheap(tool.FeaturesConfig, "arpg", passes=2))
