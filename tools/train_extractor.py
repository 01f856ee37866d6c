#!/usr/bin/env -S uv run
"""Train the offline ruler: a small classifier whose features measure samples without Inception.

Reads     {train,test}_{images,labels}.npy of stage 1
Writes    checkpoints/extractor_<dataset>.pth, float16, read by metrics/extractor.py
The same command resumes a run that was cut.
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
    build, producer = partial(Classifier, cfg.width), "tools/train_extractor.py"
    train_classifier(cfg, "extractor", producer, build)


if __name__ == "__main__":
    command.run(main, ExtractorConfig)
