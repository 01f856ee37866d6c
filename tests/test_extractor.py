"""The offline classifier: what is saved is what is loaded, counted and trained."""

import numpy as np
import pytest
import torch
from helpers import script
from tiny_extractor import colours, write_extractor

from metrics.extractor import (
    class_probabilities,
    classifier_extractor,
    label_accuracy,
    load_classifier,
)
from metrics.fidelity import features_of, fidelity
from models.artifacts import header, load_checkpoint, save_checkpoint
from models.command import InputError
from models.data import load_split, save_splits

make_shapes = script("data/shapes.py").make_shapes

stage = script("tools/train_extractor.py")


def test_an_extractor_survives_saving(tmp_path):
    extractor = write_extractor(tmp_path / "small.pth")
    loaded = load_classifier(tmp_path / "small.pth")[0]
    assert not loaded.training
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    images_N3HW = torch.rand(8, 3, 32, 32)
    features_NF, logits_NC = loaded(images_N3HW)
    assert features_NF.shape == (8, 16) and logits_NC.shape == (8, 10)
    rounded = extractor.half().float()
    for a, b in zip((features_NF, logits_NC), rounded(images_N3HW), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    save_checkpoint(tmp_path / "other.pth", header("tokenizer", "test", {}))
    with pytest.raises(InputError, match="expected extractor, found tokenizer"):
        load_classifier(tmp_path / "other.pth")[0]


def test_its_numbers_are_named_after_its_dataset(tmp_path):
    images, _ = make_shapes(40, seed=0)
    for dataset, tag in (("cifar10", "c10"), ("shapes", "shapes"), ("pets", "pets")):
        write_extractor(tmp_path / "small.pth", dataset=dataset)
        extractor = classifier_extractor(tmp_path / "small.pth")
        both = (features_of(part, extractor) for part in (images[:20], images[20:]))
        assert set(fidelity(*both, extractor)) == {
            f"{name}_{tag}" for name in ("FD", "KD", "precision", "recall", "IS")
        }


class Brightest(torch.nn.Linear):
    """Takes an image for the channel that is brightest."""

    def forward(self, images_N3HW):
        means_N3 = images_N3HW.mean((2, 3))
        return means_N3, 100 * means_N3


def test_label_accuracy_counts_what_was_asked_for():
    red, green, blue = np.zeros((3, 1, 8, 8, 3), np.uint8)
    red[..., 0] = green[..., 1] = blue[..., 2] = 255
    colours = np.concatenate([red, green, blue, red])
    extractor = Brightest(1, 1).eval()
    assert label_accuracy(colours, np.array([0, 1, 2, 1]), extractor) == 0.75
    probabilities_NC = class_probabilities(colours, extractor, batch=3)
    np.testing.assert_allclose(probabilities_NC, np.eye(3)[[0, 1, 2, 0]], atol=1e-6)
    with pytest.raises(InputError, match="expected 4 labels"):
        label_accuracy(colours, np.array([0, 1]), extractor)
    with pytest.raises(InputError, match="expected images uint8"):
        class_probabilities(colours / 255, extractor)


def test_training_learns_and_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("models.classifier.ROOT", tmp_path)
    names = tuple("abcdefghij")
    arrays = {"train": colours(400, seed=0), "test": colours(100, seed=1)}
    save_splits(tmp_path, arrays, names, "colours", "test", {})
    stage.main(stage.ExtractorConfig(data=tmp_path, epochs=4, batch=32, width=8))
    written = tmp_path / "checkpoints" / "extractor_colours.pth"  # never over another dataset's
    head = load_checkpoint(written, "extractor", "")["header"]
    test = load_split(tmp_path, "test")
    assert head["test_accuracy"] > 0.9
    assert head["dataset"] == "colours" and head["classes"] == list(names)
    assert head["inputs"]["test_images"] == test.sha256 and head["config"]["width"] == 8
    accuracy = label_accuracy(test.images_NHWC, test.labels_N, load_classifier(written)[0])
    assert accuracy == head["test_accuracy"]
    assert f"test accuracy {accuracy:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_values_that_fit_no_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="load_CIFAR10"):
        stage.main(stage.ExtractorConfig(data=tmp_path))
