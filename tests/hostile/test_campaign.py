"""Files from outside, damaged in every way: one line, or what was in them; never anything else.

`uv run pytest tests/hostile --cases 100000 -n 0` runs the campaign; `--first-case N` one of it.
"""

import contextlib
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import same

from hostile import corrupt
from hostile.targets import TARGETS
from models.command import InputError

SECONDS = 10
MEMORY = 12 << 30


class Hang(BaseException):
    """Not an Exception, so that no `except` of a library takes it."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS):
    """End what takes longer, or asks for memory that no valid file needs."""

    def hang(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damage(path: Path, folder: Path, rng: np.random.Generator, mark: Path) -> str:
    """Damage a file in one way, by its kind; return the way."""
    raw, ways = path.read_bytes(), ["bytes", "bytes", "swapped", "gone", "folder", "fifo"]
    ways += {".json": ["json"] * 4, ".pth": ["checkpoint"] * 6, ".pt": ["checkpoint"] * 6}.get(
        path.suffix, ["array", "array", "header"] if path.suffix == ".npy" else []
    )
    way = ways[rng.integers(len(ways))]
    if way == "checkpoint":
        path.write_bytes(corrupt.of_checkpoint(raw, rng, mark))
    elif change := getattr(corrupt, f"of_{way}", None):
        path.write_bytes(change(raw, rng))
    elif way == "swapped":
        others = sorted(p for p in folder.parent.rglob("*") if p.is_file())
        path.write_bytes(others[rng.integers(len(others))].read_bytes())
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "fifo":
            os.mkfifo(path)
    return way


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> dict:
    """Every target's files, and what is in them."""
    root, found = tmp_path_factory.mktemp("pristine"), {}
    torch.manual_seed(0)
    for name, target in TARGETS.items():
        (root / name).mkdir()
        target.write(root / name)
        found[name] = root / name, target.read(root / name)
    return found


@pytest.mark.parametrize(("name", "width"), [("generator gpt", 2**14), ("tokenizer", 2**12)])
def test_a_size_that_the_weights_cannot_fill_is_not_allocated(pristine, tmp_path, name, width):
    path = next(pristine[name][0].glob("*.pth"))
    contents = torch.load(path, weights_only=True)
    contents["model_config"] |= {"width": width}
    torch.save(contents, tmp_path / path.name)
    with limited(), pytest.raises(InputError, match="size mismatch"):
        TARGETS[name].read(tmp_path)


def test_damaged_files_end_in_one_line_or_read_as_they_were(pristine, tmp_path, pytestconfig):
    first, cases = (pytestconfig.getoption(f"--{name}") for name in ("first-case", "cases"))
    tally, wrong = Counter(), []
    for case in range(first, first + cases):
        rng = np.random.default_rng([7, case])
        name = list(TARGETS)[case % len(TARGETS)]
        source, wanted = pristine[name]
        folder, mark = tmp_path / "case", tmp_path / "it_ran"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("train_"))
        path = files[rng.integers(len(files))]
        way = damage(path, source, rng, mark)
        before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        where = f"case {case}: {name}, {path.name}, {way}"
        try:
            with limited():
                found = TARGETS[name].read(folder)
            result = "as it was" if same(found, wanted) else "read"
            if result == "read" and TARGETS[name].exact and way == "bytes":
                wrong.append(f"{where}: read as something else")
        except (InputError, OSError) as e:
            result = "refused"
            if "\n" in str(e) and isinstance(e, InputError) or len(str(e)) > 1500:
                wrong.append(f"{where}: more than a line: {e}")
        except Hang:
            result = "hang"
            wrong.append(f"{where}: took more than {SECONDS} s")
        except BaseException as e:
            result = "traceback"
            at = traceback.extract_tb(e.__traceback__)[-1]
            wrong.append(f"{where}: {type(e).__name__} {str(e)[:200]} at {at.filename}:{at.lineno}")
        after = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name in before}
        if name not in ("features", "done") and after != before:
            wrong.append(f"{where}: it was changed")
        if mark.exists():
            wrong.append(f"{where}: its code ran")
            mark.rmdir()
        tally[result] += 1
    print(dict(tally))
    assert not wrong, f"{len(wrong)} of {cases}, the first:\n" + "\n".join(wrong[:40])
