"""Samples as files and pictures: ADM's .npz, class grids, and what a training shows of itself."""

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from metrics.pictures import GREY, plot_class_grid, save_figure, tile
from metrics.plots import plot_curves
from metrics.report import Run
from metrics.robustness import code_vectors
from models.artifacts import as_written, expect_file, replace_file
from models.checkpoint import load_generator
from models.command import InputError
from models.data import Codes
from models.method import Method
from models.methods import check_order
from models.sampling import Plan, generate, sample_chance, sample_codes
from models.tokenizer import Tokenizer, decode_codes, find_tokenizer, load_tokenizer
from models.training import write_log

PANELS = {
    "bits per code": ["train_bits", "heldout_bits", "test_bits", "cluster_bits"],
    "learning rate": ["lr"],
    "images per second": ["images_per_second"],
}


LARGEST = 4 << 30
"""bytes of an array of samples: more than a million images"""


def write_samples(out: Path, images_NHWC: np.ndarray, label_N: np.ndarray, classes: list) -> None:
    """Write samples.npz (arr_0 uint8 NHWC, arr_1 labels: ADM's convention) and samples.png."""
    packed = io.BytesIO()
    np.savez(packed, arr_0=images_NHWC, arr_1=label_N)
    replace_file(out / "samples.npz", lambda file: file.write(packed.getbuffer()))
    present = [k for k in range(len(classes)) if (label_N == k).any()]
    columns = min(10, *(int((label_N == k).sum()) for k in present))
    shown = np.concatenate([np.flatnonzero(label_N == k)[:columns] for k in present])
    figure = plot_class_grid(images_NHWC[shown], label_N[shown], [classes[k] for k in present])
    save_figure(figure, out / "samples.png", dpi=150)


def read_samples(path: Path, size: int, classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (images uint8 (N, size, size, 3), labels int64 (N,) or None) of an .npz.

    Raises InputError unless arr_0 is such an array, and arr_1, if there, labels in 0..classes-1.
    """
    mend = "give an .npz as eval_c2i.py writes it"
    expect_file(path, "samples", mend)
    with as_written(path, "samples with an arr_0", mend), zipfile.ZipFile(path) as packed:
        images_NHWC = _member(packed, "arr_0")
        label_N = _member(packed, "arr_1") if "arr_1.npy" in packed.namelist() else None
    if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (size, size, 3):
        raise InputError(
            f"{path}: expected arr_0 uint8 (N, {size}, {size}, 3), "
            f"found {images_NHWC.dtype} {images_NHWC.shape}"
        )
    if label_N is None:
        return images_NHWC, None
    integers = np.issubdtype(label_N.dtype, np.integer) and label_N.shape == images_NHWC.shape[:1]
    if not integers or not ((label_N >= 0) & (label_N < classes)).all():
        raise InputError(
            f"{path}: expected arr_1 to hold {len(images_NHWC)} labels in 0..{classes - 1}, "
            f"found {label_N.dtype} {label_N.shape}"
        )
    return images_NHWC, label_N.astype(np.int64)


def _member(packed: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of an .npz whose size was looked at before it is read: it may be a bomb."""
    with packed.open(f"{name}.npy") as file:
        first = np.lib.format.read_magic(file)[0] == 1
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = math.prod(shape) * dtype.itemsize
        if size > LARGEST or file.tell() + size != packed.getinfo(f"{name}.npy").file_size:
            raise ValueError(f"{name} claims {dtype} {shape}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def tokenizer_of(path: Path, codes: Codes) -> Tokenizer | None:
    """Return the tokenizer at `path` if it is the one that made the codes, else None."""
    if not path.exists():
        return None
    tokenizer, about = load_tokenizer(path)
    made_them = about["sha256"] == codes.header["inputs"]["tokenizer"]
    return tokenizer.to(codes.label_N.device) if made_them else None


def show_progress(
    out: Path,
    rows: list[dict],
    model: Method,
    tokenizer: Tokenizer | None,
    classes: list[str],
    order: str,
) -> None:
    """Write metrics.jsonl, curves.png and, with a tokenizer, samples/<step>.png (cfg 1 -> 2)."""
    write_log(out / "metrics.jsonl", rows)
    save_figure(plot_curves([Run(out.name, {}, rows)], PANELS), out / "curves.png")
    if tokenizer is None:
        return
    model.eval()
    label_N = torch.arange(len(classes)).repeat_interleave(8)
    codes_NT = sample_codes(model, label_N, Plan(order=order, cfg_scale=2.0), seed=0)
    figure = plot_class_grid(decode_codes(tokenizer, codes_NT), label_N.numpy(), classes)
    save_figure(figure, out / f"samples/{rows[-1]['step']:07d}.png")


def decoding_frames(
    tokenizer: Tokenizer, steps: Sequence[torch.Tensor], grid: int
) -> list[np.ndarray]:
    """Return pictures of samples side by side, decoded from the codes_NT so far, -1 for none.

    Cells still to come are decoded as the code nearest to the mean of all, and shown in grey: a
    cell that is there changes with its neighbours.
    """
    vectors_VC = code_vectors(tokenizer)
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
    free = model.any_order and model.parallel
    plan = Plan(
        order=generator.order if order is None or own else order,
        decode_steps=decode_steps if free else None,
        cfg_scale=cfg_scale,
    )
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
