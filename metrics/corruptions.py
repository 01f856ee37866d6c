"""Corrupted images: fifteen ways to spoil a 32x32 image, each at severities 1 to 5.

The built-in set is torchvision corruptions, after CIFAR-10-C (Hendrycks and Dietterich,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv 1903.12261;
code: github.com/hendrycks/robustness), not CIFAR-10-C itself: compare only with each other. The
official images are read by `official`. Differs from CIFAR-10-C in:
- light in place of weather: darkness, haze and fading in place of snow, frost and fog;
- no glass blur; posterize in its place, among the digital ones;
- a Gaussian in place of a disc as the defocus, a straight line as the motion;
- amounts are CIFAR-10-C's where the measure is the same: noise, blur, zoom, contrast, JPEG.
"""

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from models.artifacts import map_array
from models.command import InputError
from models.data import IMAGE_SHAPE
from models.tokenizer import to_float, to_uint8

SEVERITIES = (1, 2, 3, 4, 5)
SOURCE = (
    "torchvision corruptions, after CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261), "
    "not CIFAR-10-C itself; compare only with each other"
)
"""of what `drawn` makes"""
OFFICIAL = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
)
"""the corruptions that CIFAR-10-C's mean is over; the four others in its folder are for tuning"""
Corruption = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]
"""(float images in [0, 1], amount, chance) -> float images, not clamped"""
Versions = dict[str, Callable[[int], np.ndarray]]
"""name -> (severity 1..5 -> the images under this corruption, uint8 (N, 32, 32, 3))"""


def gaussian_noise(images_N3HW: torch.Tensor, deviation: float, g: torch.Generator):
    """Add noise of this standard deviation."""
    return images_N3HW + deviation * torch.randn(images_N3HW.shape, generator=g)


def shot_noise(images_N3HW: torch.Tensor, photons: float, g: torch.Generator):
    """Count the photons of each value; white has `photons` on average."""
    return torch.poisson(images_N3HW * photons, generator=g) / photons


def impulse_noise(images_N3HW: torch.Tensor, share: float, g: torch.Generator):
    """Set this share of the values to 0 or 1."""
    chance_N3HW = torch.rand(images_N3HW.shape, generator=g)
    spoilt_N3HW = images_N3HW.masked_fill(chance_N3HW < share / 2, 0)
    return spoilt_N3HW.masked_fill(chance_N3HW > 1 - share / 2, 1)


def gaussian_blur(images_N3HW: torch.Tensor, deviation: float, g: torch.Generator):
    """Blur by a Gaussian of this many pixels."""
    return _blurred(images_N3HW, 9, deviation)


def _blurred(images_NCHW: torch.Tensor, size: int, deviation: float) -> torch.Tensor:
    """Blur by a Gaussian, rows and then columns: a product of matrices each."""
    from torchvision.transforms.v2 import functional  # takes longer to import than torch

    still_1HH = torch.eye(IMAGE_SHAPE[0]).unsqueeze(0)
    blur_HH = functional.gaussian_blur(still_1HH, [1, size], [deviation, deviation])[0]
    return blur_HH @ images_NCHW @ blur_HH.T


def _hat(distance: torch.Tensor) -> torch.Tensor:
    """Return the weight in bilinear interpolation of a pixel at this distance."""
    return (1 - distance.abs()).clamp(min=0)


def motion_blur(images_N3HW: torch.Tensor, pixels: float, g: torch.Generator):
    """Average along a line of this length, within 45 degrees of level."""
    angle_N = (torch.rand(len(images_N3HW), generator=g) - 0.5) * torch.pi / 2
    place_P1, reach = torch.linspace(-0.5, 0.5, 15).unsqueeze(1) * pixels, math.ceil(pixels / 2)
    near_K = torch.arange(-reach, reach + 1)
    down_NPK, right_NPK = (
        _hat(near_K - place_P1 * along_N[:, None, None])
        for along_N in (angle_N.sin(), angle_N.cos())
    )
    line_NKK = down_NPK.mT @ right_NPK / len(place_P1)
    mirrored = np.pad(np.arange(IMAGE_SHAPE[0]), reach, "symmetric")
    padded_3NHW = images_N3HW[:, :, mirrored][..., mirrored].transpose(0, 1)
    return F.conv2d(padded_3NHW, line_NKK.unsqueeze(1), groups=len(line_NKK)).transpose(0, 1)


def zoom_blur(images_N3HW: torch.Tensor, zoom: float, g: torch.Generator):
    """Average over zooms from 1 to this."""
    place_H, zooms = torch.arange(IMAGE_SHAPE[0]) - (IMAGE_SHAPE[0] - 1) / 2, 11
    seen_ZHH = [_hat(place_H[:, None] / z - place_H) for z in torch.linspace(1, zoom, zooms)]
    return sum(seen_HH @ images_N3HW @ seen_HH.T for seen_HH in seen_ZHH) / zooms


def vision(name: str, images_N3HW: torch.Tensor, amount: float, g: torch.Generator):
    """Call torchvision's function of this name."""
    from torchvision.transforms.v2 import functional

    return getattr(functional, name)(images_N3HW, amount)


def haze(images_N3HW: torch.Tensor, thickness: float, g: torch.Generator):
    """Mix with light grey, this much where the haze is thickest and half as much elsewhere."""
    coarse_N1hw = torch.rand(len(images_N3HW), 1, 4, 4, generator=g)
    cloud_N1HW = F.interpolate(coarse_N1hw, IMAGE_SHAPE[:2], mode="bilinear", align_corners=True)
    return images_N3HW.lerp(torch.tensor(0.9), thickness * (1 + cloud_N1HW) / 2)


def elastic(images_N3HW: torch.Tensor, pixels: float, g: torch.Generator):
    """Move every pixel smoothly, by this standard deviation."""
    noise_N2HW = torch.randn(len(images_N3HW), 2, *IMAGE_SHAPE[:2], generator=g)
    smooth_N2HW = _blurred(noise_N2HW, 19, 3.0)
    pixel = 2 / IMAGE_SHAPE[0]  # for `grid_sample` a side reaches from -1 to 1
    moved_N2HW = smooth_N2HW / smooth_N2HW.std(dim=(1, 2, 3), keepdim=True) * pixels * pixel
    still_N23 = torch.eye(2, 3).expand(len(images_N3HW), -1, -1)
    grid_NHW2 = F.affine_grid(still_N23, images_N3HW.shape, align_corners=False)
    grid_NHW2 = grid_NHW2 + moved_N2HW.permute(0, 2, 3, 1)
    return F.grid_sample(images_N3HW, grid_NHW2, padding_mode="reflection", align_corners=False)


def pixelate(images_N3HW: torch.Tensor, side: int, g: torch.Generator):
    """Shrink to this side and enlarge again, by area: with nearest pixels 20 errs less than 30."""
    small_1Hh = F.interpolate(torch.eye(IMAGE_SHAPE[0]).unsqueeze(0), side, mode="area")
    again_HH = F.interpolate(small_1Hh, IMAGE_SHAPE[0], mode="area")[0]
    return again_HH.T @ images_N3HW @ again_HH


def jpeg(images_N3HW: torch.Tensor, quality: int, g: torch.Generator):
    """Compress by JPEG, with Pillow: torchvision's own coder is to be removed."""
    decoded = []
    for image_HWC in to_uint8(images_N3HW):
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return to_float(np.stack(decoded))


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "motion_blur": (motion_blur, (2, 3, 4, 5, 7)),
    "zoom_blur": (zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    "brightness": (partial(vision, "adjust_brightness"), (1.1, 1.2, 1.3, 1.5, 1.8)),  # factor
    "darkness": (partial(vision, "adjust_brightness"), (0.8, 0.65, 0.5, 0.4, 0.3)),
    "haze": (haze, (0.1, 0.2, 0.3, 0.45, 0.6)),
    "saturation": (partial(vision, "adjust_saturation"), (0.7, 0.5, 0.3, 0.15, 0.0)),  # 0 is grey
    "contrast": (partial(vision, "adjust_contrast"), (0.75, 0.5, 0.4, 0.3, 0.15)),  # to mean grey
    "elastic": (elastic, (0.25, 0.5, 0.75, 1.0, 1.5)),
    "pixelate": (pixelate, (30, 27, 24, 20, 16)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
    "posterize": (partial(vision, "posterize"), (6, 5, 4, 3, 2)),  # bits kept
}
"""name -> what it does, and how much at each severity; a new one goes last, for its seed"""


def corrupt(images_NHWC: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Return uint8 (N, 32, 32, 3) at severity 1..5; chance is a function of (name, seed) alone."""
    spoil, amounts = CORRUPTIONS[name]
    entropy = np.random.SeedSequence([seed, list(CORRUPTIONS).index(name)])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
    images_N3HW = to_float(images_NHWC).contiguous()
    return to_uint8(spoil(images_N3HW, amounts[severity - 1], generator))


def drawn(images_NHWC: np.ndarray, seed: int = 0) -> Versions:
    """Return the built-in corruptions of uint8 images."""
    return {name: partial(corrupt, images_NHWC, name, seed=seed) for name in CORRUPTIONS}


def official(
    folder: Path, test_NHWC: np.ndarray, labels_N: np.ndarray, rows_M: np.ndarray
) -> Versions:
    """Return CIFAR-10-C's versions of some of the N test images; the files are mapped, not read.

    Their rows are those of the official archive, and stage 1 sorts its own: each test image is the
    nearest of its class to one under the mildest noise. Raises InputError for a folder that lacks
    a file or holds one of another shape, or that is of other test images.
    """
    count, folder = len(labels_N), Path(folder)
    rows = len(SEVERITIES) * count
    files = {name: _mapped(folder, name, (rows, *IMAGE_SHAPE)) for name in OFFICIAL}
    noisy_NHWC = files["gaussian_noise"][:count]
    theirs_N = _mapped(folder, "labels", (rows,))[:count]
    row_N = np.zeros(count, np.int64)
    if np.array_equal(np.sort(labels_N), np.sort(theirs_N)):
        for label in np.unique(labels_N):
            ours, theirs = np.flatnonzero(labels_N == label), np.flatnonzero(theirs_N == label)
            pair = torch.from_numpy(test_NHWC[ours]), torch.from_numpy(noisy_NHWC[theirs])
            distance = torch.cdist(*(images.float().flatten(1) for images in pair))
            row_N[ours] = theirs[distance.argmin(1)]
    if len(np.unique(row_N)) != count:
        raise InputError(f"{folder} is of other test images than those in --data")
    return {
        name: lambda severity, file=file: file[(severity - 1) * count + row_N[rows_M]]
        for name, file in files.items()
    }


def _mapped(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    path = folder / f"{name}.npy"
    fix = "unpack CIFAR-10-C.tar of https://zenodo.org/records/2535967 and give its folder"
    array = map_array(path, "CIFAR-10-C", fix)
    if array.dtype != np.uint8 or array.shape != shape:
        raise InputError(
            f"{path}: expected uint8 {shape}, five severities of the test images one after "
            f"another, found {array.dtype} {array.shape}"
        )
    return array
