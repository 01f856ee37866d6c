"""Training a small image classifier: the recipe of fast CIFAR-10 classifiers, in a resumable loop.

SGD with Nesterov momentum, a learning rate that rises and falls once, label smoothing, random crops
and flips (D. Page, "How to train your ResNet", 2018).
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from models.artifacts import load_checkpoint, save_checkpoint
from models.data import Split
from models.training import batch_rows, lr_at, same_run, seed_step

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PAD = 4
"""pixels that a random crop may move an image by"""
WARMUP = 0.2
"""share of the steps in which the learning rate rises to its peak"""

SAVE_EVERY = 200
"""steps between saves of the training state"""


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


def fit_classifier(
    model: nn.Module,
    train: Split,
    fabric: "Fabric",
    head: dict,
    state: Path,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """Train `model`, images (B, 3, H, W) in [0, 1] -> (anything, logits_BC), in place.

    `state` is written every SAVE_EVERY steps, resumed if it is there, and left to be deleted.
    """
    edges = ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0))
    padded_NHWC = torch.tensor(
        np.pad(train.images_NHWC, edges, mode="reflect"), device=fabric.device
    )
    label_N = torch.tensor(train.labels_N, device=fabric.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    net, optimizer = fabric.setup(model, optimizer)
    kind, begin, rows = f"{head['kind']} training state", 0, len(label_N)
    if state.exists():
        saved = load_checkpoint(state, kind, rerun=f"rm {state}, then this command")
        known = saved["header"]["config"] | saved["header"]["inputs"]
        same_run(known, head["config"] | head["inputs"], ("data", "out", "device"), state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    steps = math.ceil(epochs * rows / batch)
    bar = tqdm(range(begin, steps), head["kind"], steps, initial=begin, unit="step", mininterval=1)
    for step in bar:
        generator = seed_step(seed, step, fabric.device)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, lr, int(WARMUP * steps), steps)
        pick_B = batch_rows(rows, batch, step, seed).to(fabric.device)
        images_B3HW = crop_and_flip(padded_NHWC, pick_B, generator).float() / 255
        _, logits_BC = net(images_B3HW)
        loss = cross_entropy(logits_BC, label_N[pick_B], label_smoothing=0.1)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            right = (logits_BC.argmax(1) == label_N[pick_B]).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{right:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(state, head | {"kind": kind}, step=step + 1, **learned)
