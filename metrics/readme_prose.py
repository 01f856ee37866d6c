"""The sentences of README.md that hold numbers: the words are in metrics/readme/, the numbers here.

A text says {fact} where a number belongs; what makes the block gives exactly these facts.
"""

import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metrics.kept_numbers import RHO, needed, pair, same, single
from metrics.orders_likelihood import RANDOM
from metrics.readme_seeds import seed_cells, seed_runs
from metrics.report_runs import Run
from metrics.report_tables import number
from models.artifacts import ROOT
from models.errors import InputError

TEXTS = Path(__file__).parent / "readme"
TOKENIZER = ("vqvae_cifar10", "tokenizer.json")
IMAGES = 60_000
"""of CIFAR-10, each encoded together with its mirror image"""


def fill(name: str, facts: dict[str, str], texts: Path = TEXTS) -> str:
    """Return the text <name>.md with its {facts}. Raises InputError for too many or too few."""
    path = texts / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    asked = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    if asked != facts.keys():
        missing, unused = sorted(asked - facts.keys()), sorted(facts.keys() - asked)
        raise InputError(f"{path}: no such facts {missing}; facts without a place {unused}")
    return text.format_map(facts)


def both(name: str, runs: Sequence[Run], show: Callable[[Run], str]) -> dict[str, str]:
    """Return {raster_<name>, random_<name>}."""
    raster, random = runs
    return {f"raster_{name}": show(raster), f"random_{name}": show(random)}


def quickstart(kept: Path) -> str:
    """Return how long the quickstart takes and what comes of it."""
    found = single(kept, "quickstart", "quickstart.json")
    if found("resumed"):
        raise InputError(
            f"{kept}/quickstart is of a quickstart that went on from a cut one, so its minutes are "
            "not those of a whole one; remove results/quickstart and run it again"
        )
    facts = {"minutes": f"{found('minutes'):.0f}", "cores": str(found("cores"))}
    for order in ("raster", "random"):
        facts[order] = number(found("orders", order, "label_accuracy"), 0, percent=True)
        facts["samples"] = f"{found('orders', order, 'num_samples'):,}"
    return fill("quickstart", facts)


def _minutes(images: int, images_per_second: float) -> str:
    minutes = images / images_per_second / 60
    return f"{minutes:.0f}" if minutes >= 1 else "under 1"


def stages(kept: Path) -> str:
    """Return the table of stages: what each takes and gives."""
    runs = pair(kept)
    tokenizer, speed = single(kept, *TOKENIZER), single(kept, "benchmark", "benchmark.json")
    steps, batch, model = (
        same(runs, kept, "config.json", "config", key) for key in ("steps", "batch", "model")
    )
    samples, tokenizer_batch = runs[0].metrics["num_samples"], tokenizer("train_batch")
    search = tokenizer("codes.stored.search")
    randar = {"method": "randar", "model": model}
    rows = {
        "tokenizer": (
            tokenizer("train_steps") * tokenizer_batch, {"stage": 2, "batch": tokenizer_batch}
        ),
        "search": (IMAGES, {"what": f"encoding, --search {search}"}),
        "nearest": (IMAGES, {"what": "encoding, --search 0"}),
        "train": (steps * batch, {"stage": 4, "batch": batch} | randar),
        "sample": (samples, {"stage": 5, "network_calls": 64} | randar),
    }  # fmt: skip
    facts = {
        f"{name}_minutes": _minutes(images, speed("rows", row, "images_per_second"))
        for name, (images, row) in rows.items()
    }
    on_cpu = speed("device") == "cpu"
    return fill(
        "stages",
        facts
        | both(
            "bits",
            runs,
            lambda run: number(needed(run, kept, "metrics.json", "bits_per_image.own.mean"), 0),
        )
        | {
            "machine": f"{speed('threads')} CPU cores" if on_cpu else speed("device"),
            "tokenizer_steps": str(tokenizer("train_steps")),
            "search": str(search),
            "model": model,
            "batch": str(batch),
            "steps": str(steps),
            "samples": f"{samples:,}",
            "nearest_psnr": number(tokenizer("codes.nearest.psnr.value"), 1),
            "stored_psnr": number(tokenizer("codes.stored.psnr.value"), 1),
            "usage": number(tokenizer("codes.nearest.codebook_usage"), 0, percent=True),
        },
    )


def first_run_setting(kept: Path) -> str:
    """Return what the shipped pair is and how it was trained; both alike but for the order."""
    runs = pair(kept)

    def config(key: str) -> Any:
        return same(runs, kept, "config.json", "config", key)

    same(runs, kept, "config.json", "config.seed")
    return fill(
        "first_run_setting",
        {
            "model": config("model"),
            "parameters": f"{same(runs, kept, 'metrics.json', 'parameters') / 1e6:.1f}",
            "steps": f"{config('steps'):,}",
            "batch": str(config("batch")),
            "guidance": f"{same(runs, kept, 'metrics.json', 'plan.cfg'):g}",
            "schedule": same(runs, kept, "metrics.json", "plan.schedule"),
        },
    )


def beside_it(kept: Path) -> str:
    """Return what the first run's numbers are to be compared with."""
    runs, tokenizer = pair(kept), single(kept, *TOKENIZER)
    decoded = tokenizer("codes.stored.as_samples")
    without = {
        name: number(same(runs, kept, "metrics.json", f"baseline_bits.{name}"), 1)
        for name in ("uniform", "class_position", "raster_bigram")
    }
    for name in ("FD_c10", "FID768", "recall768"):
        without[f"decoded_{name}"] = number(decoded.get(name), 3)
    accuracy = number(decoded.get("label_accuracy"), 1, percent=True)
    return fill("beside_it", without | {"decoded_accuracy": accuracy})


def parts(kept: Path) -> str:
    """Return the table of what the results stand on."""
    found = single(kept, *TOKENIZER)
    shipped = ROOT / "checkpoints/extractor_cifar10.pth"
    facts = {
        "codebook": f"{found('codebook_size'):,}",
        "grid": f"{found('grid')}x{found('grid')}",
        "parameters": f"{found('parameters') / 1e6:.1f}",
        "tokenizer_steps": str(found("train_steps")),
        "search": str(found("codes.stored.search")),
        "extractor_accuracy": number(found("control.label_accuracy"), 2, percent=True),
        "extractor_size": f"{shipped.stat().st_size / 1e6:.1f}",
        "images": f"{found('images'):,}",
    }
    shown = {
        "psnr.value": ("psnr", 2, False),
        "codebook_usage": ("usage", 0, True),
        "perplexity": ("perplexity", 0, False),
        "rFD_c10": ("rfd", 3, False),
        "rFID768": ("rfid768", 3, False),
    }
    for kind in ("nearest", "stored"):
        for path, (name, *how) in shown.items():
            facts[f"{kind}_{name}"] = number(found("codes", kind, path), *how)
    return fill("parts", facts)


def finding(kept: Path) -> str:
    """Return what random order did to likelihood, calibration and robustness, and what not."""
    runs, seeds = pair(kept), seed_runs(kept)

    def shown(name: str, digits: int, file: str, *path: str | dict, percent: bool = False):
        return both(name, runs, lambda run: number(needed(run, kept, file, *path), digits, percent))

    calibrated, robust, wrong = "calibration.json", "robustness.json", {"rho": RHO}
    found = _orders_facts(runs, kept) | _corruption_facts(runs, kept)
    found |= {
        "rho": f"{RHO:.0%}",
        "context_images": f"{same(runs, kept, robust, 'images'):,}",
        "seeds": str(len(seeds["raster order"])),
        "seed_steps": f"{seeds['raster order'][0].metrics['train_steps']:,}",
        **shown("together", 1, calibrated, "orders.ensemble.random.gain"),
        **shown("ece", 4, calibrated, "tokens.overall.ece_equal_width"),
        **shown("temperature", 2, calibrated, "tokens.temperature.temperature"),
        **shown("entropy", 0, calibrated, "entropy.difference_bits_per_image"),
        **shown("uniform", 1, robust, "context.uniform", wrong, "more_bits_per_image"),
        **shown("neighbours", 1, robust, "context.neighbours", wrong, "more_bits_per_image"),
    }
    for name, rho in (("read", {"rho": 0}), ("misread", wrong)):
        where = (robust, "sampling", rho)
        found |= shown(f"{name}_accuracy", 0, *where, "label_accuracy", percent=True)
        found |= shown(f"{name}_distance", 1, *where, "FD_c10")
    for name in ("bits", "ece", "uniform", "neighbours", "accuracy"):
        *_, found[f"seeds_{name}"] = seed_cells(seeds, kept, name)
    return fill("finding", found)


def _orders_facts(runs: Sequence[Run], kept: Path) -> dict[str, str]:
    """Return the finding's facts on likelihood by order."""
    own = [needed(run, kept, "metrics.json", "bits_per_image.own") for run in runs]
    cost = {"mean": own[1]["mean"] - own[0]["mean"], "se": math.hypot(*(x["se"] for x in own))}
    by_order = "orders.bits_per_image"
    names = needed(runs[0], kept, "calibration.json", by_order)
    drawn = [name for name in names if name.startswith(RANDOM)]

    def others(run: Run) -> list[float]:
        found = needed(run, kept, "calibration.json", by_order)
        return [bits["value"] for n, bits in found.items() if n != run.metrics["trained_order"]]

    return {
        "cost": number(cost, 1),
        "orders": str(len(drawn)),
        "scans": str(len(names) - len(drawn)),
        "order_images": f"{same(runs, kept, 'calibration.json', 'images'):,}",
        "raster_own": number(
            needed(runs[0], kept, "calibration.json", by_order, "raster.value"), 1
        ),
        **both(
            "bits",
            runs,
            lambda run: number(needed(run, kept, "metrics.json", "bits_per_image.own"), 1),
        ),
        **both("least", runs, lambda run: number(min(others(run)), 1)),
        **both("most", runs, lambda run: number(max(others(run)), 1)),
    }


def _corruption_facts(runs: Sequence[Run], kept: Path) -> dict[str, str]:
    """Return the finding's facts on corrupted images."""
    rows = [needed(run, kept, "robustness.json", "corruptions.by_severity") for run in runs]
    pairs = [[one["class_accuracy"] for one in both_rows] for both_rows in zip(*rows, strict=True)]
    gaps = [100 * (raster["value"] - random["value"]) for raster, random in pairs]
    apart = [a for a, b in pairs if a["low"] > b["high"] or b["low"] > a["high"]]
    worst = [one[-1] for one in rows]
    return {
        "corrupted_images": f"{same(runs, kept, 'robustness.json', 'corruptions.images'):,}",
        "least_gap": number(min(gaps), 1),
        "most_gap": number(max(gaps), 1),
        "severities": str(len(pairs)),
        "apart": str(len(apart)),
        "worst": str(worst[0]["severity"]),
        "raster_worst_ece": number(worst[0]["ece_equal_width"], 4),
        "random_worst_ece": number(worst[1]["ece_equal_width"], 4),
    }


PROSE_BLOCKS = {
    "quickstart": quickstart,
    "stages": stages,
    "first_run_setting": first_run_setting,
    "beside_it": beside_it,
    "finding": finding,
    "parts": parts,
}
