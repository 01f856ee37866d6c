"""What tools/report.py shows: its files read and checked, and kept small for git.

A run is a folder of what measured it: metrics.json (eval_c2i.py), and perhaps calibration.json
(tools/calibrate.py), robustness.json (tools/robustness.py), sweep.json (tools/sweep_cfg.py), and
from its training config.json and the curve metrics.jsonl. What is measured of no run has one file
in a folder of its own: see SINGLE.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.artifacts import ROOT, write_text
from models.data import evenly
from models.errors import InputError

PRODUCERS = {
    "metrics.json": "eval_c2i.py",
    "calibration.json": "tools/calibrate.py",
    "robustness.json": "tools/robustness.py",
    "sweep.json": "tools/sweep_cfg.py",
    "config.json": "train_c2i.py",
    "metrics.jsonl": "train_c2i.py",
    "tokenizer.json": "tools/measure_tokenizer.py",
    "benchmark.json": "tools/benchmark.py",
    "quickstart.json": "tools/quickstart.py",
}
SINGLE = ("tokenizer.json", "benchmark.json", "quickstart.json")
"""what is no run and has one file only"""
NEEDED = {
    "metrics.json": """
        num_samples config command device git_commit plan?.order plan?.cfg bits_per_image?.*.mean
    """,
    "calibration.json": """
        images command quality.*.spearman.value
        tokens.overall.accuracy.value tokens.overall.overconfidence_gap.value
        tokens.overall.ece_equal_width.value tokens.overall.ece_equal_width_if_calibrated.value
        tokens.overall.ece_equal_mass.value tokens.overall.reliability.count
        tokens.overall.reliability.confidence.value tokens.overall.reliability.accuracy.value
        tokens.by_step.*.ece_equal_width.value tokens.temperature.temperature.value
        tokens.temperature.gain_bits_per_image.value orders.bits_per_image.*.value
        orders.ensemble?.*.orders orders.ensemble?.*.log_mean_exp.value
        classes.before.accuracy.value classes.before.ece_equal_width.value
        classes.after.ece_equal_width.value entropy.difference_bits_per_image.value
    """,
    "robustness.json": """
        images command corruptions.images corruptions.by_severity.*.severity
        corruptions.by_severity.*.class_accuracy corruptions.by_severity.*.ece_equal_width
        corruptions.by_corruption.*.*.severity
        context.*.*.rho context.*.*.more_bits_per_image.value sampling.*.rho
    """,
    "sweep.json": """
        rows.*.plan.steps rows.*.plan.cfg rows.*.samples rows.*.control rows.*.num_samples
    """,
    "config.json": "config",
    "metrics.jsonl": "*.step",
    "tokenizer.json": "codes.*.psnr.value codes.*.as_samples control images",
    "benchmark.json": """
        threads device cpu peak_memory rows.*.stage rows.*.method rows.*.order rows.*.what
        rows.*.model rows.*.network_calls rows.*.peak_memory_gb rows.*.images_per_second
    """,
    "quickstart.json": "minutes cores resumed orders.*.label_accuracy orders.*.num_samples",
}
"""what a file must hold to be shown; `*` is every item, `?` follows what may be missing"""
STUDIES = ("calibration", "robustness", "sweep")
MODEL = ("method", "trained_order", "parameters")
"""in what the files of a run must agree"""
LEFT_OUT = {
    "bits_per_step",
    "difference_bits_per_step",
    "entropy_bits_per_step",
    "held_out_bits_per_step",
    "risk_coverage",
}
"""long lists that no report shows and no kept file holds"""
CURVE_ROWS = 300
"""rows of a kept curve, besides those with a likelihood"""
LARGEST = 100_000
"""bytes of a kept file"""


@dataclass(frozen=True)
class Run:
    """What is known of one run; None, or an empty curve, for what was not measured."""

    name: str
    metrics: dict
    calibration: dict | None
    robustness: dict | None
    sweep: dict | None
    training: dict | None
    """config.json: the header that its checkpoints carry"""
    curve: list[dict]


def _holds(found: Any, path: Sequence[str]) -> bool:
    """Tell whether parsed JSON has a value at a path of NEEDED."""
    if not path:
        return True
    if path[0] == "*" and isinstance(found, dict | list):
        children = found.values() if isinstance(found, dict) else found
        return all(_holds(child, path[1:]) for child in children)
    key = path[0].removesuffix("?")
    if not isinstance(found, dict) or key not in found:
        return isinstance(found, dict) and path[0].endswith("?")
    return _holds(found[key], path[1:])


def _read(folders: Sequence[Path], name: str) -> Any:
    """Return what the file of the first folder that has it holds, None if none has.

    Raises InputError if it is not what its producer writes.
    """
    path = next((folder / name for folder in folders if (folder / name).exists()), None)
    if path is None:
        return None
    rerun = f"run {PRODUCERS[name]} again, or remove the file"
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if name.endswith("l") else [text]
        parsed = [json.loads(line) for line in lines]
    except ValueError as e:  # not JSON, or not text
        raise InputError(f"{path} is broken ({e}): {rerun}") from None
    found = parsed if name.endswith("l") else parsed[0]
    for needed in NEEDED[name].split():
        if not _holds(found, needed.split(".")):
            raise InputError(f"{path} has no {needed}, so no {PRODUCERS[name]} wrote it: {rerun}")
    return found


def read_run(folder: Path, trainings: Path | None = None) -> Run:
    """Read a run; its config.json and curve may also lie in `trainings`/<name of the run>.

    Raises InputError if there is no metrics.json, a file is broken, or they are of two models.
    """
    name = folder.resolve().name
    folders = [folder, trainings / name] if trainings else [folder]
    metrics = _read([folder], "metrics.json")
    if metrics is None:
        raise InputError(
            f"expected a run at {folder}, found no metrics.json there; "
            f"run: uv run eval_c2i.py --checkpoint YOURS --out {folder}"
        )
    studies = {part: _read([folder], f"{part}.json") for part in STUDIES}
    for part, study in studies.items():
        for key in MODEL if study else ():
            ours, theirs = metrics.get(key), study.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise InputError(
                    f"{folder}/{part}.json is of another model than the metrics.json beside it: "
                    f"{key} {theirs}, not {ours}"
                )
    curve = _read(folders, "metrics.jsonl") or []
    return Run(name, metrics, **studies, training=_read(folders, "config.json"), curve=curve)


def other_checkpoints(run: Run) -> list[str]:
    """Return a line for each study of another checkpoint file than the run's metrics.json.

    Not an error: a file that was exported again has another sha256 and the same weights.
    """
    ours = run.metrics.get("inputs", {}).get("checkpoint")
    found = []
    for part in STUDIES:
        theirs = (getattr(run, part) or {}).get("inputs", {}).get("checkpoint", ours)
        if theirs != ours:
            found.append(
                f"note: {part}.json of {run.name} was measured on checkpoint {theirs[:8]}, its "
                f"metrics.json on {(ours or 'unknown')[:8]}; are the weights the same?"
            )
    return found


def read_runs(folders: Sequence[Path], trainings: Path | None = None) -> list[Run]:
    """Read several runs. Raises InputError if two have one name."""
    runs = [read_run(folder, trainings) for folder in folders]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected runs of different names, got {', '.join(twice)} more than once")
    return runs


def single_file(folder: Path) -> str | None:
    """Return the name of the one file of SINGLE in a folder that is no run, None if it is one."""
    found = [name for name in SINGLE if (folder / name).exists()]
    return found[0] if found and not (folder / "metrics.json").exists() else None


def read_single(folder: Path, name: str) -> dict:
    """Read a file of SINGLE. Raises InputError if it is missing or broken."""
    found = _read([folder], name)
    if found is None:
        raise InputError(f"expected {folder / name}, found nothing; run {PRODUCERS[name]}")
    return found


def kept_folders(kept: Path) -> list[Path]:
    """Return the folders of kept runs. Raises InputError if there are none."""
    folders = sorted(path for path in kept.glob("*") if path.is_dir() and not single_file(path))
    if not folders:
        raise InputError(f"no runs in {kept}; run: uv run tools/report.py --keep results/YOURS")
    return folders


def _shortened(found: Any) -> Any:
    """Return parsed JSON with 6 significant digits and without the lists of LEFT_OUT."""
    if isinstance(found, dict):
        return {key: _shortened(item) for key, item in found.items() if key not in LEFT_OUT}
    if isinstance(found, list):
        return [_shortened(item) for item in found]
    return float(f"{found:.6g}") if isinstance(found, float) else found


def _lines(found: dict) -> str:
    """Return JSON with one line for each key, so that git shows what changed."""
    lines = (f"{json.dumps(key)}: {json.dumps(item)}" for key, item in _shortened(found).items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _thinned(curve: list[dict]) -> list[dict]:
    """Return all rows with a likelihood, and of the others some that are evenly spaced."""
    others = [i for i, row in enumerate(curve) if "heldout_bits" not in row]
    some = {others[k] for k in evenly(len(others), min(len(others), CURVE_ROWS))} if others else ()
    return [row for i, row in enumerate(curve) if "heldout_bits" in row or i in some]


def _texts(folder: Path, trainings: Path | None) -> dict[str, str]:
    """Return what is kept of a run, or of a single file: {name: text}."""
    single = single_file(folder)
    if single:
        return {single: _lines(read_single(folder, single))}
    run = read_run(folder, trainings)
    parts = {"metrics.json": run.metrics, "config.json": run.training}
    parts |= {f"{study}.json": getattr(run, study) for study in STUDIES}
    texts = {name: _lines(part) for name, part in parts.items() if part is not None}
    if run.curve:
        rows = (json.dumps(_shortened(row)) + "\n" for row in _thinned(run.curve))
        texts["metrics.jsonl"] = "".join(rows)
    return texts


def keep_run(folder: Path, kept: Path, trainings: Path | None = None) -> dict[str, int]:
    """Copy a run's numbers, or a single file's, to `kept`/<its name>; return the bytes of each.

    Floats are rounded to 6 significant digits, the lists of LEFT_OUT dropped, long curves thinned,
    paths below the project made relative. Raises InputError, before anything is written, if the run
    cannot be read or a file would still be too large for git.
    """
    found = _texts(folder, trainings)
    texts = {name: text.replace(f"{ROOT}/", "") for name, text in found.items()}
    for name, text in texts.items():
        if len(text) > LARGEST:
            raise InputError(
                f"{name} of {folder} takes {len(text):,} bytes, more than the {LARGEST:,} of a "
                "file in git; nothing was kept"
            )
    for name, text in texts.items():
        write_text(kept / folder.resolve().name / name, text)
    return {name: len(text) for name, text in texts.items()}
