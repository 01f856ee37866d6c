"""Pictures of images, codes and orders, and animations. Nothing is shown here, only made.

Functions called plot_* return a matplotlib figure; matplotlib is imported when the first is made.
"""

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from models.artifacts import replace_file
from models.checkpoint import load_generator
from models.methods import check_order
from models.orders import sample_chance
from models.sampling import Plan, generate
from models.tokenizer import Tokenizer, decode_codes, find_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = 205
"""of cells that are still to come"""


def blank(width: float = 5.2, height: float = 3.4, rows: int = 1, columns: int = 1, **more: Any):
    """Return a figure (inches) and its axes, which Jupyter shows by itself, as pyplot's would be.

    Not pyplot's: that one keeps every figure of a process in memory.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(png_of, figure)
    axes = figure.subplots(rows, columns, **more)
    for one in np.atleast_1d(axes).flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def reference(axes: Any, value: float, text: str) -> None:
    """Draw what a value is to be compared with, a dashed line with its name on it."""
    axes.axhline(value, color="black", lw=0.8, ls="--")
    place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top", "fontsize": 8}
    axes.annotate(text, (1, value), (0, -3), textcoords="offset points", **place)


def png_of(figure: "Figure", dpi: int = 110) -> bytes:
    """Return a figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def save_figure(figure: "Figure", path: Path, dpi: int = 110) -> None:
    """Write a figure as PNG in one rename."""
    replace_file(path, lambda file: file.write(png_of(figure, dpi)))


def tile(images_NHWC: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Lay uint8 images out row by row on white; each takes (H + gap, W + gap) pixels."""
    missing = -len(images_NHWC) % columns
    sides = ((0, missing), (0, gap), (0, gap), (0, 0))
    cells_MHWC = np.pad(images_NHWC, sides, constant_values=255)
    rows = cells_MHWC.reshape(-1, columns, *cells_MHWC.shape[1:])
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def show_image(axes: Any, picture_HWC: np.ndarray, row_names: Sequence[str] = (), size: int = 11):
    """Show an image without ticks but for the names of its rows."""
    axes.imshow(picture_HWC, interpolation="nearest")
    height = len(picture_HWC) / max(1, len(row_names))
    places = [height * (k + 0.5) for k in range(len(row_names))]
    axes.set_yticks(places, row_names, fontsize=size)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_class_grid(
    images_NHWC: np.ndarray, labels_N: np.ndarray, classes: Sequence[str], most: int = 16
) -> "Figure":
    """Draw a row for each class that has images: its name, and `most` of them if all have those."""
    rows = {name: np.flatnonzero(labels_N == k) for k, name in enumerate(classes)}
    rows = {name: row for name, row in rows.items() if len(row)}
    count = min(most, *map(len, rows.values()))
    # were it too wide rather than too high, the layout would cut off what the rows are called
    names = 0.2 + 0.09 * max(map(len, rows))
    figure, axes = blank(names + 0.55 * count, 0.1 + 0.58 * len(rows))
    shown = np.concatenate([row[:count] for row in rows.values()])
    show_image(axes, tile(images_NHWC[shown], count), list(rows))
    return figure


def plot_first_images(
    images_NHWC: np.ndarray, labels_N: np.ndarray, classes: Sequence[str]
) -> "Figure":
    """Draw up to ten images of each of the first twenty classes."""
    return plot_class_grid(images_NHWC, labels_N, classes[:20], most=10)


def plot_reconstructions(
    images_NHWC: np.ndarray, others_NHWC: np.ndarray, names: Sequence[str] = ("original", "decoded")
) -> "Figure":
    """Draw images over what became of them, the first 16."""
    both_NHWC = np.concatenate((images_NHWC, others_NHWC))
    return plot_class_grid(both_NHWC, np.repeat((0, 1), len(images_NHWC)), names)


def enlarged(open_T: torch.Tensor, size: tuple[int, int], mode: str) -> np.ndarray:
    """Return the open cells as a picture, (H, W, 1), 1 where open."""
    grid = math.isqrt(len(open_T))
    open_11hw = open_T.view(1, 1, grid, grid).float()
    return F.interpolate(open_11hw, size, mode=mode)[0, 0].unsqueeze(-1).numpy()


def plot_edit(before: dict[str, np.ndarray], results_NHWC: np.ndarray) -> "Figure":
    """Draw what an edit began with, by title, and its results beside that, four in a row."""
    columns = min(4, len(results_NHWC))
    sheet_HWC = tile(results_NHWC, columns)
    widths = [1] * len(before) + [sheet_HWC.shape[1] / 32]
    size = 1.35 * sum(widths), 0.4 + 1.35 * sheet_HWC.shape[0] / 32
    figure, axes = blank(*size, 1, len(widths), width_ratios=widths)
    pictures = before | {f"{len(results_NHWC)} results": sheet_HWC}
    for one, (title, picture_HWC) in zip(axes, pictures.items(), strict=True):
        show_image(one, picture_HWC)
        one.set_title(title, fontsize=10)
    return figure


def plot_usage(counts_V: np.ndarray) -> "Figure":
    """Draw how often each code is used, most used first, against uniform use."""
    figure, axes = blank(5.2, 3)
    share_V = np.sort(counts_V)[::-1] / counts_V.sum()
    axes.fill_between(np.arange(len(share_V)), share_V, step="mid", alpha=0.7)
    reference(axes, 1 / len(share_V), "if all were used alike")
    axes.set(xlabel="code, most used first", ylabel="share of tokens")
    return figure


def plot_histogram(values_N: np.ndarray, label: str) -> "Figure":
    """Draw how values spread over images, and their mean."""
    (figure, axes), mean = blank(5.2, 3), values_N.mean()
    axes.hist(values_N, bins=40, alpha=0.7)
    axes.axvline(mean, color="black", lw=0.8, ls="--")
    axes.set(xlabel=label, ylabel="images", title=f"mean {mean:.2f}")
    return figure


def plot_clusters(patches_VHWC: np.ndarray, size: int) -> "Figure":
    """Draw what each code looks like, a cluster of `size` codes in each row, enlarged."""
    patches_VHWC = patches_VHWC.repeat(4, axis=1).repeat(4, axis=2)
    clusters = len(patches_VHWC) // size
    figure, axes = blank(1 + 0.22 * size, 0.6 + 0.22 * clusters)
    show_image(axes, tile(patches_VHWC, size, gap=2), [str(k) for k in range(clusters)], size=7)
    axes.set_ylabel("cluster")
    return figure


def plot_orders(orders: dict[str, np.ndarray], grid: int) -> "Figure":
    """Draw at each cell the step at which an order visits it, dark first, four orders a row."""
    rows = -(-len(orders) // 4)
    figure, panels = blank(10, 2.7 * rows, rows, 4, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, (name, order_S) in zip(panels.flat, orders.items(), strict=False):
        rank_hw = np.argsort(order_S).reshape(grid, grid)
        axes.imshow(rank_hw, cmap="viridis")
        axes.set_title(name, fontsize=17)
        for (row, column), rank in np.ndenumerate(rank_hw):
            colour = "black" if rank > grid * grid / 2 else "white"
            axes.text(column, row, rank, ha="center", va="center", fontsize=11, color=colour)
    return figure


def stacked_frames(rows: dict[str, list[np.ndarray]], scale: int = 2) -> list[np.ndarray]:
    """Return animations one above the other, enlarged; one that is over waits for the others."""
    from PIL import Image, ImageDraw

    def titled(name: str, frame_HWC: np.ndarray) -> np.ndarray:
        large_HWC = frame_HWC.repeat(scale, axis=0).repeat(scale, axis=1)
        width = large_HWC.shape[1]
        text = textwrap.fill(name, width // 6)  # a letter is about 6 pixels wide
        strip = Image.new("RGB", (width, 5 + 12 * len(text.splitlines())), "white")
        ImageDraw.Draw(strip).text((2, 1), text, fill="black", spacing=2)
        return np.concatenate((np.asarray(strip), large_HWC))

    longest = max(len(frames) for frames in rows.values())
    columns = [
        [titled(name, frame) for frame in frames + frames[-1:] * (longest - len(frames))]
        for name, frames in rows.items()
    ]
    return [np.concatenate(together) for together in zip(*columns, strict=True)]


def gif(frames: Sequence[np.ndarray]) -> bytes:
    """Return an endless GIF of uint8 (H, W, 3) frames; the last one stays."""
    from PIL import Image

    # one palette, made from the first and the last frame: no colour flickers
    palette = Image.fromarray(np.concatenate((frames[0], frames[-1]))).quantize(64)
    none = Image.Dither.NONE
    first, *others = (Image.fromarray(x).quantize(palette=palette, dither=none) for x in frames)
    file, durations = io.BytesIO(), [90] * len(others) + [2400]  # ms of a network call, of the last
    first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue()


def animation(moving: dict[str, list[np.ndarray]], out: Path | None = None):
    """Return animations one above the other for a notebook, and write them as a GIF to `out`."""
    from IPython.display import HTML

    if not moving:
        return HTML("no checkpoint at hand to decode with")
    content = gif(stacked_frames(moving))
    if out is not None:
        replace_file(out, lambda file: file.write(content))
    source = f"data:image/gif;base64,{base64.b64encode(content).decode()}"
    style = "width: min(100%, 600px); image-rendering: pixelated"
    return HTML(f'<img alt="{", ".join(moving)}" src="{source}" style="{style}">')


def decoding_frames(
    tokenizer: Tokenizer, steps: Sequence[torch.Tensor], grid: int
) -> list[np.ndarray]:
    """Return pictures of samples side by side, decoded from the codes_NT so far, -1 for none.

    Cells still to come are decoded as the code nearest to the mean of all, and shown in grey: a
    cell that is there changes with its neighbours.
    """
    vectors_VC = tokenizer.codebook_VC
    neutral = (vectors_VC - vectors_VC.mean(0)).square().sum(1).argmin().item()
    frames = []
    for codes_NT in steps:
        missing_NT = codes_NT.cpu() < 0
        images_NHWC = decode_codes(tokenizer, codes_NT.cpu().masked_fill(missing_NT, neutral))
        side = images_NHWC.shape[1] // grid
        missing_Nhw = missing_NT.view(-1, grid, grid).numpy()
        missing_NHW1 = missing_Nhw.repeat(side, axis=1).repeat(side, axis=2)[..., None]
        frames.append(tile(np.where(missing_NHW1, GREY, images_NHWC), columns=len(images_NHWC)))
    return frames


def watch_decoding(
    checkpoint: Path,
    tokenizer: Path | None = None,
    count: int = 5,
    cfg_scale: float = 1.0,
    seed: int = 1,
    decode_steps: int | None = None,
    order: str | torch.Tensor | None = None,
) -> dict[str, list[np.ndarray]]:
    """Return {title: pictures after every network call} of one image of each of the first classes.

    `order` is a name, an order_T of one's own, or the order of the training; a method that takes no
    other number of calls takes its own. {} without a file. Raises InputError for an order that
    the method cannot take.
    """
    if not checkpoint.exists():
        return {}
    generator = load_generator(checkpoint)
    model, head = generator.model, generator.header
    decoder, _ = load_tokenizer(find_tokenizer(head["inputs"]["tokenizer"], tokenizer))
    own = isinstance(order, torch.Tensor)
    name = "order of your own" if own else f"{order or generator.order} order"
    steps_asked = decode_steps if model.any_order and model.parallel else None
    plan_order = generator.order if order is None or own else order
    plan = Plan(plan_order, decode_steps=steps_asked, cfg_scale=cfg_scale)
    check_order(head["method"], name if own else plan.order, model.config.scan)
    label_N = torch.arange(min(count, model.config.classes))
    uniform_NS, order_NS = sample_chance(seed, range(len(label_N)), model.config.tokens)
    if own or plan.order != "random":
        order_NS = (order if own else model.order(plan.order)).expand_as(order_NS)
    steps = [torch.full_like(order_NS, -1)]
    generate(model, label_N, order_NS, uniform_NS, *plan.groups(model), watch=steps.append)
    trained = head["config"]["order"]
    title = f"{head['method']} trained in {trained}, {name}, {len(steps) - 1} calls"
    return {title: decoding_frames(decoder, steps, model.config.grid)}
