"""The offline feature extractor: a small classifier of 32x32 images, for use without Inception.

Its pooled features and class probabilities give distances and scores through metrics/fidelity.py.
They carry the name of the images it was trained on (`FD_c10`, `IS_c10`), are never called FID, and
compare runs with one another only: the classifier has seen the training images. The network
follows the fast residual classifiers of D. Page, "How to train your ResNet" (2018; code:
davidcpage/cifar10-fast). Differs from them in: half the width or less, a residual block at each of
three resolutions, mean instead of max pooling at the end, no fixed scale on the logits.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from metrics.fidelity import FeatureExtractor
from models.classifier import load_net
from models.command import InputError
from models.tokenizer import to_float

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
        self.trunk = nn.Sequential(
            conv_norm_relu(3, width),
            nn.MaxPool2d(2),
            Residual(width),
            conv_norm_relu(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            conv_norm_relu(2 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(4 * width),
        )
        self.head = nn.Linear(4 * width, classes)
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def forward(self, images_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map float images in [0, 1], H and W multiples of 8, to (features_NF, logits_NC)."""
        scaled_N3HW = (images_N3HW - 0.5) * 4  # CIFAR-10's standard deviation is about 1/4
        scaled_N3HW = scaled_N3HW.contiguous(memory_format=torch.channels_last)
        features_NF = self.trunk(scaled_N3HW).mean((2, 3))
        return features_NF, self.head(features_NF)


def load_classifier(path: Path) -> tuple[Classifier, dict]:
    """Read a classifier onto the CPU, as float32 and in eval mode, and its header.

    Raises InputError if the file is missing, broken, unsafe or no such classifier.
    """
    return load_net(path, "extractor", RERUN, Classifier)


def classifier_extractor(path: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Return the classifier at `path` for distances; their names carry the name of its dataset.

    Raises InputError as `load_classifier`.
    """
    classifier, head = load_classifier(path)
    classifier.to(device)

    def run(images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        features_BF, logits_BC = classifier(images_B3HW.float() / 255)
        return {"features": features_BF, "logits": logits_BC}

    suffix = "_" + TAGS.get(head["dataset"], head["dataset"])
    return FeatureExtractor(run, head["sha256"], "features", "logits", suffix)


@torch.inference_mode()
def class_probabilities(
    images_NHWC: np.ndarray, classifier: Classifier, batch: int = 500
) -> np.ndarray:
    """Return what the classifier thinks uint8 images are: float32 (N, C), rows sum to 1.

    Raises InputError for images of another type or shape.
    """
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
        raise InputError(
            f"expected images uint8 (N, H, W, 3), got {images_NHWC.dtype} {images_NHWC.shape}"
        )
    assert not classifier.training, "batch norm would look at the whole batch"
    device = next(classifier.parameters()).device
    chunks = [images_NHWC[i : i + batch] for i in range(0, len(images_NHWC), batch)]
    logits_NC = torch.cat([classifier(to_float(chunk, device))[1] for chunk in chunks])
    return logits_NC.float().softmax(1).cpu().numpy()


def label_accuracy(images_NHWC: np.ndarray, labels_N: np.ndarray, classifier: Classifier) -> float:
    """Return the share of uint8 images, in [0, 1], that the classifier takes for their label.

    Raises InputError unless there is one label for each image.
    """
    if labels_N.shape != images_NHWC.shape[:1]:
        raise InputError(f"expected {len(images_NHWC)} labels, got an array of {labels_N.shape}")
    return float((class_probabilities(images_NHWC, classifier).argmax(1) == labels_N).mean())
