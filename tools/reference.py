#!/usr/bin/env -S uv run
"""Train every method under one budget, find each one's guidance, and measure: a table to compare.

codes + tokenizer -> --out/<run>/ with all that the stages write; `tools/report.py --keep` takes the
folders. A cut or longer list trains and searches what is not done yet, and evaluates all anew.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from metrics.evaluation import MeasureConfig
from metrics.report import read_run
from metrics.tables import methods
from models import command
from models.artifacts import ROOT, as_written, expect_file, read_json
from models.command import InputError
from models.machine import Stage, run_stages
from models.method import SIZES
from models.training import OptimizerName

RUNS = {
    "gpt_raster": ("gpt", "raster"),
    "randar_raster": ("randar", "raster"),
    "randar_random": ("randar", "random"),
    "randar_fixed_random": ("randar", "fixed_random"),
    "randar_adaptive": ("randar", "adaptive"),
    "rar_raster": ("rar", "raster"),
    "rar_anneal": ("rar", "anneal"),
    "rar_random": ("rar", "random"),
    "arpg_random": ("arpg", "random"),
    "par_regions": ("par", "regions"),
}
"""name -> --method, --order"""


@dataclass(frozen=True)
class ReferenceConfig(command.Config):
    """Train, tune the guidance of, and measure every method under one budget."""

    runs: tuple[Literal[tuple(RUNS)], ...] = tuple(RUNS)
    codes: Path = ROOT / "data/codes"
    """from stage 3, or clustered by tools/cluster_codebook.py"""
    tokenizer: Path = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    out: command.OutFolder = ROOT / "results/reference"
    """a folder for each run"""
    model: Literal[tuple(SIZES)] = "nano"
    steps: command.Count = 3000
    batch: command.Batch = 64
    optimizer: OptimizerName = "muon"
    lr: command.Share = 3e-3
    dropout: command.Fraction = 0.0
    tuned: Path | None = None
    """folder of tuning_<method>_<order> from tools/tune.py, whose best settings the runs take"""
    cluster_weight: command.Amount = 0.0
    heldout: command.Count = 2000
    seed: command.Seed = 0
    cfg_scale: tuple[command.Amount, ...] = (2.0, 3.0, 4.0, 6.0, 10.0)
    """guidance scales, of which each run takes what is best for it"""
    swept: command.Images = 2000
    """samples of each of them"""
    num_samples: command.Images = 10_000
    """fresh samples of the best"""
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    together: Annotated[int, command.Range(1, 64)] = 1
    """runs side by side, on an equal share of the cores each"""


def flags(cfg: ReferenceConfig, name: str, measured: bool, **more) -> list[str]:
    """Return what every stage of a run is told, and how it is `measured`; None is left out."""
    values = {"tokenizer": cfg.tokenizer, "out": cfg.out / name, "seed": cfg.seed}
    if measured:
        values |= {"checkpoint": cfg.out / name / "last.pth", **asdict(cfg.against)}
    given = {key: value for key, value in (values | more).items() if value is not None}
    return [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]


def stages(cfg: ReferenceConfig, name: str) -> list[Stage]:
    """Return training and search of one run; what follows needs the guidance that it finds.

    Raises InputError if the run was to be tuned and is not.
    """
    budget = ("model", "steps", "batch", "optimizer", "lr", "dropout", "cluster_weight", "heldout")
    more = {key: getattr(cfg, key) for key in (*budget, "codes")}
    more["method"], more["order"] = method, order = RUNS[name]
    if cfg.tuned and order == "adaptive":
        raise InputError(f"{name} cannot be tuned: leave it out of --runs, or --tuned")
    if cfg.tuned:
        path = cfg.tuned / f"tuning_{name}" / "tuning.json"
        rerun = f"run: uv run tools/tune.py --method {method} --order {order} --out {path.parent}"
        expect_file(path, "a tuning", rerun)
        with as_written(path, "tuning", rerun):
            more |= {key: float(x) for key, x in read_json(path)["best"]["settings"].items()}
    search = flags(cfg, name, True, num_samples=cfg.swept, final=0)
    search += ["--cfg-scale", *map(str, cfg.cfg_scale)]
    return [
        (f"{name}: training", ["train_c2i.py", *flags(cfg, name, False, **more)]),
        (f"{name}: guidance", ["tools/sweep_cfg.py", *search]),
    ]


def evaluation(cfg: ReferenceConfig, name: str) -> Stage:
    """Return the evaluation at the guidance that was best, with samples it was not chosen on."""
    best = json.loads((cfg.out / name / "sweep.json").read_text())["best"]["cfg_scale"]
    more = {"codes": cfg.codes, "num_samples": cfg.num_samples, "cfg_scale": best}
    more |= {"seed": cfg.seed + 1, "random_orders": 8}
    return f"{name}: evaluation", ["eval_c2i.py", *flags(cfg, name, True, **more)]


def main(cfg: ReferenceConfig) -> str:
    """Run every stage, each of which knows what it has done; print and return the table."""
    first = {name: stages(cfg, name) for name in cfg.runs}  # refuses what is not tuned at once
    for i in range(0, len(cfg.runs), cfg.together):
        names = cfg.runs[i : i + cfg.together]
        for side_by_side in zip(*(first[name] for name in names), strict=True):
            run_stages(side_by_side)
        run_stages([evaluation(cfg, name) for name in names])
    runs = [read_run(cfg.out / name) for name in cfg.runs]
    table = methods({run.name: run for run in runs})
    print(table)
    return table


if __name__ == "__main__":
    command.run(main, ReferenceConfig)
