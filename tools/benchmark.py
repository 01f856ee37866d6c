#!/usr/bin/env -S uv run
"""How fast and how large each stage and each method is on this machine.

Runs the stages themselves, as the commands that they are, on drawn shapes, and reads what they
record; results/benchmark/benchmark.json and a table. What a number is:

training    images a second, median of the rows of the stage's log but the first, which is the
            warm-up; evaluations and saves are not in it
encoding    images a second of the test split, as stage 3 prints it; the train split, as large and
            encoded before, is the warm-up. An image and its mirror image count as one
sampling    images a second of all samples, from labels to pixels, after stage 5's own warm-up
memory      what stages 2, 4 and 5 record: the largest resident set of the process, with Python,
            torch and evaluations; on a GPU the most that tensors took there
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from metrics.report import write_record
from models import command
from models.artifacts import ROOT
from models.checkpoint import load_generator
from models.command import InputError, run
from models.method import SIZES
from models.methods import METHODS
from models.processes import (
    device_name,
    of_encoding,
    of_sampling,
    of_training,
    processor,
    run_stages,
)
from models.tokenizer import load_tokenizer
from models.training import LOG_EVERY, parameters, pick_device

CALLS = (64, 16)
"""network calls of the methods that can choose"""
TOKENIZER_BATCH = 128


@dataclass(frozen=True)
class BenchmarkConfig(command.Config):
    """Measure speed and memory of the stages on this machine."""

    methods: tuple[Literal[tuple(METHODS)], ...] = tuple(METHODS)
    """each trained in random order if it can be, else in its own"""
    model: Literal[tuple(SIZES)] = "nano"
    """size of the generators; the tokenizer is the README's"""
    batch: command.Batch = 64
    """images a training step of the generators"""
    steps: Annotated[int, command.Range(2, 10**6)] = 150
    """of training each generator; 50 of them are the warm-up, of fewer than 100 half of them"""
    tokenizer_steps: Annotated[int, command.Range(2, 10**6)] = 50
    """of training the tokenizer, 128 images each; the first fifth is the warm-up"""
    images: Annotated[int, command.Range(20, 10**6)] = 1_000
    """shapes drawn for training, and as many to encode"""
    num_samples: command.Images = 500
    """sampled from each generator, with guidance"""
    sample_batch: command.Batch = 500
    """of them at once"""
    threads: Annotated[int, command.Range(1, 1024)] = os.cpu_count() or 1
    """of each stage"""
    seed: command.Seed = 0
    device: command.DeviceName = "auto"
    out: command.OutFolder = ROOT / "results/benchmark"
    """benchmark.json goes here, at the end"""
    work: Path | None = None
    """new or empty folder to keep what the stages write; default: a temporary one"""

    def check(self) -> None:
        """Raise InputError for what cannot be measured."""
        if not self.methods or len(set(self.methods)) < len(self.methods):
            known = ", ".join(METHODS)
            raise InputError(f"expected --methods of {known}, each once, got {self.methods}")
        if self.work and self.work.exists() and (self.work.is_file() or any(self.work.iterdir())):
            raise InputError(
                f"expected --work to be a new or empty folder, {self.work} is not: a stage that "
                "is finished there would not run again"
            )


@dataclass(frozen=True)
class Measurement:
    """One stage to run, and how to read its record."""

    about: dict
    """the start of its row: stage, method, order, what, model, batch"""
    line: list[str]
    """its command"""
    read: Callable[[str], dict]
    """returns the rest, images_per_second, parameters, .., of what it printed and recorded"""

    def name(self, number: int, total: int) -> str:
        """Return its name, which says how far the benchmark is."""
        parts = (self.about[key] for key in ("stage", "method", "order", "what"))
        return f"{number} of {total}: stage {' '.join(str(p) for p in parts if p)}"


def tokenizer_measurements(cfg: BenchmarkConfig, work: Path, device: str) -> list[Measurement]:
    """Return stage 2 at the README's size, and stage 3 without and with search."""
    path, data = work / "tokenizer.pth", work / "data"
    about = {"stage": 2, "method": None, "order": None, "what": "training", "model": "vqvae"}

    def with_size(found: dict) -> dict:
        return found | {"parameters": parameters(load_tokenizer(path)[0])}

    train = ["tokenizer_vq/train_vqvae.py", f"--data={data}", f"--out={path}", f"--seed={cfg.seed}"]
    train += ["--init=None", "--loss=l2", "--perceptual=0"]
    train += [f"--steps={cfg.tokenizer_steps}", f"--save-every={cfg.tokenizer_steps}"]
    train += [f"--log-every={-(-cfg.tokenizer_steps // 5)}", f"--batch={TOKENIZER_BATCH}", device]
    log, row = path.with_suffix(".jsonl"), about | {"batch": TOKENIZER_BATCH}
    found = [Measurement(row, train, lambda said: with_size(of_training(log)))]
    batch = min(cfg.images, 500)
    for search in (0, 1):
        encode = ["tools/extract_latent_codes.py", f"--tokenizer={path}", f"--data={data}", device]
        encode += [f"--out={work / f'codes_{search}'}", f"--batch={batch}", f"--search={search}"]
        what = {"stage": 3, "what": f"encoding, --search {search}", "batch": batch}
        found.append(Measurement(about | what, encode, lambda said: with_size(of_encoding(said))))
    return found


def method_measurements(
    cfg: BenchmarkConfig, method: str, work: Path, device: str
) -> list[Measurement]:
    """Return a method's stage 4 in its own order, and its stage 5 in all its numbers of calls."""
    kind, run, seed = METHODS[method], work / method, f"--seed={cfg.seed}"
    order = "random" if kind.any_order else kind.scans[0]
    about = {"stage": 4, "method": method, "order": order, "what": "training", "model": cfg.model}
    evaluate_at = cfg.steps if cfg.steps >= 2 * LOG_EVERY else -(-cfg.steps // 2)  # writes a row
    train = ["train_c2i.py", f"--method={method}", f"--order={order}", f"--model={cfg.model}"]
    train += [f"--codes={work / 'codes_0'}", f"--out={run}", f"--tokenizer={work / 'none.pth'}"]
    train += [f"--batch={cfg.batch}", f"--steps={cfg.steps}", f"--eval-every={evaluate_at}", seed]
    train += [f"--heldout={cfg.images // 10}", "--optimizer=muon", "--lr=3e-3", "--dropout=0"]

    def read_training(said: str) -> dict:
        size = parameters(load_generator(run / "last.pth").model)
        return of_training(run / "metrics.jsonl") | {"parameters": size}

    found = [Measurement(about | {"batch": cfg.batch}, [*train, device], read_training)]
    for steps in CALLS if kind.parallel and kind.any_order else (None,):
        out = run / f"samples_{steps or 'own'}"
        sample = ["eval_c2i.py", f"--checkpoint={run / 'last.pth'}", f"--out={out}"]
        sample += ["--cfg-scale=3"]
        sample += [f"--tokenizer={work / 'tokenizer.pth'}", f"--codes={work / 'left_out'}", seed]
        sample += [f"--data={work / 'data'}", "--inception-weights=none", "--reference=10", device]
        sample += [f"--num-samples={cfg.num_samples}", f"--batch={cfg.sample_batch}"]
        sample += [f"--decode-steps={steps}"] if steps else []
        batch = min(cfg.num_samples, cfg.sample_batch)
        what = {"stage": 5, "what": "sampling", "batch": batch}
        found.append(Measurement(about | what, sample, lambda _, out=out: of_sampling(out)))
    return found


def measure(cfg: BenchmarkConfig, work: Path, device: str) -> list[dict]:
    """Run everything in `work`, one stage at a time; return a row for each measurement."""
    draw = ["data/shapes.py", f"--out={work / 'data'}"]
    draw += [f"--count-train={cfg.images}", f"--count-test={cfg.images}", f"--seed={cfg.seed}"]
    todo = tokenizer_measurements(cfg, work, device)
    for method in cfg.methods:
        todo += method_measurements(cfg, method, work, device)
    run_stages([("the shapes to measure with", draw)], cfg.threads)
    rows = []
    for number, measurement in enumerate(todo, 1):
        since = time.time()
        with tempfile.TemporaryFile("w+") as output:
            stage = (measurement.name(number, len(todo)), measurement.line)
            run_stages([stage], cfg.threads, output)
            output.seek(0)
            said = output.read()
        print(said, end="", flush=True)
        row = {"network_calls": None, "seconds": time.time() - since, "peak_memory_gb": None}
        rows.append(measurement.about | row | measurement.read(said))
    return rows


def report(rows: list[dict]) -> None:
    """Print the rows as a table."""
    print(f"\n{'stage':31} {'order':8} {'parameters':>10} {'calls':>6} {'images/s':>9} {'GB':>6}")
    for row in rows:
        name = " ".join(str(row[key]) for key in ("stage", "method", "what") if row[key])
        memory = "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f}"
        print(
            f"{name:31} {row['order'] or '':8} {row['parameters']:10,} "
            f"{row['network_calls'] or '':>6} {row['images_per_second']:9.1f} {memory:>6}"
        )


def main(cfg: BenchmarkConfig) -> Path:
    """Measure everything, write and print it; return the path of benchmark.json."""
    device = pick_device(cfg.device)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        work = (cfg.work or Path(folder)).absolute()
        rows = measure(cfg, work, f"--device={device.type}")
    on_gpu = device.type == "cuda"
    numbers = {
        "device": device_name(device),
        "cpu": processor(),
        "threads": cfg.threads,
        "torch": torch.__version__,
        "peak_memory": "tensors on the GPU" if on_gpu else "resident set of the process",
        "rows": rows,
    }
    path = cfg.out / "benchmark.json"
    record = write_record(path, numbers, cfg, {})
    report(rows)
    print("on {device} ({cpu}, {threads} threads) -> ".format(**record) + str(path))
    return path


if __name__ == "__main__":
    run(main, BenchmarkConfig)
