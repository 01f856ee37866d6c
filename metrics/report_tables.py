"""Tables of runs side by side: numbers as text, with their intervals, in HTML or in Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from metrics.calibration_pictures import summary
from metrics.report_runs import Run

CONTROL = "real test images"


@dataclass(frozen=True)
class Table:
    """Text in rows; every row has as many cells as the head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown, ending in a newline."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        cells = [[f" {cell}".rstrip().replace("|", "\\|") for cell in line] for line in lines]
        return "".join("|" + " |".join(line) + " |\n" for line in cells)


def number(value: Any, digits: int, percent: bool = False) -> str:
    """Return a number as text: with its interval, its standard error or deviation if it has one.

    `value` is a number, an estimate {value, low, high}, {mean, se} or {mean, sd}; None gives "".
    """
    if value is None:
        return ""
    scale, unit = (100, "%") if percent else (1, "")

    def text(x: float) -> str:
        return f"{scale * x:z.{digits}f}"

    if not isinstance(value, dict):
        return text(value) + unit
    if "low" in value:
        return f"{text(value['value'])}{unit} [{text(value['low'])}, {text(value['high'])}]"
    return f"{text(value['mean'])} ± {text(value['sd'] if 'sd' in value else value['se'])}{unit}"


def quality_number(name: str, value: Any) -> str:
    """Return a measure of samples with the digits that its name asks for."""
    if name == "label_accuracy":
        return number(value, 1, percent=True)
    return number(value, {"KI": 4, "KD": 4, "IS": 2}.get(name[:2], 3))


def measured(run: Run, name: str) -> Any:
    """Return a measure of the samples: over seeds if it was sampled with several, else of one."""
    return run.metrics.get("over_seeds", {}).get(name, run.metrics.get("samples", {}).get(name))


def names_of(dicts: Iterable[dict]) -> list[str]:
    """Return the keys of all dicts, each once, in the order in which they come."""
    return list(dict.fromkeys(key for one in dicts for key in one))


def shared_control(runs: Sequence[Run]) -> dict[str, float] | None:
    """Return the same measures of real images, None if the runs' differ as they are shown."""
    found = {}
    for run in runs:
        for name, value in run.metrics.get("control", {}).items():
            if quality_number(name, found.setdefault(name, value)) != quality_number(name, value):
                return None
    return found


def orders_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return what each key of the runs' `bits_per_image` means: in one order, or in several."""
    bits = [run.metrics.get("bits_per_image", {}) for run in runs]
    found = {}
    for name in names_of(bits):
        counts = {one[name].get("orders", 1) for one in bits if name in one}
        several = f"{' or '.join(map(str, sorted(counts)))} {name} orders (mean)"
        found[name] = f"{name} order" if counts == {1} else several
    return found


def runs_table(runs: Sequence[Run]) -> Table:
    """Return what each run is; samples of another project have no method."""
    titles = {
        "method": "method",
        "trained_order": "trained in",
        "parameters": "parameters",
        "train_steps": "steps",
        "order": "sampled in",
        "cfg": "guidance",
        "device": "device",
    }
    rows = []
    for run in runs:
        about = run.metrics | run.metrics.get("plan", {})
        cells = [f"{value:,}" if isinstance(value, int) else _field(value)
                 for value in (about.get(key, "") for key in titles)]  # fmt: skip
        rows.append([run.name, *cells, about["git_commit"][:8]])
    return Table(["run", *titles.values(), "commit"], rows)


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """Return a config with dots in the names of what was nested."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def differences_table(runs: Sequence[Run]) -> Table:
    """Return the fields of training and evaluation in which the runs that know them differ."""
    configs = []
    for run in runs:
        evaluation = flat(run.metrics["config"] | run.metrics.get("plan", {}), "evaluation: ")
        training = flat(run.training["config"], "training: ") if run.training else {}
        configs.append({key: _field(value) for key, value in (training | evaluation).items()})
    rows = [[name, *(config.get(name, "") for config in configs)] for name in names_of(configs)]
    rows = [row for row in rows if len({cell for cell in row[1:] if cell}) > 1]
    return Table(["", *(run.name for run in runs)], rows)


def _field(value: Any) -> str:
    """Return the value of a config's field as text."""
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def likelihood_table(runs: Sequence[Run]) -> Table:
    """Return bits per test image by order, then what models without a network need."""
    without = names_of(run.metrics.get("baseline_bits", {}) for run in runs)
    parts = {
        "bits_per_image": orders_of(runs),
        "baseline_bits": {name: f"without a network: {name}" for name in without},
    }
    rows = [
        [title, *(number(run.metrics.get(part, {}).get(name), 1) for run in runs)]
        for part, titles in parts.items()
        for name, title in titles.items()
    ]
    return Table(["bits per test image", *(run.name for run in runs)], rows)


def quality_table(runs: Sequence[Run]) -> Table:
    """Return the measures of samples, beside those of real images: one control if all share it."""
    shared = shared_control(runs)
    if shared is None:
        controls = {f"{CONTROL}, as for {run.name}": run.metrics.get("control", {}) for run in runs}
    else:
        controls = {CONTROL: shared}
    head = ["", *(run.name for run in runs), *controls]
    blank = [""] * len(controls)

    def row(name: str, show) -> list[str]:
        return [name, *(show(run.metrics) for run in runs), *blank]

    rows = [
        row("samples", lambda m: f"{m['num_samples']:,}"),
        row("sampling seeds", lambda m: ", ".join(map(str, m.get("seeds", [m.get("seed", "")])))),
        row("guidance", lambda m: _field(m.get("plan", {}).get("cfg", ""))),
        row("reference images", lambda m: f"{m.get('reference_images', 0):,}"),
    ]
    for name in names_of(run.metrics.get("samples", {}) for run in runs):
        cells = [quality_number(name, measured(run, name)) for run in runs]
        real = [quality_number(name, control.get(name)) for control in controls.values()]
        rows.append([name, *cells, *real])
    rows.append(row("images per second", lambda m: number(m.get("images_per_second"), 1)))
    return Table(head, rows)


def calibration_table(runs: Sequence[Run]) -> Table:
    """Return what tools/calibrate.py prints, for the runs that have it."""
    found = [summary(run.calibration) for run in runs]
    images = [f"{run.calibration['images']:,}" for run in runs]
    rows = [["test images", *images]]
    for name in names_of(found):
        digits = 2 if "bits" in name else 4
        rows.append([name, *(number(one.get(name), digits) for one in found)])
    return Table(["", *(run.name for run in runs)], rows)


SEVERITY = {
    "bits_per_image": ("bits per image", 1, False),
    "ece_equal_width": ("ECE", 4, False),
    "overconfidence_gap": ("overconfidence", 4, False),
    "class_accuracy": ("class accuracy", 1, True),
    "class_ece": ("class ECE", 3, False),
    "psnr": ("PSNR, dB", 2, False),
}
"""measures of corrupted images: title, digits, percent"""
CONTEXT = {
    "more_bits_per_image": ("more bits per image", 1, False),
    "accuracy": ("code accuracy", 1, True),
    "ece_equal_width": ("ECE", 4, False),
    "overconfidence_gap": ("overconfidence", 4, False),
}
"""measures of codes read in a wrong context"""
DISTANCE = "FD_c10"
"""of what codes decode to, and of samples, by the offline classifier"""


def _cells(row: dict, measures: dict[str, tuple[str, int, bool]]) -> list[str]:
    return [number(row.get(key), *how) for key, (_, *how) in measures.items()]


def robustness_tables(runs: Sequence[Run]) -> list[Table]:
    """Return tables by severity, by corruption at its worst, by wrong codes read and sampled."""
    severity, corruption, context, sampling = [], [], [], []
    for run in runs:
        found = run.robustness
        for row in found["corruptions"]["by_severity"]:
            cells = [*_cells(row, SEVERITY), _distance(row)]
            severity.append([run.name, str(row["severity"]), *cells])
        for kind, rows in found["corruptions"]["by_corruption"].items():
            corruption += [[f"{kind}, {run.name}", *_cells(row, SEVERITY)] for row in rows[-1:]]
        for kind, rows in found["context"].items():
            name = f"{run.name}, {kind}"
            context += [[name, f"{row['rho']:g}", *_cells(row, CONTEXT)] for row in rows]
        for row in found["sampling"]:
            accuracy = quality_number("label_accuracy", row.get("label_accuracy"))
            sampling.append([run.name, f"{row['rho']:g}", accuracy, _distance(row)])
    titles = [title for title, *_ in SEVERITY.values()]
    tables = [
        Table(["corrupted images", "severity", *titles, DISTANCE], severity),
        Table(["at the highest severity", *titles], sorted(corruption)),
        Table(["codes replaced", "rho", *(title for title, *_ in CONTEXT.values())], context),
        Table(["while sampling", "rho", "label_accuracy", DISTANCE], sampling),
    ]
    return [table for table in tables if table.rows]


def _distance(row: dict) -> str:
    return number(row.get(DISTANCE), 3)
