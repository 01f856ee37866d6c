#!/usr/bin/env -S uv run
"""Train the net of the tokenizer's perceptual loss: a small VGG-like classifier.

images -> checkpoints/perceptual_<dataset>.pth, float16. The same command resumes a cut run.
"""

from dataclasses import dataclass

from models import command
from models.classifier import KIND, ClassifierConfig, PerceptualNet, train_classifier


@dataclass(frozen=True)
class PerceptualConfig(ClassifierConfig):
    """Train the net of the perceptual loss."""

    epochs: command.Count = 5
    batch: command.Batch = 128
    lr: command.Amount = 0.15
    seed: command.Seed = 1


def main(cfg: PerceptualConfig) -> None:
    """Train on the train split, fold, round, measure on the test split, write."""
    make, producer = lambda n: PerceptualNet(classes=n), "tools/train_perceptual.py"
    train_classifier(cfg, KIND, producer, make, lambda net: net.fold())


if __name__ == "__main__":
    command.run(main, PerceptualConfig)
