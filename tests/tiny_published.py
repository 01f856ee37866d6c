"""Tiny published weights, every kind of file they come in, and their import."""

from argparse import Namespace
from dataclasses import replace

import torch
from helpers import script
from published_layouts import LAYOUTS
from safetensors.torch import save_file

tool = script("tools/import_checkpoint.py")

CODES, CLASSES, GRID, HEADS, REGIONS = 7, 3, 4, 2, 4
TOKENS = GRID * GRID


def layout(method: str, codes=CODES, classes=CLASSES, grid=GRID, layers=2):
    """The published names and shapes at a tiny size; a new method needs its own in LAYOUTS."""
    more = {"rar": {"heads": HEADS, "tokens": grid * grid}, "par": {"regions": REGIONS}}
    hidden = 64 if method == "rar" else 256  # 256: LlamaGen's rounding of 8/3 x 16
    return LAYOUTS[method](layers, 16, hidden, codes, classes, **more.get(method, {}))


def imported(path, tmp_path, **changes):
    """Import a file at the tiny size; return where."""
    cfg = tool.ImportConfig(path, out=tmp_path / "ours.pth", grid=GRID, heads=HEADS)
    return tool.main(replace(cfg, **changes))


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def stray(width: int = 16) -> dict:
    """What some published files hold besides weights."""
    tables = ("freqs_cis", "causal_mask", "layers.0.attention.kv_cache.k_cache")
    return dict.fromkeys((*tables, "layers.0.attention.kv_cache.v_cache"), torch.zeros(2, width))


def trained(weights: dict) -> dict:
    """As LlamaGen's and ARPG's trainers save it."""
    state = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    args = Namespace(gpt_model="GPT-B", lr=1e-4, ema=True, betas=[0.9, 0.95], vq_ckpt=None)
    ema = {name: value + 1 for name, value in weights.items()}
    return {"model": weights, "optimizer": state, "steps": 1234, "args": args, "ema": ema}


def save_legacy(contents, path) -> None:
    torch.save(contents, path, _use_new_zipfile_serialization=False)


FILES = {
    "bare.bin": torch.save,
    "legacy.pt": save_legacy,
    "trained.pt": lambda w, path: torch.save(trained(w), path),
    "strays.pt": lambda w, path: torch.save({"model": w | stray()}, path),
    "both.pth": lambda w, path: torch.save({"module": prefixed(w, "_orig_mod.module.")}, path),
    "ddp.pt": lambda w, path: torch.save({"state_dict": prefixed(w, "module.")}, path),
    "flat.safetensors": save_file,
    "compiled.safetensors": lambda w, path: save_file(prefixed(w, "_orig_mod."), path),
}
