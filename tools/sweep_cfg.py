#!/usr/bin/env -S uv run
"""Find the guidance a generator samples best with, then measure that with fresh samples.

checkpoint -> results/<run>/{sweep.json, sweep.png}. A cut sweep goes on where it was.
"""

import itertools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes

from metrics.evaluation import MeasureConfig, Reference, sample_images
from metrics.pictures import save_figure
from metrics.plots import HIGHER_IS_BETTER, plot_sweep
from metrics.report import Run
from models import command
from models.artifacts import git_commit, plain, read_json, this_command, write_text
from models.checkpoint import Generator, load_generator, results_of
from models.command import InputError, run
from models.method import Method
from models.sampling import Plan, Schedule
from models.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from models.training import pick_device


@dataclass(frozen=True)
class SweepConfig(command.Config):
    """Sample with every combination of settings, measure each, and the best one once more."""

    checkpoint: Path
    """last.pth of a run, or a file in checkpoints/"""
    cfg_scale: tuple[command.Amount, ...] = (1.0, 2.0, 4.0, 7.0, 10.0, 15.0)
    """guidance scales"""
    temperature: tuple[command.Amount, ...] = (1.0,)
    schedule: tuple[Schedule, ...] = ("linear",)
    decode_steps: tuple[command.Count, ...] = ()
    """network calls a sample; default the method's own number only"""
    num_samples: command.Images = 10_000
    """of each combination, all with --seed"""
    final: command.ImagesOrNone = 50_000
    """samples of the best combination, with --seed + 1: it was not chosen on those; 0: none"""
    metric: str | None = None
    """what is best; default the first FID if one is measured, else the first distance"""
    seed: command.Seed = 0
    batch: command.Batch = 500
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made the generator's codes"""
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    out: command.OutFolder | None = None
    """default results/<name of the run or file>"""
    device: command.DeviceName = "auto"

    def check(self) -> None:
        """Raise InputError for settings that nothing can be sampled with."""
        for name in ("cfg_scale", "temperature"):
            if not getattr(self, name):
                raise InputError(f"expected --{name.replace('_', '-')} of one value or more")

    def plans(self, generator: Generator) -> list[Plan]:
        """Return every combination. Raises InputError for steps that the method cannot take."""
        settings = (self.schedule, self.temperature, self.decode_steps or (None,), self.cfg_scale)
        found = [
            Plan(order=generator.order, schedule=s, temperature=t, decode_steps=n, cfg_scale=c)
            for s, t, n, c in itertools.product(*settings)
        ]
        for plan in found:
            plan.groups(generator.model)
        return found


def better(row: dict, metric: str) -> float:
    """Return what to minimise for the best `metric` of a row."""
    value = row["samples"][metric]
    return -value if metric.startswith(HIGHER_IS_BETTER) else value


@dataclass(frozen=True)
class Sweep:
    """What is measured, with what, and the rows so far, which are on disk."""

    model: Method
    tokenizer: Tokenizer
    reference: Reference
    batch: int
    file: Path
    inputs: dict
    """what the rows depend on besides their own settings"""
    rows: list[dict]

    def row(self, plan: Plan, count: int, seed: int) -> dict:
        """Return the row of one combination, measured now or before."""
        key = {"plan": asdict(plan), "num_samples": count, "seed": seed}
        for row in self.rows:
            if key.items() <= row.items():
                return row
        label_N, began = torch.arange(count) % self.model.config.classes, time.time()
        images_NHWC = sample_images(self.model, self.tokenizer, label_N, plan, seed, self.batch)
        speed = count / (time.time() - began)
        found = self.reference.report(images_NHWC, label_N.numpy())
        self.rows.append(key | {"images_per_second": speed} | found)
        self.write({})
        return self.rows[-1]

    def write(self, more: dict) -> dict:
        """Write the rows, and `more`; return what the file holds."""
        found = {"inputs": self.inputs, "rows": self.rows, **more}
        write_text(self.file, json.dumps(found, indent=1) + "\n")
        return found


def read_rows(file: Path, made_from: dict) -> list[dict]:
    """Return what a sweep has measured so far. Raises InputError if it was of other inputs."""
    if not file.exists():
        return []
    try:
        found = read_json(file)
        inputs, rows = found["inputs"], list(found["rows"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file} is no sweep ({e}); delete it, or choose another --out") from None
    if inputs != made_from:
        raise InputError(
            f"{file} is a sweep of another checkpoint, tokenizer or reference; delete it, or "
            "choose another --out"
        )
    return rows


def start_sweep(cfg: SweepConfig, generator: Generator, device: torch.device) -> Sweep:
    """Read all that is measured with. Raises InputError if there is nothing to measure with."""
    head = generator.header
    path = find_tokenizer(head["inputs"]["tokenizer"], cfg.tokenizer)
    reference = cfg.against.load(head["dataset"], device)
    if reference is None or not reference.extractors:
        raise InputError("expected real images, and --inception-weights or --extractor")
    inputs = {
        "checkpoint": head["sha256"],
        "tokenizer": head["inputs"]["tokenizer"],
        **reference.inputs,
    }
    file = (cfg.out or results_of(cfg.checkpoint)) / "sweep.json"
    return Sweep(
        generator.model.to(device),
        load_tokenizer(path)[0].to(device),
        reference,
        cfg.batch,
        file,
        inputs,
        read_rows(file, inputs),
    )


def main(cfg: SweepConfig) -> dict:
    """Sweep, write after each combination, print; return what sweep.json holds."""
    generator = load_generator(cfg.checkpoint)
    plans = cfg.plans(generator)
    sweep = start_sweep(cfg, generator, pick_device(cfg.device))
    names = sweep.reference.names(cfg.num_samples)
    metric = cfg.metric or next((name for name in names if name.startswith("FID")), names[0])
    if metric not in names:
        raise InputError(f"expected --metric {', '.join(names)}, got {metric}")
    swept = [
        sweep.row(plan, cfg.num_samples, cfg.seed) for plan in tqdm(plans, desc="combinations")
    ]
    best = min(swept, key=lambda row: better(row, metric))["plan"]
    final = sweep.row(Plan(**best), cfg.final, cfg.seed + 1) if cfg.final else None
    made_by = {"command": this_command(), "config": plain(cfg), "git_commit": git_commit()}
    found = sweep.write({"metric": metric, "best": best, "final": final} | made_by)
    run = Run(sweep.file.parent.name, {"sweep": {"rows": swept}}, [])
    figure = plot_sweep([run], metric, ("cfg_scale", "decode_steps", "images_per_second"))
    save_figure(figure, sweep.file.with_suffix(".png"))
    report(swept, final, metric, sweep.file)
    return found


def report(swept: list[dict], final: dict | None, metric: str, file: Path) -> None:
    """Print a line for each combination, best first, and the final one beside its control."""
    for row in sorted(swept, key=lambda row: better(row, metric)):
        plan = row["plan"]
        print(
            f"  {metric} {row['samples'][metric]:9.4f}  cfg {plan['cfg_scale']:g} "
            f"{plan['schedule']}, "
            f"temperature {plan['temperature']:g}, {plan['decode_steps'] or 'all'} steps, "
            f"{row['images_per_second']:.1f} images/s"
        )
    for name, value in (final or {"samples": {}})["samples"].items():
        print(f"  {name:>14}: {value:10.4f}   real test images: {final['control'][name]:10.4f}")
    if final:
        print(f"  {final['num_samples']} fresh samples of the best, seed {final['seed']}")
    print(f"  -> {file}")


if __name__ == "__main__":
    run(main, SweepConfig)
