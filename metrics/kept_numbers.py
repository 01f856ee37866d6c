"""Numbers of the kept runs, for README.md: the number, or one line about what is missing."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metrics.report_runs import PRODUCERS, Run, read_runs, read_single
from models.errors import InputError

FIRST = {
    "raster order": "randar_raster_nano_cifar10",
    "random order": "randar_random_nano_cifar10",
}
"""the shipped pair, by the title of its column"""
RHO = 0.4
"""share of wrong codes that README.md speaks of"""


def part_of(run: Run, kept: Path, file: str) -> Any:
    """Return a run's calibration, robustness, training or curve. Raises InputError without it."""
    attribute = {"config.json": "training", "metrics.jsonl": "curve"}.get(file, Path(file).stem)
    found = getattr(run, attribute)
    if not found:
        raise InputError(
            f"README.md needs {kept / run.name / file}, and it is not there; run {PRODUCERS[file]},"
            f" then: uv run tools/report.py --keep results/{run.name}"
        )
    return found


def _at(found: Any, file: Path, path: Sequence[str | dict], own: str | None = None) -> Any:
    """Return what the parsed JSON of a file holds at a path, see `needed`."""
    keys = [key for step in path for key in (step.split(".") if isinstance(step, str) else [step])]
    for key in keys:
        if isinstance(key, dict) and isinstance(found, list):
            found = next((row for row in found if key.items() <= row.items()), None)
        else:
            found = found.get(own if key == "own" else key) if isinstance(found, dict) else None
        if found is None:
            said = (str(k).strip("{}").replace("'", "") for k in keys)
            raise InputError(
                f"README.md needs {' / '.join(said)} in {file}, and it is not there; run "
                f"{PRODUCERS[file.name]} again, then tools/report.py --keep"
            )
    return found


def needed(run: Run, kept: Path, file: str, *path: str | dict) -> Any:
    """Return what a run's file holds at a path; `own` in it is the order it was trained in.

    A string is keys with dots between them, a dict picks the row of a list in which it holds.
    Raises InputError without it.
    """
    found = part_of(run, kept, file)
    return _at(found, kept / run.name / file, path, run.metrics.get("trained_order"))


def single(kept: Path, folder: str, file: str) -> Callable[..., Any]:
    """Return what looks up a path, as in `needed`, in a file of SINGLE."""
    found = read_single(kept / folder, file)
    return lambda *path: _at(found, kept / folder / file, path)


def alike(runs: Sequence[Run], *fields: str) -> list[Any]:
    """Return the values of fields of metrics.json. Raises InputError if runs differ in one."""
    for field in fields:
        _all_the_same(field, {run.name: run.metrics.get(field) for run in runs})
    return [runs[0].metrics.get(field) for field in fields]


def same(runs: Sequence[Run], kept: Path, file: str, *path: str | dict) -> Any:
    """Return what `needed` finds in each run. Raises InputError if it is not the same."""
    found = {run.name: needed(run, kept, file, *path) for run in runs}
    _all_the_same(str(path[-1]), found)
    return found[runs[0].name]


def _all_the_same(what: str, found: dict[str, Any]) -> None:
    """Raise InputError, naming the runs, if they have not all one value."""
    if len(set(map(str, found.values()))) > 1:
        said = ", ".join(f"{value} ({name})" for name, value in found.items())
        raise InputError(f"README.md compares runs of one {what}, got {said}")


def pair(kept: Path) -> list[Run]:
    """Return the two runs of FIRST. Raises InputError if one is not kept."""
    return read_runs([kept / name for name in FIRST.values()])
