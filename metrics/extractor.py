"""The offline feature extractor: a small classifier of 32x32 images, for use without Inception.

Its pooled features and class probabilities give distances and scores through metrics/fidelity.py.
They carry the name of the images it was trained on (`FD_c10`, `IS_c10`), are never called FID, and
compare runs with one another only: the classifier has seen the training images. The network
follows the fast residual classifiers of D. Page, "How to train your ResNet" (2018; code:
davidcpage/cifar10-fast). Differs from them in: half the width or less, a residual block at each of
three resolutions, mean instead of max pooling at the end, no fixed scale on the logits.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from metrics.fidelity import FeatureExtractor, codebook_use, features_of, psnr
from models.artifacts import ROOT
from models.classifier import load_net
from models.command import InputError
from models.data import Split, evenly
from models.tokenizer import Tokenizer, decode_codes, encode_images

RERUN = "uv run tools/train_extractor.py"
TAGS = {"cifar10": "c10"}
"""dataset -> the short form at the end of its numbers' names; others go by their own name"""


def conv_norm_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return a 3x3 convolution that keeps height and width, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, channels: int):
        super().__init__()
        self.inner = nn.Sequential(*(conv_norm_relu(channels, channels) for _ in range(2)))

    def forward(self, x):
        return x + self.inner(x)


class Classifier(nn.Module):
    """Classifier with `width` channels at 16x16, 2 * width at 8x8 and F = 4 * width at 4x4."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.size = {"width": width, "classes": classes}
        layers = []
        for before, after in pairwise((3, width, 2 * width, 4 * width)):
            layers += [conv_norm_relu(before, after), nn.MaxPool2d(2), Residual(after)]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, classes)
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def forward(self, images_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map float images in [0, 1], H and W multiples of 8, to (features_NF, logits_NC)."""
        scaled_N3HW = (images_N3HW - 0.5) * 4  # CIFAR-10's standard deviation is about 1/4
        scaled_N3HW = scaled_N3HW.contiguous(memory_format=torch.channels_last)
        features_NF = self.trunk(scaled_N3HW).mean((2, 3))
        return features_NF, self.head(features_NF)


def load_classifier(path: Path) -> tuple[Classifier, dict]:
    """Read a classifier onto the CPU, float32, in eval mode, and its header, as `load_net`."""
    return load_net(path, "extractor", RERUN, Classifier)


def classifier_extractor(path: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Return the classifier at `path` for distances; their names carry the name of its dataset."""
    classifier, head = load_classifier(path)
    classifier.to(device)

    def run(images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        features_BF, logits_BC = classifier(images_B3HW.float() / 255)
        return {"features": features_BF, "logits": logits_BC}

    suffix = "_" + TAGS.get(head["dataset"], head["dataset"])
    names = {"suffix": suffix, "classes": tuple(head["classes"])}
    return FeatureExtractor(run, head["sha256"], "features", "logits", **names)


def extractor_of(
    dataset: str, classes: Sequence[str], path: Path | None, device: torch.device
) -> FeatureExtractor | None:
    """Return the offline classifier at `path`, else the data set's, if there is one.

    Raises InputError for one of other classes; the data set's is none then: a folder of images may
    have its name.
    """
    shipped = ROOT / f"checkpoints/extractor_{dataset}.pth"
    if not path and not shipped.exists():
        return None
    extractor = classifier_extractor(path or shipped, device)
    if extractor.classes == tuple(classes):
        return extractor
    if path is None:
        return None
    raise InputError(
        f"expected --extractor of the classes {', '.join(classes)}, and {path} knows "
        f"{', '.join(extractor.classes)}; run: {RERUN} --data YOURS --out NEW"
    )


def reconstruction_report(model: Tokenizer, test: Split, count: int) -> dict[str, float]:
    """Return PSNR (dB), codebook use and label_accuracy of decoded test images, evenly spaced."""
    rows_N, device = evenly(len(test.labels_N), count), next(model.parameters()).device
    images_NHWC, codes_NT = test.images_NHWC[rows_N], encode_images(model, test.images_NHWC[rows_N])
    decoded_NHWC = decode_codes(model, codes_NT)
    report = {"psnr": float(psnr(images_NHWC, decoded_NHWC).mean()), "images": len(rows_N)}
    report |= codebook_use(codes_NT, model.config.codebook_size)
    if extractor := extractor_of(test.dataset, test.classes, None, device):
        features = features_of(decoded_NHWC, extractor, device, verbose=False, least=1)
        report["label_accuracy"] = extractor.label_accuracy(features, test.labels_N[rows_N])
    return report
