#!/usr/bin/env -S uv run
"""All five stages in one go, at a size for a laptop: minutes, no download, one page of results.

Runs the stages as commands, in raster and in random order, and writes
results/quickstart/index.html. Nothing outside that folder is touched. A cut run is resumed.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from metrics.quickstart_page import write_page
from metrics.stages import Ran, Stage, run_stage
from models.artifacts import ROOT, git_commit, plain, this_command, write_text
from models.errors import InputError, expect_at_least, one_line_errors
from models.methods import METHODS

ORDERS = ("raster", "random")
GUIDANCE = 3.0


@dataclass(frozen=True)
class QuickstartConfig:
    """Run all five stages in one go."""

    dataset: Literal["shapes", "cifar10"] = "shapes"
    """shapes are drawn; cifar10 needs --source, or downloads"""
    source: Path | None = None
    """CIFAR-10 as an archive or folder, see data/load_CIFAR10.py"""
    method: Literal[tuple(METHODS)] = "randar"
    out: Path = ROOT / "results/quickstart"
    """everything goes here; delete it to start over"""
    effort: float = 1.0
    """scales the steps of all trainings"""
    images: int = 10_000
    """shapes to draw for training, and a tenth as many for testing"""
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for options that fit no run."""
        expect_at_least(self, effort=0, seed=0, images=100)
        if self.source is not None and self.dataset != "cifar10":
            raise InputError("--source needs --dataset cifar10: shapes are drawn, not read")

    def steps(self, full: int) -> int:
        """Return a training's length."""
        return max(2, round(self.effort * full))

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders to show: both, or the one that the method has."""
        method = METHODS[self.method]
        return ORDERS if method.any_order else method.scans[:1]


def first_stages(cfg: QuickstartConfig) -> list[Stage]:
    """Return what comes before the generators, in order."""
    out, seed = cfg.out, f"--seed={cfg.seed}"
    data, tokenizer = out / "data", out / "tokenizer.pth"
    load = ["data/load_CIFAR10.py", f"--out={data}"]
    if cfg.dataset == "shapes":
        counts = [f"--count-train={cfg.images}", f"--count-test={cfg.images // 10}"]
        load = ["data/shapes.py", f"--out={data}", *counts, seed]
    if cfg.source is not None:
        load.append(f"--source={cfg.source}")
    return [
        ("1 data", load),
        (
            "2 tokenizer",
            ["tokenizer_vq/train_vqvae.py", f"--data={data}", f"--out={tokenizer}", seed]
            + [f"--steps={cfg.steps(400)}", "--batch=64", "--lr=3e-3", "--warmup=40"]
            + ["--init=None", "--loss=l2", "--perceptual=0"]
            + ["--model.codebook-size=64", "--model.width=32", "--model.blocks=1"],
        ),
        (
            "3 codes",
            ["tools/extract_latent_codes.py", f"--data={data}", f"--tokenizer={tokenizer}"]
            + [f"--out={out / 'codes'}"],
        ),
        (
            "the offline classifier",
            ["tools/train_extractor.py", f"--data={data}", f"--out={out / 'extractor.pth'}", seed]
            + ["--epochs=1", "--width=32", "--batch=128"],
        ),
    ]


def generator_stages(cfg: QuickstartConfig, order: str) -> list[Stage]:
    """Return the training in one order and its evaluation."""
    out, seed, steps = cfg.out, f"--seed={cfg.seed}", cfg.steps(700)
    run, tokenizer, codes = out / f"{cfg.method}_{order}", out / "tokenizer.pth", out / "codes"
    return [
        (
            f"4 train, {order} order",
            ["train_c2i.py", f"--method={cfg.method}", f"--order={order}", f"--out={run}", seed]
            + [f"--codes={codes}", f"--tokenizer={tokenizer}", "--model=nano", "--batch=16"]
            + [f"--steps={steps}", f"--eval-every={steps}", "--optimizer=muon", "--lr=3e-3"]
            + ["--ema=0.98", "--dropout=0", f"--heldout={cfg.images // 20}"],
        ),
        (
            f"5 evaluate, {order} order",
            ["eval_c2i.py", f"--checkpoint={run / 'last.pth'}", f"--tokenizer={tokenizer}"]
            + [f"--codes={codes}", f"--data={out / 'data'}", seed, "--inception-weights=none"]
            + [f"--extractor={out / 'extractor.pth'}", "--num-samples=500", f"--cfg={GUIDANCE}"]
            + [f"--out={out / ('samples_' + order)}"],
        ),
    ]


def run_side_by_side(chains: list[list[Stage]], threads: int) -> list[Ran]:
    """Run chains of stages at once, each on its share of the threads; show the last one's bars.

    Small models do not fill two threads: two on one thread each are half as fast again.
    """
    share = max(1, threads // len(chains))

    def run(chain: list[Stage]) -> list[Ran]:
        return [run_stage(stage, share, show=chain is chains[-1]) for stage in chain]

    with ThreadPoolExecutor(len(chains)) as pool:
        return [done for chain in pool.map(run, chains) for done in chain]


def evaluations(cfg: QuickstartConfig) -> dict[str, dict]:
    """Return what metrics.json of each order holds."""
    paths = {order: cfg.out / f"samples_{order}/metrics.json" for order in cfg.orders}
    return {order: json.loads(path.read_text()) for order, path in paths.items()}


def write_numbers(
    cfg: QuickstartConfig, evaluated: dict[str, dict], done: list[Ran], about: dict
) -> None:
    """Write quickstart.json, what tools/report.py keeps of it."""
    found = {
        **about,
        "seconds": {ran.name: ran.seconds for ran in done},
        "orders": {
            order: {"num_samples": one["num_samples"], **one["samples"]}
            for order, one in evaluated.items()
        },
        "config": plain(cfg),
        "command": this_command(),
        "git_commit": git_commit(),
    }
    write_text(cfg.out / "quickstart.json", json.dumps(found, indent=1) + "\n")


def main(cfg: QuickstartConfig) -> Path:
    """Run everything and write the page; return its path."""
    cfg.check()
    began, threads = time.time(), os.cpu_count() or 1
    resumed = cfg.out.exists() and any(cfg.out.iterdir())
    done = [run_stage(stage, threads) for stage in first_stages(cfg)]
    done += run_side_by_side([generator_stages(cfg, order) for order in cfg.orders], threads)
    evaluated = evaluations(cfg)
    path = write_page(cfg.out, cfg.method, evaluated, GUIDANCE, done)
    minutes = (time.time() - began) / 60
    write_numbers(cfg, evaluated, done, {"minutes": minutes, "cores": threads, "resumed": resumed})
    print(f"\nquickstart finished in {minutes:.1f} minutes: open {path}")
    return path


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(QuickstartConfig))
