#!/usr/bin/env -S uv run
"""All five stages in one go, at a size for a laptop: minutes, no download, one page of results.

The stages run as commands, in raster and in random order, then notebooks/results.ipynb on what they
made: results/quickstart/index.html. Nothing outside that folder is touched; a cut run is resumed.
"""

import json
import re
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import torch

from metrics.report import write_record
from models import command
from models.artifacts import ROOT, write_text
from models.command import InputError, run
from models.machine import Stage, run_stages
from models.methods import METHODS

ORDERS = ("raster", "random")
GUIDANCE = 3.0


@dataclass(frozen=True)
class QuickstartConfig(command.Config):
    """Run all five stages in one go."""

    dataset: Literal["shapes", "cifar10"] = "shapes"
    """shapes are drawn; cifar10 needs --source, or downloads"""
    source: Path | None = None
    """CIFAR-10 as an archive or folder, see data/load_CIFAR10.py"""
    method: Literal[tuple(METHODS)] = "randar"
    out: command.OutFolder = ROOT / "results/quickstart"
    """everything goes here; delete it to start over"""
    effort: Annotated[float, command.Range(0, 100)] = 1.0
    """scales the steps of all trainings"""
    images: Annotated[int, command.Range(100, 10**6)] = 10_000
    """shapes to draw for training, and a tenth as many for testing"""
    seed: command.Seed = 0

    def check(self) -> None:
        if self.source is not None and self.dataset != "cifar10":
            raise InputError("--source needs --dataset cifar10: shapes are drawn, not read")

    def steps(self, full: int) -> int:
        return max(2, round(self.effort * full))

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders to show: both, or the one that the method has."""
        method = METHODS[self.method]
        return ORDERS if method.any_order else method.scans[:1]


def first_stages(cfg: QuickstartConfig) -> list[Stage]:
    """Return what comes before the generators, in order."""
    out, seed = cfg.out, f"--seed={cfg.seed}"
    data, tokenizer = f"--data={out / 'data'}", out / "tokenizer.pth"
    load = ["data/load_CIFAR10.py", f"--out={out / 'data'}"]
    if cfg.dataset == "shapes":
        counts = [f"--count-train={cfg.images}", f"--count-test={cfg.images // 10}"]
        load = ["data/shapes.py", f"--out={out / 'data'}", *counts, seed]
    if cfg.source is not None:
        load.append(f"--source={cfg.source}")
    train = ["tokenizer_vq/train_vqvae.py", data, f"--out={tokenizer}", seed]
    train += [f"--steps={cfg.steps(400)}", "--batch=64", "--lr=3e-3", "--warmup=40"]
    train += ["--init=None", "--loss=l2", "--perceptual=0", "--model.codebook-size=64"]
    train += ["--model.width=32", "--model.blocks=1"]
    encode = ["tools/extract_latent_codes.py", data, f"--tokenizer={tokenizer}"]
    classify = ["tools/train_extractor.py", data, f"--out={out / 'extractor.pth'}", seed]
    return [
        ("1 data", load),
        ("2 tokenizer", train),
        ("3 codes", [*encode, f"--out={out / 'codes'}"]),
        ("the offline classifier", [*classify, "--epochs=2", "--width=32", "--batch=128"]),
    ]


def generator_stages(cfg: QuickstartConfig, order: str) -> list[Stage]:
    """Return the training in one order and its evaluation."""
    out, seed, steps = cfg.out, f"--seed={cfg.seed}", cfg.steps(700)
    run, made = out / f"{cfg.method}_{order}", [f"--tokenizer={out / 'tokenizer.pth'}"]
    made += [f"--codes={out / 'codes'}", f"--out={run}", seed]
    train = ["train_c2i.py", f"--method={cfg.method}", f"--order={order}", *made, "--model=nano"]
    train += ["--batch=16", f"--steps={steps}", f"--eval-every={steps}", "--optimizer=muon"]
    train += ["--lr=3e-3", "--ema=0.98", "--dropout=0", f"--heldout={cfg.images // 20}"]
    evaluate = ["eval_c2i.py", f"--checkpoint={run / 'last.pth'}", *made, "--num-samples=500"]
    evaluate += [f"--data={out / 'data'}", f"--extractor={out / 'extractor.pth'}"]
    evaluate += ["--inception-weights=none", f"--cfg-scale={GUIDANCE}"]
    return [(f"4 train, {order} order", train), (f"5 evaluate, {order} order", evaluate)]


def page_parameters(cfg: QuickstartConfig) -> str:
    """Return the first cell of notebooks/results.ipynb for this run."""
    out = cfg.out.absolute()
    runs = [str(out / f"{cfg.method}_{order}") for order in cfg.orders]
    return f"""from pathlib import Path

runs, tokenizer = [Path(path) for path in {runs}], Path({str(out / "tokenizer.pth")!r})
checkpoints = [run / "last.pth" for run in runs]
grids = [*(run / "samples.png" for run in runs), tokenizer.with_suffix(".reconstructions.png")]
cfg_scale, ceiling = {GUIDANCE}, 6.0"""


def write_page(parameters: str, head: str, foot: str, out: Path) -> None:
    """Execute the first half of notebooks/results.ipynb; write what it shows as one HTML file."""
    import nbformat

    page = nbformat.read(ROOT / "notebooks/results.ipynb", as_version=4)
    first, last = (
        next(i for i, cell in enumerate(page.cells) if cell.id == name)
        for name in ("parameters", "about-calibration")  # what follows was not measured
    )
    page.cells[last:] = [nbformat.v4.new_markdown_cell(foot)]
    page.cells[: first + 1] = [
        nbformat.v4.new_markdown_cell(head),
        page.cells[first],
        nbformat.v4.new_code_cell(parameters),
    ]
    # a process of its own: it has handlers of Ctrl-C and SIGTERM that do not go with ours
    notebook, made = (out.with_name(f"Quickstart.{kind}") for kind in ("ipynb", "html"))
    nbformat.write(page, notebook)
    line = [str(Path(sys.executable).with_name("jupyter-nbconvert")), "--execute", "--to=html"]
    line += ["--no-input", "--ExecutePreprocessor.timeout=1200", str(notebook)]
    run_stages([("results", line)], quiet=True)
    html = made.read_text()
    # formulas and widgets, which are not there, would be drawn by scripts from the network
    html = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    wide = "table { display: block !important } pre, pre code { white-space: pre !important }"
    scrolls = f"<style>{wide} table, pre {{ overflow-x: auto }}</style></head>"
    write_text(out, html.replace("</head>", scrolls))
    for file in (notebook, made):
        file.unlink()


def as_typed(stages: list[Stage]) -> str:
    """Return the commands of stages as one types them in the root of the repo, a flag a line."""
    lines = [[shlex.quote(word.replace(f"{ROOT}/", "")) for word in line] for _, line in stages]
    return "\n".join("uv run " + " \\\n  ".join(words) for words in lines)


def main(cfg: QuickstartConfig) -> Path:
    """Run everything and write the page; return its path."""
    began = time.time()
    resumed = cfg.out.exists() and any(cfg.out.iterdir())
    steps = [[stage] for stage in first_stages(cfg)]
    # small models do not fill two threads: two trainings on one each are half as fast again
    steps += list(zip(*(generator_stages(cfg, order) for order in cfg.orders), strict=True))
    seconds = {}
    for stages in steps:
        since = time.time()
        run_stages(stages)
        seconds[" and ".join(name for name, _ in stages)] = time.time() - since
    minutes = (time.time() - began) / 60
    head = "# Images in any token order\n\nAn image becomes an 8x8 grid of codes, and "
    head += f"{cfg.method} learned them in {' and in '.join(cfg.orders)} order, "
    head += f"in {minutes:.1f} minutes."
    if resumed:
        head += f" Resumed at {datetime.fromtimestamp(began):%Y-%m-%d %H:%M}: a part is older."
    foot = f"## How this was made\n\n```\n{as_typed([s for group in steps for s in group])}\n```"
    path = cfg.out / "index.html"
    write_page(page_parameters(cfg), head, foot, path)
    minutes, cores = (time.time() - began) / 60, torch.get_num_threads()
    numbers = {"minutes": minutes, "cores": cores, "resumed": resumed, "seconds": seconds}
    numbers["orders"] = {}
    for order in cfg.orders:
        metrics = json.loads((cfg.out / f"{cfg.method}_{order}/metrics.json").read_text())
        numbers["orders"][order] = {"num_samples": metrics["num_samples"], **metrics["samples"]}
    write_record(cfg.out / "quickstart.json", numbers, cfg, {})
    print(f"\nquickstart finished in {minutes:.1f} minutes: open {path}")
    return path


if __name__ == "__main__":
    run(main, QuickstartConfig)
