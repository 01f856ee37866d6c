"""Figures show the numbers of every run, one colour each, and stand beside their reference."""

from functools import partial

import numpy as np
import pytest

from metrics import plots
from metrics.pictures import gif, stacked_frames
from metrics.report import REPORTS, Run, read_reports

PAIR = [run for name, run in read_reports(REPORTS).items() if name.endswith("nano_perceptual")]


@pytest.mark.parametrize(
    "plot",
    [
        plots.plot_by_order, plots.plot_reliability,
        *(partial(plots.plot_robustness, picture=picture) for picture in plots.ROBUSTNESS),
        partial(plots.plot_curves, panels={"bits": ["heldout_bits"]}, ceiling=10.0),
    ],
)  # fmt: skip
def test_a_figure_has_a_colour_for_each_run(plot):
    for runs in (PAIR, PAIR[:1]):
        figure = plot(runs)
        drawn = [line.get_color() for axes in figure.axes for line in axes.lines]
        assert set(drawn) - {"black"} == {f"C{i}" for i in range(len(runs))}
        assert figure.get_figwidth() <= 5.2 and figure._repr_png_().startswith(b"\x89PNG")


def test_a_line_is_the_runs_own_numbers_with_its_interval():
    figure = plots.plot_robustness(PAIR, "context")
    rows = PAIR[1].at("robustness.context.uniform")
    line, band = figure.axes[0].lines[1], figure.axes[0].collections[1]
    assert list(line.get_xdata()) == [row["rho"] for row in rows]
    more = [row["more_bits_per_image"] for row in rows]
    assert list(line.get_ydata()) == [one["value"] for one in more]
    edge = band.get_paths()[0].vertices[:, 1]
    assert edge.max() == max(one["high"] for one in more)


def test_a_sweep_draws_the_best_at_each_value_and_single_runs_as_points():
    rows = [
        {"plan": {"decode_steps": steps, "cfg_scale": scale}, "samples": {"FD_c10": steps + scale}}
        for steps in (16, 64)
        for scale in (1, 2)
    ]
    one = Run("alone", {"metrics": {"samples": {"FD_c10": 3.0}, "network_calls": 19}}, [])
    figure = plots.plot_sweep([Run("swept", {"sweep": {"rows": rows}}, []), one], "FD_c10")
    swept, alone = figure.axes[0].lines
    assert list(swept.get_xdata()) == [16, 64] and list(swept.get_ydata()) == [17, 65]
    assert list(alone.get_xdata()) == [19] and list(alone.get_ydata()) == [3]


def test_a_trade_goes_along_guidance_at_all_network_calls():
    samples = {"precision_c10": 0.9, "recall_c10": 0.1}
    rows = [
        {"plan": {"decode_steps": steps, "cfg_scale": scale}, "samples": {**samples, x: scale}}
        for x, steps, scale in (("precision_c10", None, 4), ("recall_c10", None, 2), ("", 16, 3))
    ]
    calls = Run("over calls alone", {"sweep": {"rows": rows[2:]}}, [])
    (axes,) = plots.plot_trade([calls, Run("swept", {"sweep": {"rows": rows}}, [])]).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0.9, 4] and list(line.get_ydata()) == [2, 0.1]
    assert [text.get_text() for text in axes.texts] == [" 2", " 4"]


def test_animations_together_start_together_and_wait_for_each_other():
    short, long = ([np.full((4, 6, 3), k, np.uint8) for k in range(count)] for count in (2, 4))
    frames = stacked_frames({"short": short, "longer": long}, scale=4)
    assert [frame[-1, 0, 0] for frame in frames] == [0, 1, 2, 3]
    assert [frame[len(frame) // 2 - 1, 0, 0] for frame in frames] == [0, 1, 1, 1]
    assert gif(frames).startswith(b"GIF89a")
