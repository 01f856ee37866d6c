#!/usr/bin/env -S uv run
"""Stage 1 without CIFAR-10: the shapes set, ten kinds of figures drawn from a seed.

Writes    {train,test}_{images,labels}.npy with sidecars, and classes.png, as data/load_CIFAR10.py

An image shows one figure of its class with its own place, size, tilt and colours, on a background
that fades from one shade to another. Figures are signed distance fields: a function of the plane
that is negative inside and whose value near the edge is the distance to it, which gives the
anti-aliased edge for free. In `x, y` the figure has radius about 1, x points right and y up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metrics.pictures import plot_first_images, save_figure
from models import command
from models.artifacts import ROOT
from models.command import run
from models.data import CLASSES, save_splits

SIDE = 32
BLOCK = 1000
"""Images drawn from one random stream; a multiple of 10, so that every block is balanced."""
REACH = 1.15
"""How far any tilted figure reaches to one side, in units of its radius."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weight of red, green and blue in the brightness of a colour (ITU-R BT.601)."""


def box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    """Field of a rectangle around the origin."""
    return np.maximum(abs(x) - half_x, abs(y) - half_y)


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Field of a five-pointed star: one edge, mirrored into the ten half arms."""
    arm = 2 * math.pi / 5
    angle = np.arctan2(x, y)  # 0 at the top
    from_arm = abs(angle - arm * np.round(angle / arm))
    radius = np.hypot(x, y)
    tip, inner, half = 1.1, 0.45, arm / 2
    edge_x, edge_y = inner * math.sin(half), inner * math.cos(half) - tip  # from the tip inwards
    along, across = radius * np.cos(from_arm) - tip, radius * np.sin(from_arm)
    return (along * edge_x - across * edge_y) / math.hypot(edge_x, edge_y)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Field of a heart: a square on its corner with a half disc on each upper side."""
    x, y = abs(x), y + 0.15
    turned = (abs(x) + abs(y)) * math.sqrt(0.5) - 0.6
    side = 0.6 * math.sqrt(0.5)  # the middle of an upper side
    return np.minimum(turned, np.hypot(x - side, y - side) - 0.6)


def checker(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Field of a 3x3 checkerboard: its corners and its middle."""
    cell = 0.6
    waves = np.cos(x * math.pi / cell) * np.cos(y * math.pi / cell)
    return np.maximum(box(x, y, 0.9, 0.9), -waves * cell / math.pi)


FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.2,
    "square": lambda x, y: box(x, y, 0.8, 0.8),
    "triangle": lambda x, y: np.maximum(abs(x) * math.sqrt(0.75) + y * 0.5, -y) - 0.5,
    "plus": lambda x, y: np.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95)),
    "star": star,
    "heart": heart,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.45, y)),
    "bars": lambda x, y: box(x, y - 0.68 * np.round(y / 0.68).clip(-1, 1), 0.95, 0.2),
    "checker": checker,
}
"""Fields by class name, in the order of CLASSES["shapes"]."""


def draw_colours(count: int, light: bool, rng: np.random.Generator) -> np.ndarray:
    """Return float32 (N, 3) colours of any hue, bright if `light`, else dark."""
    hue_NC = rng.random((count, 3), np.float32)
    brightness_N = rng.uniform(0.7, 0.9, count) if light else rng.uniform(0.12, 0.32, count)
    return brightness_N[:, None].astype(np.float32) + 0.6 * (hue_NC - (hue_NC @ LUMA)[:, None])


def draw_shading(count: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Return float32 (N, 32, 32, 3): shades from -s to s across each image, s up to `strength`."""
    angle_N11 = rng.uniform(0, 2 * math.pi, (count, 1, 1))
    change_N11C = rng.uniform(-strength, strength, (count, 1, 1, 3))
    line = np.linspace(-1, 1, SIDE)
    slope_NHW = np.cos(angle_N11) * line + np.sin(angle_N11) * line[:, None]
    return (slope_NHW[..., None] / math.sqrt(2) * change_N11C).astype(np.float32)


def draw_masks(labels_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return float32 (N, 32, 32), 1 inside the figure of the label, 0 outside, between at its edge.

    Radius 10..12.5 pixels, tilt up to 0.1 radians, at most a pixel and a half off the middle.
    """
    count = len(labels_N)
    radius_N11 = rng.uniform(10, 12.5, (count, 1, 1))
    tilt_N11 = rng.uniform(-0.1, 0.1, (count, 1, 1))
    place_N21 = rng.uniform(-1, 1, (count, 2, 1)) * (15.5 - REACH * radius_N11).clip(max=1.5)
    line = np.arange(SIDE) - (SIDE - 1) / 2
    right_NHW = (line - place_N21[:, :1]) / radius_N11
    up_NHW = (-line[:, None] - place_N21[:, 1:]) / radius_N11
    cos, sin = np.cos(tilt_N11), np.sin(tilt_N11)
    x_NHW, y_NHW = cos * right_NHW + sin * up_NHW, cos * up_NHW - sin * right_NHW
    field_NHW = np.empty((count, SIDE, SIDE))
    for label, figure in enumerate(FIGURES.values()):
        of_class = labels_N == label
        field_NHW[of_class] = figure(x_NHW[of_class], y_NHW[of_class])
    return (0.5 - field_NHW * radius_N11).clip(0, 1).astype(np.float32)


def draw_images(labels_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return uint8 (N, 32, 32, 3): bright figures on dark backgrounds."""
    count = len(labels_N)
    figure_NC, ground_NC = draw_colours(count, True, rng), draw_colours(count, False, rng)
    mask_NHW1 = draw_masks(labels_N, rng)[..., None]
    figure_NHWC = figure_NC[:, None, None] + draw_shading(count, 0.1, rng)
    ground_NHWC = ground_NC[:, None, None] + draw_shading(count, 0.2, rng)
    images_NHWC = ground_NHWC + mask_NHW1 * (figure_NHWC - ground_NHWC)
    images_NHWC += 0.015 * rng.standard_normal(images_NHWC.shape, np.float32)
    return (images_NHWC.clip(0, 1) * 255).round().astype(np.uint8)


def make_shapes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (count, 32, 32, 3) and labels int64 (count,), 0..9 in turn.

    Image i depends on `seed` and i alone, so a larger set begins with the smaller one.
    """
    labels_N = np.arange(BLOCK, dtype=np.int64) % len(FIGURES)
    blocks = [
        draw_images(labels_N, np.random.default_rng([seed, block]))
        for block in range(math.ceil(count / BLOCK))
    ]
    return np.concatenate(blocks)[:count], np.resize(labels_N, count)


@dataclass(frozen=True)
class ShapesConfig(command.Config):
    """Draw the shapes set, in seconds, for a quick look at every stage."""

    out: command.OutFolder = ROOT / "data/shapes"
    """folder to write to"""
    count_train: command.Images = 10_000
    """training images"""
    count_test: command.Images = 2_000
    """test images: those that follow the training images"""
    seed: command.Seed = 0
    """everything drawn follows from it"""


def main(cfg: ShapesConfig) -> None:
    """Draw both splits and write them."""
    images_NHWC, labels_N = make_shapes(cfg.count_train + cfg.count_test, cfg.seed)
    rows = {"train": slice(cfg.count_train), "test": slice(cfg.count_train, None)}
    arrays = {split: (images_NHWC[some], labels_N[some]) for split, some in rows.items()}
    save_splits(cfg.out, arrays, CLASSES["shapes"], "shapes", "data/shapes.py", cfg)
    save_figure(plot_first_images(*arrays["train"], CLASSES["shapes"]), cfg.out / "classes.png")
    print(f"shapes: {cfg.count_train} train, {cfg.count_test} test images -> {cfg.out}")


if __name__ == "__main__":
    run(main, ShapesConfig)
