#!/usr/bin/env -S uv run
"""Make a run small enough to ship: averaged weights in half precision, no training state."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from models.artifacts import ROOT
from models.errors import one_line_errors
from models.methods import load_generator, parameters, save_generator


@dataclass(frozen=True)
class ExportConfig:
    """Write checkpoints/<run>.pth from a run's last.pth."""

    checkpoint: Path
    """last.pth of a run"""
    out: Path | None = None
    """default checkpoints/<name of the run>.pth"""


def main(cfg: ExportConfig) -> Path:
    """Write the file; what eval_c2i.py measures on it is what it is worth."""
    generator = load_generator(cfg.checkpoint)
    head = {key: value for key, value in generator.header.items() if key != "sha256"}
    out = cfg.out or ROOT / f"checkpoints/{cfg.checkpoint.parent.name}.pth"
    save_generator(out, head, generator.model.half())
    count = parameters(generator.model)
    print(f"wrote {out}: {count:,} parameters, {out.stat().st_size / 1e6:.1f} MB")
    return out


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(ExportConfig))
