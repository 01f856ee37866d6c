"""The offline ruler and the perceptual loss: two nets of one training, and what they measure."""

import pytest
import torch
from helpers import cut_at, run_cut_and_again, same, script
from tiny_extractor import colours

from metrics.extractor import load_classifier
from models import classifier
from models.artifacts import load_checkpoint
from models.classifier import KIND, PAD, PerceptualNet, load_perceptual, perceptual_distance
from models.command import InputError
from models.data import load_split, save_splits
from models.tokenizer import to_float

stage = script("tools/train_extractor.py")


def test_training_learns_and_says_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "ROOT", tmp_path)
    names = tuple("abcdefghij")
    arrays = {"train": colours(400, seed=0), "test": colours(100, seed=1)}
    save_splits(tmp_path, arrays, names, "colours", "test", {})
    stage.main(stage.ExtractorConfig(data=tmp_path, epochs=4, batch=32, width=8))
    written = tmp_path / "checkpoints" / "extractor_colours.pth"  # never over another dataset's
    head = load_checkpoint(written, "extractor", "")["header"]
    test = load_split(tmp_path, "test")
    assert head["dataset"] == "colours" and head["classes"] == list(names)
    assert head["inputs"]["test_images"] == test.sha256 and head["config"]["width"] == 8
    right_N = load_classifier(written)[0](to_float(test.images_NHWC))[1].argmax(1).numpy()
    assert head["test_accuracy"] == (right_N == test.labels_N).mean() > 0.9


WIDTHS = (4, 6, 8, 10)
net_stage = script("tools/train_perceptual.py")


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
    classifier.save_net(tmp_path / "net.pth", folded, {"kind": KIND})
    net, images_N3HW = load_perceptual(tmp_path / "net.pth"), torch.rand(2, 3, 32, 32)
    assert torch.equal(net(images_N3HW)[1], folded(images_N3HW)[1])
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with pytest.raises(InputError, match=f"expected {KIND}, found tokenizer"):
        load_perceptual(world.tokenizer)


def test_crops_are_windows_and_half_are_mirrored():
    side = 8 + 2 * PAD
    here = torch.arange(side)
    padded_NHWC = torch.stack([here[:, None].expand(side, side), here.expand(side, side)], -1)[None]
    pick_B = torch.zeros(1000, dtype=torch.int64)
    crops_BCHW = classifier.crop_and_flip(padded_NHWC, pick_B, torch.Generator().manual_seed(0))
    assert crops_BCHW.shape == (1000, 2, 8, 8)
    row_BHW, column_BHW = crops_BCHW.unbind(1)
    assert (row_BHW.diff(dim=1) == 1).all() and (row_BHW.diff(dim=2) == 0).all()
    step_BHW = column_BHW.diff(dim=2)
    mirrored_B = step_BHW[:, 0, 0] == -1
    assert (step_BHW == torch.where(mirrored_B, -1, 1)[:, None, None]).all()
    assert (column_BHW.diff(dim=1) == 0).all() and 400 < mirrored_B.sum() < 600
    for cells_BHW in (row_BHW, column_BHW):
        assert cells_BHW.amin((1, 2)).unique().tolist() == list(range(2 * PAD + 1))


def test_a_cut_training_ends_as_an_undisturbed_one_and_has_learnt(tmp_path, monkeypatch):
    arrays = {"train": colours(200, seed=0), "test": colours(50, seed=1)}
    save_splits(tmp_path, arrays, tuple("abcdefghij"), "colours", "test", {})
    monkeypatch.setattr(net_stage, "PerceptualNet", lambda classes: PerceptualNet(WIDTHS, classes))
    monkeypatch.setattr(classifier, "SAVE_EVERY", 5)
    files = [tmp_path / "whole.pth", tmp_path / "cut.pth"]
    configs = [net_stage.PerceptualConfig(tmp_path, out, epochs=20, batch=20) for out in files]
    net_stage.main(configs[0])
    taken = cut_at(monkeypatch, classifier, "crop_and_flip", 13)
    run_cut_and_again(net_stage.main, configs[1])
    assert len(taken) == 13 + 190  # of 200 steps, 10 were saved
    whole, cut = (load_checkpoint(path, KIND, "") for path in files)
    assert same(whole["state"], cut["state"])
    assert whole["header"]["test_accuracy"] == cut["header"]["test_accuracy"] > 0.3
    assert not (tmp_path / "cut.state.pth").exists()
