"""Ways to damage a file: its bytes, its JSON, its array, what a checkpoint holds."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from helpers import Evil

WEIRD = (
    None, True, 0, -1, 1.5, 10**9, 2**63, 10**30, float("nan"), float("inf"), "", "x" * 500,
    "../../etc/passwd", "\ud800".encode("utf-8", "replace").decode(), [], {}, [[]], [None] * 3,
    {"a": {"b": []}}, ["0"] * 10, "1e999",
)  # fmt: skip
"""values to put where another was"""


def of_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, blank, repeat, insert or swap a few bytes."""
    out = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(0, len(out) + 1)), int(rng.integers(1, 65))
        match rng.integers(0, 7):
            case 0 if at < len(out):
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                del out[at:]
            case 2:
                out[at : at + size] = bytes(len(out[at : at + size]))
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                out[at:at] = rng.bytes(size)
            case 5:
                del out[at : at + size]
            case _:
                other = int(rng.integers(0, len(out) + 1))
                out[at : at + size] = out[other : other + size]
        if not out:
            break
    return bytes(out)


def _places(tree, path: tuple = ()) -> list[tuple]:
    """Return the paths of keys to everything in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += _places(value, (*path, key))
    return found


def of_tree(tree, rng: np.random.Generator, extra: tuple = ()):
    """Return nested dicts and lists with up to three values replaced, removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.integers(1, 4)):
        if not isinstance(tree, dict | list) or not (places := _places(tree)):
            return tree
        *path, key = places[rng.integers(len(places))]
        at = tree
        for step in path:
            at = at[step]
        weird = (*WEIRD, *extra)
        value = weird[rng.integers(len(weird))]
        if not isinstance(value, Evil):  # to copy it would run it
            value = copy.deepcopy(value)
        match rng.integers(0, 8):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[f"{key}x"] = at.pop(key)
            case 2 if isinstance(at, dict):
                at["added"] = value
            case 3:  # the whole
                return value
            case 4 if isinstance(at[key], int | float) and not isinstance(at[key], bool):
                at[key] = at[key] * 10 ** int(rng.integers(1, 12))
            case _:
                at[key] = value
    return tree


def of_json(raw: bytes, rng: np.random.Generator) -> bytes:
    """Change what a JSON file says, or nest it deeper than any parser goes."""
    if rng.random() < 0.05:
        depth = int(rng.integers(1_000, 200_000))
        return b'{"a":' * depth + b"1" + b"}" * depth
    return json.dumps(of_tree(json.loads(raw), rng)).encode()


def of_checkpoint(raw: bytes, rng: np.random.Generator, mark: Path) -> bytes:
    """Change what a .pth holds: other values, tensors of another shape, dtype, layout, or code."""
    w = torch.ones(2, 3)
    tensors = (
        w, w.half(), w.long(), w.to_sparse(), torch.full((3,), torch.nan), torch.zeros(0),
        torch.zeros(1).expand(1 << 40), torch.zeros((), dtype=torch.complex64), w.bool(),
        torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), torch.empty(3, device="meta"),
    )  # fmt: skip
    try:
        contents = torch.load(io.BytesIO(raw), weights_only=True)
    except RuntimeError:  # torch checks sparse tensors that an earlier, torn file left behind, once
        contents = torch.load(io.BytesIO(raw), weights_only=True)
    contents = of_tree(contents, rng, (*tensors, *tensors, Evil(mark), b"bytes", (1, 2), {1: 2}))
    if rng.random() < 0.1:
        return pickle.dumps(contents)
    out = io.BytesIO()
    torch.save(contents, out, _use_new_zipfile_serialization=rng.random() < 0.9)
    return out.getvalue()


def of_array(raw: bytes, rng: np.random.Generator) -> bytes:
    """Write another array than the one that was there: dtype, shape, order, values, or objects."""
    array = np.load(io.BytesIO(raw))
    dtypes = ("u1", "i8", "f4", "f2", "c8", "S3", "<U4", "M8[s]", "?", ">i8", [("a", "i4")])
    options: list[Callable] = [
        lambda: array.astype(dtypes[rng.integers(len(dtypes) - 1)], casting="unsafe"),
        lambda: np.zeros(array.shape, dtypes[rng.integers(len(dtypes))]),
        lambda: array[:-1],
        lambda: array[:0],
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: np.asfortranarray(array),
        lambda: np.array(7),
        lambda: array[::-1],
        lambda: np.full_like(array, np.nan if array.dtype.kind == "f" else 255),
        lambda: np.array([{"a": 1}, None], object),
    ]
    out = io.BytesIO()
    np.save(out, options[rng.integers(len(options))](), allow_pickle=True)
    return out.getvalue()


def of_header(raw: bytes, rng: np.random.Generator) -> bytes:
    """Write another .npy header before the same values."""
    words = (b"999999999999,", b"-1,", b"", b"0,", b"10, 10, 10,", b"2**60,", b"None,", b"()")
    start, end = raw.index(b"'shape': (") + 10, raw.index(b"), }")
    old = raw[start:end]
    new = words[rng.integers(len(words))]
    return raw[:start] + new + raw[end:].replace(b" " * max(0, len(new) - len(old)), b"", 1)
