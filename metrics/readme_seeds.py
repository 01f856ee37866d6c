"""Both orders over several training seeds: a table, and what the finding says of them."""

from pathlib import Path

import numpy as np

from metrics.kept_numbers import FIRST, RHO, alike, needed, same
from metrics.readme_tables import ACCURACY, FD
from metrics.report_runs import Run, kept_folders, read_runs
from metrics.report_tables import Table, number
from models.errors import InputError

WRONG = f"{RHO:.0%} of the codes replaced by {{}}, more bits per image"
TRAINED = {
    "bits": ("bits per test image, own order", 1, "metrics.json", "bits_per_image.own.mean"),
    "random": (
        "bits per test image, {} random orders (mean)", 1, "metrics.json",
        "bits_per_image.random.mean",
    ),
    "accuracy": (ACCURACY, 1, "metrics.json", f"samples.{ACCURACY}"),
    "distance": (FD, 2, "metrics.json", f"samples.{FD}"),
    "ece": (
        "top-label ECE", 4, "robustness.json",
        "context.uniform", {"rho": 0}, "ece_equal_width.value",
    ),
    "uniform": (
        WRONG.format("any others"), 1, "robustness.json",
        "context.uniform", {"rho": RHO}, "more_bits_per_image.value",
    ),
    "neighbours": (
        WRONG.format("similar ones"), 1, "robustness.json",
        "context.neighbours", {"rho": RHO}, "more_bits_per_image.value",
    ),
}  # fmt: skip
"""measures in the block `training_seeds`: title, digits, where the number is"""
MAY_DIFFER = {"seed", "order", "codes", "out", "tokenizer", "devices", "device"}
"""fields of a training's config in which the runs that are compared may differ"""


def seed_runs(kept: Path) -> dict[str, list[Run]]:
    """Return {column: runs of several training seeds}, both columns of the same seeds.

    They are the runs called <anything>_randar_raster and <anything>_randar_random. Raises
    InputError if they were trained or sampled in different ways.
    """
    found, seeds = {}, {}
    for order, title in zip(("raster", "random"), FIRST, strict=True):
        folders = [path for path in kept_folders(kept) if path.name.endswith(f"_randar_{order}")]
        runs = read_runs(folders)
        runs.sort(key=lambda run: needed(run, kept, "config.json", "config.seed"))
        found[title] = runs
        seeds[title] = [run.training["config"]["seed"] for run in runs]
    first, second = seeds.values()
    if first != second or len(set(first)) < max(2, len(first)):
        raise InputError(
            "README.md compares runs ..._randar_raster and ..._randar_random of the same training "
            f"seeds, two or more, in {kept}; got {first} and {second}"
        )
    runs = [run for of_order in found.values() for run in of_order]
    for field in sorted(runs[0].training["config"].keys() - MAY_DIFFER):
        same(runs, kept, "config.json", "config", field)
    same(runs, kept, "metrics.json", "plan.cfg")
    alike(runs, "num_samples", "reference_images", "train_steps")
    return found


def seed_cells(runs: dict[str, list[Run]], kept: Path, name: str) -> list[str]:
    """Return a measure of TRAINED over training seeds: raster, random, random - raster."""
    title, digits, *where = TRAINED[name]
    raster, random = (
        np.array([needed(run, kept, *where) for run in of_order]) for of_order in runs.values()
    )
    cells = [
        number({"mean": x_N.mean(), "sd": x_N.std(ddof=1)}, digits, percent=title == ACCURACY)
        for x_N in (raster, random, random - raster)
    ]
    return [*cells[:2], cells[2].replace("%", " points")]


def training_seeds(kept: Path) -> str:
    """Return both orders over several training seeds, and their difference, seed by seed."""
    found = seed_runs(kept)
    runs = [run for of_order in found.values() for run in of_order]
    count, steps = alike(runs, "num_samples", "train_steps")
    orders = same(runs, kept, "metrics.json", "bits_per_image.random.orders")
    images = same(runs, kept, "robustness.json", "images")
    rows = [
        [title.format(orders), *seed_cells(found, kept, name)]
        for name, (title, *_) in TRAINED.items()
    ]
    head = [f"{len(runs) // 2} training seeds, {steps:,} steps", *FIRST, "random - raster"]
    return (
        f"{Table(head, rows).markdown()}\n± is the sd over training seeds, of the difference seed "
        f"by seed; {count:,} samples of each model; ECE and replaced codes on {images:,} test "
        "images.\n"
    )
