"""Weights that others published: read them safely, and put them into our models, strictly.

Our models keep the published names and shapes, so nothing is renamed or reshaped: wrappers and
prefixes come off, the size is read off the shapes (sizes.py), and every name and shape must agree.

A file is data here. Pickles go through torch's restricted reader, which calls nothing but what
rebuilds tensors. It is told one more class, argparse.Namespace, that LlamaGen and ARPG save their
arguments in: a plain holder of attributes, whose constructor takes no positional argument from the
file and runs no code of it. What else a file asks for is refused by name.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from models.command import InputError, one_line
from models.methods import METHODS, build
from models.published.sizes import infer_config, recognise
from models.tokenizer import build_tokenizer

Which = Literal["model", "ema"]

WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""parts of a name that torch.compile, DDP, FSDP and activation checkpointing put in"""
NO_WEIGHTS = {"freqs_cis", "causal_mask", "k_cache", "v_cache"}
"""last parts of names of tables that are computed, not learned"""


@dataclass(frozen=True)
class Published:
    """The learned values of a file."""

    path: Path
    weights: dict[str, torch.Tensor]
    """by their published names"""
    name_in_file: dict[str, str]
    dropped: list[str]
    """names in the file of what is computed, not learned"""
    steps: int | None
    """optimizer steps of the training, where the file says so"""


def read_published(path: Path, which: Which = "model") -> Published:
    """Read a .safetensors, or what torch.save wrote, without running anything in it.

    Raises InputError for a file that is missing, broken, unsafe, or without such weights.
    """
    if not path.is_file():
        raise InputError(f"expected published weights at {path}, found no such file")
    contents = _read(path)
    if not isinstance(contents, dict):
        raise InputError(f"{path}: expected a dict of tensors, found {type(contents).__name__}")
    if "header" in contents and "model_config" in contents:
        raise InputError(f"{path} is a checkpoint of this repo already")
    weights, name_in_file, dropped = {}, {}, []
    for name, value in _unwrap(path, contents, which).items():
        if not isinstance(name, str):
            raise InputError(f"{path}: expected tensors by name, found one called {name!r}")
        clean = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if clean.rpartition(".")[2] in NO_WEIGHTS:
            dropped.append(name)
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: expected a tensor as {name}, found {type(value).__name__}")
        if clean in weights:
            raise InputError(f"{path} has {clean} twice: {name_in_file[clean]} and {name}")
        weights[clean], name_in_file[clean] = value, name
    counts = [contents.get(name) for name in ("steps", "train_steps", "global_step")]
    steps = next((count for count in counts if isinstance(count, int)), None)
    return Published(path, weights, name_in_file, dropped, steps)


def _read(path: Path) -> Any:
    """Return what a file holds; mapped from disk, so optimizer states cost no memory."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch.save did not write
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except OSError:
        raise
    except pickle.UnpicklingError as e:
        why = f"{path} is broken or unsafe and was not loaded"
        if wanted := re.search(r"GLOBAL (\S+)", str(e)):
            why = f"{path} was not loaded: it asks for {wanted[1]}, which weights have no need of; "
            why += "nothing in it was run"
        raise InputError(why) from None
    except Exception as e:  # torch raises many types for a torn file
        raise InputError(f"{path} is broken and was not loaded ({one_line(e, 100)})") from None


def _unwrap(path: Path, contents: dict, which: Which) -> dict:
    """Return the state dict in what was saved: under a name that the projects use, or bare."""
    for name in ("ema",) if which == "ema" else ("model", "module", "state_dict"):
        if isinstance(contents.get(name), dict):
            return contents[name]
    if which == "model" and any(isinstance(value, torch.Tensor) for value in contents.values()):
        return contents
    names = ", ".join(map(str, contents)) or "nothing"
    raise InputError(f"{path} has no {which} weights, only: {names[:150]}")


def restore(published: Published, heads: int | None = None, grid: int | None = None) -> nn.Module:
    """Return the recognised model with the file's weights, in the file's dtype, on the CPU.

    Raises InputError, with the first of what is missing, unexpected or of another shape.
    """
    path, weights = published.path, published.weights
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    model = "none of ours"
    try:
        model = recognise(shapes)
        config = infer_config(model, shapes, heads, grid)
        with torch.device("meta"):
            network = build(model, config) if model in METHODS else build_tokenizer(model, config)
    except InputError as e:
        raise InputError(f"{path} looks like {model}: {e}") from None
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "wrong": [
            f"{name} is {weights[name].dtype} {shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in weights and (shapes[name] != shape or not weights[name].is_floating_point())
        ],
    }
    lines = [
        f"{kind}: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise InputError(f"{path} is no {model} as published; {'; '.join(lines)}")
    network.load_state_dict(weights, assign=True)
    return network.eval()
