"""What several trainings tell: the papers' claims, what another seed changes, records of speed.

A claim is about the difference of two runs. It is said to hold, or not to, by the 95% interval of
that difference: paired where values per image are kept, else made of the intervals of both numbers
(Zou & Donner, "Construction of confidence limits about effect measures", 2008). Runs that differ in
their training are one training each. For bits the interval is that of what another seed changes, by
SEEDS: image by image it would be a tenth as wide, and say nothing of another training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from metrics.calibration import mean_of
from metrics.report import STUDENT, Run, Runs, below, interval, names, own_bits, shared, show, table
from metrics.tables import training_tflop
from models.command import InputError

MARGIN = 0.05
"""of the Frechet distance with which a quality counts as kept"""
LAST = 10
"""rows of a curve that its last train bits are averaged over"""
SEEDS = {
    order: tuple(f"randar_{order}_nano_{run}" for run in ("perceptual", "seed1", "seed2"))
    for order in ("raster", "random")
}
"""trainings that differ in nothing but the seed"""


def minus(a: dict, b: dict) -> dict[str, float]:
    """Return the difference of two independent numbers, each with its interval, with its own."""
    a, b = interval(a), interval(b)
    apart = a["value"] - b["value"]
    below = math.hypot(a["value"] - a["low"], b["high"] - b["value"])
    above = math.hypot(a["high"] - a["value"], b["value"] - b["low"])
    return {"value": apart, "low": apart - below, "high": apart + above}


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and the difference of kept runs that decides it."""

    text: str
    paper: str
    runs: tuple[str, str]
    """the one that it is claimed of, and the one to compare with"""
    measure: str
    number: Callable[[Run], dict | torch.Tensor]
    """of a run, with its interval or spread; or its values of the same images, to be paired"""
    wanted: Literal["less", "more", "kept"]
    """what it says of the difference; kept: it is a loss of at most MARGIN"""
    digits: int = 1
    percent: bool = False

    def difference(self, runs: Runs) -> dict[str, float] | None:
        """Return {value, low, high}, of a quality as a share, or None if a run is not there."""
        if not runs.keys() >= set(self.runs):
            return None
        pair = {name: runs[name] for name in self.runs}
        new, old = map(self.number, pair.values())
        if isinstance(new, torch.Tensor):
            for key in ("inputs.test_codes", "images", "corruptions.images"):
                shared(pair, f"robustness.{key}")  # else image by image means nothing
            return mean_of(new - old)
        if self.number is own_bits:
            half, apart = of_seeds(runs), interval(new)["value"] - interval(old)["value"]
            return None if half is None else dict(value=apart, low=apart - half, high=apart + half)
        if self.wanted == "kept":  # of logarithms: what is compared with has an interval too
            new, old = ({key: math.log(x) for key, x in interval(x).items()} for x in (new, old))
            return {key: math.expm1(x) for key, x in minus(new, old).items()}
        return minus(new, old)

    def verdict(self, difference: dict[str, float] | None) -> str:
        """Return whether the claim holds here: `yes`, `no`, or why neither is known."""
        if difference is None:
            return "not run here"
        low, high = difference["low"], difference["high"]
        if self.wanted == "kept":
            return "yes" if high <= MARGIN else "no" if low > MARGIN else "not decided"
        if self.wanted == "less":
            low, high = -high, -low
        return "yes" if low > 0 else "no, the opposite" if high < 0 else "no difference found"


def of_seeds(runs: Runs) -> float | None:
    """Return half of the 95% interval of the difference in own bits of two single trainings.

    By the standard deviation of SEEDS within both orders; None without them.
    """
    if not runs.keys() >= {name for some in SEEDS.values() for name in some}:
        return None
    bits = [[own_bits(runs[name])["mean"] for name in some] for some in SEEDS.values()]
    bits_OS = torch.tensor(bits, dtype=torch.float64)
    freedom = bits_OS.numel() - len(bits_OS)
    return STUDENT[freedom - 1] * math.sqrt(2 * bits_OS.var(1).mean().item())


def frechet(run: Run) -> dict:
    """Return FD_c10, with its sd over sampling seeds."""
    over = run.at("metrics.over_seeds.FD_c10")
    return over | {"seeds": len(run.at("metrics.seeds"))}


def overfitting(run: Run) -> dict:
    """Return held-out less train bits a code at the end, with the spread of the last train bits."""
    train = torch.tensor([row["train_bits"] for row in run.curve[-LAST:]], dtype=torch.float64)
    held_out = [row["heldout_bits"] for row in run.curve if "heldout_bits" in row][-1]
    return {"mean": held_out - train.mean().item(), "sd": train.std().item(), "seeds": LAST}


def of_images(path: str, key: str, **row: Any) -> Callable[[Run], torch.Tensor]:
    """Return what reads the values of single images from a run."""
    return lambda run: torch.tensor(run.at(path, **row)[key]["of_images"])


LONG, SHORT = (
    tuple(f"randar_{order}_nano_{run}" for order in ("random", "raster"))
    for run in ("8epochs", "perceptual")
)
KEPT = frechet, "kept", 1, True
OWN, CODES = "bits per test image, own order", "robustness.context.uniform"
CLAIMS = (
    Claim("RandAR keeps its quality in 2.5 times fewer network calls", "RandAR",
          ("claim_randar_26", "claim_randar_64"), "FD_c10, 26 calls - 64", *KEPT),
    Claim("ARPG keeps its quality in 16 network calls", "ARPG",
          ("claim_arpg_16", "claim_arpg_64"), "FD_c10, 16 calls - 64", *KEPT),
    Claim("ARPG keeps its quality in 8 network calls", "ARPG",
          ("claim_arpg_8", "claim_arpg_64"), "FD_c10, 8 calls - 64", *KEPT),
    Claim("PAR in 19 calls loses nothing to one code at a time", "PAR",
          ("claim_par_19", "claim_gpt_raster"), "FD_c10, PAR - GPT", *KEPT),
    Claim("RAR's annealing beats training in random order to its end", "RAR",
          ("nano_rar_anneal", "nano_rar_random"), OWN, own_bits, "less"),
    Claim("RAR's annealing beats training in raster order only", "RAR",
          ("nano_rar_anneal", "nano_rar_raster"), OWN, own_bits, "less"),
    Claim("IAR's cluster term saves training", "IAR",
          ("nano_gpt_raster_cluster", "nano_gpt_raster"), OWN, own_bits, "less"),
    Claim("Random order costs likelihood", "RAR, RandAR",
          LONG, f"{OWN}, random - raster", own_bits, "more"),
    Claim("Random order costs quality", "RAR, RandAR",
          ("claim_randar_random", "claim_randar_raster"), "FD_c10, random - raster",
          frechet, "more", 3),
    Claim("Random order overfits later", "RandAR",
          LONG, "held-out - train bits a code, random - raster", overfitting, "less", 3),
    # not the ECE, of which chance makes a part
    Claim("Random order is less overconfident", "asked here", LONG,
          "mean confidence - accuracy of the codes, random - raster",
          lambda run: run.at("calibration.tokens.overall.overconfidence_gap"), "less", 4),
    Claim("Random order loses less to 40% wrong codes in the context", "asked here",
          LONG, "more bits per test image, random - raster",
          of_images(CODES, "more_bits_per_image", rho=0.4), "less"),
    Claim("Random order helps on corrupted images", "asked here",
          SHORT, "class accuracy by Bayes at severity 5, random - raster",
          of_images("robustness.corruptions.by_severity", "class_accuracy", severity=5),
          "more", 1, True),
)  # fmt: skip


def claims(runs: Runs) -> str:
    """Return the table of all claims, those without runs too."""
    rows = []
    for claim in CLAIMS:
        difference = claim.difference(runs)
        value = show(difference, claim.digits, claim.percent)
        rows.append([claim.text, claim.paper, claim.measure, value, claim.verdict(difference)])
    head = ["claim", "of", "difference measured", "value", "holds here"]
    return table(head, rows) + (
        f"\nIn brackets: 95% interval. A quality is kept if its distance grows by at most "
        f"{MARGIN:.0%}. Where two trainings are compared, it is one of each: the interval of bits "
        "is what another seed may change, by three trainings of RandAR in each order; of the "
        "others see `three seeds`.\n"
    )


TRAINED = {
    "bits per test image, own order": (own_bits, 1),
    "FD_c10": (lambda run: run.at("metrics.samples.FD_c10"), 3),
    "label_accuracy": (lambda run: run.at("metrics.samples.label_accuracy"), 1, True),
    "recall_c10": (lambda run: run.at("metrics.samples.recall_c10"), 3),
    "top-label ECE": (lambda run: run.at("calibration.tokens.overall.ece_equal_width"), 4),
    "confidence - accuracy of codes": (
        lambda run: run.at("calibration.tokens.overall.overconfidence_gap"), 4),
    "best temperature": (lambda run: run.at("calibration.tokens.temperature.temperature"), 3),
    "class accuracy by Bayes": (lambda run: run.at("calibration.classes.before.accuracy"), 1, True),
    "more bits, 40% any others": (
        lambda run: run.at("robustness.context.uniform", rho=0.4)["more_bits_per_image"], 1),
}  # fmt: skip
"""what another training seed may change: of a run, digits, percent"""


def training_seeds(runs: Runs) -> str:
    """Return mean and sd over training seeds in both orders, and the difference, seed by seed."""
    rows, count = [], len(runs) // 2
    for name, (number, *how) in TRAINED.items():
        values = torch.tensor([interval(number(run))["value"] for run in runs.values()])
        raster_N, random_N = values.view(2, count)
        cells = []
        for x_N in (raster_N, random_N, random_N - raster_N):
            cells.append({"mean": x_N.mean().item(), "sd": x_N.std().item(), "seeds": count})
        shown = [show(cell, *how) for cell in cells[:2]]
        rows.append([name, *shown, show(interval(cells[2]), *how)])
    text = f"{count} trainings in each order; ±: sd over them; in brackets: 95% interval (Student)."
    head = ["", "raster order", "random order", "random - raster"]
    return table(head, rows) + below(runs, text, "metrics")


TARGETS = {"raster": 520, "random": 540}
"""order -> bits of a test image that a record comes down to, in that order"""
LEAST = 3
"""trainings that a record takes"""


def reached(run: Run, target: float) -> tuple[float, float]:
    """Return the minutes and the TFLOP of a training until `target` bits a test image.

    Evaluations do not count. Raises InputError if it never came down to the target.
    """
    step, seconds, batch = 0, 0.0, run.at("config.config.batch")
    for row in run.curve:
        seconds += (row["step"] - step) * batch / row["images_per_second"]
        step, tokens = row["step"], row["tokens_per_second"] / row["images_per_second"]
        if row.get("test_bits", math.inf) * tokens <= target:
            return seconds / 60, training_tflop(run) * step / run.at("config.config.steps")
    raise InputError(f"{run.name} never came down to {target} bits a test image: no record")


def records(runs: Runs) -> str:
    """Return how soon trainings came to TARGETS: a row for all record_<name>_<seed> of a name.

    Raises InputError for other codes, few seeds, or trainings of a name that are not alike.
    """
    shared(runs, "config.inputs.codes")
    named, rows = {}, []
    for title, run in runs.items():
        named.setdefault(title.rpartition("_")[0], {})[title] = run
    for name, some in named.items():
        first = next(iter(some.values()))
        config = first.at("config.config")
        for key in set(names(some, "config.config")) - {"seed", "out"}:
            shared(some, f"config.config.{key}")
        order = config["anneal"]["to"] if config["order"] == "anneal" else config["order"]
        seeds = {run.at("config.config.seed") for run in some.values()}
        if len(seeds) < LEAST or order not in TARGETS:
            orders = " or ".join(TARGETS)
            raise InputError(f"{name}: a record takes {LEAST} seeds, in {orders} order")
        both_R2 = torch.tensor([reached(run, TARGETS[order]) for run in some.values()])
        spread = zip(both_R2.mean(0).tolist(), both_R2.std(0).tolist(), strict=True)
        cells = [f"{TARGETS[order]} bits, {order} order", name.removeprefix("record_")]
        cells += [str(config[key]) for key in ("method", "model", "steps", "batch")]
        cells += [show({"mean": mean, "sd": sd}, 1) for mean, sd in spread]
        machines = dict.fromkeys(run.at("config.machine") for run in some.values())
        rows.append([*cells, ", ".join(machines), first.at("config.git_commit")[:7]])
    head = ["target", "record", "method", "model", "steps", "batch", "minutes", "TFLOP"]
    text = f"Of {LEAST} seeds or more, ± their sd; evaluations do not count. Config and curve of "
    text += "each: `checkpoints/reports/record_*`. A row of your own: train to "
    text += "`results/record_<name>_<seed>`, then `tools/report.py --keep` them."
    return table([*head, "machine", "commit"], sorted(rows)) + f"\n{text}\n"
