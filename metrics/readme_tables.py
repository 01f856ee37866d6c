"""The tables of README.md, each a function of the folder of kept runs."""

from collections.abc import Sequence
from pathlib import Path

from metrics.kept_numbers import FIRST, alike, needed, pair, part_of
from metrics.report_runs import Run, kept_folders, read_run, read_runs, read_single
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

FD, ACCURACY = "FD_c10", "label_accuracy"
OWN = (FD, "IS_c10", ACCURACY)
"""the offline ruler's measures in the README; all of Inception's are shown"""


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
    return _quality(pair(kept))


def seeds(kept: Path) -> str:
    """Return quality over several sampling seeds, of the runs kept as <name>_seeds."""
    return _quality(read_runs([kept / f"{name}_seeds" for name in FIRST.values()]))


def _quality(runs: Sequence[Run]) -> str:
    """Return what is known of a pair of runs: likelihood by order, samples, and the control."""
    count, *_ = alike(runs, "num_samples", "reference_images", "seeds")
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
    known = ("method", "trained_order", "parameters", "network_calls")
    values = (needed(run, kept, "metrics.json", key) for key in (*known, "plan", "cluster_weight"))
    method, trained, parameters, calls, plan, cluster = values
    bits = needed(run, kept, "metrics.json", "bits_per_image")
    own = trained if trained in bits else plan["order"]
    return [
        method,
        trained,
        f"{cluster:g}" if cluster else "no",
        f"{parameters:,}",
        number(needed(run, kept, "metrics.json", f"bits_per_image.{own}"), 1),
        number(bits["random"], 1) if bits.get("random", {}).get("orders") == 8 else "",
        f"{plan['cfg']:g}",
        *(quality_number(name, measured(run, name)) for name in (ACCURACY, FD)),
        str(calls),
    ]


def methods(kept: Path) -> str:
    """Return one row for each run whose name begins with five_, in the order of METHODS."""
    runs = [read_run(path) for path in kept_folders(kept) if path.name.startswith("five_")]
    if not runs:
        raise InputError(f"README.md needs runs called five_... in {kept}; there are none")
    method = {run.name: needed(run, kept, "metrics.json", "method") for run in runs}
    runs.sort(key=lambda run: [*METHODS, method[run.name]].index(method[run.name]))
    count, reference, _ = alike(runs, "num_samples", "reference_images", "seeds")
    control = _control(runs)
    real = [quality_number(name, control.get(name)) for name in (ACCURACY, FD)]
    table = Table(
        ["method", "order", "cluster term", "parameters", "bits per test image, own order"]
        + ["mean of 8 random orders", "guidance", ACCURACY, FD, "network calls"],
        [*(_method_row(run, kept) for run in runs), [CONTROL, *[""] * 6, *real, ""]],
    )
    return (
        f"{table.markdown()}\n{count:,} samples each, against {reference or 0:,} train images. "
        f"{_spreads(runs)}\n"
    )


def calls(kept: Path) -> str:
    """Return what fewer network calls cost, for the runs whose sweep is kept.

    Raises InputError for sweeps over anything else, or that cannot be compared.
    """
    runs = [run for run in read_runs(kept_folders(kept)) if run.sweep]
    if not runs:
        raise InputError(f"README.md needs a run with a sweep.json in {kept}; there is none")
    rows = [(run, row) for run in runs for row in run.sweep["rows"]]
    settings = {
        (row["num_samples"], str(row["control"]))
        + tuple((key, x) for key, x in row["plan"].items() if key not in ("steps", "order"))
        for _, row in rows
    }
    if len(settings) > 1:
        raise InputError(
            f"README.md compares sweeps over the network calls only, got {len(settings)} settings "
            f"in {', '.join(run.name for run in runs)}"
        )
    table = [
        [run.metrics["method"], run.metrics["trained_order"], str(row["plan"]["steps"])]
        + [quality_number(name, row["samples"].get(name)) for name in (ACCURACY, FD)]
        for run, row in rows
    ]
    row = rows[0][1]
    real = [quality_number(name, row["control"].get(name)) for name in (ACCURACY, FD)]
    table.append([CONTROL, "", "", *real])
    head = ["method", "order", "network calls", ACCURACY, FD]
    return (
        f"{Table(head, table).markdown()}\n{row['num_samples']:,} samples each, guidance "
        f"{row['plan']['cfg']:g}.\n"
    )


def speed(kept: Path) -> str:
    """Return images/s of every method, trained and sampled, as tools/benchmark.py measured them."""
    found = read_single(kept / "benchmark", "benchmark.json")
    trained = {row["method"]: row for row in found["rows"] if row["stage"] == 4}
    rows = []
    for method, row in trained.items():
        sampled = [x for x in found["rows"] if x["stage"] == 5 and x["method"] == method]
        shown = [f"{x['images_per_second']:.0f} ({x['network_calls']})" for x in sampled]
        memory = max(x["peak_memory_gb"] or 0 for x in (row, *sampled))
        cells = [f"{row['images_per_second']:.0f}", ", ".join(shown)]
        rows.append([method, row["order"], *cells, f"{memory:.1f}" if memory else ""])
    head = ["method", "order", "training", "sampling (network calls)", "GB"]
    models = " and ".join(dict.fromkeys(row["model"] for row in trained.values()))
    where = found["cpu"] if found["device"] == "cpu" else found["device"]
    return (
        f"{Table(head, rows).markdown()}\nImages/s of `{models}` with {found['threads']} threads "
        f"on {where}; GB, the larger of both: {found['peak_memory']}.\n"
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
    runs = pair(kept)
    file = "calibration.json"
    found = [part_of(run, kept, file) for run in runs]
    buckets = {
        f"ECE, {name}": (f"tokens.by_step.{name}.ece_equal_width", 4)
        for name in found[0]["tokens"]["by_step"]
    }
    counts = [str(needed(run, kept, file, "orders.ensemble.random.orders")) for run in runs]
    together = " and ".join(dict.fromkeys(counts))
    rows = []
    for title, (path, digits) in (CALIBRATION | buckets | AFTER_BUCKETS).items():
        values = [needed(run, kept, file, path) for run in runs]
        percent = title == "class accuracy by Bayes"
        of = [f"{value['images']:,}" for value in values]
        title = title.format(together)
        if of != [f"{one['images']:,}" for one in found]:
            title += f" ({' and '.join(dict.fromkeys(of))} images)"
        rows.append([title, *(number(v, digits, percent) for v in values)])
    images = " and ".join(dict.fromkeys(f"{one['images']:,}" for one in found))
    table = Table([f"measured on {images} test images", *FIRST], rows)
    return f"{table.markdown()}\nIn brackets: 95% interval over images.\n"


def robustness(kept: Path) -> str:
    """Return what corrupted images and wrong codes cost in raster and in random order."""
    runs = pair(kept)
    found = [part_of(run, kept, "robustness.json") for run in runs]
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
    images, of_context = (
        " and ".join(dict.fromkeys(f"{one['images']:,}" for one in part))
        for part in ([one["corruptions"] for one in found], found)
    )
    return (
        f"{corrupted.markdown()}\n{replaced.markdown()}\n"
        f"{images} test images above, {of_context} below; in brackets: 95% interval over images.\n"
    )


TABLE_BLOCKS = {
    "first_run": first_run,
    "seeds": seeds,
    "methods": methods,
    "calls": calls,
    "speed": speed,
    "calibration": calibration,
    "robustness": robustness,
}
