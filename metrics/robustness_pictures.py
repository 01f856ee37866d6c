"""What tools/robustness.py shows: four panels against severity and rho, and a short table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.pictures import Picture, save_figure


def _curve(axes: Any, rows: Sequence[dict], x: str, name: str, label: str, **style: Any) -> None:
    """Draw the measure `name` of the rows, if any, against their `x`, its interval shaded."""
    if not rows:
        return
    at = [row[x] for row in rows]
    value, low, high = (
        np.array([row[name][key] for row in rows]) for key in ("value", "low", "high")
    )
    (line,) = axes.plot(at, value, marker="o", markersize=4, label=label, **style)
    axes.fill_between(at, low, high, alpha=0.2, color=line.get_color(), lw=0)


def _draw_images(axes: Any, rows: Sequence[dict]) -> None:
    """Draw bits, and on the right class accuracy, against severity."""
    _curve(axes, rows, "severity", "bits_per_image", "bits")
    axes.set(xlabel="severity", ylabel="bits per image")
    right = axes.twinx()
    right.spines.right.set_visible(True)
    style = {"color": "C1", "linestyle": "--"}
    _curve(right, rows, "severity", "class_accuracy", "class accuracy", **style)
    right.set(ylabel="class accuracy by Bayes", ylim=(0, 1))
    lines = [*axes.lines, *right.lines]
    axes.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=8)


def robustness_figure(found: dict) -> Picture:
    """Draw what robustness.json holds: images, calibration, context and samples."""
    rows, source = found["corruptions"]["by_severity"], found["corruptions"]["source"]
    figure = Picture(figsize=(9, 7))
    (images, calibration), (context, samples) = figure.subplots(2, 2)
    _draw_images(images, rows)
    images.set_title(f"corrupted images ({source.split(',')[0]})", fontsize=10)
    _curve(calibration, rows, "severity", "ece_equal_width", "codes")
    _curve(calibration, rows, "severity", "class_ece", "class by Bayes", color="C1", linestyle="--")
    calibration.set(xlabel="severity", ylabel="ECE")
    calibration.set_title("calibration on them", fontsize=10)
    for kind, kind_rows in found["context"].items():
        _curve(context, kind_rows, "rho", "more_bits_per_image", kind)
    context.set(xlabel="rho, codes replaced in the context", ylabel="more bits per image")
    context.set_title("corrupted context", fontsize=10)
    _curve(samples, found["sampling"], "rho", "label_accuracy", "samples")
    samples.set(xlabel="rho, own codes misread", ylabel="label accuracy", ylim=(0, 1))
    guidance = f"guidance {found['config']['cfg']:g}"
    samples.set_title(f"{found['num_samples']} samples, {guidance}", fontsize=10)
    for axes in (axes for axes in (calibration, context) if axes.lines):
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    return figure


def draw(found: dict, out: Path) -> None:
    """Write robustness.png of what robustness.json holds."""
    save_figure(robustness_figure(found), out / "robustness.png")


COLUMNS = {
    "bits": "bits_per_image",
    "ECE": "ece_equal_width",
    "gap": "overconfidence_gap",
    "class": "class_accuracy",
    "class ECE": "class_ece",
    "PSNR": "psnr",
}
"""heading -> measure of images to print"""


def table(found: dict) -> list[str]:
    """Return the lines to print of what robustness.json holds; FD goes by its ruler's name."""
    images, samples = found["corruptions"]["by_severity"], found["sampling"]
    distance = [name for name in (images or samples or [{}])[0] if name.startswith("FD_")]
    lines = []
    if images:
        heads = ("severity", *COLUMNS, *distance)
        lines += [found["corruptions"]["source"], _line(*heads)]
    for row in images:
        values = [*(row[name]["value"] for name in COLUMNS.values()), row[distance[0]]]
        lines.append(_line(row["severity"], *values))
    lines.append("more bits with a share rho of the context replaced")
    lines.append(_line("rho", "uniform", "neighbour"))
    for rows in zip(found["context"]["uniform"], found["context"]["neighbours"], strict=True):
        values = [row["more_bits_per_image"]["value"] for row in rows]
        lines.append(_line(f"{rows[0]['rho']:g}", *values))
    if samples:
        lines += ["samples that misread a share rho", _line("rho", "label acc", *distance)]
    for row in samples:
        values = row["label_accuracy"]["value"], row[distance[0]]
        lines.append(_line(f"{row['rho']:g}", *values))
    return lines


def _line(*cells: str | int | float) -> str:
    """Return cells as one line of columns, numbers with three decimals."""
    return "".join(f"{x:10.3f}" if isinstance(x, float) else f"{x:>10}" for x in cells)
