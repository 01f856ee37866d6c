#!/usr/bin/env -S uv run
"""Stage 5: sample from a checkpoint and measure it, or measure the samples of another project.

checkpoint + tokenizer -> results/<run>/{samples.png, samples.npz, metrics.json}
"""

import contextlib
import statistics
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes

from metrics import evaluation, likelihood
from metrics.evaluation import MeasureConfig, SamplingConfig, Subject, plan_of, sample_images
from metrics.report import Done, Run, read_samples, write_record, write_samples
from metrics.tables import quality
from models import command
from models.artifacts import ROOT, sha256_of
from models.checkpoint import locked
from models.command import InputError, run
from models.machine import device_name, peak_memory, pick_device, pick_precision
from models.method import Grouping
from models.orders import CHOSEN
from models.sampling import Plan, Schedule


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """Sample from a generator and measure it (stage 5)."""

    checkpoint: Path | None = None
    """last.pth of a run, or a file in checkpoints/"""
    samples: Path | None = None
    """instead of a checkpoint: .npz with arr_0 uint8 (N, 32, 32, 3), perhaps arr_1 labels (ADM)"""
    num_samples: command.Images = 10_000
    """sample i is of class i modulo 10"""
    seeds: Annotated[int, command.Range(1, 1000)] = 1
    """sample again with seed + 1, ..: mean and sd of every number"""
    order: evaluation.SamplingOrder = None
    """order of sampling; default: the one it was trained in (anneal, adaptive: the scan);
    confidence, entropy, margin: the cells first that the model is surest of, as it goes"""
    decode_steps: command.Count | None = None
    """network calls a sample; fewer than 64 decode codes in parallel; default 64"""
    grouping: Grouping | None = None
    """how many codes each step decodes: cosine (RandAR; default), arpg_cosine, arccos (ARPG)"""
    cfg_scale: command.Amount | None = None
    """guidance scale, 1 for none; default: what the checkpoint recommends, else 2"""
    schedule: Schedule | None = None
    """linear (default): from 1 to --cfg-scale over the decoding; linear_after as ARPG, power_cosine
    as RAR; constant"""
    power: command.Amount | None = None
    """of power_cosine; default 2.75"""
    cfg_from: command.Fraction | None = None
    """share of the codes decoded before guidance begins; default 0"""
    cfg_to: command.Share | None = None
    """share of the codes after which it ends, at half the cost from there; default 1"""
    temperature: command.Amount | None = None
    """default 1"""
    top_k: command.Natural | None = None
    """default 0: all codes"""
    top_p: Annotated[float, command.Range(1e-6, 1)] | None = None
    """default 1: all codes"""
    choice_temperature: command.Amount | None = None
    """noise in an order that the model chooses; default 8; 0: always the surest cells first"""
    revise: command.Fraction | None = None
    """share of the cells that are drawn anew afterwards, given all others: those that were least
    likely given what came before them; default 0"""
    rounds: Annotated[int, command.Range(1, 100)] | None = None
    """of revising; default 1"""
    revise_scale: command.Amount | None = None
    """guidance scale of revising; default: --cfg-scale, but 2 at most"""
    labels: tuple[command.Natural, ...] = ()
    """sample these classes only; default all"""
    random_orders: Annotated[int, command.Range(1, 1000)] = 1
    """random orders an image that its likelihood is averaged over"""
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    codes: Path = ROOT / "data/codes"
    """test codes for the likelihood, from stage 3"""

    def check(self) -> None:
        if (self.checkpoint is None) == (self.samples is None):
            raise InputError("expected either --checkpoint or --samples")
        idle = [name for name in (*(f.name for f in fields(Plan)), "labels") if getattr(self, name)]
        if self.samples and idle:
            raise InputError(f"--samples are drawn already: expected no --{idle[0]}")

    @property
    def folder(self) -> Path:
        if self.samples and not self.out:
            return ROOT / "results" / self.samples.stem
        return super().folder


def measure_samples(cfg: EvalConfig) -> tuple[dict, dict]:
    """Measure the images of --samples; return the numbers, and what they rest on."""
    reference = cfg.against.load("cifar10", pick_device(cfg.device))
    if reference is None:
        raise InputError("expected real images to hold --samples against; give --data")
    size, classes = reference.train_NHWC.shape[1], len(reference.test.classes)
    images_NHWC, label_N = read_samples(cfg.samples, size, classes)
    metrics = {"num_samples": len(images_NHWC), **reference.report(images_NHWC, label_N)}
    inputs = {"samples": sha256_of(cfg.samples), **reference.inputs}
    return metrics, inputs


def first_samples(
    done: Done, subject: Subject, sampler, label_N: torch.Tensor, plan: Plan, cfg: EvalConfig
) -> tuple[np.ndarray, dict]:
    """Return samples of the first seed, from samples.npz if a cut run wrote it, and their record.

    That is {sha256, images_per_second}.
    """
    classes, file = subject.header["classes"], subject.out / "samples.npz"
    if (before := done.parts.pop("samples", None)) and file.exists():
        with contextlib.suppress(InputError):  # torn: they are drawn anew
            images_NHWC, _ = read_samples(file, None, len(classes))
            if sha256_of(images_NHWC) == before["sha256"]:
                return images_NHWC, done("samples", lambda: before)
    sample_images(sampler, label_N[: 2 * cfg.devices], plan, cfg.seed, 2)  # warm-up, not timed
    began = time.time()
    images_NHWC = sample_images(sampler, label_N, plan, cfg.seed, cfg.batch)
    speed = cfg.num_samples / (time.time() - began)
    write_samples(subject.out, images_NHWC, label_N.numpy(), classes)
    record = {"sha256": sha256_of(images_NHWC), "images_per_second": speed}
    return images_NHWC, done("samples", lambda: record)


def bits_of(done: Done, subject: Subject, codes: dict, plan: Plan, draws: int) -> dict:
    """Return bits per test image by order, and what codes cost without a network.

    The orders: its own, the plan's, raster and `draws` random ones, where the method can choose.
    """
    model, orders = subject.model, {subject.model.config.scan}
    if model.any_order:
        orders = {subject.order, plan.order, "raster", "random"} - {*CHOSEN}
    bits = {
        order: done(f"bits {order}", likelihood.likelihood, model, codes["test"], order, draws)
        for order in sorted(orders)
    }
    baselines = done("baselines", likelihood.baseline_bits, codes["train"], codes["test"])
    return {"bits_per_image": bits, "baseline_bits": baselines}


def measure_generator(cfg: EvalConfig) -> tuple[dict, dict]:
    """Sample and measure, write samples; return the numbers, and what they rest on.

    What a cut evaluation had done (samples, then bits, then each measure) is not done again.
    """
    subject = cfg.load()
    model, header = subject.model, subject.header
    plan = plan_of(subject, **{f.name: getattr(cfg, f.name) for f in fields(Plan)})
    classes = header["classes"]
    if not set(cfg.labels) <= set(range(len(classes))):
        raise InputError(f"expected --labels in 0..{len(classes) - 1}, got {cfg.labels}")
    reference = cfg.against.load(header["dataset"], subject.device, cfg.labels)
    codes = evaluation.likelihood_codes(subject, cfg.codes, cfg.checkpoint, reference)
    labels = torch.tensor(cfg.labels or range(len(classes)))
    label_N = labels[torch.arange(cfg.num_samples) % len(labels)]
    inputs = subject.inputs | {f"{s} codes": one.header["sha256"] for s, one in codes.items()}
    inputs |= reference.inputs if reference else {}
    named = ("labels", "num_samples", "seed", "random_orders")
    how = {"plan": asdict(plan), "precision": pick_precision(cfg.precision, subject.device)}
    settings = how | {name: getattr(cfg, name) for name in named}
    done = Done(subject.out / ".partial.json", inputs | settings)

    sampler = cfg.sampler(subject)
    images_NHWC, record = first_samples(done, subject, sampler, label_N, plan, cfg)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    metrics = subject.description | {
        "cluster_weight": header["config"].get("cluster_weight", 0.0),
        "train_steps": header["config"]["steps"],
        **how,
        "own_order": subject.order,
        "network_calls": plan.calls(model),
        "num_samples": cfg.num_samples,
        "seeds": list(seeds),
        "images_per_second": record["images_per_second"],
        "samples_sha256": record["sha256"],  # of samples.npz: a cut run may have replaced it
        **peak_memory(subject.device),
    }
    if codes:
        metrics |= bits_of(done, subject, codes, plan, cfg.random_orders)
    if reference is not None:
        metrics |= reference.report(images_NHWC, label_N.numpy(), done)
    if reference is not None and cfg.seeds > 1:

        def again(seed: int) -> dict[str, float]:
            images_NHWC = sample_images(sampler, label_N, plan, seed, cfg.batch)
            return reference.measure(images_NHWC, label_N.numpy())

        every = [metrics["samples"], *(done(f"seed {seed}", again, seed) for seed in seeds[1:])]
        values = {name: [one[name] for one in every] for name in every[0]}
        metrics["over_seeds"] = {
            name: {"mean": statistics.mean(of_one), "sd": statistics.stdev(of_one)}
            for name, of_one in values.items()
        }
    return metrics, inputs


def main(cfg: EvalConfig) -> dict:
    """Sample, measure, write, print; return what metrics.json holds."""
    with locked(out := cfg.folder):
        metrics, inputs = measure_samples(cfg) if cfg.samples else measure_generator(cfg)
        metrics |= {"device": device_name(pick_device(cfg.device))}
        metrics = write_record(out / "metrics.json", metrics, cfg, inputs)
        (out / ".partial.json").unlink(missing_ok=True)
    print(quality({out.name: Run(out.name, {"metrics": metrics}, [])}) + f"-> {out}")
    return metrics


if __name__ == "__main__":
    run(main, EvalConfig)
