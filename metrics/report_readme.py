"""The parts of README.md that are made from the kept runs: tables between two comments.

`<!-- report:NAME -->` and `<!-- /report -->`, each alone on its line, hold the block NAME; what
stood between them is replaced, and nothing else.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metrics.report_runs import PRODUCERS, Run, kept_folders, read_run, read_runs
from metrics.report_tables import (
    CONTROL,
    Table,
    measured,
    names_of,
    number,
    orders_of,
    quality_number,
    shared_control,
)
from models.errors import InputError
from models.methods import METHODS

FIRST = {
    "raster order": "randar_raster_nano_cifar10",
    "random order": "randar_random_nano_cifar10",
}
"""the pair of all blocks but methods, by the title of its column"""
MARKER = re.compile(r"^<!-- (?:report:(?P<name>\w+)|/report) -->[ \t\r]*$", re.MULTILINE)
OWN = ("FD_c10", "IS_c10", "label_accuracy")
"""the offline ruler's measures in the README; all of Inception's are shown"""


def _part(run: Run, kept: Path, file: str) -> Any:
    """Return a run's calibration, robustness, training or curve. Raises InputError without it."""
    attribute = {"config.json": "training", "metrics.jsonl": "curve"}.get(file, Path(file).stem)
    found = getattr(run, attribute)
    if not found:
        raise InputError(
            f"README.md needs {kept / run.name / file}, and it is not there; run {PRODUCERS[file]},"
            f" then: uv run tools/report.py --keep results/{run.name}"
        )
    return found


def _needed(run: Run, kept: Path, file: str, path: str) -> dict:
    """Return what a run's file holds at a dotted path. Raises InputError without it."""
    found = _part(run, kept, file)
    for key in path.split("."):
        if key not in found:
            raise InputError(f"README.md needs {path} in {kept / run.name / file}; it is not there")
        found = found[key]
    return found


def _alike(runs: Sequence[Run], *fields: str) -> list[Any]:
    """Return the values of fields of metrics.json. Raises InputError if runs differ in one."""
    for field in fields:
        found = {run.name: run.metrics.get(field) for run in runs}
        if len(set(map(str, found.values()))) > 1:
            said = ", ".join(f"{value} ({name})" for name, value in found.items())
            raise InputError(f"README.md compares runs of one {field}, got {said}")
    return [runs[0].metrics.get(field) for field in fields]


def _control(runs: Sequence[Run]) -> dict[str, float]:
    """Return the measures of real images that the runs share."""
    shared = shared_control(runs)
    if shared is None:
        names = ", ".join(run.name for run in runs)
        raise InputError(f"README.md compares runs with one control; those of {names} differ")
    return shared


def _spreads(runs: Sequence[Run]) -> str:
    """Return what ± means beside likelihoods and samples."""
    seeds = {len(run.metrics["seeds"]) for run in runs if "over_seeds" in run.metrics}
    said = [f"of samples: sd over {count} sampling seeds" for count in seeds]
    if any("bits_per_image" in run.metrics for run in runs):
        said.insert(0, "of bits: standard error over test images")
    return f"± {'; '.join(said)}."


def first_run(kept: Path) -> str:
    """Return likelihood and quality in raster and in random order."""
    return _quality(read_runs([kept / name for name in FIRST.values()]))


def seeds(kept: Path) -> str:
    """Return quality over several sampling seeds, of the runs kept as <name>_seeds."""
    return _quality(read_runs([kept / f"{name}_seeds" for name in FIRST.values()]))


def _quality(runs: Sequence[Run]) -> str:
    """Return what is known of a pair of runs: likelihood by order, samples, and the control."""
    count, *_ = _alike(runs, "num_samples", "reference_images", "seeds")
    control = _control(runs)
    rows = []
    for name, title in sorted(orders_of(runs).items(), key=lambda item: item[0] != "raster"):
        bits = [run.metrics.get("bits_per_image", {}).get(name) for run in runs]
        rows.append([f"bits per test image, read in {title}", *(number(b, 1) for b in bits), ""])
    names = names_of(run.metrics.get("samples", {}) for run in runs)
    inception = [name for name in names if not name.endswith("_c10") and name not in OWN]
    for name in [*(name for name in OWN if name in names), *inception]:
        cells = [quality_number(name, measured(run, name)) for run in runs]
        rows.append([name, *cells, quality_number(name, control.get(name))])
    table = Table([f"measured on {count:,} samples", *FIRST, CONTROL], rows)
    return f"{table.markdown()}\n{_spreads(runs)}\n"


def _method_row(run: Run, kept: Path) -> list[str]:
    """Return a run's row of the block `methods`."""
    known = ("method", "trained_order", "parameters", "network_calls", "images_per_second")
    needed = (_needed(run, kept, "metrics.json", key) for key in (*known, "plan", "cluster_weight"))
    method, trained, parameters, calls, speed, plan, cluster = needed
    bits = _needed(run, kept, "metrics.json", "bits_per_image")
    own = trained if trained in bits else plan["order"]
    return [
        method,
        trained,
        f"{cluster:g}" if cluster else "no",
        f"{parameters:,}",
        number(_needed(run, kept, "metrics.json", f"bits_per_image.{own}"), 1),
        number(bits["random"], 1) if bits.get("random", {}).get("orders") == 8 else "",
        f"{plan['cfg']:g}",
        *(quality_number(name, measured(run, name)) for name in ("label_accuracy", "FD_c10")),
        str(calls),
        number(speed, 1),
    ]


def methods(kept: Path) -> str:
    """Return one row for each run whose name begins with five_, in the order of METHODS."""
    runs = [read_run(path) for path in kept_folders(kept) if path.name.startswith("five_")]
    if not runs:
        raise InputError(f"README.md needs runs called five_... in {kept}; there are none")
    method = {run.name: _needed(run, kept, "metrics.json", "method") for run in runs}
    runs.sort(key=lambda run: [*METHODS, method[run.name]].index(method[run.name]))
    count, reference, device, _ = _alike(runs, "num_samples", "reference_images", "device", "seeds")
    control = _control(runs)
    real = [quality_number(name, control.get(name)) for name in ("label_accuracy", "FD_c10")]
    table = Table(
        ["method", "order", "cluster term", "parameters", "bits per test image, own order"]
        + ["mean of 8 random orders", "guidance", "label_accuracy", "FD_c10", "network calls"]
        + ["images/s"],
        [*(_method_row(run, kept) for run in runs), [CONTROL, *[""] * 6, *real, "", ""]],
    )
    return (
        f"{table.markdown()}\n{count:,} samples each, against {reference or 0:,} train images; "
        f"images/s on {device}. {_spreads(runs)}\n"
    )


CALIBRATION = {
    "token NLL, bits": ("tokens.overall.nll_bits", 3),
    "top-label ECE": ("tokens.overall.ece_equal_width", 4),
    "ECE by chance alone": ("tokens.overall.ece_equal_width_if_calibrated", 4),
}
AFTER_BUCKETS = {
    "best temperature": ("tokens.temperature.temperature", 3),
    "NLL it gains, bits per image": ("tokens.temperature.gain_bits_per_image", 2),
    "{} random orders together gain, bits per image": ("orders.ensemble.random.gain", 1),
    "class accuracy by Bayes": ("classes.before.accuracy", 1),
    "class ECE by Bayes": ("classes.before.ece_equal_width", 3),
    "entropy - NLL, bits per image": ("entropy.difference_bits_per_image", 1),
}
"""rows of the block `calibration` before and after ECE by step: where the number is, its digits"""


def calibration(kept: Path) -> str:
    """Return calibration in raster and in random order, every number with its interval."""
    runs = read_runs([kept / name for name in FIRST.values()])
    file = "calibration.json"
    found = [_part(run, kept, file) for run in runs]
    buckets = {
        f"ECE, {name}": (f"tokens.by_step.{name}.ece_equal_width", 4)
        for name in found[0]["tokens"]["by_step"]
    }
    counts = [str(_needed(run, kept, file, "orders.ensemble.random.orders")) for run in runs]
    together = " and ".join(dict.fromkeys(counts))
    rows = []
    for title, (path, digits) in (CALIBRATION | buckets | AFTER_BUCKETS).items():
        values = [_needed(run, kept, file, path) for run in runs]
        percent = title == "class accuracy by Bayes"
        rows.append([title.format(together), *(number(v, digits, percent) for v in values)])
    images = " and ".join(dict.fromkeys(f"{one['images']:,}" for one in found))
    table = Table([f"measured on {images} test images", *FIRST], rows)
    return f"{table.markdown()}\nIn brackets: 95% interval over images.\n"


def robustness(kept: Path) -> str:
    """Return what corrupted images and wrong codes cost in raster and in random order."""
    runs = read_runs([kept / name for name in FIRST.values()])
    found = [_part(run, kept, "robustness.json") for run in runs]
    parts = {
        "bits_per_image": ("bits per image", 1, False),
        "ece_equal_width": ("ECE", 4, False),
        "class_accuracy": ("class accuracy", 1, True),
    }
    both = [{row["severity"]: row for row in one["corruptions"]["by_severity"]} for one in found]
    rows = [
        [str(severity)]
        + [
            number(one.get(severity, {}).get(key), *how)
            for key, (_, *how) in parts.items()
            for one in both
        ]
        for severity in sorted(names_of(both))
    ]
    titles = [f"{title}, {order}" for title, *_ in parts.values() for order in FIRST]
    corrupted = Table(["severity", *titles], rows)
    kinds = names_of(one["context"] for one in found)
    more = [
        {row["rho"]: row["more_bits_per_image"] for row in one["context"].get(kind, [])}
        for kind in kinds
        for one in found
    ]
    titles = [f"{kind}, {order}" for kind in kinds for order in FIRST]
    rows = [
        [f"{rho:g}", *(number(one.get(rho), 1) for one in more)] for rho in sorted(names_of(more))
    ]
    replaced = Table(["rho: share of codes replaced; more bits per image", *titles], rows)
    images = " and ".join(dict.fromkeys(f"{one['images']:,}" for one in found))
    return (
        f"{corrupted.markdown()}\n{replaced.markdown()}\n"
        f"{images} test images; in brackets: 95% interval over images.\n"
    )


BLOCKS = {
    "first_run": first_run,
    "seeds": seeds,
    "methods": methods,
    "calibration": calibration,
    "robustness": robustness,
}


def regenerate(text: str, kept: Path) -> tuple[str, list[str]]:
    """Return README.md with its blocks made anew from the kept runs, and their names.

    Raises InputError for an unknown block, one that is not closed, none at all, or one whose runs
    or files are not kept.
    """
    markers = list(MARKER.finditer(text))
    opened = [marker["name"] for marker in markers]
    if not markers or None in opened[::2] or any(opened[1::2]) or len(opened) % 2:
        raise InputError(
            "expected README.md to hold <!-- report:NAME --> and <!-- /report --> by turns, each "
            f"alone on its line, got {[m.group().strip() for m in markers] or 'none'}"
        )
    unknown = sorted(set(opened[::2]) - set(BLOCKS))
    if unknown:
        raise InputError(f"expected blocks of {', '.join(BLOCKS)}, got {', '.join(unknown)}")
    parts, end = [], 0
    for first, last in zip(markers[::2], markers[1::2], strict=True):
        parts += [text[end : first.end()], "\n", BLOCKS[first["name"]](kept)]
        end = last.start()
    return "".join(parts) + text[end:], opened[::2]
