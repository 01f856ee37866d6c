"""A perceptual distance of 32x32 images that needs no download: LPIPS with a small net of our own.

LPIPS: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv 1801.03924, eq. 1 with all weights one. Differs from it in: the features are of a VGG-like
classifier of the same images that the tokenizer is trained on (tools/train_perceptual.py), not of
VGG-16 on ImageNet. It is another net than the one that measures (metrics/extractor.py): no loss
here may look at that one, or at Inception.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.artifacts import load_checkpoint, save_checkpoint

KIND = "perceptual net"
WIDTHS = (24, 64, 128, 192)
"""channels at 32x32, 16x16, 8x8 and 4x4 pixels"""


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


def save_perceptual(path: Path, net: PerceptualNet, head: dict) -> None:
    """Write a folded net as float16 under `head`."""
    state = {name: value.half() for name, value in net.state_dict().items()}
    save_checkpoint(path, head, size=net.size, state=state)


def load_perceptual(path: Path) -> PerceptualNet:
    """Read a folded net onto the CPU, float32, frozen. Raises InputError for another file."""
    saved = load_checkpoint(path, KIND, "uv run tools/train_perceptual.py")
    net = PerceptualNet(**saved["size"], folded=True)
    net.load_state_dict(saved["state"])
    return net.requires_grad_(False).eval()


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
