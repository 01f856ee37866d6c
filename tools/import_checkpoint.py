#!/usr/bin/env -S uv run
"""Bring published weights into this repo: their file -> a checkpoint that eval_c2i.py samples from.

    tools/import_checkpoint.py vq_ds16_c2i.pt                          tokenizers first,
    tools/import_checkpoint.py c2i_B_256.pt --tokenizer tokenizer_vq/vq_ds16_c2i_imported.pth

Generators of LlamaGen, RandAR, RAR, ARPG and PAR; LlamaGen's VQ-16 and VQ-8; the VQ-VAE and the
RandAR of the CIFAR-10 baseline lime413/randar. The MaskGIT-VQGAN tokenizer is out of scope, and
with it sampling from RAR's weights and from one of RandAR's two: they import without a tokenizer.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn

from models import command
from models.artifacts import ROOT, header, sha256_of
from models.checkpoint import KIND, save_generator
from models.command import InputError, run
from models.data import CLASSES
from models.method import Method
from models.methods import METHODS
from models.published.vq16 import VQ16
from models.published.weights import Published, Which, read_published, restore
from models.tokenizer import KIND as TOKENIZER_KIND
from models.tokenizer import load_tokenizer, save_tokenizer
from models.training import parameters

PRODUCER = "tools/import_checkpoint.py"


@dataclass(frozen=True)
class ImportConfig(command.Config):
    """Import published weights, strictly: every name and shape must be the published one."""

    source: tyro.conf.Positional[Path]
    """.pt, .pth, .bin or .safetensors as published; a pickle is read without running it"""
    out: command.OutFile | None = None
    """default tokenizer_vq/<name>_imported.pth, or checkpoints/runs/<name>_imported.pth"""
    tokenizer: Path | None = None
    """the imported tokenizer of a generator's codes; eval_c2i.py refuses a generator without"""
    weights: Which = "model"
    """ema: the averaged weights beside the model's, where the file has them"""
    grid: Annotated[int, command.Range(1, 256)] | None = None
    """side of the token grid, where the shapes do not tell; default 16 (CIFAR baseline: 8)"""
    heads: Annotated[int, command.Range(1, 256)] | None = None
    """attention heads, where neither the shapes nor the published widths tell"""
    dataset: str | None = None
    """what the labels mean; default cifar10 for ten classes and imagenet for a thousand"""
    dry_run: bool = False
    """print what would become of each tensor, and write nothing"""


def class_names(dataset: str | None, count: int) -> tuple[str, list[str]]:
    """Return (dataset, names of the labels): "class 0", "class 1", .. where we have no names."""
    dataset = dataset or {10: "cifar10", 1000: "imagenet"}.get(count, "unknown")
    names = CLASSES.get(dataset, [f"class {label}" for label in range(count)])
    if len(names) != count:
        raise InputError(f"{dataset} has {len(names)} classes, the weights have {count}")
    return dataset, list(names)


def describe(cfg: ImportConfig, published: Published, model: nn.Module) -> dict:
    """Return the header of what was imported; which images a tokenizer learned from is not known.

    Raises InputError for a tokenizer of other codes or of another grid, or for a tokenizer's own.
    """
    inputs = {"published": sha256_of(published.path)}
    if not isinstance(model, Method):
        if cfg.tokenizer is not None:
            raise InputError(f"{cfg.source} is a tokenizer itself; --tokenizer is for a generator")
        usual = "imagenet" if isinstance(model, VQ16) else "cifar10"
        return header(TOKENIZER_KIND, PRODUCER, cfg, inputs) | {"dataset": cfg.dataset or usual}
    inputs["tokenizer"] = None
    if cfg.tokenizer is not None:
        tokenizer, head = load_tokenizer(cfg.tokenizer)
        theirs = (tokenizer.config.codebook_size, tokenizer.grid)
        ours = (model.config.vocab_size, model.config.grid)
        if theirs != ours:
            raise InputError(
                f"{cfg.tokenizer} has {theirs[0]} codes on a grid of {theirs[1]}, the generator "
                f"{ours[0]} on a grid of {ours[1]}; give its own tokenizer, or another --grid"
            )
        inputs["tokenizer"] = head["sha256"]
    dataset, classes = class_names(cfg.dataset, model.config.classes)
    method = next(name for name, kind in METHODS.items() if kind is type(model))
    order = model.config.scan  # that the paper trains it in, as train_c2i.py's --order has it
    if model.any_order:
        order = "anneal" if method == "rar" else "random"
    training = {"order": order, "steps": published.steps}
    head = header(KIND, PRODUCER, asdict(cfg) | training, inputs)
    return head | {"method": method, "dataset": dataset, "classes": classes}


def main(cfg: ImportConfig) -> Path | None:
    """Write the checkpoint and return its path; None for a dry run."""
    published = read_published(cfg.source, cfg.weights)
    model = restore(published, cfg.heads, cfg.grid)
    head = describe(cfg, published, model)
    print(f"{type(model).__name__}, {parameters(model):,} parameters: {model.config}")
    if cfg.dry_run:
        for name, value in published.weights.items():
            print(f"{published.name_in_file[name]} -> {name} {tuple(value.shape)}")
        for name in published.dropped:
            print(f"{name} -> dropped, it is computed")
        return None
    generator = isinstance(model, Method)
    folder = ROOT / ("checkpoints/runs" if generator else "tokenizer_vq")
    out = cfg.out or folder / f"{cfg.source.stem}_imported.pth"
    if generator:
        save_generator(out, head, model)
        sample = f"uv run eval_c2i.py --checkpoint {out} --tokenizer {cfg.tokenizer} "
        sample += "--codes none"
        again = "eval_c2i.py needs its tokenizer: import again with --tokenizer to sample"
        print(f"wrote {out}; {sample if cfg.tokenizer else again}")
    else:
        save_tokenizer(out, model, head)
        print(f"wrote {out}; import a generator of its codes with --tokenizer {out}")
    return out


if __name__ == "__main__":
    run(main, ImportConfig)
