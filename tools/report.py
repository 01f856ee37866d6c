#!/usr/bin/env -S uv run
"""Runs side by side: one page and one Markdown file; and the README's tables.

uv run tools/report.py [RUNS ...]         RUNS, or the kept runs -> results/report/
uv run tools/report.py --keep RUNS ...    numbers of RUNS -> checkpoints/reports/<run>/, for git
uv run tools/report.py --readme           checkpoints/reports/ -> the marked parts of README.md,
                                          checkpoints/report.png

A run is a folder that eval_c2i.py wrote, results/<run>. What tools/calibrate.py and
tools/robustness.py wrote beside it is shown too, and the training in checkpoints/runs/<run>.
--keep also takes what tools/measure_tokenizer.py, benchmark.py and quickstart.py write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from metrics.kept_numbers import pair
from metrics.report_pictures import overview
from metrics.report_readme import regenerate
from metrics.report_runs import (
    LEFT_OUT,
    Run,
    keep_run,
    kept_folders,
    other_checkpoints,
    read_runs,
    read_single,
    single_file,
)
from metrics.report_sections import sections
from models.artifacts import ROOT, replace_file, write_text
from models.errors import InputError, one_line_errors
from models.gallery import page
from models.pictures import side_by_side


@dataclass(frozen=True)
class ReportConfig:
    """Show runs side by side; keep their numbers for git; make the README's tables of those."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders results/<run>; default: the kept runs"""
    keep: bool = False
    """copy the numbers of RUNS to --kept; no page"""
    readme: bool = False
    """make the parts of README.md between report comments from the kept runs; no page"""
    kept: Path = ROOT / "checkpoints/reports"
    """the kept runs"""
    trainings: Path = ROOT / "checkpoints/runs"
    """where config and curve of a training are, if not in the folder of the run"""
    out: Path = ROOT / "results/report"
    """index.html and report.md go here"""

    def check(self) -> None:
        """Raise InputError for options that do not go together."""
        if self.keep and not self.runs:
            raise InputError("--keep needs RUNS: uv run tools/report.py --keep results/YOURS")
        if self.readme and self.runs and not self.keep:
            raise InputError("--readme reads the kept runs; to keep RUNS before, add --keep")


def checked(folders: Sequence[Path], trainings: Path) -> list[Run]:
    """Return the runs; print a note where the numbers of one are of two files."""
    runs = read_runs(folders, trainings)
    for line in (line for run in runs for line in other_checkpoints(run)):
        print(line)
    return runs


def keep(cfg: ReportConfig) -> None:
    """Copy the numbers of the runs; say how large they are and what was dropped."""
    singles = {folder: single_file(folder) for folder in cfg.runs}
    # all or none: a broken one stops before the first is kept
    checked([folder for folder, name in singles.items() if not name], cfg.trainings)
    for folder, name in singles.items():
        if name:
            read_single(folder, name)
    for folder in cfg.runs:
        sizes = keep_run(folder, cfg.kept, cfg.trainings)
        said = ", ".join(f"{name} {size / 1000:.1f} kB" for name, size in sizes.items())
        print(f"kept {folder.resolve().name}: {said}")
    print(f"  in {cfg.kept}, with 6 digits and without {', '.join(sorted(LEFT_OUT))}")


def remake_readme(path: Path, kept: Path) -> None:
    """Make the marked parts of README.md anew, the rest byte for byte as it is; and its picture."""
    text, names = regenerate(path.read_bytes().decode(), kept)
    picture = side_by_side(overview(pair(kept)))
    write_text(path, text)
    replace_file(kept.parent / "report.png", lambda file: picture.save(file, "png"))
    print(f"remade {', '.join(names)} in {path}, and {kept.parent / 'report.png'}")


def find_grids(runs: Sequence[Run], folders: Sequence[Path], shipped: Path) -> dict[str, Path]:
    """Return the PNG of each run's samples: beside its numbers, or beside its shipped weights."""
    found = {}
    for run, folder in zip(runs, folders, strict=True):
        for path in (folder / "samples.png", shipped / f"{run.name}.png"):
            if path.exists():
                found.setdefault(run.name, path)
    return found


def main(cfg: ReportConfig) -> Path | None:
    """Keep, remake the README, or write page and Markdown and return the page's path."""
    cfg.check()
    if cfg.keep:
        keep(cfg)
    if cfg.readme:
        remake_readme(ROOT / "README.md", cfg.kept)
    if cfg.keep or cfg.readme:
        return None
    folders = cfg.runs or kept_folders(cfg.kept)
    runs = checked(folders, cfg.trainings)
    parts = sections(runs, find_grids(runs, folders, cfg.kept.parent))
    title = "Runs side by side"
    introduction = f"Runs shown: {len(runs)}. Under the numbers are the commands that made them."
    content = page(title, introduction, {part.title: part.html() for part in parts})
    write_text(cfg.out / "index.html", content)
    text = "\n".join([f"# {title}\n", *filter(None, (part.markdown() for part in parts))])
    write_text(cfg.out / "report.md", text)
    print(
        f"runs shown: {len(runs)}; open {cfg.out / 'index.html'}; as text {cfg.out / 'report.md'}"
    )
    return cfg.out / "index.html"


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(ReportConfig))
