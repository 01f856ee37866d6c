"""Flags of every command, drawn from its fields: one line, or a result; inputs are left alone.

As tests/hostile/test_campaign.py: `--cases`, `--first-case`. Commands that only start others are
parsed, not run.
"""

import contextlib
import io
import shutil
import traceback
import typing
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny, script
from test_commands import SCRIPTS, config_of
from tiny_cifar import write_image_folder
from tiny_extractor import write_extractor

from hostile.targets import generator_of, write_npz, write_perceptual, write_run
from hostile.test_campaign import Hang, limited
from models import command
from models.artifacts import sha256_of
from models.command import Output, Range, marks_of

STARTERS = ("tools/quickstart.py", "tools/benchmark.py")
JUNK = ("", "x", "nan", "inf", "-1", "0", "1e400", "9" * 30, "0x10", "1.5", "None", "a b", "--",
        "-", "\u2028", "../..", "%s", "'", '"', "True")  # fmt: skip
SMALL = {"steps": 2, "batch": 20, "num_samples": 10, "images": 10, "epochs": 1, "heldout": 20,
         "corrupted_images": 0, "random_orders": 1, "final": 0, "iterations": 3, "reference": 20,
         "cfg_scale": 1, "count_train": 10, "count_test": 10, "decode_steps": 4, "cluster_size": 2,
         "warmup": 0, "eval_every": 2, "save_every": 2, "init": "None", "perceptual": 0, "width": 8,
         "inception_weights": "none", "device": "cpu", "model": "nano", "labels": None,
         "trials": 1, "tflop": 1e-6, "views": 2, "rounds": 1}  # fmt: skip
"""values with which a command takes about a second"""
HEAVY = (*SMALL, "devices", "seeds", "search", "logger", "url", "source", "model.width",
         "model.blocks", "model.codebook_size", "model.code_dim", "temperature")  # fmt: skip
"""fields that are given small values or wrong ones, and nothing between"""
SLOW = ("base", "large")
"""choices that take most of a minute, which a busy machine makes more than one"""


@pytest.fixture(scope="module")
def files(world, tmp_path_factory) -> dict[str, Path]:
    """Small inputs of every command, by the names of the fields that take them."""
    folder = tmp_path_factory.mktemp("inputs")
    write_image_folder(folder / "images")
    write_extractor(folder / "extractor.pth", dataset="shapes")
    write_perceptual(folder)
    (folder / "run").mkdir()
    write_run(folder / "run")
    write_npz(folder)
    save_tiny(folder / "generator.pth", world, order="random")
    (folder / "published").mkdir()
    generator_of("gpt").write(folder / "published")
    np.save(folder / "order.npy", np.arange(64))
    return {
        "checkpoint": folder / "generator.pth", "tokenizer": world.tokenizer, "codes": world.codes,
        "data": world.data, "extractor": folder / "extractor.pth", "source": folder / "images",
        "samples": folder / "s.npz", "runs": folder / "run", "kept": folder,
        "file": folder / "s.npz",
        "perceptual_weights": folder / "p.pth", "trainings": folder, "order": folder,
        "sampling": folder / "run/metrics.json", "downloads": folder / "new", "work": folder / "w",
        "cifar10_c": folder, "init": world.tokenizer, "inception_weights": folder / "s.npz",
    }  # fmt: skip


@pytest.fixture(scope="module")
def copies(files, tmp_path_factory) -> list[Path]:
    """Other files and folders, for outputs to write over."""
    folder, found = tmp_path_factory.mktemp("copies"), []
    for path in sorted({path for path in files.values() if path.exists()}):
        found.append(folder / str(len(found)) / path.name)
        found[-1].parent.mkdir()
        (shutil.copytree if path.is_dir() else shutil.copy)(path, found[-1])
    return found


def flat(kind: type, prefix: str = "") -> list[tuple[str, object]]:
    """Return the flags of a config and their types; those of MeasureConfig have no prefix."""
    hints, found = typing.get_type_hints(kind, include_extras=True), []
    for field in fields(kind):
        hint = hints[field.name]
        inner = typing.get_args(hint)[0] if marks_of(hint) and typing.get_args(hint) else hint
        if is_dataclass(inner):
            nested = "" if inner is not hint else f"{prefix}{field.name}."
            found += flat(inner, nested)
        else:
            found.append((prefix + field.name, hint))
    return found


def value_of(name: str, hint, rng, files: dict[str, Path], outs: list[Path]) -> str:
    """Return a value for a flag: a good one, one at the edge of its range, or none that fits."""
    marks = marks_of(hint)
    if rng.random() < 0.3:
        return JUNK[rng.integers(len(JUNK))]
    if any(isinstance(mark, Output) for mark in marks):
        return str(outs[rng.integers(len(outs))])
    if allowed := next((mark for mark in marks if isinstance(mark, Range)), None):
        near = (allowed.least, allowed.least - 1, allowed.most + 1, -allowed.most, 2.0**63)
        good = near if name in HEAVY else (*near, allowed.most, (allowed.least + allowed.most) / 2)
        value = good[rng.integers(len(good))]
        return str(int(value) if float(value).is_integer() else value)
    if name in files or Path in typing.get_args(hint) or hint is Path:
        places = (*files.values(), *outs[:2], Path("/dev/null"), Path("a" * 300))
        return str(places[rng.integers(len(places))])
    parts = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part)]
    choices = [c for part in parts for c in typing.get_args(part) if isinstance(c, str)]
    choices = [c for c in choices if c not in SLOW]
    return choices[rng.integers(len(choices))] if choices else JUNK[rng.integers(len(JUNK))]


def line_of(path: str, rng, files: dict[str, Path], copies: list[Path], out: Path) -> list[str]:
    """Return the arguments of a command: what makes it small, and one to four drawn ones."""
    flags = dict(flat(config_of(path)))
    line = {name: SMALL[name] for name in flags if name in SMALL and SMALL[name] is not None}
    line |= {name: files[name] for name in flags if name in files and name not in SMALL}
    if path == "eval_c2i.py":
        del line["samples" if rng.random() < 0.8 else "checkpoint"]
    line |= {"out": out / ("new.pth" if Output(".pth") in marks_of(flags["out"]) else "new")} \
        if "out" in flags else {}  # fmt: skip
    line.pop("order", None)
    outs = [out, *(out / name for name in ("new", "new.pth", "new.png")), *copies]
    outs += [Path("/dev/null/a"), *(value for value in line.values() if isinstance(value, Path))]
    for name in rng.choice(list(flags), rng.integers(1, 5)):
        line[name] = value_of(name, flags[name], rng, files, outs)
    free = [str(line.pop(name)) for name in ("file", "runs") if name in line]
    if path == "tools/import_checkpoint.py":
        free.append(str(line.pop("source")))
    return [*free, *(f"--{name.replace('_', '-')}={value}" for name, value in line.items())]


def hashes(files: dict[str, Path]) -> dict[Path, str]:
    every = {p for f in files.values() for p in ([f] if f.is_file() else f.rglob("*"))}
    return {p: sha256_of(p) for p in every if p.is_file()}


def test_any_flags_end_in_one_line_or_a_result(files, copies, tmp_path, pytestconfig, monkeypatch):
    first, cases = (pytestconfig.getoption(f"--{name}") for name in ("first-case", "cases"))
    monkeypatch.chdir(tmp_path)
    before, tally, wrong = hashes(files), Counter(), []
    for case in range(first, first + cases // 4):
        rng = np.random.default_rng([8, case])
        path = SCRIPTS[case % len(SCRIPTS)]
        line = line_of(path, rng, files, copies, tmp_path / f"out{case}")
        where = f"case {case}: {path} {' '.join(line)}"
        nowhere = io.TextIOWrapper(io.BytesIO())
        quiet = contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)
        monkeypatch.setattr("sys.argv", [path, *line])
        main = script(path).main if path not in STARTERS else lambda cfg: None
        try:
            with limited(60), quiet[0], quiet[1], torch.random.fork_rng():
                command.run(main, config_of(path))
            result = "done"
        except SystemExit as e:
            result = "refused"
            if not isinstance(e.code, str) or "\n" in e.code or not e.code.startswith("error: "):
                wrong.append(f"{where}: {e.code!r}")
        except Hang:
            wrong.append(f"{where}: took too long")
            result = "hang"
        except BaseException as e:
            result = "traceback"
            at = traceback.extract_tb(e.__traceback__)[-1]
            wrong.append(f"{where}: {type(e).__name__} {str(e)[:200]} at {at.filename}:{at.lineno}")
        tally[result] += 1
        if case % 50 == 0 or case + 1 == first + cases // 4:
            now = hashes(files)
            changed = [p for p in before if now.get(p) != before[p]]
            wrong += [f"{where}, or before it: inputs changed: {changed}"] * bool(changed)
            before = now
    print(dict(tally))
    assert not wrong, f"{len(wrong)} of {cases // 4}, the first:\n" + "\n".join(wrong[:40])
