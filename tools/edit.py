#!/usr/bin/env -S uv run
"""Edit an image: some of its codes are kept, the others drawn anew given all of them.

checkpoint + tokenizer + image -> results/<run>/<task>/{edit.png, codes.npy, decoding.gif}

The abilities that RandAR (arXiv 2412.01827) and ARPG (2503.10568) claim and did not release. Any
method with any order can do it, since the decode loop takes what is known first.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tyro.conf import Positional

from metrics import pictures
from metrics.evaluation import GeneratorConfig, SamplingOrder, Subject, plan_of
from metrics.likelihood import log_p_given_all
from metrics.pictures import enlarged
from models import command
from models.artifacts import ROOT, header, replace_file, save_array, sha256_of
from models.command import InputError, run
from models.data import load_split, read_image
from models.sampling import Plan, fill
from models.tokenizer import Area, Tokenizer, area, decode_codes, encode_images

Cells = Annotated[int, command.Range(1, 256)]


@dataclass(frozen=True)
class EditConfig(GeneratorConfig):
    """Fill in, change the class of, vary, or extend an image."""

    task: Positional[Literal["inpaint", "reclass", "variations", "outpaint"]] = "inpaint"
    """inpaint: draw the cells of --mask anew; reclass: a random --share of them, as --label;
    variations: the --share that the model is least sure of; outpaint: a larger --canvas around"""
    image: str = "0"
    """row of the test images, or an image file, which is cropped and resized to 32x32"""
    label: str | None = None
    """class, by name or number; default: that of the test image"""
    data: Path | None = None
    """test images from stage 1; default data/<dataset>"""
    mask: Area | Path = "centre"
    """cells to draw anew: an area, or a PNG of a pixel a cell or a pixel a pixel, white ones"""
    share: command.Share = 0.5
    """of the cells, where they are random or the least sure"""
    canvas: tuple[Cells, Cells] = (8, 16)
    """rows and columns of outpaint, in cells, the image in the middle"""
    overlap: command.Count = 4
    """cells that the window of outpaint keeps of what is there, as it moves on"""
    count: Annotated[int, command.Range(1, 64)] = 8
    """results to draw"""
    order: SamplingOrder = None
    """in which the open cells are drawn; default: the one that the model was trained in"""
    decode_steps: command.Count | None = None
    """network calls; default: one for each open cell"""
    cfg_scale: command.Amount | None = None
    """guidance scale; default: what the checkpoint recommends, else 2"""
    temperature: command.Amount = 1.0
    paste: bool = False
    """blend the pixels of the kept cells back in, instead of showing how they decode"""


def chosen_label(cfg: EditConfig, subject: Subject, own: int | None) -> int:
    """Return the class that is asked for, or the image's own."""
    classes = subject.header["classes"]
    numbers = {str(i): i for i in range(len(classes))} | {c: i for i, c in enumerate(classes)}
    label = own if cfg.label is None else numbers.get(cfg.label)
    if label is None:
        raise InputError(
            f"expected --label of {', '.join(classes)} or 0..{len(classes) - 1}, got {cfg.label}"
        )
    return label


def read_subject(cfg: EditConfig, dataset: str) -> tuple[np.ndarray, int | None]:
    """Return the image, uint8 (32, 32, 3), and its label if it is a test image."""
    if not cfg.image.isdecimal():
        return read_image(Path(cfg.image), size=32), None
    test = load_split(cfg.data or ROOT / "data" / dataset, "test")
    if int(cfg.image) >= len(test.labels_N):
        raise InputError(f"expected --image in 0..{len(test.labels_N) - 1}, got {cfg.image}")
    return test.images_NHWC[int(cfg.image)], int(test.labels_N[int(cfg.image)])


def open_cells(cfg: EditConfig, subject: Subject, codes_T: torch.Tensor, label: int, side: int):
    """Return which cells are drawn anew, bool (T,)."""
    model = subject.model
    if cfg.task == "variations":
        least_sure_T = log_p_given_all(model, codes_T.to(subject.device), label).argsort().cpu()
        open_T = torch.zeros(len(codes_T), dtype=torch.bool)
        open_T[least_sure_T[: round(cfg.share * len(codes_T))]] = True
        return open_T
    mask = "random" if cfg.task == "reclass" else cfg.mask
    return area(mask, model.config.grid, side, cfg.share, cfg.seed)


def corners(canvas: tuple[int, int], grid: int, overlap: int) -> list[tuple[int, int]]:
    """Return the top left cells of windows that cover a canvas, the middle one first."""
    middle, starts = [(length - grid) // 2 for length in canvas], []
    for length, start in zip(canvas, middle, strict=True):
        moves = range(0, length, grid - overlap)
        moved = {start + sign * move for move in moves for sign in (-1, 1)}
        starts.append({min(max(at, 0), length - grid) for at in moved})
    windows = [(top, left) for top in starts[0] for left in starts[1]]
    return sorted(windows, key=lambda at: (math.dist(at, middle), at))


def outpaint(cfg: EditConfig, subject: Subject, codes_T: torch.Tensor, label: int, plan: Plan):
    """Return codes of cfg.count larger canvases, (count, rows, columns), the image in the middle.

    A window of the model's grid moves outwards; it keeps what is there and draws the rest.
    """
    grid, (rows, columns) = subject.model.config.grid, cfg.canvas
    if min(cfg.canvas) < grid or cfg.overlap >= grid:
        raise InputError(
            f"expected --canvas of at least {grid} rows and columns and --overlap below {grid}, "
            f"got {rows} {columns} and {cfg.overlap}"
        )
    codes_Nhw = torch.full((cfg.count, rows, columns), -1)
    label_N = torch.full((cfg.count,), label)
    for i, (top, left) in enumerate(corners(cfg.canvas, grid, cfg.overlap)):
        view_Nhw = codes_Nhw[:, top : top + grid, left : left + grid]
        if i == 0:
            view_Nhw[:] = codes_T.view(grid, grid)
        codes_NT = view_Nhw.flatten(1)
        given = (codes_NT.clamp(min=0), codes_NT[0] < 0, label_N, plan)
        filled_NT = fill(subject.model, *given, cfg.seed, first=64 * i)  # streams of its own
        view_Nhw[:] = filled_NT.cpu().view_as(view_Nhw)
    return codes_Nhw


def decode_canvas(tokenizer: Tokenizer, codes_Nhw: torch.Tensor, grid: int) -> np.ndarray:
    """Return uint8 images of canvases: of each cell what the window with it in the middle shows."""
    rows, columns = codes_Nhw.shape[1:]
    windows, cells = {}, [[None] * columns for _ in range(rows)]
    for row, column in np.ndindex(rows, columns):
        top = min(max(row - grid // 2, 0), rows - grid)
        left = min(max(column - grid // 2, 0), columns - grid)
        if (top, left) not in windows:
            window_Nhw = codes_Nhw[:, top : top + grid, left : left + grid]
            windows[top, left] = decode_codes(tokenizer, window_Nhw.flatten(1))
        side = windows[top, left].shape[1] // grid
        y, x = (row - top) * side, (column - left) * side
        cells[row][column] = windows[top, left][:, y : y + side, x : x + side]
    return np.concatenate([np.concatenate(strip, axis=2) for strip in cells], axis=1)


def main(cfg: EditConfig) -> np.ndarray:
    """Edit, write, print; return the results, uint8 (count, H, W, 3)."""
    subject = cfg.load()
    model, head, tokenizer = subject.model, subject.header, subject.tokenizer
    grid = model.config.grid
    out = (cfg.out or subject.out) / cfg.task
    for given in (cfg.image, str(cfg.mask)):
        if Path(given).resolve().parent == out.resolve():
            raise InputError(f"{given} would be written over; choose another --out")
    original_HWC, own = read_subject(cfg, head["dataset"])
    label = chosen_label(cfg, subject, own)
    flags = {"decode_steps": cfg.decode_steps, "cfg_scale": cfg.cfg_scale, "order": cfg.order}
    plan = plan_of(subject, temperature=cfg.temperature, **flags)
    codes_T = encode_images(tokenizer, original_HWC[None])[0]
    before = {"original": original_HWC, "its codes": decode_codes(tokenizer, codes_T[None])[0]}
    if cfg.task == "outpaint":
        codes_Nhw, opened = outpaint(cfg, subject, codes_T, label, plan), "all around"
        results_NHWC = decode_canvas(tokenizer, codes_Nhw, grid)
    else:
        open_T = open_cells(cfg, subject, codes_T, label, len(original_HWC))
        opened = f"{int(open_T.sum())} of {len(open_T)} cells"
        codes_NT, label_N = codes_T.expand(cfg.count, -1), torch.full((cfg.count,), label)
        steps = [codes_NT.masked_fill(open_T, -1)]
        codes_NT = fill(model, codes_NT, open_T, label_N, plan, cfg.seed, 0, steps.append).cpu()
        codes_Nhw, results_NHWC = codes_NT.view(-1, grid, grid), decode_codes(tokenizer, codes_NT)
        open_HW1 = enlarged(open_T, original_HWC.shape[:2], "nearest")
        before["kept"] = np.where(open_HW1 > 0, pictures.GREY, before["its codes"]).astype(np.uint8)
        if cfg.paste:  # softly, over half a cell at the borders
            open_HW1 = enlarged(open_T, original_HWC.shape[:2], "bilinear")
            blended_NHWC = original_HWC + open_HW1 * (results_NHWC - 1.0 * original_HWC)
            results_NHWC = blended_NHWC.round().astype(np.uint8)
        film = {cfg.task: pictures.decoding_frames(tokenizer, steps, grid)}
        film_gif = pictures.gif(pictures.stacked_frames(film))
        replace_file(out / "decoding.gif", lambda file: file.write(film_gif))
    pictures.save_figure(pictures.plot_edit(before, results_NHWC), out / "edit.png", dpi=150)
    inputs = subject.inputs | {"image": sha256_of(original_HWC)}
    save_array(out / "codes.npy", codes_Nhw.numpy(), header("edit", "tools/edit.py", cfg, inputs))
    drawn = f"{opened} drawn {cfg.count} times as {head['classes'][label]}"
    print(f"{cfg.task}: {drawn}, guidance {plan.cfg_scale:g} -> {out}")
    return results_NHWC


if __name__ == "__main__":
    run(main, EditConfig)
