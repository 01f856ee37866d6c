#!/usr/bin/env -S uv run
"""RESULTS.md from the kept numbers; runs side by side; numbers of runs kept for git.

uv run tools/report.py                    checkpoints/reports/ -> RESULTS.md
uv run tools/report.py RUNS ...           RUNS side by side, printed as Markdown
uv run tools/report.py --keep RUNS ...    numbers of RUNS -> checkpoints/reports/<run>/

A run is a folder that eval_c2i.py wrote, results/<run>, with what tools/calibrate.py, robustness.py
and sweep_cfg.py wrote beside it. --keep also takes the folders of tune.py, measure_tokenizer.py,
measure_inpainting.py, features.py, benchmark.py and quickstart.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import tyro

from metrics import report, tables
from metrics.claims import SEEDS, claims, records, training_seeds
from metrics.report import REPORTS, Runs, below, read_run, shared, show, table
from metrics.tables import calibration, quality, robustness
from models import command
from models.artifacts import ROOT, as_written, write_text
from models.command import InputError, run

INTRODUCTION = """# Results

Made whole by `uv run tools/report.py` from the JSON in `checkpoints/reports/`, where each file says
the command and the commit that made it. What the measures are: see README.md.
"""
IMAGES = 60_000
"""of CIFAR-10, each encoded together with its mirror image"""


def minutes(runs: Runs) -> str:
    """Return how long README.md's stages take at the measured speeds, and the quickstart."""
    every = {key: run for run in runs.values() for key in run.files}
    at, trained = every["tokenizer"].at, every["config"].at("config.config")
    tokenizer, generator = {"method": "vqvae", "what": "training"}, {"method": "randar"}
    work = {
        "2 tokenizer": (at("tokenizer.train_steps") * at("tokenizer.train_batch"), tokenizer),
        "3 codes": (IMAGES, {"what": "encoding, --search 0"}),
        "3 codes, --search 1": (IMAGES, {"what": "encoding, --search 1"}),
        "4 train RandAR": (trained["steps"] * trained["batch"], generator | {"what": "training"}),
        "5 sample": (10_000, generator | {"what": "sampling", "network_calls": 64}),
    }
    rows, measured = [], every["benchmark"].at("benchmark.rows")
    for stage, (images, row) in work.items():
        rate = max(r["images_per_second"] for r in measured if row.items() <= r.items())
        rows.append([stage, f"{images:,}", show(images / rate / 60, 0)])
    at = every["quickstart"].at
    rows.append(["quickstart, all of it", "", show(at("quickstart.minutes"), 0)])
    paths = (f"quickstart.orders.{order}.label_accuracy" for order in ("raster", "random"))
    accuracy = [show(at(path), 0, True) for path in paths]
    text = "At the fastest batch and precision, without evaluations. The quickstart's samples show "
    text += f"their label in {accuracy[0]} of cases in raster and {accuracy[1]} in random order."
    return table(["stage", "images", "minutes"], rows) + f"\n{text}\n"


def probes(runs: Runs) -> str:
    """Return how often a linear map of a layer's features tells the class."""
    layers = report.names(runs, "features.accuracy")
    measures = {name: (f"features.accuracy.{name}", 1, True) for name in layers}
    counts = (shared(runs, f"features.{key}") for key in ("train_images", "images"))
    text = "{:,} train images, {:,} test images; in brackets: 95% interval.".format(*counts)
    return tables.by_measure(runs, measures, text, "features", "linear probe on")


def tuning(runs: Runs) -> str:
    """Return what every method's search found; all of equal trials and operations."""
    rows, settings = [], report.names(runs, "tuning.best.settings")
    for one in runs.values():
        best, trials = one.at("tuning.best"), one.at("tuning.trials")
        cut = f"{len(trials)} ({sum(row['pruned'] for row in trials)})"
        columns = (one.at(f"tuning.{key}") for key in ("method", "order", "steps"))
        cells = [*map(str, columns), cut]
        cells += [show(row["bits"], 3) for row in (trials[0], best)]
        rows.append(cells + [f"{best['settings'][name]:.2g}" for name in settings])
    head = ["method", "order", "steps", "trials (cut)", "bits a held-out code, first trial", "best"]
    budget = shared(runs, "tuning.config.tflop"), shared(runs, "tuning.config.batch")
    text = "{:g} TFLOP a trial, in steps of {} images.".format(*budget)
    return table([*head, *settings], rows) + below(runs, text, "tuning")


def wrong_codes(runs: Runs) -> str:
    """Return what a wrong context costs the runs, one of them trained with wrong codes."""
    every, path = list(runs.values()), "robustness.context.uniform"
    rows = [
        [f"{rho:.0%}", *(show(one.at(path, rho=rho)["bits_per_image"], 1) for one in every)]
        for rho in (row["rho"] for row in every[0].at(path))
    ]
    text = f"Bits of {shared(runs, 'robustness.images'):,} test images; in brackets: 95% interval."
    parts = table(["share of the codes replaced", *runs], rows), tables.differences(runs)
    return "\n".join(parts) + below(runs, text, "robustness")


def class_orders(runs: Runs) -> str:
    """Return what the class by Bayes gains by averaging over readings in several orders."""
    path, kinds = "calibration.class_orders", ("probabilities", "logs")
    rows = [
        [k, *(show(run.at(f"{path}.{k}.{kind}.accuracy", True), 1, True)
              for run in runs.values() for kind in kinds)]
        for k in report.names(runs, path)
    ]  # fmt: skip
    head = ["readings", *(f"{name}, mean of {kind}" for name in runs for kind in kinds)]
    text = "Class accuracy by Bayes; in brackets: 95% interval over images."
    return table(head, rows) + below(runs, text, "calibration")


PAIR, INCEPTION, SHORTER = (
    {f"{order} order": f"randar_{order}_nano_{run}" for order in ("raster", "random")}
    for run in ("8epochs", "8epochs_768", "perceptual")
)
"""by the title of their column: the shipped pair, that as Inception sees it, and the pair trained
for half as long, as the other methods"""
SEED_RUNS = {
    f"{order} order, seed {seed}": run
    for order, runs in SEEDS.items()
    for seed, run in enumerate(runs)
}
COMPLETED, SHAPES = (
    {f"{order} order": f"{kind}_randar_{order}" for order in ("raster", "random")}
    for kind in ("inpainted", "shapes")
)
FIXED = {
    "on 1,024 codes": "fixed_vqvae_cifar10_perceptual_long",
    "on 4,096 codes": "fixed_vqvae_cifar10_4096",
}
READ_RASTER = {"random order, read in raster order": "randar_random_nano_8epochs_read_raster"}
READ_TWICE = {f"{title}, read twice": f"{run}_twice" for title, run in PAIR.items()}
READINGS = {
    "in an order each": "class_orders_randar_random",
    "two in an order, the second of the mirror image": "class_views_randar_random",
}
NOISE = {"raster order, 10% wrong codes in training": "noise_randar_raster"} | SHORTER
ALIGNED = {
    "guided": "randar_random_nano_perceptual",
    "not guided": "randar_random_nano_unguided",
    "aligned, 780 steps": "randar_random_nano_cca1",
    "aligned, 260 more": "randar_random_nano_cca",
    "guided, 1,000 samples": "cca_guided_1000",
    "aligned, 1,000 samples": "cca_aligned_1000",
}
"""guidance while sampling, none, and in the weights"""
STAGES = ("benchmark", "quickstart", "vqvae_cifar10", SHORTER["random order"])
"""what tells the minutes of README.md's stages"""
SECTIONS: tuple[tuple[str, Callable[[Runs], str], dict[str, str] | Sequence[str]], ...] = (
    ("What the papers claim", claims, ("*",)),
    ("The shipped pair", quality, PAIR),
    ("The shipped pair in the features of Inception", quality, INCEPTION),
    ("The shipped pair read in every order", tables.by_order, PAIR),
    ("Calibration of the shipped pair", calibration, PAIR),
    ("Robustness of the shipped pair", robustness, PAIR | READ_RASTER),
    ("What features of a layer tell of the class", probes, PAIR | READ_RASTER | READ_TWICE),
    ("Class told in several readings", class_orders, READINGS),
    ("The pair trained for half as long", quality, SHORTER),
    ("Calibration of the pair trained for half as long", calibration, SHORTER),
    ("Robustness of the pair trained for half as long", robustness, SHORTER),
    ("Trained with wrong codes in the context", quality, NOISE),
    ("Wrong codes read by what was trained with them", wrong_codes, NOISE),
    ("The pair trained for half as long, from three seeds", training_seeds, SEED_RUNS),
    ("Guidance in the weights of the random-order model", quality, ALIGNED),
    ("Every method at one budget", tables.methods, ("nano_*", *SHORTER.values())),
    ("Records: the shortest trainings to a target", records, ("record_*",)),
    ("What trainings were tuned to", tuning, ("tuning",)),
    ("Fewer network calls than codes", tables.calls,
     ("nano_arpg_*", SHORTER["random order"], "chosen_*")),
    ("Completing test images", tables.inpainting, COMPLETED),
    ("Completing shapes", tables.inpainting, SHAPES),
    ("Tokenizers", tables.tokenizers, ("tokenizer",)),
    ("One small generator on each tokenizer's codes", quality, FIXED),
    ("Speed", tables.speed, {"": "benchmark"}),
    ("Speed beside the authors' own code", tables.speed, {"": "benchmark_against"}),
    ("Minutes", minutes, {run: run for run in STAGES}),
)  # fmt: skip
"""title, table, and which kept runs: by title of their column; or of these names or files"""


@dataclass(frozen=True)
class ReportConfig(command.Config):
    """Write RESULTS.md, show runs side by side, or keep their numbers."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders results/<run>"""
    keep: bool = False
    """copy the numbers of RUNS to --kept"""
    kept: Path = REPORTS
    """the kept runs"""
    trainings: Path = ROOT / "checkpoints/runs"
    """where config and curve of a training are, if not in the folder of the run"""
    out: Path = ROOT / "RESULTS.md"


def chosen(kept: Runs, which: dict[str, str] | Sequence[str]) -> Runs:
    """Return the kept runs of a section, none of a pair that is not whole."""
    if isinstance(which, dict):
        whole = kept.keys() >= set(which.values())
        return {title: kept[name] for title, name in which.items()} if whole else {}
    return {
        name: run
        for name, run in kept.items()
        if any(fnmatch(name, pattern) or pattern in run.files for pattern in which)
    }


def results(kept: Path = REPORTS) -> str:
    """Return RESULTS.md of the kept runs; a section without runs is left out."""
    runs, parts = report.read_reports(kept), [INTRODUCTION]
    for title, make, which in SECTIONS:
        section = chosen(runs, which)
        parts += [f"## {title}\n", make(section)] if section else []
    return "\n".join(parts)


def side_by_side(runs: Runs) -> str:
    """Return all tables of any runs, a column each, those that every run has the files for."""
    parts, of_file = ["# Runs side by side\n"], {quality: "metrics", robustness: "robustness"}
    for make in (quality, tables.by_order, calibration, class_orders, robustness):
        file = of_file.get(make, "calibration")
        some = {name: run for name, run in runs.items() if file in run.files}
        with as_written(", ".join(some), "measurements", "measure them again"):
            parts += [f"## {make.__name__}\n", make(some)] if some else []
    return "\n".join(parts)


def main(cfg: ReportConfig) -> None:
    """Keep, compare, or write RESULTS.md."""
    if cfg.keep and not cfg.runs:
        raise InputError("--keep needs RUNS: uv run tools/report.py --keep results/YOURS")
    if not cfg.runs:
        write_text(cfg.out, results(cfg.kept))
        print(f"wrote {cfg.out}")
    elif not cfg.keep:
        runs = {run.name: run for run in map(read_run, cfg.runs)}
        if len(runs) < len(cfg.runs):
            raise InputError(f"expected folders of different names, got {', '.join(runs)}")
        print(side_by_side(runs))
    for folder in cfg.runs if cfg.keep else ():
        sizes = report.keep_run(folder, cfg.kept, cfg.trainings / folder.resolve().name)
        print(f"kept {', '.join(f'{name} {size:,} bytes' for name, size in sizes.items())}")


if __name__ == "__main__":
    run(main, ReportConfig)
