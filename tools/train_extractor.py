#!/usr/bin/env -S uv run
"""Train the offline ruler: a small classifier whose features measure samples without Inception.

Reads     {train,test}_{images,labels}.npy of stage 1
Writes    checkpoints/extractor_<dataset>.pth, float16, read by metrics/extractor.py
The recipe is the usual one of fast CIFAR-10 classifiers: SGD with Nesterov momentum, a learning
rate that rises and falls once, label smoothing, random crops and flips. A killed run starts over.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from lightning_fabric import Fabric
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from metrics.extractor import Extractor, label_accuracy, save_extractor
from models.artifacts import ROOT, header
from models.data import Split, load_split
from models.errors import expect_at_least, one_line_errors
from models.training import batch_rows, lr_at, pick_device, seed_step, start_fabric

PAD = 4
"""pixels that a random crop may move an image by"""
WARMUP = 0.2
"""share of the steps in which the learning rate rises to its peak"""


@dataclass(frozen=True)
class ExtractorConfig:
    """Train the classifier that stands in for Inception."""

    data: Path = ROOT / "data" / "cifar10"
    """folder written by data/load_CIFAR10.py"""
    out: Path | None = None
    """file to write; checkpoints/extractor_<dataset>.pth if not given"""
    epochs: int = 8
    """passes over the training images"""
    batch: int = 256
    """images in a step"""
    lr: float = 0.2
    """highest learning rate"""
    width: int = 48
    """channels at 16x16; the features are 4 times as many"""
    seed: int = 0
    """weights, order of the images, crops and flips follow from it"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def check(self) -> None:
        """Raise InputError for values that fit no run."""
        expect_at_least(self, epochs=1, batch=1, width=1)


def crop_and_flip(
    padded_NHWC: torch.Tensor, pick_B: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Cut a window out of each picked image, half of them mirrored: uint8 (B, 3, H, W).

    `padded_NHWC` has PAD pixels more on every side than what is cut.
    """
    B, device = len(pick_B), padded_NHWC.device
    top_B, left_B = torch.randint(2 * PAD + 1, (2, B), generator=generator, device=device)
    mirrored_B = torch.rand(B, generator=generator, device=device) < 0.5
    cell_W = torch.arange(padded_NHWC.shape[1] - 2 * PAD, device=device)
    row_BH = top_B[:, None] + cell_W
    column_BW = left_B[:, None] + torch.where(mirrored_B[:, None], cell_W.flip(0), cell_W)
    crop_BHWC = padded_NHWC[pick_B[:, None, None], row_BH[:, :, None], column_BW[:, None, :]]
    return crop_BHWC.permute(0, 3, 1, 2)


def fit(
    extractor: Extractor, train: Split, test: Split, cfg: ExtractorConfig, fabric: Fabric
) -> None:
    """Train `extractor` in place; print its accuracy on `test` after every epoch."""
    edges = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    padded_NHWC = torch.tensor(
        np.pad(train.images_NHWC, edges, mode="reflect"), device=fabric.device
    )
    label_N = torch.tensor(train.labels_N, device=fabric.device)
    optimizer = torch.optim.SGD(
        extractor.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    net, optimizer = fabric.setup(extractor, optimizer)
    rows = len(label_N)
    steps = math.ceil(cfg.epochs * rows / cfg.batch)
    bar = tqdm(range(steps), desc="extractor", unit="step", mininterval=1)
    for step in bar:
        generator = seed_step(cfg.seed, step, fabric.device)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg.lr, int(WARMUP * steps), steps)
        pick_B = batch_rows(rows, cfg.batch, step, cfg.seed).to(fabric.device)
        images_B3HW = crop_and_flip(padded_NHWC, pick_B, generator).float() / 255
        _, logits_BC = net(images_B3HW)
        loss = cross_entropy(logits_BC, label_N[pick_B], label_smoothing=0.1)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            right = (logits_BC.argmax(1) == label_N[pick_B]).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{right:.3f}", refresh=False)
        epoch = (step + 1) * cfg.batch // rows
        if epoch > step * cfg.batch // rows:
            with fabric.autocast():
                accuracy = label_accuracy(test.images_NHWC, test.labels_N, extractor.eval())
            extractor.train()
            bar.write(f"epoch {epoch}/{cfg.epochs}: test accuracy {accuracy:.4f}")


def main(cfg: ExtractorConfig) -> None:
    """Read both splits, train, measure what the file will hold, write it."""
    cfg.check()
    fabric = start_fabric(pick_device(cfg.device))
    train, test = load_split(cfg.data, "train"), load_split(cfg.data, "test")
    out = cfg.out or ROOT / "checkpoints" / f"extractor_{train.dataset}.pth"
    torch.manual_seed(cfg.seed)
    extractor = Extractor(cfg.width, len(train.classes))
    fit(extractor, train, test, cfg, fabric)
    extractor.half().float().eval()  # rounds the weights to those that the file holds
    accuracy = label_accuracy(test.images_NHWC, test.labels_N, extractor)
    inputs = {"train_images": train.sha256, "test_images": test.sha256}
    head = header("extractor", "tools/train_extractor.py", cfg, inputs) | {
        "dataset": train.dataset,
        "classes": list(train.classes),
        "test_accuracy": accuracy,
    }
    save_extractor(out, extractor, head)
    print(f"{out}: test accuracy {accuracy:.4f}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(ExtractorConfig))
