"""The pictures of tools/report.py: several runs in each, one colour a run.

Each is one panel of the width of a telephone's screen, so that its text stays readable there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metrics.calibration_pictures import reliability_figure
from metrics.orders_likelihood import RANDOM
from metrics.report_runs import Run
from metrics.report_tables import DISTANCE, measured, names_of
from models.pictures import Picture

CORRUPTED, CONTEXT = "Corrupted test images", "Wrong codes in the context"


def _panel(height: float = 3.6) -> tuple[Picture, Any]:
    figure = Picture(figsize=(5.2, height))
    return figure, figure.subplots()


def _name_runs(axes: Any) -> None:
    """Put the names of the runs above the panel, where they hide nothing."""
    names = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, names), default=0) < 24 else 1
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _with_ends(value: Any) -> tuple[float, float, float]:
    """Return value, low, high of a number that may have an interval or a standard error."""
    if not isinstance(value, dict):
        return value, value, value
    if "low" in value:
        return value["value"], value["low"], value["high"]
    half = 1.96 * value["se"]
    return value["mean"], value["mean"] - half, value["mean"] + half


def _draw(axes: Any, rows: Sequence[dict], x: str, y: str, **style: Any) -> None:
    """Draw a measure of rows against another, its intervals shaded."""
    rows = [row for row in rows if row.get(y) is not None]
    if not rows:
        return
    points = np.array([(row[x], *_with_ends(row[y])) for row in rows]).reshape(-1, 4).T
    axes.plot(points[0], points[1], marker=".", **style)
    axes.fill_between(points[0], points[2], points[3], alpha=0.2, lw=0, color=style["color"])


def curves_figure(runs: Sequence[Run]) -> Picture:
    """Draw bits per code over the steps of training: faint of its batches, strong held out."""
    figure, axes = _panel()
    for i, run in enumerate(runs):
        label = run.name
        for key, style in (("heldout_bits", {"marker": "."}), ("train_bits", {"alpha": 0.35})):
            points = [(row["step"], row[key]) for row in run.curve if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, **style)
                label = None
    axes.set(xlabel="step", ylabel="bits per code")
    _name_runs(axes)
    return figure


def orders_figure(runs: Sequence[Run]) -> Picture:
    """Draw bits per test image by order, with 95% intervals; random orders share a line."""
    bits = [
        run.calibration["orders"]["bits_per_image"]
        if run.calibration
        else run.metrics.get("bits_per_image", {})
        for run in runs
    ]
    lines = names_of(dict.fromkeys(map(_line, one)) for one in bits)
    figure, axes = _panel(1.2 + 0.28 * len(lines))
    for i, (run, one) in enumerate(zip(runs, bits, strict=True)):
        shift = (i - (len(runs) - 1) / 2) * 0.5 / len(runs)  # else runs hide one another
        points = [
            (lines.index(_line(name)) + shift, *_with_ends(value)) for name, value in one.items()
        ]
        if points:
            y, value, low, high = np.array(points).T
            bars = np.maximum([value - low, high - value], 0)
            axes.errorbar(value, y, xerr=bars, fmt="o", ms=4, capsize=2, color=f"C{i}",
                          label=run.name)  # fmt: skip
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bits per test image")
    _name_runs(axes)
    return figure


def _line(order: str) -> str:
    """Return on which line of `orders_figure` an order is drawn."""
    drawn = order.startswith(RANDOM) and order.removeprefix(RANDOM).isdecimal()
    return "each random order" if drawn else order


def speed_figure(runs: Sequence[Run], measure: str) -> Picture:
    """Draw a measure of the samples against how fast they were made."""
    figure, axes = _panel()
    for i, run in enumerate(runs):
        value = measured(run, measure)
        quality = value["mean"] if isinstance(value, dict) else value
        sd = value["sd"] if isinstance(value, dict) else None
        axes.errorbar(run.metrics["images_per_second"], quality, yerr=sd, fmt="o", capsize=2,
                      color=f"C{i}", label=run.name)  # fmt: skip
    axes.set(xlabel="images per second", ylabel=measure)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _name_runs(axes)
    return figure


def reliability_figures(runs: Sequence[Run]) -> dict[str, Picture]:
    """Draw each run's reliability over all predicted codes, by the name of the run."""
    return {
        run.name: reliability_figure({run.name: run.calibration["tokens"]["overall"]})
        for run in runs
    }


def robustness_figures(runs: Sequence[Run]) -> dict[str, Picture]:
    """Draw what corrupted images, wrong codes read and wrong codes sampled cost, by caption."""
    found = {}
    for key, label in (
        ("bits_per_image", "bits per image"),
        ("ece_equal_width", "ECE"),
        ("class_accuracy", "class accuracy"),
    ):
        figure, axes = _panel()
        for i, run in enumerate(runs):
            rows = run.robustness["corruptions"]["by_severity"]
            _draw(axes, rows, "severity", key, color=f"C{i}", label=run.name)
        axes.set(xlabel="severity of corruption", ylabel=label)
        found[f"{CORRUPTED}: {label}"] = figure
    figure, axes = _panel()
    for i, run in enumerate(runs):
        for (kind, rows), dashes in zip(
            run.robustness["context"].items(), ("-", "--"), strict=False
        ):
            style = {"color": f"C{i}", "linestyle": dashes, "label": f"{run.name}, {kind}"}
            _draw(axes, rows, "rho", "more_bits_per_image", **style)
    axes.set(xlabel="rho, share of codes replaced", ylabel="more bits per image")
    found[CONTEXT] = figure
    for key in ("label_accuracy", DISTANCE):
        figure, axes = _panel()
        for i, run in enumerate(runs):
            _draw(axes, run.robustness["sampling"], "rho", key, color=f"C{i}", label=run.name)
        axes.set(xlabel="rho, share of codes replaced while sampling", ylabel=key)
        found[f"Wrong codes while sampling: {key}"] = figure
    found = {caption: figure for caption, figure in found.items() if figure.axes[0].lines}
    for figure in found.values():
        _name_runs(figure.axes[0])
    return found


def overview(runs: Sequence[Run]) -> list[Picture]:
    """Return the pictures of the README, those that the runs have: orders, contexts, corruption."""
    found = robustness_figures([run for run in runs if run.robustness])
    captions = [CONTEXT, f"{CORRUPTED}: ECE", f"{CORRUPTED}: class accuracy"]
    return [orders_figure(runs), *(found[caption] for caption in captions if caption in found)]
