"""The only reader and writer of .npy and .pth files, and of what is known about them.

Every artifact carries a header: kind, producer, config, git commit, sha256 of its inputs, and for
an array its shape, dtype and own sha256. A .pth holds it under the key `header`; an .npy has it in
a sidecar `NAME.npy.json`. Files are written beside their target and renamed, so a reader sees the
old file or the new one, never a part. Pickled code is never run (`weights_only=True`).
"""

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
"""Project root; the stages' default paths start here, so they work from any folder."""


def sha256_of(source: Path | np.ndarray) -> str:
    """Return the sha256 hex digest of a file's bytes or of an array's values."""
    if isinstance(source, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(source)).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str:
    """Return this checkout's commit, `+` added if tracked files differ, "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + "+" * clean.returncode if head.returncode == 0 else "unknown"


def plain(config: Any) -> Any:
    """Return a dataclass (or dict) as JSON-ready values; paths become strings.

    Those below the project lose its folder, so that what two clones write is the same.
    """
    if is_dataclass(config):
        config = asdict(config)
    return json.loads(json.dumps(config, default=_text))


def _text(value: Any) -> str:
    """Return what JSON has no type for as text."""
    below = isinstance(value, Path) and value.is_relative_to(ROOT)
    return str(value.relative_to(ROOT) if below else value)


def this_command() -> str:
    """Return the command that runs now, as it can be typed again."""
    return shlex.join(["uv", "run", *sys.argv])


def header(kind: str, producer: str, config: Any, inputs: dict[str, str] | None = None) -> dict:
    """Describe an artifact: what it is, who wrote it and from what (`inputs`: name -> sha256)."""
    return {
        "kind": kind,
        "producer": producer,
        "config": plain(config),
        "git_commit": git_commit(),
        "inputs": dict(inputs or {}),
    }


def replace_file(path: Path, write: Callable[[Any], None]) -> None:
    """Give `write` an open binary file and make it `path` in one rename, or leave `path` alone.

    Raises OSError with the path in it when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")  # one name: a killed run leaves at most one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        raise OSError(f"cannot write {path}: {e}; what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one rename."""
    replace_file(path, lambda file: file.write(text.encode()))


def sidecar(path: Path) -> Path:
    """Return where the header of the array `path` lies: `codes.npy` -> `codes.npy.json`."""
    return path.with_name(path.name + ".json")


def save_array(path: Path, array: np.ndarray, head: dict) -> None:
    """Write an .npy, then its sidecar, so that a torn pair is noticed on reading."""
    about = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256_of(array)}
    replace_file(path, lambda file: np.save(file, array, allow_pickle=False))
    write_text(sidecar(path), json.dumps(head | about, indent=1) + "\n")


def load_array(path: Path, kind: str, rerun: str) -> tuple[np.ndarray, dict]:
    """Read an .npy and its header, checked against each other.

    Raises InputError, naming the command `rerun` that makes the file, if it is missing, torn,
    changed since it was written, or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"expected {kind} at {path}, found nothing; run: {rerun}")
    try:
        about = json.loads(sidecar(path).read_text())
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"cannot read {path} with its sidecar ({e}); run: {rerun}") from None
    if about.get("kind") != kind:
        raise InputError(f"{path}: expected {kind}, found {about.get('kind')}; run: {rerun}")
    if sha256_of(array) != about.get("sha256"):
        raise InputError(f"{path} is not the array its sidecar describes; run: {rerun}")
    return array, about


def save_checkpoint(path: Path, head: dict, **contents: Any) -> None:
    """Write a .pth: `header` and `contents` (tensors, numbers, text, dicts and lists of them)."""
    replace_file(path, lambda file: torch.save({"header": head, **contents}, file))


def load_checkpoint(path: Path, kind: str, rerun: str) -> dict[str, Any]:
    """Read a .pth of ours onto the CPU: its `header` and whatever was saved beside it.

    Raises InputError, naming `rerun`, if it is missing, broken, unsafe or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"expected {kind} at {path}, found nothing; run: {rerun}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch raises many types for a torn, foreign or unsafe file
        reason = " ".join(str(e).split())[:100]
        raise InputError(
            f"{path} is broken or unsafe and was not loaded ({reason}); run: {rerun}"
        ) from None
    found = contents["header"].get("kind") if _has_header(contents) else "a file without our header"
    if found != kind:
        raise InputError(f"{path}: expected {kind}, found {found}; run: {rerun}")
    return contents


def _has_header(contents: Any) -> bool:
    return isinstance(contents, dict) and isinstance(contents.get("header"), dict)
