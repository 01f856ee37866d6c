"""What tools/calibrate.py shows: pictures of reliability, orders and samples, and a short table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from models.pictures import Picture, save_figure


def _band(axes: Any, x: Sequence, found: dict, label: str, **style: Any) -> None:
    """Draw an estimate of a list against x, its interval shaded."""
    (line,) = axes.plot(x, found["value"], label=label, **style)
    axes.fill_between(x, found["low"], found["high"], alpha=0.2, color=line.get_color(), lw=0)


def _bars(found: dict) -> np.ndarray:
    """Return how far an interval reaches below and above its value, (2, N), for errorbar."""
    value, low, high = (np.array(found[key]) for key in ("value", "low", "high"))
    return np.maximum([value - low, high - value], 0)  # an ECE's interval may lie beside it


def draw_reliability(axes: Any, diagram: dict, **style: Any) -> None:
    """Draw accuracy against confidence, with the diagonal of a calibrated predictor."""
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axes.errorbar(
        diagram["confidence"]["value"],
        diagram["accuracy"]["value"],
        yerr=_bars(diagram["accuracy"]),
        marker="o",
        markersize=4,
        capsize=2,
        **style,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")


def reliability_figure(reports: dict[str, dict]) -> Picture:
    """Draw one reliability diagram per report, by name, over the counts of its bins."""
    figure = Picture(figsize=(3.4 * len(reports), 4.6))
    rows = figure.subplots(2, len(reports), squeeze=False, sharex="col", height_ratios=(3, 1))
    for column, (name, report) in enumerate(reports.items()):
        diagram, (top, bottom) = report["reliability"], rows[:, column]
        draw_reliability(top, diagram)
        error = report["ece_equal_width"]
        top.set_title(
            f"{name}\nECE {error['value']:.4f} [{error['low']:.4f}, {error['high']:.4f}]",
            fontsize=10,
        )
        bottom.bar(diagram["confidence"]["value"], diagram["count"], width=0.04)
        bottom.set(yscale="log", xlabel="confidence", ylabel="tokens")
        bottom.yaxis.set_minor_formatter(NullFormatter())
        top.tick_params(labelbottom=True)
    figure.tight_layout()
    return figure


def orders_figure(found: dict, ceiling: float) -> Picture:
    """Draw bits per image by order, random ones and ensembles too, and bits per code by step.

    `ceiling` is log2 V, the bits of a code under a uniform model.
    """
    rows = dict(found["bits_per_image"])
    for group, both in found.get("ensemble", {}).items():
        rows |= {f"ensemble of {both['orders']} ({group})": both["log_mean_exp"]}
    figure = Picture(figsize=(11, max(3.2, 0.24 * len(rows))))
    left, right = figure.subplots(1, 2)
    for y, (name, row) in enumerate(rows.items()):
        colour = "C1" if name.startswith("ensemble") else "C0"
        left.errorbar(row["value"], y, xerr=_bars(row)[:, None], fmt="o", color=colour, capsize=2)
    left.set_yticks(range(len(rows)), rows, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("bits per image")
    curves = {k: v for k, v in found["bits_per_step"].items() if not k.startswith("random_")}
    for i, (name, curve) in enumerate(curves.items()):
        style = {"linestyle": "-" if i < 10 else "--", "linewidth": 1.0}
        right.plot(range(len(curve["value"])), curve["value"], label=name, **style)
    right.axhline(ceiling, color="black", linewidth=0.8, linestyle=":", label="uniform")
    right.set(xlabel="step", ylabel="bits per code")
    right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def _draw_risk(axes: Any, quality: dict[str, dict]) -> None:
    """Draw risk against coverage for each kind of confidence, and the risk of all samples."""
    for name, report in quality.items():
        curve = report["risk_coverage"]
        coverage = np.arange(1, len(curve) + 1) / len(curve)
        axes.plot(coverage, curve, label=f"{name}, AURC {report['aurc']['value']:.3f}")
    axes.axhline(report["risk"]["value"], color="black", linewidth=0.8, linestyle="--")
    axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="coverage, most confident first", ylabel="1 - label probability", ylim=(0, 1))


def samples_figure(entropy: dict, classes: dict, quality: dict[str, dict]) -> Picture:
    """Draw entropy against held-out NLL by step, classes' reliability, and risk-coverage.

    `quality` holds a report for each kind of confidence, and is empty without a judge.
    """
    panels = 3 if quality else 2
    figure = Picture(figsize=(4.4 * panels, 3.8))
    steps, names, *risk = figure.subplots(1, panels)
    count = range(len(entropy["entropy_bits_per_step"]["value"]))
    _band(steps, count, entropy["entropy_bits_per_step"], "entropy on own samples")
    _band(steps, count, entropy["held_out_bits_per_step"], "held-out NLL")
    steps.set(xlabel="step", ylabel="bits per code")
    steps.legend(frameon=False, fontsize=8)
    for when in ("before", "after"):
        error = classes[when]["ece_equal_width"]["value"]
        label = f"{when} temperature, ECE {error:.3f}"
        draw_reliability(names, classes[when]["reliability"], label=label)
    names.set(xlabel="p(class | image)")
    names.legend(frameon=False, fontsize=8)
    if quality:
        _draw_risk(risk[0], quality)
    figure.tight_layout()
    return figure


def draw_all(found: dict, ceiling: float, out: Path) -> None:
    """Write the three pictures of what calibration.json holds; `ceiling` is log2 V."""
    reports = {"all steps": found["tokens"]["overall"], **found["tokens"]["by_step"]}
    save_figure(reliability_figure(reports), out / "reliability.png")
    save_figure(orders_figure(found["orders"], ceiling), out / "orders.png")
    figure = samples_figure(found["entropy"], found["classes"], found["quality"])
    save_figure(figure, out / "samples_calibration.png")


def summary(found: dict) -> dict[str, dict]:
    """Return the numbers to print, by the name to print, of what calibration.json holds."""
    tokens, classes = found["tokens"], found["classes"]
    rows = {
        f"code {name}": tokens["overall"][name]
        for name in ("accuracy", "overconfidence_gap", "ece_equal_width", "ece_equal_mass")
    }
    rows["ECE by chance alone"] = tokens["overall"]["ece_equal_width_if_calibrated"]
    rows["best temperature"] = tokens["temperature"]["temperature"]
    rows["its gain, bits/image"] = tokens["temperature"]["gain_bits_per_image"]
    drawn = {k: v for k, v in found["orders"]["bits_per_image"].items() if "random_" not in k}
    rows |= {f"bits/image, {name}": row for name, row in drawn.items()}
    for group, both in found["orders"].get("ensemble", {}).items():
        rows |= {f"bits/image, {both['orders']} orders ({group})": both["log_mean_exp"]}
    rows["class accuracy by Bayes"] = classes["before"]["accuracy"]
    rows["class ECE"] = classes["before"]["ece_equal_width"]
    rows["class ECE, scaled"] = classes["after"]["ece_equal_width"]
    rows["entropy - NLL, bits/image"] = found["entropy"]["difference_bits_per_image"]
    for name, quality in found["quality"].items():
        rows[f"Spearman of {name}"] = quality["spearman"]
    return rows
