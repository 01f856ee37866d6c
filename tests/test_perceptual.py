"""The perceptual loss: the distance that it says it is, by a net that a cut training leaves equal."""

import numpy as np
import pytest
import torch
from helpers import script

from models.artifacts import load_checkpoint
from models.dataset import load_split, save_split
from models.errors import InputError
from models.perceptual import (
    KIND,
    PerceptualNet,
    load_perceptual,
    perceptual_distance,
    save_perceptual,
)

WIDTHS = (4, 6, 8, 10)
stage = script("tools/train_perceptual.py")


@pytest.fixture
def trained_a_bit() -> PerceptualNet:
    """A net whose batch norms have seen images."""
    torch.manual_seed(0)
    net = PerceptualNet(WIDTHS)
    for _ in range(5):
        net(torch.rand(8, 3, 32, 32) ** 2)
    return net


def test_folding_changes_no_feature(trained_a_bit):
    images_N3HW = torch.rand(3, 3, 32, 32)
    folded = trained_a_bit.fold()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    features, logits_NC = trained_a_bit.eval()(images_N3HW)
    same_features, same_logits_NC = folded(images_N3HW)
    assert [(f.shape[1], f.shape[2]) for f in features] == [(4, 32), (6, 16), (8, 8), (10, 4)]
    torch.testing.assert_close(features, same_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_NC, same_logits_NC, rtol=1e-4, atol=1e-5)


def test_the_distance_is_lpips_with_weights_of_one(trained_a_bit):
    net = trained_a_bit.fold().requires_grad_(False)
    a_N3HW, b_N3HW = torch.rand(2, 3, 3, 32, 32)
    by_hand = 0
    for a, b in zip(net(a_N3HW)[0], net(b_N3HW)[0], strict=True):
        unit_a, unit_b = (f / f.norm(dim=1, keepdim=True).clamp(min=1e-3) for f in (a, b))
        by_hand += ((unit_a - unit_b) ** 2).sum(1).mean() / 4
    torch.testing.assert_close(perceptual_distance(net, a_N3HW, b_N3HW), by_hand)
    assert perceptual_distance(net, a_N3HW, a_N3HW).abs() < 1e-5


def test_its_gradient_leads_to_the_target_and_never_to_the_net_or_from_the_target(trained_a_bit):
    net = trained_a_bit.fold().requires_grad_(False)
    images_N3HW = torch.rand(2, 3, 32, 32, requires_grad=True)
    target_N3HW = torch.rand(2, 3, 32, 32, requires_grad=True)
    before = perceptual_distance(net, images_N3HW, target_N3HW)
    before.backward()
    assert target_N3HW.grad is None and all(p.grad is None for p in net.parameters())
    stepped = images_N3HW.detach() - 0.5 * images_N3HW.grad / images_N3HW.grad.norm()
    assert perceptual_distance(net, stepped, target_N3HW) < before


def test_a_net_comes_back_frozen_and_another_file_does_not(trained_a_bit, tmp_path, world):
    folded = trained_a_bit.fold().half().float()
    save_perceptual(tmp_path / "net.pth", folded, {"kind": KIND})
    net, images_N3HW = load_perceptual(tmp_path / "net.pth"), torch.rand(2, 3, 32, 32)
    assert torch.equal(net(images_N3HW)[1], folded(images_N3HW)[1])
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with pytest.raises(InputError, match=f"expected {KIND}, found tokenizer"):
        load_perceptual(world.tokenizer)


def colours(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images of ten colours, uint8 (count, 32, 32, 3), and which one each has."""
    palette_C3 = 50 + 75 * np.indices((3, 3, 3)).reshape(3, 27).T[:10]
    labels_N = np.arange(count) % 10
    noise = np.random.default_rng(count).normal(0, 10, (count, 32, 32, 3))
    return (palette_C3[labels_N][:, None, None] + noise).clip(0, 255).astype(np.uint8), labels_N


def test_a_cut_training_ends_as_an_undisturbed_one_and_has_learnt(tmp_path, monkeypatch):
    for split, count in (("train", 200), ("test", 50)):
        save_split(tmp_path, split, *colours(count), tuple("abcdefghij"), "x", "test", {}, {})
    monkeypatch.setattr(stage, "PerceptualNet", lambda classes: PerceptualNet(WIDTHS, classes))
    monkeypatch.setattr("models.classifier.SAVE_EVERY", 5)
    files = [tmp_path / "whole.pth", tmp_path / "cut.pth"]
    configs = [stage.PerceptualConfig(tmp_path, out, epochs=20, batch=20) for out in files]
    stage.main(configs[0])
    draw, taken = stage.fit_classifier.__globals__["crop_and_flip"], []

    def cut_once(*args):
        taken.append(1)
        if len(taken) == 13:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr("models.classifier.crop_and_flip", cut_once)
    with pytest.raises(KeyboardInterrupt):
        stage.main(configs[1])
    stage.main(configs[1])
    assert len(taken) == 13 + 190  # of 200 steps, 10 were saved
    whole, cut = (load_checkpoint(path, KIND, "") for path in files)
    for name, value in whole["state"].items():
        assert torch.equal(value, cut["state"][name]), name
    assert whole["header"]["test_accuracy"] == cut["header"]["test_accuracy"] > 0.5
    train = load_split(tmp_path, "train")
    assert whole["header"]["inputs"] == {"train_images": train.sha256}
    assert not (tmp_path / "cut.state.pth").exists()
