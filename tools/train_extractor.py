#!/usr/bin/env -S uv run
"""Train the offline ruler: a small classifier whose features measure samples without Inception.

Reads     {train,test}_{images,labels}.npy of stage 1
Writes    checkpoints/extractor_<dataset>.pth, float16, read by metrics/extractor.py
The same command resumes a run that was cut.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from metrics.extractor import Classifier, label_accuracy
from models import command
from models.classifier import ClassifierConfig, save_net, train_classifier
from models.command import run
from models.data import Split


@dataclass(frozen=True)
class ExtractorConfig(ClassifierConfig):
    """Train the classifier that stands in for Inception."""

    width: Annotated[int, command.Range(1, 2**12)] = 48
    """channels at 16x16; the features are 4 times as many"""


def write(out: Path, net: Classifier, head: dict, test: Split) -> float:
    """Write what was trained; return its accuracy on the test split."""
    net.half().float().eval()  # rounded to what the file holds
    accuracy = label_accuracy(test.images_NHWC, test.labels_N, net)
    save_net(out, net, head | {"test_accuracy": accuracy})
    return accuracy


def main(cfg: ExtractorConfig) -> None:
    """Read both splits, train, measure what the file will hold, write it."""
    producer = "tools/train_extractor.py"
    train_classifier(cfg, "extractor", producer, lambda n: Classifier(cfg.width, n), write)


if __name__ == "__main__":
    run(main, ExtractorConfig)
