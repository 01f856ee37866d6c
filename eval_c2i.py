#!/usr/bin/env -S uv run
"""Stage 5: sample from a checkpoint and measure it, or measure the samples of another project.

checkpoint + tokenizer -> results/<run>/{samples.png, samples.npz, metrics.json}
"""

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro

from metrics.baselines import baseline_bits
from metrics.evaluation import Reference, find_reference, likelihoods, over_seeds, sample_images
from metrics.samples import read_samples, write_samples
from models.artifacts import ROOT, git_commit, plain, sha256_of, this_command, write_text
from models.checkpoint import Generator, load_generator, results_of
from models.data import Codes, load_codes, load_codes_of
from models.errors import InputError, expect_at_least, one_line_errors
from models.methods import check_order
from models.orders import SCANS, Grouping
from models.sampling import Plan, Schedule
from models.tokenizer import find_tokenizer, load_tokenizer
from models.training import gpu_memory, parameters, pick_device


@dataclass(frozen=True)
class EvalConfig:
    """Sample from a generator and measure it (stage 5)."""

    checkpoint: Path | None = None
    """last.pth of a run, or a file in checkpoints/"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made the generator's codes"""
    samples: Path | None = None
    """instead of a checkpoint: .npz with arr_0 uint8 (N, 32, 32, 3), perhaps arr_1 labels (ADM)"""
    num_samples: int = 10_000
    """sample i is of class i modulo 10"""
    seed: int = 0
    seeds: int = 1
    """sample again with seed + 1, ..: mean and sd of every number"""
    order: Literal[(*SCANS, "random")] | None = None
    """order of sampling; default: the one it was trained in (anneal, adaptive: the scan)"""
    steps: int | None = None
    """network calls a sample; fewer than 64 decode codes in parallel; default 64"""
    grouping: Grouping | None = None
    """how many codes each step decodes: cosine (RandAR; default), arpg_cosine, arccos (ARPG)"""
    cfg: float | None = None
    """guidance scale, 1 for none; default: what the checkpoint recommends, else 2"""
    schedule: Schedule | None = None
    """linear (default): from 1 to --cfg over the decoding; power_cosine as RAR; constant"""
    power: float | None = None
    """of power_cosine; default 2.75"""
    temperature: float | None = None
    """default 1"""
    top_k: int | None = None
    """default 0: all codes"""
    top_p: float | None = None
    """default 1: all codes"""
    labels: tuple[int, ...] = ()
    """sample these classes only; default all"""
    batch: int = 500
    random_orders: int = 1
    """random orders an image that its likelihood is averaged over"""
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
        if (self.checkpoint is None) == (self.samples is None):
            raise InputError("expected either --checkpoint or --samples")
        expect_at_least(self, num_samples=10, batch=1, steps=1, reference=2, seeds=1)
        expect_at_least(self, cfg=0, temperature=0, top_k=0, random_orders=1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"expected --top-p in (0, 1], got {self.top_p}")

    def plan(self, generator: Generator) -> Plan:
        """Return how to sample: as asked, else as the checkpoint recommends, else by default.

        Raises InputError for what the method cannot do.
        """
        asked = {field.name: getattr(self, field.name) for field in fields(Plan)}
        asked = {name: value for name, value in asked.items() if value is not None}
        plan = Plan(**{"cfg": 2.0, "order": generator.order} | generator.sampling | asked)
        check_order(generator.header["method"], plan.order, generator.model.config.scan)
        plan.groups(generator.model)  # refuses a number of steps that the method cannot take
        return plan

    def reference_for(self, dataset: str, device: torch.device) -> Reference | None:
        """Return what samples are held against; None, with a line, without real images."""
        data = self.data or ROOT / "data" / dataset
        if self.data is None and not data.exists():
            print(f"no real images at {data}: no FD, no FID; run: uv run data/load_CIFAR10.py")
            return None
        return find_reference(
            data,
            self.reference,
            self.extractor,
            self.inception_weights,
            self.fid_features,
            device,
        )

    def test_codes(self, generator: Generator) -> Codes | None:
        """Return the codes for the likelihood; None, with a line, if there are none."""
        if not (self.codes / "test_codes.npy").exists():
            run = "uv run tools/extract_latent_codes.py"
            print(f"no codes at {self.codes}: no likelihood; run: {run}")
            return None
        tokenizer = generator.header["inputs"]["tokenizer"]
        return load_codes_of(tokenizer, self.codes, "test", self.checkpoint)


def about_run(cfg: EvalConfig, device: torch.device) -> dict:
    """Return what metrics.json says of how it was made."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "command": this_command(),
        "config": plain(cfg),
        "git_commit": git_commit(),
    }


def measure_samples(cfg: EvalConfig, device: torch.device) -> tuple[dict, Path]:
    """Measure the images of --samples; return what metrics.json holds and its folder."""
    reference = cfg.reference_for("cifar10", device)
    if reference is None:
        raise InputError("expected real images to hold --samples against; give --data")
    size, classes = reference.train_NHWC.shape[1], len(reference.test.classes)
    images_NHWC, label_N = read_samples(cfg.samples, size, classes)
    found = {
        "num_samples": len(images_NHWC),
        **about_run(cfg, device),
        "inputs": {"samples": sha256_of(cfg.samples)},
        **reference.report(images_NHWC, label_N),
    }
    return found, cfg.out or ROOT / "results" / cfg.samples.stem


def measure_generator(cfg: EvalConfig, device: torch.device) -> tuple[dict, Path]:
    """Sample and measure; write samples; return what metrics.json holds and its folder."""
    generator = load_generator(cfg.checkpoint)
    head, model = generator.header, generator.model.to(device)
    plan = cfg.plan(generator)
    path = find_tokenizer(head["inputs"]["tokenizer"], cfg.tokenizer)
    tokenizer = load_tokenizer(path)[0].to(device)
    classes = head["classes"]
    if not set(cfg.labels) <= set(range(len(classes))):
        raise InputError(f"expected --labels in 0..{len(classes) - 1}, got {cfg.labels}")
    reference, test = cfg.reference_for(head["dataset"], device), cfg.test_codes(generator)
    out = cfg.out or results_of(cfg.checkpoint)

    labels = torch.tensor(cfg.labels or range(len(classes)))
    label_N = labels[torch.arange(cfg.num_samples) % len(labels)]
    inputs = (model, tokenizer, label_N, plan)
    sample_images(model, tokenizer, label_N[:2], plan, cfg.seed, cfg.batch)  # warm-up, not timed
    began = time.time()
    images_NHWC = sample_images(*inputs, cfg.seed, cfg.batch)
    speed = cfg.num_samples / (time.time() - began)
    write_samples(out, images_NHWC, label_N.numpy(), classes)

    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    found = {
        "method": head["method"],
        "trained_order": head["config"]["order"],
        "cluster_weight": head["config"].get("cluster_weight", 0.0),
        "parameters": parameters(model),
        "train_steps": head["config"]["steps"],
        "plan": asdict(plan),
        "network_calls": len(plan.groups(model)[0]),
        "num_samples": cfg.num_samples,
        "seeds": list(seeds),
        "images_per_second": speed,
        **gpu_memory(device),
        **about_run(cfg, device),
        "inputs": {"checkpoint": head["sha256"], **head["inputs"]},
    }
    if test is not None:
        found["bits_per_image"] = likelihoods(model, test, plan.order, cfg.random_orders)
        found["baseline_bits"] = baseline_bits(load_codes(cfg.codes, "train"), test)
    if reference is not None:
        found |= reference.report(images_NHWC, label_N.numpy())
    if reference is not None and cfg.seeds > 1:
        measured = [found["samples"]]
        for seed in seeds[1:]:
            again_NHWC = sample_images(*inputs, seed, cfg.batch)
            measured.append(reference.measure(again_NHWC, label_N.numpy()))
        found["over_seeds"] = over_seeds(measured)
    return found, out


def main(cfg: EvalConfig) -> dict:
    """Sample, measure, write, print; return what metrics.json holds."""
    cfg.check()
    device = pick_device(cfg.device)
    measure = measure_samples if cfg.samples else measure_generator
    found, out = measure(cfg, device)
    write_text(out / "metrics.json", json.dumps(found, indent=1) + "\n")
    report(found, out)
    return found


def report(found: dict, out: Path) -> None:
    """Print the numbers, each beside the same measure of real images."""
    if "method" in found:
        print(f"{found['method']} ({found['trained_order']}), {found['parameters']:,} parameters")
    for order, bits in found.get("bits_per_image", {}).items():
        print(f"  {order:>10} order: {bits['mean']:8.2f} +- {bits['se']:.2f} bits per test image")
    for name, bits in found.get("baseline_bits", {}).items():
        print(f"  {name:>14}: {bits:8.2f} bits, without a network")
    for name, value in found.get("samples", {}).items():
        print(f"  {name:>14}: {value:10.4f}   real test images: {found['control'][name]:10.4f}")
    for name, both in found.get("over_seeds", {}).items():
        seeds = len(found["seeds"])
        print(f"  {name:>14}: {both['mean']:10.4f} +- {both['sd']:.4f}, sd over {seeds} seeds")
    speed = f", {found['images_per_second']:.1f} images/s" if "method" in found else ""
    print(f"  {found['num_samples']} samples{speed} -> {out}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(EvalConfig))
