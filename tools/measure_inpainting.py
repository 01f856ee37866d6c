#!/usr/bin/env -S uv run
"""Complete test images of which some cells are hidden, and measure what was drawn.

checkpoint + tokenizer + test codes -> results/<run>/{inpainting.json, inpainting.png}

Cells are drawn given all that is kept, where the method takes any order, and given only what comes
before them in a fixed order. Beside both stand the test images as their own codes decode, the best
that can be, and the class's mean image in the hole, which knows nothing but the label.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes

from metrics.calibration import mean_of
from metrics.evaluation import GeneratorConfig, MeasureConfig, Subject, codes_of_images, plan_of
from metrics.likelihood import bits_per_code, orders_for
from metrics.pictures import GREY, enlarged, plot_class_grid, save_figure
from metrics.report import Run, write_record
from metrics.tables import inpainting
from models import command
from models.artifacts import ROOT
from models.command import InputError
from models.data import evenly, load_split
from models.orders import known_first
from models.sampling import Plan, fill
from models.tokenizer import Area, area, decode_codes

ALL, PAST = "given all", "given the past"


@dataclass(frozen=True)
class InpaintingConfig(GeneratorConfig):
    """Complete test images with hidden cells and measure the results."""

    mask: Area | Path = "centre"
    """cells that are hidden: an area, or a PNG of a pixel a cell or a pixel a pixel, white ones"""
    share: command.Share = 0.5
    """of the cells, where they are random"""
    images: command.Images = 10_000
    """test images used, evenly spaced"""
    decode_steps: command.Count | None = None
    """network calls, given all; default: one for each hidden cell"""
    cfg_scale: command.Amount | None = None
    """guidance scale, the same for every hidden cell; default: what the checkpoint recommends, else
    2"""
    codes: Path = ROOT / "data/codes"
    """test codes from stage 3"""
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)


def complete(
    cfg: InpaintingConfig, subject: Subject, scale: float, inputs: tuple, open_T: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return completed codes_NT, and the bits (N,) of the true codes of the hidden cells.

    `inputs` are codes and labels; both are {way that the method knows: ..}: given all, in the order
    that the model was trained in; given the past, along its scan.
    """
    model, codes, bits = subject.model, {}, {}
    # a schedule that rises would guide the hole more given all, where it comes last
    guidance = {"cfg_scale": scale, "schedule": "constant"}
    ways = {PAST: Plan(model.config.scan, **guidance)}
    if model.any_order:
        ways = {ALL: Plan(subject.order, cfg.decode_steps, **guidance)} | ways
    for way, plan in ways.items():
        parts, count = [], min(cfg.batch, len(inputs[0]))
        batches = list(zip(*(x.split(count) for x in inputs), strict=True))
        for codes_BT, label_B in tqdm(batches, way, unit="image", unit_scale=count):
            given = codes_BT, open_T, label_B, plan, cfg.seed, count * len(parts)
            parts.append(fill(model, *given, past=way == PAST).cpu())
        codes[way] = torch.cat(parts)
        order_NS = orders_for(model, plan.order, len(inputs[0]), cfg.seed)
        order_NS = known_first(order_NS, open_T) if way == ALL else order_NS
        bits_NS = bits_per_code(model, *inputs, order_NS, name=f"bits {way}")
        bits[way] = (bits_NS * open_T[order_NS]).sum(1)
    return codes, bits


def main(cfg: InpaintingConfig) -> dict:
    """Complete, measure, write, print; return what inpainting.json holds."""
    subject = cfg.load()
    dataset, tokenizer = subject.header["dataset"], subject.tokenizer
    reference = cfg.against.load(dataset, subject.device)
    if reference is None:
        raise InputError("expected real images to measure on; give --data")
    test, train = reference.test, load_split(cfg.against.data or ROOT / "data" / dataset, "train")
    codes = codes_of_images(subject.header, cfg.codes, cfg.checkpoint, test)
    rows_N = evenly(len(test.labels_N), cfg.images)
    images_NHWC, label_N = test.images_NHWC[rows_N], test.labels_N[rows_N]
    inputs = codes.codes_NAT[torch.from_numpy(rows_N), 0], torch.from_numpy(label_N).long()
    side = images_NHWC.shape[1]
    open_T = area(cfg.mask, subject.model.config.grid, side, cfg.share, cfg.seed)
    open_HW1 = enlarged(open_T, (side, side), "nearest") > 0

    scale = plan_of(subject, cfg_scale=cfg.cfg_scale).cfg_scale
    done, bits = complete(cfg, subject, scale, inputs, open_T)
    mean_KHWC = [train.images_NHWC[train.labels_N == k].mean(0) for k in range(len(test.classes))]
    shown = {way: decode_codes(tokenizer, codes_NT) for way, codes_NT in done.items()}
    shown["its own codes"] = decode_codes(tokenizer, inputs[0])
    mean_NHWC = np.where(open_HW1, np.stack(mean_KHWC).round()[label_N], images_NHWC)
    shown["class mean"] = mean_NHWC.astype(np.uint8)
    if ALL in bits:
        bits["what the future saves"] = bits[PAST] - bits[ALL]
    numbers = subject.description | {
        "images": len(rows_N),
        "mask": str(cfg.mask),
        "hidden_cells": int(open_T.sum()),
        "cfg_scale": scale,
        "bits_per_image": {name: mean_of(bits_N, cfg.seed) for name, bits_N in bits.items()},
        "completed": {name: reference.measure(x, label_N) for name, x in shown.items()},
        "control": reference.measure(images_NHWC, label_N, real=True),
        "reference_images": len(reference.train_NHWC),
    }
    used = subject.inputs | {"test codes": codes.header["sha256"], **reference.inputs}
    record = write_record(subject.out / "inpainting.json", numbers, cfg, used)
    rows = {"test image": images_NHWC, "kept": np.where(open_HW1, GREY, images_NHWC), **shown}
    drawn = evenly(len(rows_N), 16)
    tiles_NHWC = np.concatenate([x[drawn] for x in rows.values()]).astype(np.uint8)
    figure = plot_class_grid(tiles_NHWC, np.repeat(range(len(rows)), len(drawn)), list(rows))
    save_figure(figure, subject.out / "inpainting.png", dpi=150)
    run = Run(subject.out.name, {"inpainting": record}, [])
    print(inpainting({run.name: run}) + f"-> {subject.out}")
    return record


if __name__ == "__main__":
    command.run(main, InpaintingConfig)
