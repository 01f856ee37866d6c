#!/usr/bin/env -S uv run
"""Stage 5: sample from a checkpoint and measure it.

checkpoint + tokenizer -> results/<run>/{samples.png, samples.npz, metrics.json}
"""

import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from metrics.baselines import baseline_bits
from metrics.evaluation import likelihoods, quality, sample_images
from metrics.extractor import Extractor, extractor_ruler, load_extractor
from metrics.fidelity import Ruler, download_inception, inception_ruler
from models.artifacts import ROOT, git_commit, plain, replace_file, write_text
from models.codes import Codes, load_codes
from models.dataset import SPLITS, Split, load_split
from models.errors import InputError, expect_at_least, one_line_errors
from models.methods import check_order, load_generator, parameters
from models.orders import SCANS, Grouping
from models.pictures import class_grid, save_figure
from models.sampling import Plan, Schedule
from models.tokenizer import find_tokenizer, load_tokenizer
from models.training import pick_device


@dataclass(frozen=True)
class EvalConfig:
    """Sample from a generator and measure it (stage 5)."""

    checkpoint: Path
    """last.pth of a run, or a file in checkpoints/"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/ or checkpoints/ that made the generator's codes"""
    num_samples: int = 10_000
    """sample i is of class i modulo 10"""
    order: Literal[(*SCANS, "random")] | None = None
    """order of sampling; default: the one it was trained in (anneal: raster)"""
    steps: int | None = None
    """network calls a sample; fewer than 64 decode codes in parallel; default 64"""
    grouping: Grouping = "cosine"
    """how many codes each step decodes: cosine as RandAR, arpg_cosine and arccos as ARPG"""
    cfg: float = 2.0
    """guidance scale; 1 for none"""
    schedule: Schedule = "linear"
    """linear goes from 1 to --cfg over the decoding, power_cosine as RAR, constant as LlamaGen"""
    power: float = 2.75
    """of power_cosine"""
    temperature: float = 1.0
    top_k: int = 0
    """0: all codes"""
    top_p: float = 1.0
    labels: tuple[int, ...] = ()
    """sample these classes only; default all"""
    seed: int = 0
    batch: int = 500
    inception_weights: Path | None = None
    """FID-Inception state dict; default: torch-fidelity's download; `none`: do without"""
    fid_features: Literal["2048", "768", "192", "64"] = "2048"
    """Inception layer; any but 2048 is printed as FID768 and so on"""
    extractor: Path | None = None
    """offline ruler; default: checkpoints/extractor_<dataset>.pth if it is there"""
    data: Path | None = None
    """real images from stage 1; default data/<dataset>"""
    reference: int | None = None
    """use this many real train images, evenly spaced, as the reference; default all"""
    codes: Path = ROOT / "data/codes"
    """test codes for the likelihood, from stage 3"""
    out: Path | None = None
    """default results/<name of the run or file>"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def check(self) -> None:
        """Raise InputError for numbers that no evaluation can have."""
        expect_at_least(self, num_samples=10, batch=1, steps=1, reference=2)
        expect_at_least(self, cfg=0, temperature=0, top_k=0)
        if not 0 < self.top_p <= 1:
            raise InputError(f"expected --top-p in (0, 1], got {self.top_p}")

    def plan(self, trained_order: str) -> Plan:
        """Return how to sample."""
        return Plan(
            order=self.order or trained_order,
            steps=self.steps,
            grouping=self.grouping,
            cfg=self.cfg,
            schedule=self.schedule,
            power=self.power,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def find_rulers(cfg: EvalConfig, dataset: str) -> tuple[list[Ruler], Extractor | None]:
    """Return the rulers at hand, and the offline extractor to judge labels by."""
    found, judge = [], None
    extractor = cfg.extractor or ROOT / f"checkpoints/extractor_{dataset}.pth"
    if cfg.extractor or extractor.exists():
        judge = load_extractor(extractor).to(pick_device(cfg.device))
        found.append(extractor_ruler(extractor))
    if str(cfg.inception_weights) != "none":
        weights = cfg.inception_weights or download_inception()
        if weights:
            found.append(inception_ruler(weights, cfg.fid_features))
        else:
            print(
                "no Inception weights at hand and none to download: no FID; "
                "give --inception-weights PATH"
            )
    return found, judge


def real_images(cfg: EvalConfig, header: dict) -> dict[str, Split] | None:
    """Return both splits of the images that the tokenizer learned from, or None with a line."""
    folder = cfg.data or ROOT / "data" / header["dataset"]
    if cfg.data is None and not folder.exists():
        print(f"no real images at {folder}: no FD, no FID; run: uv run data/load_CIFAR10.py")
        return None
    return {split: load_split(folder, split) for split in SPLITS}


def held_out_codes(cfg: EvalConfig, header: dict) -> Codes | None:
    """Return the test codes if they are from the generator's tokenizer, else None with a line."""
    if not (cfg.codes / "test_codes.npy").exists():
        print(f"no codes at {cfg.codes}: no likelihood; run: uv run tools/extract_latent_codes.py")
        return None
    test = load_codes(cfg.codes, "test")
    if test.header["inputs"]["tokenizer"] != header["inputs"]["tokenizer"]:
        raise InputError(
            f"{cfg.codes} holds codes of another tokenizer than {cfg.checkpoint} was trained on; "
            "run: uv run tools/extract_latent_codes.py --tokenizer THE_ONE --out NEW, "
            "then give --codes NEW"
        )
    return test


def write_samples(out: Path, images_NHWC: np.ndarray, label_N: np.ndarray, classes: list) -> None:
    """Write samples.npz (arr_0 uint8 NHWC, arr_1 labels: ADM's convention) and samples.png."""
    packed = io.BytesIO()
    np.savez(packed, arr_0=images_NHWC, arr_1=label_N)
    replace_file(out / "samples.npz", lambda file: file.write(packed.getbuffer()))
    present = [k for k in range(len(classes)) if (label_N == k).any()]
    columns = min(10, *(int((label_N == k).sum()) for k in present))
    shown = np.concatenate([np.flatnonzero(label_N == k)[:columns] for k in present])
    figure = class_grid(images_NHWC[shown], label_N[shown], [classes[k] for k in present])
    save_figure(figure, out / "samples.png", dpi=150)


def main(cfg: EvalConfig) -> dict:
    """Sample, measure, write; return what metrics.json holds."""
    cfg.check()
    device = pick_device(cfg.device)
    generator = load_generator(cfg.checkpoint)
    head, model = generator.header, generator.model.to(device)
    trained = head["config"]["order"]
    plan = cfg.plan(model.config.scan if trained == "anneal" else trained)
    check_order(head["method"], plan.order, model.config.scan)
    plan.groups(model)  # refuses a number of steps that the method cannot take
    path = find_tokenizer(head["inputs"]["tokenizer"], cfg.tokenizer)
    tokenizer = load_tokenizer(path)[0].to(device)
    classes = head["classes"]
    if not set(cfg.labels) <= set(range(len(classes))):
        raise InputError(f"expected --labels in 0..{len(classes) - 1}, got {cfg.labels}")
    real, test = real_images(cfg, head), held_out_codes(cfg, head)
    rulers, judge = find_rulers(cfg, head["dataset"]) if real else ([], None)
    name = cfg.checkpoint.parent.name if cfg.checkpoint.stem == "last" else cfg.checkpoint.stem
    out = cfg.out or ROOT / "results" / name

    label_N = torch.tensor(cfg.labels or range(len(classes)))[
        torch.arange(cfg.num_samples) % (len(cfg.labels) or len(classes))
    ]
    began = time.time()
    images_NHWC = sample_images(model, tokenizer, label_N, plan, cfg.seed, cfg.batch)
    speed = cfg.num_samples / (time.time() - began)
    write_samples(out, images_NHWC, label_N.numpy(), classes)

    found = {
        "method": head["method"],
        "trained_order": head["config"]["order"],
        "parameters": parameters(model),
        "train_steps": head["config"]["steps"],
        "plan": asdict(plan),
        "num_samples": cfg.num_samples,
        "seed": cfg.seed,
        "images_per_second": speed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "command": " ".join(["uv run", *sys.argv]),
        "config": plain(cfg),
        "git_commit": git_commit(),
        "inputs": {"checkpoint": head["sha256"], **head["inputs"]},
    }
    if test is not None:
        found["bits_per_image"] = likelihoods(model, test, plan.order)
        found["baseline_bits"] = baseline_bits(load_codes(cfg.codes, "train"), test)
    if real is not None:
        found |= quality(images_NHWC, label_N.numpy(), real, cfg.reference, rulers, judge, device)
    write_text(out / "metrics.json", json.dumps(found, indent=1) + "\n")
    report(found, out)
    return found


def report(found: dict, out: Path) -> None:
    """Print the numbers, each beside the same measure of real images."""
    print(f"{found['method']} ({found['trained_order']}), {found['parameters']:,} parameters")
    for order, bits in found.get("bits_per_image", {}).items():
        print(f"  {order:>10} order: {bits['mean']:8.2f} +- {bits['se']:.2f} bits per test image")
    for name, bits in found.get("baseline_bits", {}).items():
        print(f"  {name:>14}: {bits:8.2f} bits, without a network")
    for name, value in found.get("samples", {}).items():
        print(f"  {name:>14}: {value:10.4f}   real test images: {found['control'][name]:10.4f}")
    print(f"  {found['num_samples']} samples, {found['images_per_second']:.1f} images/s -> {out}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(EvalConfig))
