#!/usr/bin/env -S uv run
"""Find the guidance a generator samples best with, then measure that with fresh samples.

checkpoint -> results/<run>/{sweep.json, sweep.png}. A cut sweep goes on where it was.
"""

import itertools
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes

from metrics import evaluation
from metrics.evaluation import MeasureConfig, SamplingConfig, Subject
from metrics.pictures import save_figure
from metrics.plots import plot_sweep
from metrics.report import HIGHER_IS_BETTER, Run, write_record
from metrics.tables import quality
from models import command
from models.artifacts import as_written, read_json
from models.checkpoint import locked
from models.command import InputError, run
from models.machine import pick_precision
from models.sampling import Plan, Schedule


@dataclass(frozen=True)
class SweepConfig(SamplingConfig):
    """Sample with every combination of settings, measure each, and the best one once more."""

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
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)

    def check(self) -> None:
        for name in ("cfg_scale", "temperature", "schedule"):
            if not getattr(self, name):
                raise InputError(f"expected --{name.replace('_', '-')} of one value or more")


def read_rows(file: Path, inputs: dict) -> list[dict]:
    """Return what a sweep has measured so far. Raises InputError if it was of other inputs."""
    if not file.exists():
        return []
    with as_written(file, "sweep", "delete it, or choose another --out"):
        record = read_json(file)
        if record["inputs"] != inputs:
            raise InputError(
                f"{file} is a sweep of another checkpoint, tokenizer or reference; delete it, or "
                "choose another --out"
            )
        return [dict(row) for row in record["rows"]]


def main(cfg: SweepConfig) -> dict:
    """Sweep, write after each combination, print; return what sweep.json holds."""
    subject = cfg.load()
    with locked(subject.out):  # a second sweep would lose the rows of the first
        return sweep(cfg, subject)


def sweep(cfg: SweepConfig, subject: Subject) -> dict:
    """Do what `main` says, in a folder that nobody else writes to."""
    settings = (cfg.schedule, cfg.temperature, cfg.decode_steps or (None,), cfg.cfg_scale)
    plans = [
        Plan(order=subject.order, schedule=s, temperature=t, decode_steps=n, cfg_scale=c)
        for s, t, n, c in itertools.product(*settings)
    ]
    for plan in plans:
        plan.groups(subject.model)  # refuses a number of steps that the method cannot take
    reference = cfg.against.load(subject.header["dataset"], subject.device)
    if reference is None or not reference.extractors:
        raise InputError("expected real images, and --inception-weights or --extractor")
    names = reference.names(cfg.num_samples)
    metric = cfg.metric or next((name for name in names if name.startswith("FID")), names[0])
    if metric not in names:
        raise InputError(f"expected --metric {', '.join(names)}, got {metric}")
    inputs, file = subject.inputs | reference.inputs, subject.out / "sweep.json"
    rows, sampler = read_rows(file, inputs), cache(lambda: cfg.sampler(subject))
    precision = pick_precision(cfg.precision, subject.device)

    def measured(plan: Plan, count: int, seed: int) -> dict:  # now or before
        key = {"plan": asdict(plan), "num_samples": count, "seed": seed, "precision": precision}
        for row in rows:
            if key.items() <= row.items():
                return row
        label_N = torch.arange(count) % subject.model.config.classes
        sample, began = sampler(), time.time()
        images_NHWC = evaluation.sample_images(sample, label_N, plan, seed, cfg.batch)
        key["network_calls"] = plan.calls(subject.model)
        key["images_per_second"] = count / (time.time() - began)
        rows.append(key | reference.report(images_NHWC, label_N.numpy()))
        write_record(file, {"rows": rows}, cfg, inputs)
        return rows[-1]

    swept = [measured(plan, cfg.num_samples, cfg.seed) for plan in tqdm(plans, "combinations")]
    sign = -1 if metric.startswith(HIGHER_IS_BETTER) else 1
    swept.sort(key=lambda row: sign * row["samples"][metric])
    best = swept[0]["plan"]
    final = measured(Plan(**best), cfg.final, cfg.seed + 1) if cfg.final else None
    numbers = {"rows": rows, "metric": metric, "best": best, "final": final}
    record = write_record(file, numbers, cfg, inputs)
    run = Run(subject.out.name, {"sweep": {"rows": swept}}, [])
    figure = plot_sweep([run], metric, ("cfg_scale", "decode_steps", "images_per_second"))
    save_figure(figure, file.with_suffix(".png"))
    for row in swept:
        plan = row["plan"]
        print(
            f"  {metric} {row['samples'][metric]:9.4f}  cfg {plan['cfg_scale']:g} "
            f"{plan['schedule']}, temperature {plan['temperature']:g}, "
            f"{plan['decode_steps'] or 'all'} steps, {row['images_per_second']:.1f} images/s"
        )
    if final:
        print(quality({"the best, fresh samples": Run(file.stem, {"metrics": final}, [])}))
    print(f"  -> {file}")
    return record


if __name__ == "__main__":
    run(main, SweepConfig)
