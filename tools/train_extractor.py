#!/usr/bin/env -S uv run
"""Train the offline ruler: a small classifier whose features measure samples without Inception.

images -> checkpoints/extractor_<dataset>.pth, float16. The same command resumes a cut run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from metrics.extractor import Classifier
from models import command
from models.classifier import ClassifierConfig, train_classifier


@dataclass(frozen=True)
class ExtractorConfig(ClassifierConfig):
    """Train the classifier that stands in for Inception."""

    width: Annotated[int, command.Range(1, 2**12)] = 48
    """channels at 16x16; the features are 4 times as many"""


def main(cfg: ExtractorConfig) -> None:
    """Read both splits, train, measure what the file will hold, write it."""
    build = partial(Classifier, cfg.width)
    train_classifier(cfg, "extractor", "tools/train_extractor.py", build)


if __name__ == "__main__":
    command.run(main, ExtractorConfig)
