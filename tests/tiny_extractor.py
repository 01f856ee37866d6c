"""An untrained classifier on disk, for tests that need a ruler and not its accuracy."""

from pathlib import Path

import numpy as np
import torch

from metrics.extractor import Classifier
from models.artifacts import header
from models.classifier import save_net
from models.data import CLASSES


def write_extractor(path: Path, seed: int = 0, dataset: str = "cifar10") -> Classifier:
    """Write a classifier with random weights, whose batch norms have seen images; return it."""
    torch.manual_seed(seed)
    extractor = Classifier(width=4, classes=10)
    extractor(torch.rand(50, 3, 32, 32))
    about = {"dataset": dataset, "classes": list(CLASSES[dataset])}
    save_net(path, extractor, header("extractor", "test", {}) | about)
    return extractor.eval()


def colours(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images of ten colours, uint8 (count, 32, 32, 3), and which one each has."""
    palette_C3 = 50 + 75 * np.indices((3, 3, 3)).reshape(3, 27).T[:10]
    labels_N = np.arange(count) % 10
    noise = np.random.default_rng(seed).normal(0, 10, (count, 32, 32, 3))
    images_NHWC = (palette_C3[labels_N][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    return images_NHWC, labels_N
