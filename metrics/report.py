"""Measured runs: written, read from disk, kept small for git, their numbers as text.

A run is a folder of what measured it: metrics.json of eval_c2i.py, config.json and metrics.jsonl
(the curve) of its training, calibration.json of tools/calibrate.py, and so on: FILES. A file with a
`note` has it printed under every table that shows the file.
"""

import contextlib
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metrics.pictures import plot_class_grid, save_figure
from models import artifacts
from models.artifacts import ROOT, read_json, write_text
from models.command import InputError
from models.data import evenly

REPORTS = ROOT / "checkpoints/reports"
FILES = ("metrics", "calibration", "robustness", "sweep", "config", "tokenizer", "benchmark")
FILES += ("quickstart", "inpainting", "features", "tuning")
LEFT_OUT = {"bits_per_step", "risk_coverage"} | {
    f"{name}_bits_per_step" for name in ("difference", "entropy", "held_out")
}
"""long lists that no kept file holds"""
HIGHER_IS_BETTER = ("IS", "precision", "recall", "label_accuracy")
"""starts of the names of measures; of all others less is better"""
CURVE_ROWS = 300
"""rows of a kept curve, besides those with a likelihood"""
OUTSIDE = re.compile(r"(?<=[\"\s=])(?:/|\.\./)(?:[\w.+-]+/)*(?=[\w.+-])")
"""the folder of a path outside of the project"""
LARGEST = 300_000
"""bytes of a kept file"""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantile of Student's t, for the mean of 2, 3, .. 10 values; of more it is less"""


def write_record(path: Path, numbers: dict, config: Any, inputs: dict[str, str]) -> dict:
    """Write and return numbers, with the command, config, commit and hashes they come from."""
    record = numbers | {"command": artifacts.this_command(), "config": artifacts.plain(config)}
    record |= {"git_commit": artifacts.git_commit(), "inputs": inputs}
    write_text(path, json.dumps(record, indent=1) + "\n")
    return record


class Done:
    """The parts of a long evaluation as they come, on disk, so that a cut one goes on."""

    def __init__(self, file: Path, inputs: dict):
        """Take what `file` holds if it rests on the same `inputs`, else start afresh."""
        self.file, self.inputs, self.parts = file, inputs, {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = read_json(file)
            if saved["inputs"] == json.loads(json.dumps(inputs)):
                self.parts = dict(saved["parts"])

    def __call__(self, name: str, compute: Callable, *args: Any) -> Any:
        """Return compute(*args), which is JSON, computed now or before."""
        if name not in self.parts:
            self.parts[name] = compute(*args)
            write_text(self.file, json.dumps({"inputs": self.inputs, "parts": self.parts}))
        return self.parts[name]


def at_once(name: str, compute: Callable, *args: Any) -> Any:
    """Do as a `Done` that remembers nothing."""
    return compute(*args)


@dataclass(frozen=True)
class Run:
    """A folder of measurements: `files` holds each file's JSON by its name without .json."""

    name: str
    files: dict[str, Any]
    curve: list[dict]
    """rows of metrics.jsonl; empty without"""

    def at(self, path: str, optional: bool = False, **row: Any) -> Any:
        """Return a value, as `metrics.plan.cfg_scale`, or the row of a list in which `row` holds.

        Raises InputError naming the file without it, or returns None if it is `optional`.
        """
        value = self.files
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if row and isinstance(value, list):
            value = next((x for x in value if row.items() <= x.items()), None)
        if value is None and not optional:
            file, *keys = path.split(".")
            wanted = ".".join(keys) + "".join(f" of {k} {v}" for k, v in row.items())
            raise InputError(f"{self.name}/{file}.json has no {wanted}: measure it again")
        return value


Runs = dict[str, Run]
"""title of a column -> run"""


def read_run(folder: Path) -> Run:
    """Read a folder. Raises InputError if it holds no measurement, or a broken file."""
    files, curve = {}, []
    paths = [folder / f"{name}.json" for name in FILES] + [folder / "metrics.jsonl"]
    for path in (path for path in paths if path.is_file()):
        try:
            if path.suffix == ".jsonl":
                curve = [json.loads(line) for line in path.read_text().splitlines()]
            else:
                files[path.stem] = read_json(path)
        except (ValueError, RecursionError) as e:  # no JSON, no text, no object
            raise InputError(f"{path} is broken ({e}): measure it again, or remove it") from None
    if not files:
        raise InputError(f"no measurements in {folder}; run: uv run eval_c2i.py --out {folder}")
    return Run(folder.resolve().name, files, curve)


def read_reports(reports: Path = REPORTS) -> Runs:
    """Return all kept runs by name. Raises InputError if there are none."""
    runs = [read_run(path) for path in sorted(reports.glob("*")) if path.is_dir()]
    if not runs:
        raise InputError(f"no runs in {reports}; run: uv run tools/report.py --keep results/YOURS")
    return {run.name: run for run in runs}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, ending in a newline."""
    # Markdown would show a row with cells missing, its numbers under the wrong heads
    assert all(len(row) == len(head) for row in rows), (head, rows)
    lines = [head, ["---"] * len(head), *rows]
    cells = [[f" {cell}".rstrip().replace("|", "\\|") for cell in line] for line in lines]
    return "".join("|" + " |".join(line) + " |\n" for line in cells)


def show(value: Any, digits: int = 3, percent: bool = False) -> str:
    """Return a number as text, with its interval, standard error or deviation if it has one.

    `value` is a number, {value, low, high}, {mean, se} or {mean, sd}; None gives "".
    """
    scale, unit = (100, "%") if percent else (1, "")

    def text(x: float) -> str:
        return f"{scale * x:z,.{digits}f}"

    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return "" if value is None else text(value) + unit
    if "low" in value:
        return f"{text(value['value'])}{unit} [{text(value['low'])}, {text(value['high'])}]"
    return f"{text(value['mean'])} ± {text(value.get('sd', value.get('se')))}{unit}"


def interval(value: Any) -> dict[str, Any]:
    """Return {value, low, high}, 95%, of a number that may have an interval, an error or seeds."""
    if not isinstance(value, dict):
        return dict.fromkeys(("value", "low", "high"), value)
    if "low" in value:
        return {key: value[key] for key in ("value", "low", "high")}
    if "se" in value:
        half = 1.96 * value["se"]
    else:
        half = STUDENT[min(value["seeds"], 10) - 2] * value["sd"] / math.sqrt(value["seeds"])
    return {"value": value["mean"], "low": value["mean"] - half, "high": value["mean"] + half}


def digits(name: str) -> tuple[int, bool]:
    """Return the `digits` and `percent` of `show` for a measure of samples, by its name."""
    if name == "label_accuracy":
        return 1, True
    return {"KI": 4, "KD": 4, "IS": 2}.get(name[:2], 3), False


def real(row: dict, name: str) -> str:
    """Return a measure of real images in place of samples; of fewer, an FID has another name."""
    pairs = zip(row.get("samples", {}), row.get("control", {}).items(), strict=True)
    own, value = dict(pairs).get(name, (name, None))
    return show(value, *digits(name)) + f" ({own})" * (own != name)


def own_bits(run: Run) -> dict | None:
    """Return the bits of a test image in the order that the model was trained in, or ended in."""
    bits = run.at("metrics.bits_per_image")
    if order := run.at("metrics.own_order", True):
        return bits.get(order)
    # of before that was written
    return bits.get(run.at("metrics.trained_order")) or bits.get(run.at("metrics.plan.order"))


def below(runs: Runs, text: str, file: str) -> str:
    """Return what stands under a table: `text`, and the notes of the file that it shows."""
    notes = dict.fromkeys(run.at(f"{file}.note", True) for run in runs.values())
    parts = [part for part in (text, *(f"**Note:** {n}." for n in notes if n)) if part]
    return "".join(f"\n{part}\n" for part in parts)


def shared(runs: Runs, path: str) -> Any:
    """Return a value that all runs have. Raises InputError if one differs: no table for them."""
    values = {run.name: run.at(path, optional=True) for run in runs.values()}
    if len({json.dumps(value) for value in values.values()}) > 1:
        raise InputError(f"runs of one table differ in {path}: {values}")
    return next(iter(values.values()))


def names(runs: Runs, path: str) -> list[str]:
    """Return the keys that runs have at a path, each once, in the order in which they come."""
    return list(dict.fromkeys(key for run in runs.values() for key in run.at(path, True) or {}))


def _short(value: Any) -> Any:
    """Return parsed JSON with 6 significant digits and without the lists of LEFT_OUT."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def keep_run(folder: Path, reports: Path, training: Path | None = None) -> dict[str, int]:
    """Copy a run's numbers to `kept`/<its name>; return the bytes of each file.

    config.json and the curve may lie in the run folder `training`. Floats are rounded, the lists of
    LEFT_OUT dropped, long curves thinned, and folders outside of the project lose their path.
    Raises InputError, before anything is written, if a file would be too large for git.
    """
    run = read_run(folder)
    if training and training.exists():
        trained = read_run(training)
        run = Run(run.name, trained.files | run.files, run.curve or trained.curve)
    texts = {}
    for name, content in run.files.items():  # a line for each key, so that git shows what changed
        lines = (f"{json.dumps(key)}: {json.dumps(item)}" for key, item in _short(content).items())
        texts[f"{name}.json"] = "{\n" + ",\n".join(lines) + "\n}\n"
    others = [i for i, row in enumerate(run.curve) if "heldout_bits" not in row]
    some = {others[k] for k in evenly(len(others), CURVE_ROWS)} if others else set()
    rows = [row for i, row in enumerate(run.curve) if i in some or "heldout_bits" in row]
    if rows:
        texts["metrics.jsonl"] = "".join(json.dumps(_short(row)) + "\n" for row in rows)
    for name, text in texts.items():
        texts[name] = text = OUTSIDE.sub("", text.replace(f"{ROOT}/", ""))
        if len(text) > LARGEST:
            raise InputError(f"{name} of {folder} takes {len(text):,} bytes: nothing was kept")
    for name, text in texts.items():
        write_text(reports / run.name / name, text)
    return {name: len(text) for name, text in texts.items()}


LARGEST_SAMPLES = 4 << 30
"""bytes of an .npz, unpacked: more than a million images"""


def write_samples(out: Path, images_NHWC: np.ndarray, label_N: np.ndarray, classes: list) -> None:
    """Write samples.npz (arr_0 uint8 NHWC, arr_1 labels: ADM's convention) and samples.png."""
    packed = io.BytesIO()
    np.savez(packed, arr_0=images_NHWC, arr_1=label_N)
    artifacts.replace_file(out / "samples.npz", lambda file: file.write(packed.getbuffer()))
    figure = plot_class_grid(images_NHWC, label_N, classes, most=10)
    save_figure(figure, out / "samples.png", dpi=150)


def read_samples(
    path: Path, size: int | None, classes: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (images uint8 (N, size, size, 3), labels int64 (N,) or None) of an .npz.

    Without a size they are of any. Raises InputError unless arr_0 is such an array, and arr_1, if
    there, labels in 0..classes-1.
    """
    fix = "give an .npz as eval_c2i.py writes it"
    artifacts.expect_file(path, "samples", fix)
    with artifacts.as_written(path, "samples with an arr_0", fix), np.load(path) as packed:
        if sum(member.file_size for member in packed.zip.infolist()) > LARGEST_SAMPLES:
            raise ValueError(f"unpacked, it is of more than {LARGEST_SAMPLES} bytes")
        if damaged := packed.zip.testzip():  # numpy reads what the header says, and no checksum
            raise ValueError(f"{damaged} is not what was written")
        images_NHWC, label_N = packed["arr_0"], packed.get("arr_1")
        size = size or images_NHWC.shape[1]
    if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (size, size, 3):
        raise InputError(
            f"{path}: expected arr_0 uint8 (N, {size}, {size}, 3), "
            f"found {images_NHWC.dtype} {images_NHWC.shape}"
        )
    if label_N is None:
        return images_NHWC, None
    integers = np.issubdtype(label_N.dtype, np.integer) and label_N.shape == images_NHWC.shape[:1]
    if not integers or not ((label_N >= 0) & (label_N < classes)).all():
        raise InputError(
            f"{path}: expected arr_1 to hold {len(images_NHWC)} labels in 0..{classes - 1}, "
            f"found {label_N.dtype} {label_N.shape}"
        )
    return images_NHWC, label_N.astype(np.int64)
