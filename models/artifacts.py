"""The only reader and writer of .npy and .pth files, and of what is known about them.

Every artifact carries a header: kind, producer, config, git commit, sha256 of its inputs, and for
an array its shape, dtype and own sha256. A .pth holds it under the key `header`; an .npy has it in
a sidecar `NAME.npy.json`. Files are written beside their target and renamed, so a reader sees the
old file or the new one, never a part. Pickled code is never run (`weights_only=True`), and no file
from outside can ask for more memory than a valid file of its size would need.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.command import InputError, one_line

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
    here = [f"--git-dir={ROOT}/.git", f"--work-tree={ROOT}"]  # not a repository around this folder
    words = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        described = subprocess.run(["git", *here, *words], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def plain(config: Any) -> Any:
    """Return a dataclass (or dict) as JSON-ready values; paths become strings.

    Those below the project lose its folder, so that what two clones write is the same.
    """

    def text(value: Any) -> str:  # of what JSON has no type for
        below = isinstance(value, Path) and value.is_relative_to(ROOT)
        return str(value.relative_to(ROOT) if below else value)

    config = asdict(config) if is_dataclass(config) else config
    return json.loads(json.dumps(config, default=text))


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
    # a name of this process's own, created exclusively: two writers never share a file, and a
    # symbolic link that lies there is not followed
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, f".{path.name}.*.tmp")
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:
        full = isinstance(e, RuntimeError)  # torch.save's, which does not say why
        why = "is the disk full?" if full else e
        raise OSError(f"cannot write {path}: {why}; what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Delete the temporary files of `replace_file` that killed processes left in a folder."""
    for left in folder.glob(pattern):
        try:
            os.kill(int(left.name.split(".")[-3]), 0)  # an error unless it is alive
        except PermissionError:  # alive, and another user's
            pass
        except (OSError, OverflowError, ValueError, IndexError):
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in one rename."""
    replace_file(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def as_written(path: Path | str, what: str, fix: str) -> Iterator[None]:
    """Turn what the contents of a file from outside make Python raise into one line.

    A header or a state dict can hold anything, so almost any exception can come of using it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        reason = one_line(e, 150)
        raise InputError(f"{path} holds no {what} that is whole ({reason}); {fix}") from None


def expect_file(path: Path, what: str, fix: str) -> None:
    """Raise InputError unless there is a file, and no folder or pipe, which would be waited for."""
    if not Path(path).is_file():
        there = "something that is no file" if os.path.lexists(path) else "nothing"
        raise InputError(f"expected {what} at {path}, found {there}; {fix}")


def map_array(path: Path, what: str, fix: str) -> np.ndarray:
    """Map an .npy: a header that claims more than the file holds is refused before it is read."""
    expect_file(path, what, fix)
    try:  # numpy raises many types for a torn header, tokenize.TokenError too
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as e:
        raise InputError(f"{path} is torn or no .npy file ({one_line(e, 150)}); {fix}") from None


def read_json(path: Path, limit: int = 1 << 24) -> dict:
    """Read a JSON file that holds an object. Raises ValueError for anything else in it."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes of JSON, found more")
    try:
        contents = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path}: the JSON is nested too deeply") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(contents).__name__}")
    return contents


def sidecar(path: Path) -> Path:
    """Return where the header of the array `path` lies: `codes.npy` -> `codes.npy.json`."""
    return path.with_name(path.name + ".json")


def save_array(path: Path, array: np.ndarray, head: dict) -> None:
    """Write an .npy, then its sidecar, so that a torn pair is noticed on reading."""
    values = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256_of(array)}
    replace_file(path, lambda file: np.save(file, array, allow_pickle=False))
    write_text(sidecar(path), json.dumps(head | values, indent=1) + "\n")


def read_array(path: Path, what: str, fix: str) -> tuple[np.ndarray, dict]:
    """Read any .npy with a sidecar. Raises InputError unless it is the array described there."""
    array = np.array(map_array(path, what, fix))
    try:
        head = read_json(sidecar(path))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} has no sidecar to read ({one_line(e, 200)}); {fix}") from None
    if sha256_of(array) != head.get("sha256"):
        raise InputError(f"{path} is not the array its sidecar describes; {fix}")
    return array, head


def load_array(path: Path, kind: str, rerun: str, dtype: type, ndim: int) -> tuple:
    """Read an .npy and its header, checked against each other: (array, header).

    Raises InputError, naming the command `rerun` that makes the file, if it is missing, torn,
    changed since it was written, of another kind, dtype or number of dimensions.
    """
    path, fix = Path(path), f"run: {rerun}"
    array, head = read_array(path, kind, fix)
    if head.get("kind") != kind:
        raise InputError(f"{path}: expected {kind}, found {one_line(head.get('kind'), 100)}; {fix}")
    if array.dtype != dtype or array.ndim != ndim:
        expected = f"{np.dtype(dtype)} of {ndim} dimensions"
        raise InputError(f"{path}: expected {expected}, found {array.dtype} {array.shape}; {fix}")
    if not isinstance(head.get("inputs"), dict):
        raise InputError(f"{path}: its sidecar does not say its inputs; {fix}")
    return array, head


def save_checkpoint(path: Path, head: dict, **contents: Any) -> None:
    """Write a .pth: `header` and `contents` (tensors, numbers, text, dicts and lists of them)."""
    replace_file(path, lambda file: torch.save({"header": head, **contents}, file))


def load_checkpoint(path: Path, kind: str, rerun: str) -> dict[str, Any]:
    """Read a .pth of ours onto the CPU: its `header` and whatever was saved beside it.

    The header's `sha256` is that of the bytes that were read. Raises InputError, naming `rerun`, if
    the file is missing, broken, unsafe, of another kind, or holds NaN or infinite weights.
    """
    path = Path(path)
    expect_file(path, kind, f"run: {rerun}")
    contents, digest = safe_load(path, f"run: {rerun}")
    head = contents.get("header") if isinstance(contents, dict) else None
    is_kind = head.get("kind") if isinstance(head, dict) else "a file without our header"
    if is_kind != kind:
        raise InputError(f"{path}: expected {kind}, found {is_kind}; run: {rerun}")
    head = {"inputs": {}, "config": {}} | head | {"sha256": digest}
    if not isinstance(head["inputs"], dict) or not isinstance(head["config"], dict):
        raise InputError(f"{path}: its header does not say inputs and config; run: {rerun}")
    for name, tensor in tensors_in(contents):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values; run: {rerun}")
    return contents | {"header": head}


def safe_load(path: Path, fix: str) -> tuple[Any, str]:
    """Read any .pth onto the CPU, once, without running what is in it: (contents, sha256).

    Raises InputError, ending in what to do (`fix`), for a file that is torn, unsafe, or expands to
    more than its own size.
    """
    raw = Path(path).read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(raw)):  # else the format of PyTorch < 1.6, a plain stream
            with zipfile.ZipFile(io.BytesIO(raw)) as members:
                if any(m.compress_type or m.file_size > len(raw) for m in members.infolist()):
                    raise ValueError("compressed, or longer than the file: torch.save writes none")
                if damaged := members.testzip():  # torch.load itself does not look at checksums
                    raise ValueError(f"{damaged} is not what was written")
        contents = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        for name, tensor in tensors_in(contents):
            plain_values = tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not plain_values or tensor.is_quantized or tensor.nbytes > len(raw):
                raise ValueError(f"{name} is none, or more than the file holds: {tensor.shape}")
    except Exception as e:  # torch raises many types for a torn, foreign or unsafe file
        reason = str(e).partition("WeightsUnpickler error: ")[2] or str(e)  # without torch's advice
        raise InputError(
            f"{path} is broken or unsafe and was not loaded ({one_line(reason, 100)}); {fix}"
        ) from None
    return contents, hashlib.sha256(raw).hexdigest()


def restored(build: Callable[[], torch.nn.Module], state: dict) -> torch.nn.Module:
    """Return what `build` makes with these weights; a size they cannot fill is not allocated."""
    with torch.device("meta"):
        # a copy: torch notes assign=True in the dict, and would keep half precision below
        build().load_state_dict(dict(state), assign=True)
    (model := build()).load_state_dict(state)
    return model


def tensors_in(contents: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested dicts and lists, with the path of keys that leads to it."""
    if depth > 20:
        raise ValueError("nested more than 20 deep")
    if isinstance(contents, torch.Tensor):
        yield name, contents
    elif isinstance(contents, dict):
        for key, value in contents.items():
            yield from tensors_in(value, f"{name}.{key}".lstrip("."), depth + 1)
    elif isinstance(contents, list | tuple):
        for i, value in enumerate(contents):
            yield from tensors_in(value, f"{name}[{i}]", depth + 1)
