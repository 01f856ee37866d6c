#!/usr/bin/env -S uv run
"""Stage 5: sample from a checkpoint and measure it, or measure the samples of another project.

checkpoint + tokenizer -> results/<run>/{samples.png, samples.npz, metrics.json}
"""

import json
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes

from metrics.evaluation import Done, MeasureConfig, likelihood, over_seeds, sample_images
from metrics.likelihood import baseline_bits
from metrics.samples import read_samples, write_samples
from models import command
from models.artifacts import ROOT, git_commit, plain, sha256_of, this_command, write_text
from models.checkpoint import Generator, load_generator, results_of
from models.command import InputError, run
from models.data import Codes, load_codes_of
from models.method import Method
from models.methods import check_order
from models.orders import FIXED_RANDOM, SCANS, Grouping
from models.sampling import Plan, Schedule
from models.tokenizer import find_tokenizer, load_tokenizer
from models.training import parameters, peak_memory, pick_device


@dataclass(frozen=True)
class EvalConfig(command.Config):
    """Sample from a generator and measure it (stage 5)."""

    checkpoint: Path | None = None
    """last.pth of a run, or a file in checkpoints/"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made the generator's codes"""
    samples: Path | None = None
    """instead of a checkpoint: .npz with arr_0 uint8 (N, 32, 32, 3), perhaps arr_1 labels (ADM)"""
    num_samples: command.Images = 10_000
    """sample i is of class i modulo 10"""
    seed: command.Seed = 0
    seeds: Annotated[int, command.Range(1, 1000)] = 1
    """sample again with seed + 1, ..: mean and sd of every number"""
    order: Literal[(*SCANS, FIXED_RANDOM, "random")] | Path | None = None
    """order of sampling; default: the one it was trained in (anneal, adaptive: the scan)"""
    decode_steps: command.Count | None = None
    """network calls a sample; fewer than 64 decode codes in parallel; default 64"""
    grouping: Grouping | None = None
    """how many codes each step decodes: cosine (RandAR; default), arpg_cosine, arccos (ARPG)"""
    cfg_scale: command.Amount | None = None
    """guidance scale, 1 for none; default: what the checkpoint recommends, else 2"""
    schedule: Schedule | None = None
    """linear (default): from 1 to --cfg-scale over the decoding; power_cosine as RAR; constant"""
    power: command.Amount | None = None
    """of power_cosine; default 2.75"""
    temperature: command.Amount | None = None
    """default 1"""
    top_k: command.Natural | None = None
    """default 0: all codes"""
    top_p: Annotated[float, command.Range(1e-6, 1)] | None = None
    """default 1: all codes"""
    labels: tuple[command.Natural, ...] = ()
    """sample these classes only; default all"""
    batch: command.Batch = 500
    random_orders: Annotated[int, command.Range(1, 1000)] = 1
    """random orders an image that its likelihood is averaged over"""
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    codes: Path = ROOT / "data/codes"
    """test codes for the likelihood, from stage 3"""
    out: command.OutFolder | None = None
    """default results/<name of the run or file>"""
    device: command.DeviceName = "auto"

    def check(self) -> None:
        """Raise InputError for numbers that no evaluation can have."""
        if (self.checkpoint is None) == (self.samples is None):
            raise InputError("expected either --checkpoint or --samples")

    def plan(self, generator: Generator) -> Plan:
        """Return how to sample: as asked, else as the checkpoint recommends, else by default.

        Raises InputError for what the method cannot do.
        """
        asked = {field.name: getattr(self, field.name) for field in fields(Plan)}
        asked = {name: value for name, value in asked.items() if value is not None}
        if self.order is not None:
            asked["order"] = str(self.order)
        plan = Plan(**{"cfg_scale": 2.0, "order": generator.order} | generator.sampling | asked)
        check_order(generator.header["method"], plan.order, generator.model.config.scan)
        plan.groups(generator.model)  # refuses a number of steps that the method cannot take
        return plan


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
    reference = cfg.against.load("cifar10", device)
    if reference is None:
        raise InputError("expected real images to hold --samples against; give --data")
    size, classes = reference.train_NHWC.shape[1], len(reference.test.classes)
    images_NHWC, label_N = read_samples(cfg.samples, size, classes)
    metrics = {
        "num_samples": len(images_NHWC),
        **about_run(cfg, device),
        "inputs": {"samples": sha256_of(cfg.samples), **reference.inputs},
        **reference.report(images_NHWC, label_N),
    }
    return metrics, cfg.out or ROOT / "results" / cfg.samples.stem


def first_samples(
    done: Done, out: Path, sampler: tuple, cfg: EvalConfig, classes: list[str]
) -> tuple[np.ndarray, float]:
    """Return samples of the first seed and images/s, from samples.npz if a cut run wrote it."""
    label_N = sampler[2]
    kept = done.parts.get("samples", {})
    if kept and (out / "samples.npz").exists():
        images_NHWC, _ = read_samples(out / "samples.npz", 32, len(classes))
        if sha256_of(images_NHWC) == kept["sha256"]:
            return images_NHWC, kept["images_per_second"]
    sample_images(*sampler[:2], label_N[:2], sampler[3], cfg.seed, cfg.batch)  # warm-up, not timed
    began = time.time()
    images_NHWC = sample_images(*sampler, cfg.seed, cfg.batch)
    speed = cfg.num_samples / (time.time() - began)
    write_samples(out, images_NHWC, label_N.numpy(), classes)
    done.parts.pop("samples", None)
    done("samples", lambda: {"sha256": sha256_of(images_NHWC), "images_per_second": speed})
    return images_NHWC, speed


def bits_of(model: Method, codes: dict[str, Codes], order: str, draws: int, done: Done) -> dict:
    """Return bits per test image in each order to compare, and what codes cost without a network.

    The orders are `order`, raster and `draws` random ones where the method can choose.
    """
    orders = {order, "raster", "random"} if model.any_order else {model.config.scan}
    test = codes["test"]
    bits = {
        name: done(f"bits {name}", lambda name=name: likelihood(model, test, name, draws))
        for name in sorted(orders)
    }
    baselines = done("baselines", lambda: baseline_bits(codes["train"], test))
    return {"bits_per_image": bits, "baseline_bits": baselines}


def measure_generator(cfg: EvalConfig, device: torch.device) -> tuple[dict, Path]:
    """Sample and measure; write samples; return what metrics.json holds and its folder.

    What a cut evaluation had done (samples, then bits, then each measure) is not done again.
    """
    generator = load_generator(cfg.checkpoint)
    head, model = generator.header, generator.model.to(device)
    plan, classes = cfg.plan(generator), head["classes"]
    if not set(cfg.labels) <= set(range(len(classes))):
        raise InputError(f"expected --labels in 0..{len(classes) - 1}, got {cfg.labels}")
    path = find_tokenizer(head["inputs"]["tokenizer"], cfg.tokenizer)
    tokenizer = load_tokenizer(path)[0].to(device)
    reference = cfg.against.load(head["dataset"], device, cfg.labels)
    codes, out = {}, cfg.out or results_of(cfg.checkpoint)
    if (cfg.codes / "test_codes.npy").exists():
        codes = {s: load_codes_of(head, cfg.codes, s, cfg.checkpoint) for s in ("test", "train")}
    else:
        print(f"no codes at {cfg.codes}: no likelihood; run: uv run tools/extract_latent_codes.py")
    labels = torch.tensor(cfg.labels or range(len(classes)))
    label_N = labels[torch.arange(cfg.num_samples) % len(labels)]
    inputs = {"checkpoint": head["sha256"], **head["inputs"]}
    inputs |= {f"{split} codes": one.header["sha256"] for split, one in codes.items()}
    inputs |= reference.inputs if reference else {}
    asked = {"plan": asdict(plan), "labels": cfg.labels, "num_samples": cfg.num_samples}
    asked |= {"seed": cfg.seed, "random_orders": cfg.random_orders}
    done = Done(out / ".partial.json", inputs | asked)

    sampler = (model, tokenizer, label_N, plan)
    images_NHWC, speed = first_samples(done, out, sampler, cfg, classes)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    metrics = {
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
        **peak_memory(device),
        **about_run(cfg, device),
        "inputs": inputs,
    }
    if codes:
        metrics |= bits_of(model, codes, plan.order, cfg.random_orders, done)
    if reference is not None:
        metrics |= reference.report(images_NHWC, label_N.numpy(), done)
    if reference is not None and cfg.seeds > 1:

        def again(seed: int) -> dict[str, float]:
            return reference.measure(sample_images(*sampler, seed, cfg.batch), label_N.numpy())

        others = [done(f"seed {seed}", lambda seed=seed: again(seed)) for seed in seeds[1:]]
        metrics["over_seeds"] = over_seeds([metrics["samples"], *others])
    return metrics, out


def main(cfg: EvalConfig) -> dict:
    """Sample, measure, write, print; return what metrics.json holds."""
    device = pick_device(cfg.device)
    measure = measure_samples if cfg.samples else measure_generator
    metrics, out = measure(cfg, device)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    (out / ".partial.json").unlink(missing_ok=True)
    report(metrics, out)
    return metrics


def report(metrics: dict, out: Path) -> None:
    """Print the numbers, each beside the same measure of real images."""
    if "method" in metrics:
        order, parameters = metrics["trained_order"], metrics["parameters"]
        print(f"{metrics['method']} ({order}), {parameters:,} parameters")
    for order, bits in metrics.get("bits_per_image", {}).items():
        print(f"  {order:>10} order: {bits['mean']:8.2f} +- {bits['se']:.2f} bits per test image")
    for name, bits in metrics.get("baseline_bits", {}).items():
        print(f"  {name:>14}: {bits:8.2f} bits, without a network")
    for name, value in metrics.get("samples", {}).items():
        print(f"  {name:>14}: {value:10.4f}   real test images: {metrics['control'][name]:10.4f}")
    for name, both in metrics.get("over_seeds", {}).items():
        seeds = len(metrics["seeds"])
        print(f"  {name:>14}: {both['mean']:10.4f} +- {both['sd']:.4f}, sd over {seeds} seeds")
    speed = f", {metrics['images_per_second']:.1f} images/s" if "method" in metrics else ""
    print(f"  {metrics['num_samples']} samples{speed} -> {out}")


if __name__ == "__main__":
    run(main, EvalConfig)
