"""Small classifiers of images: their training, and a perceptual distance by one of them.

Training: SGD with Nesterov momentum, a learning rate that rises and falls once, label smoothing,
random crops and flips (D. Page, "How to train your ResNet", 2018).

Distance: LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", arXiv 1801.03924, eq. 1 with all weights one). Differs from it in: the features are of a
VGG-like net of the same images that the tokenizer is trained on (tools/train_perceptual.py), not of
VGG-16 on ImageNet. It is another net than the one that measures (metrics/extractor.py): no loss
here may look at that one, or at Inception.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from models import command
from models.artifacts import ROOT, as_written, header, load_checkpoint, restored, save_checkpoint
from models.checkpoint import load_state, same_run, save_state
from models.data import Split, load_splits
from models.machine import pick_device, start_fabric
from models.tokenizer import to_float
from models.training import batch_rows, check_finite, lr_at, seed_step

PAD = 4
"""pixels that a random crop may move an image by"""
WARMUP = 0.2
"""share of the steps in which the learning rate rises to its peak"""
SAVE_EVERY = 200
"""steps between saves of the training state"""
KIND = "perceptual net"
WIDTHS = (24, 64, 128, 192)
"""channels at 32x32, 16x16, 8x8 and 4x4 pixels"""
FREE = ("data", "out", "device")
"""fields that may change between the halves of a run"""


@dataclass(frozen=True)
class ClassifierConfig(command.Config):
    """How to train a small classifier."""

    data: Path = ROOT / "data" / "cifar10"
    """folder written by data/load_CIFAR10.py"""
    out: command.OutFile | None = None
    """file to write; default checkpoints/{extractor,perceptual}_<dataset>.pth"""
    epochs: command.Count = 8
    """passes over the training images"""
    batch: command.Batch = 256
    """images in a step"""
    lr: command.Amount = 0.2
    """highest learning rate"""
    seed: command.Seed = 0
    """weights, order of the images, crops and flips follow from it"""
    device: command.DeviceName = "auto"


def train_classifier(
    cfg: ClassifierConfig,
    kind: str,
    producer: str,
    build: Callable[[int], nn.Module],
    finish: Callable[[nn.Module], nn.Module] = lambda net: net,
) -> None:
    """Train what `build` makes for a number of classes; images (B, 3, H, W) in [0, 1] -> logits.

    What `finish` makes of it is rounded to what the file holds, measured and written.
    """
    fabric = start_fabric(pick_device(cfg.device))
    train, test = load_splits(cfg.data)
    out = cfg.out or ROOT / "checkpoints" / f"{kind.split()[0]}_{train.dataset}.pth"
    inputs = {"train_images": train.sha256, "test_images": test.sha256}
    head = header(kind, producer, cfg, inputs)
    if out.exists():  # never over a shipped one
        saved = load_checkpoint(out, kind, f"rm {out}, then this command")
        same_run(saved["header"], head, FREE, out)
        print(f"{out} is finished already")
        return
    torch.manual_seed(cfg.seed)
    net, state = build(len(train.classes)), out.with_suffix(".state.pth")
    fit_classifier(net, train, fabric, head, state, cfg)
    net = finish(net).half().float().eval()
    accuracy = label_accuracy(test.images_NHWC, test.labels_N, net)
    head |= {"dataset": train.dataset, "classes": list(train.classes), "test_accuracy": accuracy}
    save_net(out, net, head)
    state.unlink(missing_ok=True)
    print(f"{out}: test accuracy {accuracy:.4f}, {out.stat().st_size / 1e6:.2f} MB")


def fit_classifier(
    model: nn.Module, train: Split, fabric, head: dict, state: Path, cfg: ClassifierConfig
) -> None:
    """Train `model`, in place: its second output is logits_BC.

    `state` is written every SAVE_EVERY steps, resumed if it is there, and left to be deleted.
    """
    padded_NHWC = padded(train.images_NHWC, PAD).to(fabric.device)
    label_N = torch.tensor(train.labels_N, device=fabric.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=cfg.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    net, optimizer = fabric.setup(model, optimizer)
    parts, begin, rows = {"model": model, "optimizer": optimizer}, 0, len(label_N)
    if state.exists():
        begin, _ = load_state(state, head, FREE, parts)
    steps = math.ceil(cfg.epochs * rows / cfg.batch)
    bar = tqdm(range(begin, steps), head["kind"], steps, initial=begin, unit="step", mininterval=1)
    for step in bar:
        generator = seed_step(cfg.seed, step, fabric.device)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg.lr, int(WARMUP * steps), steps)
        pick_B = batch_rows(rows, cfg.batch, step, cfg.seed).to(fabric.device)
        images_B3HW = crop_and_flip(padded_NHWC, pick_B, generator).float() / 255
        _, logits_BC = net(images_B3HW)
        loss = F.cross_entropy(logits_BC, label_N[pick_B], label_smoothing=0.1)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            check_finite(loss.item(), step, state)
            right = (logits_BC.argmax(1) == label_N[pick_B]).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{right:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            save_state(state, head, step + 1, [], parts)


def padded(images_NHWC: np.ndarray, pad: int) -> torch.Tensor:
    """Return images with `pad` pixels more on every side: those inside of the edge, mirrored."""
    edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    return torch.from_numpy(np.pad(images_NHWC, edges, mode="reflect"))


def crop_and_flip(
    padded_NHWC: torch.Tensor, pick_B: torch.Tensor, generator: torch.Generator, pad: int = PAD
) -> torch.Tensor:
    """Cut a window out of each picked image, half of them mirrored: uint8 (B, 3, H, W).

    `padded_NHWC` has `pad` pixels more on every side than what is cut.
    """
    B, device = len(pick_B), padded_NHWC.device
    top_B, left_B = torch.randint(2 * pad + 1, (2, B), generator=generator, device=device)
    mirrored_B = torch.rand(B, generator=generator, device=device) < 0.5
    cell_W = torch.arange(padded_NHWC.shape[1] - 2 * pad, device=device)
    row_BH = top_B[:, None] + cell_W
    column_BW = left_B[:, None] + torch.where(mirrored_B[:, None], cell_W.flip(0), cell_W)
    crop_BHWC = padded_NHWC[pick_B[:, None, None], row_BH[:, :, None], column_BW[:, None, :]]
    return crop_BHWC.permute(0, 3, 1, 2)


class PerceptualNet(nn.Module):
    """VGG-like classifier whose stages, two 3x3 convolutions each, are the features compared."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, classes: int = 10, folded: bool = False):
        """Start from random weights; `folded`: without batch norm, each a part of its convolution.

        The net is trained unfolded and saved folded.
        """
        super().__init__()
        self.size = {"widths": list(widths), "classes": classes}
        self.stages = nn.ModuleList()
        for before, width in zip((3, *widths), widths, strict=False):
            layers = []
            for channels in (before, width):
                norm = [] if folded else [nn.BatchNorm2d(width)]
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=folded)
                layers += [conv, *norm, nn.ReLU(inplace=True)]
            self.stages.append(nn.Sequential(*layers))
        self.head = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images_N3HW: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Map images in [0, 1] to (the features of each stage, logits_NC)."""
        x = (images_N3HW - 0.5) * 4  # CIFAR-10's standard deviation is about 1/4
        x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(F.avg_pool2d(x, 2) if features else x)
            features.append(x)
        return features, self.head(x.mean((2, 3)))

    @torch.no_grad()
    def fold(self) -> "PerceptualNet":
        """Return the same function without batch norm, in eval mode."""
        folded = PerceptualNet(**self.size, folded=True).eval()
        folded.head.load_state_dict(self.head.state_dict())
        for mine, theirs in zip(self.eval().stages, folded.stages, strict=True):
            for i in range(2):
                conv = fuse_conv_bn_eval(mine[3 * i], mine[3 * i + 1])
                theirs[2 * i].load_state_dict(conv.state_dict())
        return folded


@torch.inference_mode()
def label_accuracy(images_NHWC: np.ndarray, labels_N: np.ndarray, net: nn.Module) -> float:
    """Return the share of uint8 images, in [0, 1], that a net takes for their label."""
    assert not net.training, "batch norm would look at the whole batch"
    device = next(net.parameters()).device
    batches = (images_NHWC[i : i + 500] for i in range(0, len(images_NHWC), 500))
    class_N = torch.cat([net(to_float(batch, device))[1].argmax(1) for batch in batches])
    return float((class_N.cpu().numpy() == labels_N).mean())


def save_net(path: Path, net: nn.Module, head: dict) -> None:
    """Write a net that knows its `size`, as float16, under `head`."""
    save_checkpoint(path, head, size=net.size, state=copy.deepcopy(net).half().state_dict())


def load_net(
    path: Path, kind: str, rerun: str, build: Callable[..., nn.Module]
) -> tuple[nn.Module, dict]:
    """Read what `save_net` wrote onto the CPU, as float32 and in eval mode, and its header.

    `build` makes a net of a size. Raises InputError for a file that is broken or another's.
    """
    saved = load_checkpoint(path, kind, rerun)
    with as_written(path, kind, f"run: {rerun}"):
        net = restored(lambda: build(**saved["size"]), saved["state"])  # half becomes fp32
    return net.to(memory_format=torch.channels_last).eval(), saved["header"]


def load_perceptual(path: Path) -> PerceptualNet:
    """Read a folded net onto the CPU, float32, frozen. Raises InputError for another file."""
    folded = functools.partial(PerceptualNet, folded=True)
    net, _ = load_net(path, KIND, "uv run tools/train_perceptual.py", folded)
    return net.requires_grad_(False)


def perceptual_distance(
    net: PerceptualNet, images_N3HW: torch.Tensor, target_N3HW: torch.Tensor
) -> torch.Tensor:
    """Return the mean over stages, images and pixels of |a/|a| - b/|b||^2, in [0, 2], a scalar.

    a and b are the features at one pixel. No gradient goes to `target_N3HW`.
    """
    features, _ = net(images_N3HW)
    with torch.no_grad():
        wanted, _ = net(target_N3HW)
    distances = [
        (_unit(a) - _unit(b)).square().sum(1).mean() for a, b in zip(features, wanted, strict=True)
    ]
    return torch.stack(distances).mean()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.float(), dim=1, eps=1e-3)  # where all channels are near 0 it stays there
