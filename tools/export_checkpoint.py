#!/usr/bin/env -S uv run
"""Make a run small enough to ship: averaged weights in half precision, no training state."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models import command
from models.artifacts import ROOT, as_written, read_json
from models.checkpoint import load_generator, renewed, save_generator
from models.command import InputError, run
from models.sampling import Plan
from models.training import parameters


@dataclass(frozen=True)
class ExportConfig(command.Config):
    """Write checkpoints/<run>.pth from a run's last.pth."""

    checkpoint: Path
    """last.pth of a run"""
    sampling: Path | None = None
    """metrics.json of eval_c2i.py: how it sampled becomes the default for this file"""
    out: command.OutFile | None = None
    """default checkpoints/<name of the run>.pth"""


def sampling_of(path: Path, method: str) -> dict:
    """Return how samples were made, where not by default. Raises InputError if it is not said."""
    with as_written(path, "record of samples", "give a metrics.json of eval_c2i.py"):
        metrics, usual = read_json(path), asdict(Plan())
        plan, sampled = asdict(Plan(**renewed(metrics["plan"]))), metrics["method"]
    if sampled != method:
        raise InputError(f"expected samples of {method} in {path}, found those of {sampled}")
    # a default of today that is written down would outlive it
    return {k: v for k, v in plan.items() if v != usual[k] or k in ("order", "cfg_scale")}


def main(cfg: ExportConfig) -> Path:
    """Write the file; what eval_c2i.py measures on it is what it is worth."""
    generator = load_generator(cfg.checkpoint)
    head = {key: value for key, value in generator.header.items() if key != "sha256"}
    if cfg.sampling:
        head |= {"sampling": sampling_of(cfg.sampling, head["method"])}
    out = cfg.out or ROOT / f"checkpoints/{cfg.checkpoint.resolve().parent.name}.pth"
    state = generator.model.half().state_dict()
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise InputError(f"the weights of {cfg.checkpoint} are too large for half precision")
    save_generator(out, head, generator.model)
    count = parameters(generator.model)
    print(f"wrote {out}: {count:,} parameters, {out.stat().st_size / 1e6:.1f} MB")
    return out


if __name__ == "__main__":
    run(main, ExportConfig)
