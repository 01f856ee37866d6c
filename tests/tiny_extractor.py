"""An untrained classifier on disk, for tests that need a ruler and not its accuracy."""

from pathlib import Path

import torch

from metrics.extractor import Extractor, save_extractor
from models.artifacts import header


def write_extractor(path: Path, seed: int = 0, dataset: str = "cifar10") -> Extractor:
    """Write a classifier with random weights, whose batch norms have seen images; return it."""
    torch.manual_seed(seed)
    extractor = Extractor(width=4, classes=10)
    extractor(torch.rand(50, 3, 32, 32))
    about = {"dataset": dataset, "classes": [str(label) for label in range(10)]}
    save_extractor(path, extractor, header("extractor", "test", {}) | about)
    return extractor.eval()
