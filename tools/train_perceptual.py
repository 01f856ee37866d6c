#!/usr/bin/env -S uv run
"""Train the net of the tokenizer's perceptual loss: a small VGG-like classifier.

Reads     {train,test}_{images,labels}.npy of stage 1
Writes    checkpoints/perceptual_<dataset>.pth, float16, read by models/perceptual.py
The same command resumes a run that was cut.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from metrics.extractor import label_accuracy
from models import command
from models.artifacts import ROOT, header
from models.classifier import fit_classifier
from models.command import run
from models.data import load_split
from models.perceptual import KIND, PerceptualNet, save_perceptual
from models.training import pick_device, start_fabric


@dataclass(frozen=True)
class PerceptualConfig(command.Config):
    """Train the net of the perceptual loss."""

    data: Path = ROOT / "data" / "cifar10"
    """folder written by data/load_CIFAR10.py"""
    out: command.OutFile | None = None
    """file to write; checkpoints/perceptual_<dataset>.pth if not given"""
    epochs: command.Count = 5
    """passes over the training images"""
    batch: command.Batch = 128
    """images in a step"""
    lr: command.Amount = 0.15
    """highest learning rate"""
    seed: command.Seed = 1
    """weights, order of the images, crops and flips follow from it"""
    device: command.DeviceName = "auto"


def main(cfg: PerceptualConfig) -> None:
    """Train on the train split, fold, round, measure on the test split, write."""
    fabric = start_fabric(pick_device(cfg.device))
    train, test = load_split(cfg.data, "train"), load_split(cfg.data, "test")
    out = cfg.out or ROOT / "checkpoints" / f"perceptual_{train.dataset}.pth"
    head = header(KIND, "tools/train_perceptual.py", cfg, {"train_images": train.sha256})
    torch.manual_seed(cfg.seed)
    net, state = PerceptualNet(classes=len(train.classes)), out.with_suffix(".state.pth")
    recipe = {"epochs": cfg.epochs, "batch": cfg.batch, "lr": cfg.lr, "seed": cfg.seed}
    fit_classifier(net, train, fabric, head, state, **recipe)
    folded = net.fold().half().float()  # rounded to what the file holds
    accuracy = label_accuracy(test.images_NHWC, test.labels_N, folded)
    about = {"dataset": train.dataset, "classes": list(train.classes), "test_accuracy": accuracy}
    save_perceptual(out, folded, head | about)
    state.unlink(missing_ok=True)
    print(f"{out}: test accuracy {accuracy:.4f}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main, PerceptualConfig)
