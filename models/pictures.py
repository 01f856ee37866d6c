"""The pictures that the stages make: grids of images, curves, histograms. Nothing is shown here."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from models.artifacts import replace_file

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


class Picture(Figure):
    """A figure that Jupyter shows by itself; pyplot, which would do that, keeps global state."""

    def _repr_png_(self, dpi: int = 110) -> bytes:
        """Return the PNG; the name is IPython's."""
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=dpi, bbox_inches="tight")
        return png.getvalue()


def save_figure(figure: Picture, path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG in one rename."""
    replace_file(path, lambda file: file.write(figure._repr_png_(dpi)))


def side_by_side(figures: Sequence[Picture], columns: int = 2, dpi: int = 110) -> Image.Image:
    """Return figures as one image on white, row by row, each at the top left of its place."""
    images = [Image.open(io.BytesIO(figure._repr_png_(dpi))).convert("RGB") for figure in figures]
    width = max(image.width for image in images)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (columns * width, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * width, sum(heights[:i])))
    return sheet


def tile(images_NHWC: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Lay uint8 images out row by row on white; each takes (H + gap, W + gap) pixels."""
    count, height, width, channels = images_NHWC.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap), columns * (width + gap), channels), 255, np.uint8)
    for i, image_HWC in enumerate(images_NHWC):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image_HWC
    return sheet


def first_of_each(labels_N: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the first `count` images of each class, fewer if one class has fewer."""
    names, counts = np.unique(labels_N, return_counts=True)
    count = min(count, counts.min())
    return np.concatenate([np.flatnonzero(labels_N == name)[:count] for name in names])


def class_grid(images_NHWC: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]) -> Picture:
    """Draw one row per class, its name at the left; the classes need equal numbers of images."""
    per_class = len(labels_N) // len(classes)
    by_class = np.argsort(labels_N, kind="stable")
    figure = Picture(figsize=(1.6 + 0.55 * per_class, 0.58 * len(classes)))
    axes = figure.subplots()
    axes.imshow(tile(images_NHWC[by_class], per_class), interpolation="nearest")
    height = images_NHWC.shape[1] + 1
    axes.set_yticks([height * (k + 0.5) for k in range(len(classes))], classes, fontsize=11)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def first_images(images_NHWC: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]) -> Picture:
    """Draw up to ten images of each of the first twenty classes."""
    shown = first_of_each(labels_N, 10)
    shown = shown[labels_N[shown] < 20]
    return class_grid(images_NHWC[shown], labels_N[shown], classes[:20])


def reconstruction_figure(
    images_NHWC: np.ndarray,
    others_NHWC: np.ndarray,
    names: tuple[str, str] = ("original", "decoded"),
) -> Picture:
    """Draw images over what became of them, up to 16 a row."""
    columns = min(16, len(images_NHWC))
    figure = Picture(figsize=(0.7 * columns, 1.6))
    for axes, images, name in zip(
        figure.subplots(2), (images_NHWC, others_NHWC), names, strict=True
    ):
        axes.imshow(tile(images[:columns], columns), interpolation="nearest")
        axes.set_ylabel(name)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def cluster_figure(patches_VHWC: np.ndarray, size: int, enlarge: int = 4) -> Picture:
    """Draw what each code looks like, a cluster of `size` codes in each row, enlarged."""
    patches_VHWC = patches_VHWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    clusters = len(patches_VHWC) // size
    figure = Picture(figsize=(1 + 0.22 * size, 0.6 + 0.22 * clusters))
    axes = figure.subplots()
    axes.imshow(tile(patches_VHWC, size, gap=2), interpolation="nearest")
    height = patches_VHWC.shape[1] + 2
    axes.set_yticks([height * (k + 0.5) for k in range(clusters)], range(clusters), fontsize=7)
    axes.set_xticks([])
    axes.set_ylabel("cluster")
    return figure


def order_figure(orders: dict[str, np.ndarray], grid: int) -> Picture:
    """Draw at each cell the step at which an order visits it, dark first, four orders a row."""
    rows = -(-len(orders) // 4)
    figure = Picture(figsize=(10, 2.7 * rows))
    every = list(figure.subplots(rows, 4, squeeze=False).flat)
    for axes in every:
        axes.axis("off")
    for axes, (name, order_S) in zip(every, orders.items(), strict=False):
        rank_hw = np.argsort(order_S).reshape(grid, grid)
        axes.imshow(rank_hw, cmap="viridis")
        axes.set_title(name, fontsize=11)
        for (row, column), rank in np.ndenumerate(rank_hw):
            colour = "black" if rank > grid * grid / 2 else "white"
            axes.text(column, row, rank, ha="center", va="center", fontsize=7, color=colour)
    figure.tight_layout()
    return figure


def curve_figure(rows: Sequence[dict], panels: dict[str, Sequence[str]]) -> Picture:
    """Draw `panels` (y label -> keys) of a metrics log side by side against `step`.

    A key that a row lacks is skipped there, so evaluations may be rarer than training rows.
    """
    figure = Picture(figsize=(4.2 * len(panels), 3.2))
    for axes, (label, keys) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=key, marker="." if len(points) < 40 else None)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def usage_figure(counts_V: np.ndarray) -> Picture:
    """Draw how often each code is used, most used first, against uniform use."""
    figure = Picture(figsize=(5, 3))
    axes = figure.subplots()
    share_V = np.sort(counts_V)[::-1] / counts_V.sum()
    axes.fill_between(np.arange(len(share_V)), share_V, step="mid", alpha=0.7)
    axes.axhline(1 / len(share_V), color="black", linewidth=0.8, linestyle="--", label="uniform")
    axes.set_xlabel("code, most used first")
    axes.set_ylabel("share of tokens")
    axes.legend(frameon=False)
    return figure


def histogram_figure(values_N: np.ndarray, label: str) -> Picture:
    """Draw how values spread over images, and their mean."""
    figure = Picture(figsize=(5, 3))
    axes = figure.subplots()
    axes.hist(values_N, bins=40, alpha=0.7)
    mean = values_N.mean()
    axes.axvline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:.2f}")
    axes.set_xlabel(label)
    axes.set_ylabel("images")
    axes.legend(frameon=False)
    return figure
