"""The parts of a report on several runs: tables, pictures, and the commands that made the numbers.

A part is there only if a run has something for it.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metrics.report_pictures import (
    curves_figure,
    orders_figure,
    reliability_figures,
    robustness_figures,
    speed_figure,
)
from metrics.report_runs import Run
from metrics.report_tables import (
    Table,
    calibration_table,
    differences_table,
    flat,
    likelihood_table,
    measured,
    quality_table,
    robustness_tables,
    runs_table,
)
from models.artifacts import ROOT
from models.gallery import command, pair, picture, png_file, table
from models.pictures import Picture

AGAINST_SPEED = ("FID", "FD_c10")
"""measures of samples to draw against speed: the first that all runs have"""


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[str] = ()
    """HTML, for the page only"""
    commands: Sequence[str] = ()
    """what made the numbers"""

    def html(self) -> str:
        """Return what the page shows under the title."""
        parts = [pair(self.figures)] if self.figures else []
        parts += [table(one.head, one.rows) for one in self.tables]
        return "".join([*parts, command("\n".join(self.commands))] if self.commands else parts)

    def markdown(self) -> str:
        """Return the title, the tables and the commands; "" for a part of pictures alone."""
        parts = [one.markdown() for one in self.tables]
        if self.commands:
            parts.append("```bash\n" + "\n".join(self.commands) + "\n```\n")
        return "\n".join([f"## {self.title}\n", *parts]) if parts else ""


def _drawn(figure: Picture, caption: str) -> str:
    """Return a picture as part of the page."""
    return picture(figure._repr_png_(150), "png", caption)


def training_command(run: Run) -> str:
    """Return the training that a run's config.json describes, as a command."""
    line = ["uv", "run", "train_c2i.py"]
    for name, value in flat(run.training["config"]).items():
        if value is not None:
            line += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(line).replace(f"{ROOT}/", "")


def _origins(runs: Sequence[Run], grids: dict[str, Path]) -> list[Section]:
    """Return what the runs are, how they differ, how they were trained, what they sample."""
    found = [Section("Runs", [runs_table(runs)])]
    differences = differences_table(runs)
    if differences.rows:
        found.append(Section("Config: the fields that differ", [differences]))
    trained = [run for run in runs if run.curve]
    if trained:
        caption = "Bits per code while training: faint of the batches, strong held out"
        commands = [training_command(run) for run in trained if run.training]
        curves = _drawn(curves_figure(trained), caption)
        found.append(Section("Training", figures=[curves], commands=commands))
    if grids:
        figures = [png_file(path, name) for name, path in grids.items()]
        found.append(Section("Samples, one class a row", figures=figures))
    return found


def _evaluations(runs: Sequence[Run]) -> list[Section]:
    """Return likelihood by order, and the quality of samples, also against speed."""
    found, commands = [], [run.metrics["command"] for run in runs]
    bits = likelihood_table(runs)
    if bits.rows:
        orders = _drawn(orders_figure(runs), "Bits per test image by order, with 95% intervals")
        found.append(Section("Likelihood by order", [bits], [orders], commands))
    sampled = [run for run in runs if run.metrics.get("samples")]
    if not sampled:
        return found
    timed = [run for run in sampled if "images_per_second" in run.metrics]
    shared = [n for n in AGAINST_SPEED if all(measured(run, n) is not None for run in timed)]
    figures = []
    for name in shared[:1] if len(timed) > 1 else []:
        devices = ", ".join(dict.fromkeys(run.metrics["device"] for run in timed))
        figures.append(_drawn(speed_figure(timed, name), f"{name} against speed ({devices})"))
    commands = [run.metrics["command"] for run in sampled]
    return [*found, Section("Quality of samples", [quality_table(sampled)], figures, commands)]


def _studies(runs: Sequence[Run]) -> list[Section]:
    """Return calibration and robustness."""
    found = []
    calibrated = [run for run in runs if run.calibration]
    if calibrated:
        caption = "Accuracy of predicted codes against confidence, {}"
        pictures = reliability_figures(calibrated).items()
        figures = [_drawn(figure, caption.format(name)) for name, figure in pictures]
        commands = [run.calibration["command"] for run in calibrated]
        found.append(Section("Calibration", [calibration_table(calibrated)], figures, commands))
    borne = [run for run in runs if run.robustness]
    if borne:
        figures = [_drawn(fig, caption) for caption, fig in robustness_figures(borne).items()]
        commands = [run.robustness["command"] for run in borne]
        found.append(Section("Robustness", robustness_tables(borne), figures, commands))
    return found


def sections(runs: Sequence[Run], grids: dict[str, Path]) -> list[Section]:
    """Return all parts; `grids` has the PNG of a run's samples by its name, where there is one."""
    return _origins(runs, grids) + _evaluations(runs) + _studies(runs)
