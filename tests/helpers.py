"""What several test files need: scripts as modules, tiny models, cuts, and cheap configs."""

import importlib.util
import json
import os
import sys
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from models.artifacts import ROOT, header, load_checkpoint
from models.checkpoint import KIND, save_generator
from models.data import SPLITS, load_codes, save_codes
from models.machine import rates
from models.method import Method, ModelConfig
from models.methods import METHODS, build
from models.orders import mixed_order, scan


@cache
def script(path: str) -> ModuleType:
    """Return a script as a module, `script("data/load_CIFAR10.py")`; its folder is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs: dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def config_of(kind: type, **values):
    """Return a command's config, the flags of MeasureConfig in their nested place."""
    from metrics.evaluation import MeasureConfig

    own = {f.name for f in fields(kind)}
    nested = {name: values.pop(name) for name in list(values) if name not in own}
    return kind(**values, **({"against": MeasureConfig(**nested)} if nested else {}))


def changed(config, **values):
    """Return a config with some of its values, or of its MeasureConfig's, replaced."""
    own = {f.name for f in fields(config)}
    if nested := {name: values.pop(name) for name in list(values) if name not in own}:
        values["against"] = replace(config.against, **nested)
    return replace(config, **values)


DROPOUTS = ("token_dropout", "residual_dropout", "ffn_dropout")


def tiny(method: str, dropout: float = 0.0, **changes) -> Method:
    """A method in float64 with random weights, the head too: a zero head hides leaks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "classes": 3, "grid": 4, "layers": 2, "heads": 2, "width": 16}
    sizes |= {"scan": METHODS[method].scans[0]} | dict.fromkeys(DROPOUTS, dropout)
    model = build(method, ModelConfig(**sizes | changes)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def orders_of(model: Method, batch: int, kinds=("raster", "spiral_in")) -> list[torch.Tensor]:
    """Orders to test a method in, all that it supports of `kinds` and random ones, as order_BS."""
    if not model.any_order:
        return [model.order(model.config.scan).expand(batch, -1)]
    generator = torch.Generator().manual_seed(1)
    fixed = [scan(kind, model.config.grid).expand(batch, -1) for kind in kinds]
    return [*fixed, mixed_order(fixed[0][0], batch, 1.0, generator)]


def draw(model: Method, batch: int = 3, seed: int = 2):
    """Return (codes_BT, label_B, order_BS): random codes and orders, the null label among them."""
    generator = torch.Generator().manual_seed(seed)
    codes_BT = torch.randint(
        model.config.vocab_size, (batch, model.config.tokens), generator=generator
    )
    label_B = torch.arange(batch) % (model.config.classes + 1)
    label_B[-1] = model.null_label
    return codes_BT, label_B, orders_of(model, batch)[-1]


def order_of(model) -> str:
    """The name of the most demanding order a method can be sampled in."""
    return "random" if model.any_order else model.config.scan


def decoded(model: Method, codes_BT, label_B, order_BS, sizes, known: int = 0) -> torch.Tensor:
    """Decode with the true codes, `known` of them committed first; return logits of the rest."""
    cache, codes_BS = model.cache(label_B), codes_BT.gather(1, order_BS)
    cells = order_BS.split([known, *sizes], dim=1)
    commits = codes_BS.split([known, *sizes], dim=1)
    steps = zip(commits[:-1], cells[:-1], cells[1:], strict=True)
    return torch.cat([model.decode(cache, *step) for step in steps], dim=1)


def save_tiny(path: Path, world, method: str = "randar", order=None, uniform=False) -> Path:
    """Write a generator for the world's codes, of random weights or sure of nothing."""
    order = order or METHODS[method].scans[0]
    test = load_codes(world.codes, "test").header
    about = {"method": method, "classes": test["classes"], "dataset": "shapes"}
    inputs = {"tokenizer": test["inputs"]["tokenizer"]}
    model = tiny(method, vocab_size=32, grid=8, classes=10).float()
    for parameter in model.parameters() if uniform else ():
        torch.nn.init.zeros_(parameter)
    head = header("generator", "tests", {"order": order, "steps": 0}, inputs)
    save_generator(path, head | about, model)
    return path


def other_codes(world, folder: Path, change=0, **inputs) -> Path:
    """Copy the codes, with other inputs in their header, or each code `change` higher."""
    for split in SPLITS:
        codes = load_codes(world.codes, split)
        head = codes.header | {"inputs": codes.header["inputs"] | inputs}
        codes_NAT = (codes.codes_NAT.numpy() + change) % head["codebook_size"]
        save_codes(folder, split, codes_NAT, codes.label_N.numpy(), head)
    return folder


def cut_at(monkeypatch, owner, name: str, call: int) -> list[tuple]:
    """Let that call of owner.name be a cut (KeyboardInterrupt); return the list of all calls."""
    calls, function = [], getattr(owner, name)

    def counted(*args, **more):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **more)

    monkeypatch.setattr(owner, name, counted)
    return calls


def run_cut_and_again(main, cfg):
    """Run a command that is cut, then the same again; return what it returns."""
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    return main(cfg)


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor | np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def numbers(node) -> list[float]:
    """All floats of a nested record."""
    children = node.values() if isinstance(node, dict) else node
    if isinstance(node, dict | list):
        return [x for child in children for x in numbers(child)]
    return [node] if isinstance(node, float) else []


def train_config(world, out, **changes):
    """A training of 4 steps of batches of 8, whose model is --model tiny (see conftest.py)."""
    cfg = {"codes": world.codes, "tokenizer": world.codes / "none.pth", "out": out}
    cfg |= {"model": "tiny", "device": "cpu", "steps": 4, "batch": 8}  # no tokenizer: no pictures
    cfg |= {"eval_every": 2, "heldout": 20, "warmup": 0.25}
    return script("train_c2i.py").TrainConfig(**cfg | changes)


def eval_config(world, checkpoint, out, **changes):
    """An evaluation of 10 samples, without a classifier unless `changes` give one."""
    cfg = {"checkpoint": checkpoint, "tokenizer": world.tokenizer, "codes": world.codes}
    cfg |= {"data": world.data, "inception_weights": "none", "num_samples": 10, "batch": 10}
    return config_of(
        script("eval_c2i.py").EvalConfig, **cfg | {"out": out, "device": "cpu"} | changes
    )


def log_of(path: Path) -> list[dict]:
    """The rows of a .jsonl."""
    return [json.loads(row) for row in path.read_text().splitlines()]


SPEEDS = tuple(rates(speed=1, flops=1, tokens=1, peak=1))


def last(out: Path) -> dict:
    return load_checkpoint(out / "last.pth", KIND, rerun="")


def results(out: Path) -> dict:
    """Everything in last.pth that must not depend on a cut: all but speeds, memory and the date."""
    found = last(out)
    found["rows"] = [
        {key: row[key] for key in row if key not in (*SPEEDS, "peak_memory_gb")}
        for row in found["rows"]
    ]
    del found["header"]
    return found


class Evil:
    """Unpickled, it calls `what` with `argument`; by default it makes a folder."""

    def __init__(self, argument: Path | str, what=os.mkdir):
        self.what, self.argument = what, str(argument)

    def __reduce__(self):
        return self.what, (self.argument,)
