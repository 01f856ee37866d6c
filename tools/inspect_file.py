#!/usr/bin/env -S uv run
"""What is in this file? Its header, its shapes, where it comes from, and whether it is intact.

Reads any .npy or .pth that a stage wrote, and looks for the files that it was made from.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from models import artifacts, command
from models.artifacts import ROOT, read_json, sidecar
from models.command import InputError, run

PLACES = ("data/*/*.npy", "data/*/*.pth", "tokenizer_vq/*.pth", "checkpoints/*.pth")


@dataclass(frozen=True)
class InspectConfig(command.Config):
    """Show what is in a file of a stage."""

    file: tyro.conf.Positional[Path]
    """.npy or .pth"""


def read(path: Path) -> tuple[dict, list[str]]:
    """Return the header and lines on the contents. Raises InputError for a file that is broken."""
    artifacts.expect_file(path, "an .npy or .pth", "give a file that a stage wrote")
    if path.suffix == ".npy":
        array, header = artifacts.read_array(path, "an array", "make it again")
        return header, [f"{array.dtype} {array.shape}, {array.min()} to {array.max()}"]
    contents, digest = artifacts.safe_load(path, "make it again")
    header = contents.get("header") if isinstance(contents, dict) else None
    if not isinstance(header, dict):
        raise InputError(f"{path} has no header: another project's; try tools/import_checkpoint.py")
    return header | {"sha256": digest}, [*describe(contents)]


def describe(contents: dict) -> Iterator[str]:
    """Yield a line for each part of a checkpoint: its tensors, or its value."""
    for name, part in contents.items():
        tensors = [tensor for _, tensor in artifacts.tensors_in(part)]
        if tensors:
            values = sum(tensor.numel() for tensor in tensors)
            kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
            bad = sum(not torch.isfinite(t).all() for t in tensors if t.is_floating_point())
            broken = f", NaN OR INFINITE IN {bad}" if bad else ""
            yield f"{name}: {len(tensors)} tensors, {values:,} {'/'.join(kinds)} values{broken}"
        elif name != "header":
            yield f"{name}: {short(part)}"


def short(value: Any, length: int = 150) -> str:
    """Return a value as one line, not longer than that."""
    text = json.dumps(value, default=str)
    return text if len(text) <= length else f"{text[:length]}.. ({len(text):,} characters)"


def files_here() -> dict[str, Path]:
    """Return the artifacts of the project by their sha256."""
    paths = {}
    for path in (path for place in PLACES for path in sorted(ROOT.glob(place))):
        if path.suffix == ".pth":
            paths[artifacts.sha256_of(path)] = path
            continue
        with contextlib.suppress(OSError, ValueError):  # without a header, or with a broken one
            paths[read_json(sidecar(path)).get("sha256")] = path
    return paths


def chain(header: dict, here: dict[str, Path], depth: int = 1) -> Iterator[str]:
    """Yield what a file was made from, and what that was made from, as far as it lies here."""
    for name, sha256 in header.get("inputs", {}).items():
        path = here.get(sha256)
        where = path.relative_to(ROOT) if path else "not here"
        yield f"{'  ' * depth}{name} {str(sha256)[:12]}: {where}"
        if path and depth < 8:
            # of an array the header alone: images of 150 MB would be read for a line each
            array = path.suffix == ".npy"
            yield from chain(read_json(sidecar(path)) if array else read(path)[0], here, depth + 1)


def main(cfg: InspectConfig) -> None:
    """Read and print it all."""
    header, contents = read(cfg.file)
    print(f"{cfg.file}: {header.get('kind')}, intact, sha256 {header['sha256'][:12]}..")
    for line in contents:
        print(f"  {line}")
    for name, value in header.items():
        if name not in ("sha256", "inputs", "config"):  # shown in their own way
            print(f"  {name}: {short(value)}")
    for name, value in header.get("config", {}).items():
        print(f"  config.{name}: {short(value)}")
    print("made from", *([*chain(header, files_here())] or ["  no file"]), sep="\n")


if __name__ == "__main__":
    run(main, InspectConfig)
