"""Figures show the numbers of every run, one colour each, and stand beside their reference."""

import numpy as np
import pytest

from metrics import plots
from metrics.pictures import gif, plot_orders, stacked_frames
from metrics.report import KEPT, Run, read_kept
from models.orders import SCANS, scan

PAIR = [run for name, run in read_kept(KEPT).items() if name.endswith("nano_cifar10")]


@pytest.mark.parametrize(
    "plot",
    [
        plots.plot_by_order, plots.plot_reliability, plots.plot_corruptions, plots.plot_context,
        plots.plot_misread, lambda runs: plots.plot_curves(runs, {"bits": ["heldout_bits"]}, 10.0),
    ],
)  # fmt: skip
def test_a_figure_has_a_colour_for_each_run_and_a_name(plot):
    for runs in (PAIR, PAIR[:1]):
        figure = plot(runs)
        drawn = [line.get_color() for axes in figure.axes for line in axes.lines]
        assert set(drawn) - {"black"} == {f"C{i}" for i in range(len(runs))}
        if len(runs) > 1:
            (legend,) = figure.legends
            names = [text.get_text() for text in legend.get_texts()]
            assert [n.startswith(r.name) for n, r in zip(names, runs, strict=True)] == [True] * 2
        assert any(axes.get_title() for axes in figure.axes) or len(runs) == 1
        assert figure.get_figwidth() <= 5.2 and figure._repr_png_().startswith(b"\x89PNG")


def test_a_training_without_a_log_is_said_to_be_unmeasured():
    (text,) = plots.plot_curves([Run("copied", {}, [])], {"loss": ["loss"]}).axes[0].texts
    assert "not measured" in text.get_text()


def test_a_line_is_the_runs_own_numbers_with_its_interval():
    figure = plots.plot_context(PAIR)
    rows = PAIR[1].at("robustness.context.uniform")
    line, band = figure.axes[0].lines[1], figure.axes[0].collections[1]
    assert list(line.get_xdata()) == [row["rho"] for row in rows]
    more = [row["more_bits_per_image"] for row in rows]
    assert list(line.get_ydata()) == [one["value"] for one in more]
    edge = band.get_paths()[0].vertices[:, 1]
    assert edge.max() == max(one["high"] for one in more)


@pytest.mark.parametrize(
    ("value", "ends"),
    [
        (2.0, (2, 2, 2)),
        ({"value": 2, "low": 1, "high": 4}, (2, 1, 4)),
        ({"mean": 2, "se": 0.5}, (2, 2 - 0.98, 2 + 0.98)),
        ({"mean": 2, "sd": 0.5}, (2, 1.5, 2.5)),
    ],
)
def test_an_interval_has_its_ends(value, ends):
    assert plots.ends(value) == pytest.approx(ends)


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


def test_orders_are_drawn_as_ranks():
    drawn = plot_orders({name: scan(name, 4).numpy() for name in SCANS[:5]}, 4).axes
    assert [axes.get_title() for axes in drawn] == [*SCANS[:5], "", "", ""]
    for name, axes in zip(SCANS[:5], drawn, strict=False):
        (image,) = axes.images
        assert (image.get_array() == scan(name, 4).argsort().view(4, 4).numpy()).all()


def test_animations_together_start_together_and_wait_for_each_other():
    short, long = ([np.full((4, 6, 3), k, np.uint8) for k in range(count)] for count in (2, 4))
    frames = stacked_frames({"short": short, "longer": long}, scale=4)
    title = 5 + 2 * 12  # each takes two lines of 24 pixels
    assert [frame.shape for frame in frames] == [(2 * (title + 16), 24, 3)] * 4
    assert [frame[title, 0, 0] for frame in frames] == [0, 1, 1, 1]
    assert [frame[-1, 0, 0] for frame in frames] == [0, 1, 2, 3]
    assert gif(frames).startswith(b"GIF89a")
