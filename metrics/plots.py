"""Figures of measured runs: each takes a list of runs, one colour a run; one run is a list of one.

Each is as wide as half a screen, so its text is readable; a run without its numbers is left out.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metrics.pictures import blank, plot_class_grid, reference, save_figure, show_image
from metrics.report import HIGHER_IS_BETTER, Run, interval, show
from models.method import Method
from models.sampling import Plan, sample_codes
from models.tokenizer import Tokenizer, decode_codes
from models.training import write_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def columns(values: Any) -> np.ndarray:
    """Return (values, lows, highs) of a list of numbers, or of one estimate of a list."""
    values = [interval(one) for one in ([values] if isinstance(values, dict) else values)]
    ends = [[one[key] for one in values] for key in ("value", "low", "high")]
    return np.array(ends, float).reshape(3, -1)


def draw_line(axes: Any, x: Sequence[float], values: Any, **style: Any) -> None:
    """Draw values against x, their intervals shaded."""
    value, low, high = columns(values)
    (line,) = axes.plot(x, value, **style)
    axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), lw=0)


def draw_points(axes: Any, x: Any, y: Any, along: str = "y", **style: Any) -> None:
    """Draw points with bars for the intervals of their x or their y."""
    value, low, high = columns(y if along == "y" else x)
    bars = np.maximum([value - low, high - value], 0)  # the interval of an ECE may lie beside it
    x, y = (x, value) if along == "y" else (value, y)
    axes.errorbar(x, y, **{f"{along}err": bars}, fmt="o", ms=4, capsize=2, lw=1, **style)


def titled(figure: "Figure", axes: Any, title: str) -> "Figure":
    """Put a title on the first panel and the names of its lines above; return the figure."""
    axes.set_title(title, fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    if names:
        style = {"frameon": False, "fontsize": 9, "ncols": 2 if max(map(len, names)) < 26 else 1}
        figure.legend(handles, names, loc="outside upper left", **style)
        return figure
    empty, axes = blank(5.2, 0.5)
    axes.axis("off")
    axes.text(0, 0.5, "not measured for these runs", va="center", color="grey")
    return empty


def stacked(count: int, height: float = 2.0, **more: Any) -> tuple["Figure", list[Any]]:
    """Return a figure of panels one above the other."""
    figure, axes = blank(5.2, max(3.4, 0.9 + height * count), count, 1, squeeze=False, **more)
    return figure, list(axes.flat)


def with_part(runs: Sequence[Run], path: str) -> list[tuple[str, Run]]:
    """Return the runs that have something at a path, each with its colour in all figures."""
    return [(f"C{i}", run) for i, run in enumerate(runs) if run.at(path, optional=True)]


def plot_curves(
    runs: Sequence[Run], panels: dict[str, Sequence[str]], ceiling: float | None = None
) -> "Figure":
    """Draw `panels` (y label -> keys of the log) against the step, `ceiling` in the first.

    One run has a colour for each key; of several each has a colour, and its first key is faint.
    """
    figure, every = stacked(len(panels), sharex=True)
    one = len(runs) == 1
    for axes, (label, keys) in zip(every, panels.items(), strict=True):
        for i, run in enumerate(runs):
            for k, key in enumerate(keys):
                points = [(row["step"], row[key]) for row in run.curve if row.get(key) is not None]
                last = k == len(keys) - 1
                style = {"color": f"C{k if one else i}", "alpha": 1 if one or last else 0.3}
                style |= {"marker": "." if len(points) < 40 else None}
                style |= {"label": key if one else run.name if last else None}
                if points:
                    axes.plot(*zip(*points, strict=True), **style)
        axes.set_ylabel(label)
        if one and len(keys) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=9)
    if ceiling:
        reference(every[0], ceiling, f"a uniform guess: {ceiling:g} bits")
    every[-1].set_xlabel("training step")
    if one and runs[0].curve:
        return figure
    return titled(figure, every[0], "Training; faint: of the batches, strong: held out")


def plot_by_order(runs: Sequence[Run]) -> "Figure":
    """Draw bits per test image by the order it is read in; random orders share a line."""
    paths = ("calibration.orders.bits_per_image", "metrics.bits_per_image")
    bits = [next(filter(None, (run.at(path, True) for path in paths)), {}) for run in runs]
    drawn = [{k: "random orders" if k.startswith("random_") else k for k in one} for one in bits]
    rows = list(dict.fromkeys(row for one in drawn for row in one.values()))
    figure, axes = blank(5.2, 1.4 + 0.28 * len(rows))
    for i, (run, one) in enumerate(zip(runs, bits, strict=True)):
        shift = (i - (len(runs) - 1) / 2) * 0.5 / len(runs)  # else runs hide one another
        if one:
            y = [rows.index(drawn[i][name]) + shift for name in one]
            draw_points(axes, list(one.values()), y, "x", color=f"C{i}", label=run.name)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set_xlabel("bits per test image, 95% intervals")
    return titled(figure, axes, "Likelihood by the order an image is read in")


def plot_steps(runs: Sequence[Run], ceiling: float | None = None) -> "Figure":
    """Draw bits per code by step: of test images, and the entropy along own samples (dashed)."""
    figure, axes = blank()
    for colour, run in with_part(runs, "calibration.entropy.held_out_bits_per_step"):
        for kind, style in (("held_out", {"label": run.name}), ("entropy", {"ls": "--"})):
            curve = run.at(f"calibration.entropy.{kind}_bits_per_step")
            draw_line(axes, range(len(curve["value"])), curve, color=colour, **style)
    if ceiling:
        reference(axes, ceiling, f"a uniform guess: {ceiling:g} bits")
    axes.set(xlabel="step of decoding", ylabel="bits per code")
    return titled(figure, axes, "Test images; dashed: entropy along own samples")


def plot_reliability(runs: Sequence[Run], part: str = "tokens.overall") -> "Figure":
    """Draw accuracy against confidence where the predictions are, circles by their number."""
    (figure, axes), most = blank(5.2, 4.4), 0.0
    for colour, run in with_part(runs, f"calibration.{part}.reliability"):
        diagram = run.at(f"calibration.{part}.reliability")
        share = np.array(diagram["count"]) / sum(diagram["count"])
        filled = share > 0.01  # the axes end where the predictions do
        x = np.array(diagram["confidence"]["value"])[filled]
        y, low, high = columns(diagram["accuracy"])[:, filled]
        most = max(most, x.max(), high.max())
        draw_points(axes, x, {"value": y, "low": low, "high": high}, color=colour, alpha=0.8)
        axes.plot(x, y, color=colour, lw=1, alpha=0.6)
        name = f"{run.name}: ECE {show(run.at(f'calibration.{part}.ece_equal_width'), 4)}"
        axes.scatter(x, y, s=4 + 300 * share[filled], color=colour, alpha=0.4, lw=0, label=name)
    axes.axline((0, 0), slope=1, color="black", lw=0.8, ls="--")
    limit = min(1.02, 1.05 * most) or 1.0
    axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="confidence", ylabel="accuracy")
    return titled(figure, axes, "Reliability; circles by the number of predictions")


def plot_risk(runs: Sequence[Run]) -> "Figure":
    """Draw how wrong the most confident samples are: risk against coverage, of each confidence."""
    figure, axes = blank()
    for colour, run in with_part(runs, "calibration.quality"):
        kinds = run.at("calibration.quality").items()
        for (name, measured), dashes in zip(kinds, "-:", strict=False):
            curve = measured.get("risk_coverage", [])
            coverage = np.arange(1, len(curve) + 1) / max(1, len(curve))
            axes.plot(coverage, curve, dashes, color=colour, label=f"{run.name}, {name}")
    axes.set(xlabel="coverage, most confident first", ylabel="1 - p(label)", ylim=(0, 1))
    return titled(figure, axes, "Does confidence in a sample tell its quality?")


ROBUSTNESS = {
    "corruptions": ("corruptions.by_severity", "Corrupted test images", "severity",
        {"bits per image": "bits_per_image", "ECE of codes": "ece_equal_width",
         "class accuracy by Bayes": "class_accuracy"}),
    "context": ("context.uniform", "Codes of test images replaced by any others",
        "share of the codes replaced",
        {"more bits per image": "more_bits_per_image", "ECE of codes": "ece_equal_width"}),
    "misread": ("sampling", "Samples made of misread codes", "share of its own codes misread",
        {"label accuracy": "label_accuracy", "FD of samples": "FD_"}),
}  # fmt: skip
"""picture -> rows of robustness.json, title, what x is, {y label: start of its key}"""


def plot_robustness(runs: Sequence[Run], picture: str) -> "Figure":
    """Draw a picture of ROBUSTNESS: its measures against the first key of its rows."""
    rows_at, title, xlabel, measures = ROBUSTNESS[picture]
    figure, every = stacked(len(measures), sharex=True)
    for axes, (label, start) in zip(every, measures.items(), strict=True):
        for colour, run in with_part(runs, f"robustness.{rows_at}"):
            rows = run.at(f"robustness.{rows_at}")
            x = [next(iter(row.values())) for row in rows]
            values = [next(v for k, v in row.items() if k.startswith(start)) for row in rows]
            draw_line(axes, x, values, color=colour, marker=".", label=run.name)
        axes.set_ylabel(label)
    every[-1].set_xlabel(xlabel)
    return titled(figure, every[0], title)


def plot_sweep(
    runs: Sequence[Run], measure: str, against: Sequence[str] = ("decode_steps",)
) -> "Figure":
    """Draw a measure of a sweep's samples against settings of its plans or `images_per_second`.

    The best row at each value is drawn; a run without a sweep is the point of its metrics.json.
    """
    labels = {"cfg_scale": "guidance scale", "decode_steps": "network calls"}
    best = max if measure.startswith(HIGHER_IS_BETTER) else min
    figure, every = stacked(len(against), 2.6)
    for axes, key in zip(every, against, strict=True):
        for i, run in enumerate(runs):
            points: dict[float, list[float]] = {}
            for row in run.at("sweep.rows", True) or []:
                x = (row | row["plan"])[key]
                x = row.get("network_calls", 64) if x is None else x  # the method's own number
                points.setdefault(x, []).append(row["samples"][measure])
            value = run.at(f"metrics.samples.{measure}", True)
            if not points and value is not None and key == "decode_steps":
                points = {run.at("metrics.network_calls", True) or 64: [value]}
            xs = sorted(points)
            axes.plot(xs, [best(points[x]) for x in xs], "o-", color=f"C{i}", label=run.name)
        axes.set(xlabel=labels.get(key, "images per second"), ylabel=measure)
        axes.set_xlim(left=0)
    return titled(figure, every[0], f"{measure} of samples; the best setting at each value")


def plot_trade(runs: Sequence[Run]) -> "Figure":
    """Draw a sweep's recall against its precision, a point for each guidance scale."""
    figure, axes = blank()
    for colour, run in with_part(runs, "sweep.rows"):
        rows = sorted(run.at("sweep.rows"), key=lambda row: row["plan"]["cfg_scale"])
        rows = [row for row in rows if row["plan"]["decode_steps"] is None]
        if not rows:  # of a sweep over network calls
            continue
        of = {name[:6]: name for name in reversed(rows[0]["samples"])}  # by the first extractor
        x, y = of["precis"], of["recall"]
        points = [(row["samples"][x], row["samples"][y]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=run.name)
        for row, point in zip(rows, points, strict=True):
            axes.annotate(f" {row['plan']['cfg_scale']:g}", point, fontsize=8)
    axes.set(xlabel="precision", ylabel="recall")
    return titled(figure, axes, "What guidance (the number at each point) gives and takes")


def plot_tuning(runs: Sequence[Run]) -> "Figure":
    """Draw the held-out bits of a tuning's trials against each setting; those cut are pale."""
    tuned = with_part(runs, "tuning.trials")
    settings = tuned[0][1].at("tuning.best.settings")
    figure, every = stacked(len(settings), 2.2)
    for axes, key in zip(every, settings, strict=True):
        for colour, run in tuned:
            rows = [row for row in run.at("tuning.trials") if row["bits"] is not None]
            colours = [(colour, 0.3 if row["pruned"] else 1) for row in rows]
            x = [row["settings"][key] for row in rows]
            axes.scatter(x, [row["bits"] for row in rows], c=colours, label=run.name)
            axes.set(xlabel=key, ylabel="bits a code", xscale="log" if min(x) > 0 else "linear")
    return titled(figure, every[0], "Trials of a tuning; pale: cut before their end")


PANELS = {
    "bits per code": ["train_bits", "heldout_bits", "test_bits", "cluster_bits"],
    "learning rate": ["lr"],
    "images per second": ["images_per_second"],
}
"""of the curves of a training"""


def show_progress(
    out: Path, rows: list, model: Method, tokenizer: Tokenizer | None, classes: list, order: str
) -> None:
    """Write metrics.jsonl, curves.png and, with a tokenizer, samples/<step>.png (cfg 1 -> 2)."""
    write_log(out / "metrics.jsonl", rows)
    save_figure(plot_curves([Run(out.name, {}, rows)], PANELS), out / "curves.png")
    if tokenizer is None:
        return
    model.eval()
    label_N = torch.arange(len(classes)).repeat_interleave(8)
    codes_NT = sample_codes(model, label_N, Plan(order=order, cfg_scale=2.0), seed=0)
    grid = plot_class_grid(decode_codes(tokenizer, codes_NT), label_N.numpy(), classes)
    save_figure(grid, out / f"samples/{rows[-1]['step']:07d}.png")


def plot_surprise(images: dict[str, np.ndarray], log_p_T: torch.Tensor) -> "Figure":
    """Draw images, by title, and how many bits each of their cells takes given all the others."""
    bits_hw = (-log_p_T / np.log(2)).unflatten(0, (math.isqrt(len(log_p_T)), -1)).cpu()
    figure, axes = blank(2.2 * (len(images) + 1.2), 2.3, 1, len(images) + 1)
    for one, (title, image_HWC) in zip(axes[:-1], images.items(), strict=True):
        show_image(one, image_HWC)
        one.set_title(title, fontsize=10)
    show_image(axes[-1], bits_hw)
    axes[-1].set_title("bits of each cell", fontsize=10)
    figure.colorbar(axes[-1].images[0], ax=axes[-1], shrink=0.8)
    return figure
