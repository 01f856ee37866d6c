#!/usr/bin/env -S uv run
"""Train the offline ruler: a small classifier whose features measure samples without Inception.

Reads     {train,test}_{images,labels}.npy of stage 1
Writes    checkpoints/extractor_<dataset>.pth, float16, read by metrics/extractor.py
The same command resumes a run that was cut.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from metrics.extractor import Classifier, label_accuracy, save_classifier
from models import command
from models.artifacts import ROOT, header
from models.classifier import fit_classifier
from models.command import run
from models.data import load_split
from models.training import pick_device, start_fabric


@dataclass(frozen=True)
class ExtractorConfig(command.Config):
    """Train the classifier that stands in for Inception."""

    data: Path = ROOT / "data" / "cifar10"
    """folder written by data/load_CIFAR10.py"""
    out: command.OutFile | None = None
    """file to write; checkpoints/extractor_<dataset>.pth if not given"""
    epochs: command.Count = 8
    """passes over the training images"""
    batch: command.Batch = 256
    """images in a step"""
    lr: command.Amount = 0.2
    """highest learning rate"""
    width: Annotated[int, command.Range(1, 2**12)] = 48
    """channels at 16x16; the features are 4 times as many"""
    seed: command.Seed = 0
    """weights, order of the images, crops and flips follow from it"""
    device: command.DeviceName = "auto"


def main(cfg: ExtractorConfig) -> None:
    """Read both splits, train, measure what the file will hold, write it."""
    fabric = start_fabric(pick_device(cfg.device))
    train, test = load_split(cfg.data, "train"), load_split(cfg.data, "test")
    out = cfg.out or ROOT / "checkpoints" / f"extractor_{train.dataset}.pth"
    inputs = {"train_images": train.sha256, "test_images": test.sha256}
    head = header("extractor", "tools/train_extractor.py", cfg, inputs)
    torch.manual_seed(cfg.seed)
    extractor, state = Classifier(cfg.width, len(train.classes)), out.with_suffix(".state.pth")
    recipe = {"epochs": cfg.epochs, "batch": cfg.batch, "lr": cfg.lr, "seed": cfg.seed}
    fit_classifier(extractor, train, fabric, head, state, **recipe)
    extractor.half().float().eval()  # rounds the weights to those that the file holds
    accuracy = label_accuracy(test.images_NHWC, test.labels_N, extractor)
    head |= {"dataset": train.dataset, "classes": list(train.classes), "test_accuracy": accuracy}
    save_classifier(out, extractor, head)
    state.unlink(missing_ok=True)
    print(f"{out}: test accuracy {accuracy:.4f}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main, ExtractorConfig)
