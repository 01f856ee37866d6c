"""The tables of measured runs, in Markdown: RESULTS.md is made of nothing else.

A table is a function of {title of a column: run}; InputError: they were not measured, or not alike.
"""

import torch

from metrics.calibration import mean_of
from metrics.report import Run, Runs, below, digits, names, own_bits, real, shared, show, table
from models.orders import CHOSEN

REAL = "real test images"
SHOWN = ("label_accuracy", "FD", "FID")
"""starts of the measures of samples in the tables with a row for each run"""
SAMPLING = {
    "guidance scale": ("metrics.plan.cfg_scale", 1),
    "samples": ("metrics.num_samples", 0),
    "network calls": ("metrics.network_calls", 0),
    "sampled in": ("metrics.precision",),
    "train images as reference": ("metrics.reference_images", 0),
}


def lines(runs: Runs, measures: dict[str, tuple]) -> list[list[str]]:
    """Return a row for each measure, {title: (path, how to show it ..)}, that a run has."""
    rows = []
    for title, (path, *how) in measures.items():
        cells = [show(run.at(path, True), *how) for run in runs.values()]
        rows += [[title, *cells]] if any(cells) else []
    return rows


def by_measure(runs: Runs, measures: dict[str, tuple], text: str, file: str, head="") -> str:
    """Return a table of `lines`, a column for each run; below it `text` and the file's notes."""
    return table([head, *runs], lines(runs, measures)) + below(runs, text, file)


def quality(runs: Runs) -> str:
    """Return likelihood by order and the quality of samples, beside real images in their place."""
    every, measures = runs.values(), {}
    for name in names(runs, "metrics.bits_per_image"):
        path = f"metrics.bits_per_image.{name}"
        counts = {run.at(f"{path}.orders", True) or 0 for run in every} - {0} or {1}
        count = " to ".join(map(str, sorted({min(counts), max(counts)})))
        several = f"mean of {count} {name} orders" if max(counts) > 1 else f"{name} order"
        measures[f"bits per test image, {several}"] = (path, 1)
    for name in names(runs, "metrics.baseline_bits"):
        measures[f"the same without a network: {name}"] = (f"metrics.baseline_bits.{name}", 1)
    rows = lines(runs, measures)
    for name in names(runs, "metrics.samples"):
        control = dict.fromkeys(real(run.at("metrics"), name) for run in every)
        rows.append(
            [name, *(of_samples(x, name) for x in every), " / ".join(filter(None, control))]
        )
    rows += lines(runs, SAMPLING)
    rows = [[*row, ""][: len(runs) + 2] for row in rows]  # only samples have a real one beside them
    text = "± of bits: standard error over test images; of samples: sd over sampling seeds."
    return table(["", *runs, REAL], rows) + below(runs, text, "metrics")


def of_samples(run: Run, name: str) -> str:
    """Return a measure of the samples: over seeds if it was sampled with several, else of one."""
    several = run.at(f"metrics.over_seeds.{name}", True)
    return show(several or run.at(f"metrics.samples.{name}", True), *digits(name))


def by_order(runs: Runs) -> str:
    """Return bits per test image in every order that calibrate.py read, and ensembles."""
    bits, groups = "calibration.orders.bits_per_image", "calibration.orders.ensemble"
    measures = {name: (f"{bits}.{name}", 1) for name in names(runs, bits)}
    for group in names(runs, groups):
        measures[f"gain of averaging p over {group} orders"] = (f"{groups}.{group}.gain", 1)
    text = f"{shared(runs, 'calibration.images'):,} test images; in brackets: 95% interval."
    return by_measure(runs, measures, text, "calibration", "bits per test image")


CALIBRATION = {
    "token NLL, bits": ("calibration.tokens.overall.nll_bits", 3),
    "accuracy of the likeliest code": ("calibration.tokens.overall.accuracy", 1, True),
    "top-label ECE": ("calibration.tokens.overall.ece_equal_width", 4),
    "ECE by chance alone": ("calibration.tokens.overall.ece_equal_width_if_calibrated", 4),
    "confidence - accuracy of codes": ("calibration.tokens.overall.overconfidence_gap", 4),
    **{
        f"ECE{what}, {steps}": (f"calibration.tokens.by_step.{steps}.ece_equal_width{key}", 4)
        for steps in ("t < 8", "t 8-32", "t > 32")
        for what, key in (("", ""), (" by chance alone", "_if_calibrated"))
    },
    "best temperature": ("calibration.tokens.temperature.temperature", 3),
    "NLL it gains, bits per image": ("calibration.tokens.temperature.gain_bits_per_image", 2),
    "class accuracy by Bayes": ("calibration.classes.before.accuracy", 1, True),
    "class ECE by Bayes": ("calibration.classes.before.ece_equal_width", 3),
    "entropy of own samples - NLL, bits per image": (
        "calibration.entropy.difference_bits_per_image", 1),
}  # fmt: skip


def calibration(runs: Runs) -> str:
    """Return calibration of codes and classes, every number with its interval."""
    counts = (shared(runs, f"calibration.{key}") for key in ("images", "num_samples"))
    text = "{:,} test images, of the temperature and the classes half of them, of the entropy {:,} "
    text += "samples; in brackets: 95% interval over images."
    return by_measure(runs, CALIBRATION, text.format(*counts), "calibration")


ROBUSTNESS = {
    ("severity of corrupted test images", "corruptions.by_severity", "severity"): {
        "bits per image": ("corruptions.by_severity", "bits_per_image", 1),
        "ECE": ("corruptions.by_severity", "ece_equal_width", 4),
        "class accuracy by Bayes": ("corruptions.by_severity", "class_accuracy", 1, True),
    },
    ("share of the codes replaced in test images", "context.uniform", "rho"): {
        "more bits, codes replaced by any others": ("context.uniform", "more_bits_per_image", 1),
        "more bits, by similar ones": ("context.neighbours", "more_bits_per_image", 1),
    },
    ("share of its own codes that it misreads while sampling", "sampling", "rho"): {
        "label accuracy": ("sampling", "label_accuracy", 1, True),
        "FD": ("sampling", "FD_", 2),
    },
}
"""(title, rows, what they are measured against) -> measure: rows, start of its key, how to show"""
DIFFERENCES = {
    "more bits, 40% any others": ("context.uniform", {"rho": 0.4}, "more_bits_per_image", 1),
    "more bits, 40% similar ones": ("context.neighbours", {"rho": 0.4}, "more_bits_per_image", 1),
    "class accuracy by Bayes, clean": (
        "corruptions.by_severity", {"severity": 0}, "class_accuracy", 1, True),
    "class accuracy by Bayes, severity 5": (
        "corruptions.by_severity", {"severity": 5}, "class_accuracy", 1, True),
}  # fmt: skip
"""what is kept of every image: rows, which of them, key, how to show"""


def robustness(runs: Runs) -> str:
    """Return what corrupted images, wrong codes read and wrong codes sampled cost."""
    first_run, parts = next(iter(runs.values())), []
    for (title, first, against), measures in ROBUSTNESS.items():
        rows = []
        for step in (row[against] for row in first_run.at(f"robustness.{first}")):
            rows.append([f"{step:.0%}" if against == "rho" else str(step)])
            for path, start, *how in measures.values():
                for run in runs.values():
                    row = run.at(f"robustness.{path}", True, **{against: step}) or {}
                    value = next((row[key] for key in row if key.startswith(start)), None)
                    rows[-1].append(show(value, *how))
        head = [f"{measure}, {run}" for measure in measures for run in runs]
        parts += [table([title, *head], rows)] if rows else []
    of = {"corruptions.images": "corrupted test images", "images": "test images of replaced codes"}
    counts = {what: shared(runs, f"robustness.{path}") for path, what in of.items()}
    text = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    guidance = shared(runs, "robustness.config.cfg_scale")
    count = max(run.at("robustness.num_samples") for run in runs.values())
    text += f"; {count:,} samples at guidance {guidance:g}, their FD to all test images; in "
    text += "brackets: 95% interval."
    return "\n".join([*parts, differences(runs)]) + below(runs, text, "robustness")


def differences(runs: Runs) -> str:
    """Return how the others differ from the first run on the same images, by paired intervals."""
    shared(runs, "robustness.inputs.test_codes")
    (first, *others), rows = runs, []
    for title, (path, which, key, *how) in DIFFERENCES.items():
        parts = [run.at(f"robustness.{path}", True, **which) or {} for run in runs.values()]
        values = [torch.tensor(row.get(key, {}).get("of_images", [])) for row in parts]
        if all(map(len, values)):
            rows.append([title, *(show(mean_of(x - values[0]), *how) for x in values[1:])])
    head = (f"{name} - {first}" for name in others)
    return table(["image by image", *head], rows) if rows and others else ""


def methods(runs: Runs) -> str:
    """Return a row for each run; they must be trained for as long and sampled alike."""
    rows, measures = [], [x for x in names(runs, "metrics.samples") if x.startswith(SHOWN)]
    for run in runs.values():
        method, order = run.at("metrics.method"), run.at("metrics.trained_order")
        plan, several = run.at("metrics.plan"), run.at("metrics.bits_per_image").get("random", {})
        row = [method, order, show(run.at("metrics.cluster_weight") or None, 0)]
        row += [show(run.at("metrics.parameters"), 0), show(training_tflop(run), 0)]
        row += [show(own_bits(run), 1), show(several, 1) if several.get("orders", 1) > 1 else ""]
        row += [f"{plan['cfg_scale']:g}", show(run.at("metrics.network_calls"), 0)]
        rows.append([*row, run.at("metrics.precision"), *(of_samples(run, x) for x in measures)])
    for name in measures:
        shared(runs, f"metrics.control.{name}")
    rows.append([REAL, *[""] * 9, *(real(run.at("metrics"), name) for name in measures)])
    head = ["method", "order", "cluster term", "parameters", "training, TFLOP"]
    counts = {run.at("metrics.bits_per_image.random.orders", True) or 1 for run in runs.values()}
    head += ["bits per test image, own order", f"mean of {max(counts)} random orders"]
    head += ["guidance", "network calls", "sampled in", *measures]
    steps, count = (shared(runs, f"metrics.{key}") for key in ("train_steps", "num_samples"))
    text = f"{steps:,} steps and {count:,} samples each; ± of bits: standard error over images."
    return table(head, rows) + below(runs, text, "metrics")


def training_tflop(run: Run) -> float | None:
    """Return the arithmetic of a whole training, from the rates of its curve; None without."""
    row = next((row for row in run.curve if "gflops_per_second" in row), None)
    images = run.at("config.config.steps") * run.at("config.config.batch")
    return row and images * row["gflops_per_second"] / row["images_per_second"] / 1000


def calls(runs: Runs) -> str:
    """Return what fewer network calls than codes cost: rows of sweeps, or single evaluations."""
    rows, controls, samplings = [], {}, []
    for run in runs.values():
        measured = run.at("sweep.rows", True) or [run.at("metrics")]
        samplings += [(run.at("metrics.method"), x) for x in measured if x["plan"]["decode_steps"]]
    every = dict.fromkeys(name for _, row in samplings for name in row["samples"])
    measures = [name for name in every if name.startswith(SHOWN)]
    for method, row in samplings:
        plan, count = row["plan"], show(row["num_samples"], 0)
        samples = row["samples"] | row.get("over_seeds", {})
        how = f", noise {plan['choice_temperature']:g}" if plan["order"] in CHOSEN else ""
        if plan.get("revise"):
            how += f", rounds of {plan['revise']:.1%} drawn anew: {plan['rounds']}"
        number = row.get("network_calls", plan["decode_steps"])
        counts = show(number, 0), f"{plan['cfg_scale']:g}", row["precision"]
        shown = (show(samples.get(name), *digits(name)) for name in measures)
        rows.append([method, plan["order"] + how, *counts, count, *shown])
        controls[count] = [real(row, name) for name in measures]
    rows.sort(key=lambda row: (row[0], -int(row[2]), row[5], row[1]))
    rows += [[REAL, "", "", "", "", count, *cells] for count, cells in controls.items()]
    head = ["method", "order", "network calls", "guidance", "sampled in", "samples", *measures]
    return table(head, rows) + below(runs, "", "sweep")


INPAINTING = {
    "hidden cells": ("inpainting.hidden_cells", 0),
    "test images": ("inpainting.images", 0),
    "guidance scale, alike in every cell": ("inpainting.cfg_scale", 1),
    "bits of the hidden codes, given all others": ("inpainting.bits_per_image.given all", 1),
    "given those before them": ("inpainting.bits_per_image.given the past", 1),
    "what the future saves": ("inpainting.bits_per_image.what the future saves", 1),
}


def inpainting(runs: Runs) -> str:
    """Return what completing test images is worth: bits, and the images in place of samples."""
    measures = dict(INPAINTING)
    ways = {way: f"completed.{way}" for way in names(runs, "inpainting.completed")}
    for way, path in (ways | {REAL: "control"}).items():
        for name in (x for x in names(runs, "inpainting.control") if x.startswith(SHOWN)):
            measures[f"{name}, {way}"] = (f"inpainting.{path}.{name}", *digits(name))
    return by_measure(runs, measures, "In brackets: 95% interval.", "inpainting")


TOKENIZER = {
    "test images": ("tokenizer.images", 0),
    "PSNR, dB": ("tokenizer.psnr", 2),
    "codebook usage": ("tokenizer.codebook_usage", 1, True),
    "perplexity": ("tokenizer.perplexity", 0),
    "parameters": ("tokenizer.parameters", 0),
}


def tokenizers(runs: Runs) -> str:
    """Return what tokenizers keep of test images, from the nearest codes and from stored ones."""
    columns, control = {}, {}
    for run in runs.values():
        control |= run.at("tokenizer.control")
        for kind, codes in run.at("tokenizer.codes").items():
            files = {"tokenizer": codes | run.at("tokenizer")}
            columns[f"{run.name}, {kind} codes"] = Run(run.name, files, [])
    columns[REAL] = Run(REAL, {"tokenizer": {"as_samples": control}}, [])
    distances = [x for x in names(columns, "tokenizer") if x.startswith(("rFD", "rFID"))]
    measures = TOKENIZER | {name: (f"tokenizer.{name}", 3) for name in distances}
    for name in names(columns, "tokenizer.as_samples"):
        if name.startswith((*SHOWN, "recall")):
            title = f"{name}, decoded images as samples"
            measures[title] = (f"tokenizer.as_samples.{name}", *digits(name))
    return by_measure(columns, measures, "In brackets: 95% interval.", "tokenizer")


def speed(runs: Runs) -> str:
    """Return images/s of every method in every batch, and what it does with the machine."""
    (run,) = runs.values()
    at, rows, columns = run.at, {}, {}
    keys = ("method", "what", "network_calls", "precision")
    for row in at("benchmark.rows"):
        column = f"batch {row['batch']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        rows.setdefault(tuple(str(row[key] or "") for key in keys), {})[column] = row
        columns[column] = None
    shown = []
    for key, cells in rows.items():
        *_, row = cells.values()
        speeds = [show(cells[column]["images_per_second"], 0) for column in columns]
        share = show(max(row["peak_share"] for row in cells.values()), 0, percent=True)
        shown.append([*key, *speeds, show(row["gflop"], 2), share, show(row["memory_gb"], 2)])
    head = ["method", "what", "network calls", "precision", *columns, "GFLOP an image"]
    where = at("benchmark.cpu") if at("benchmark.device") == "cpu" else at("benchmark.device")
    text = f"Images a second on {where}. Peak: of a matrix product in that precision. GB: what the "
    text += f"largest batch takes beyond torch. Median of {at('benchmark.config.rounds')} rounds."
    return table([*head, "share of peak, at best", "GB"], shown) + below(runs, text, "benchmark")
