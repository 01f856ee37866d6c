#!/usr/bin/env -S uv run
"""What the layers of a generator know of an image that they were not told: features, linear probes.

checkpoint + codes -> results/<run>/{features.json, features_train.npy, features_test.npy}

An image is read in the order that the model was trained in or another. Its features are the mean of
what each block returns (as iGPT, Chen et al., "Generative Pretraining from Pixels", 2020) at the
slots that predict, its class is told by a linear map of them. With `--passes 2` the image is read
twice in one causal pass, and the features are of the second time, when every slot has seen all of
it (RandAR, arXiv 2412.01827). The label is the null label: under its own, the features would repeat
it. Beside them stands what counting the codes tells.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from metrics.calibration import mean_of
from metrics.evaluation import GeneratorConfig, OrderFlag
from metrics.likelihood import logit_batches, orders_for
from metrics.report import show, table, write_record
from models import artifacts, command
from models.artifacts import ROOT
from models.checkpoint import load_codes_of
from models.command import InputError, run
from models.data import evenly
from models.method import Method
from models.methods import check_order
from models.randar import RandAR

DECAY = 1e-3
"""of the probe's weights, on standardised features: with 10,000 images it matters little"""


@dataclass(frozen=True)
class FeaturesConfig(GeneratorConfig):
    """Take features of a generator's layers, and tell classes from each by a linear map."""

    codes: Path = ROOT / "data/codes"
    """of train and test images, from stage 3"""
    order: OrderFlag = None
    """of reading; default: the one it was trained in (anneal, adaptive: the scan)"""
    passes: Annotated[int, command.Range(1, 2)] = 1
    """2: each image twice over, features of the second time (RandAR only)"""
    train_images: command.Images = 10_000
    """that the linear maps are fitted to, evenly spaced"""
    images: command.Images = 2000
    """test images that they are measured on"""


def layer_features(
    model: Method, codes_NT: torch.Tensor, order_NS: torch.Tensor, batch: int, name: str
) -> torch.Tensor:
    """Return float32 (N, L, D) on the CPU: the mean of what each block returns where it predicts.

    With orders (N, 2T), each cell twice, it is the second time only.
    """
    steps, tokens = order_NS.shape[1], codes_NT.shape[1]
    parts = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks, means = [block for part in parts for block in part], []

    def add_mean(_, __, x_BSD: torch.Tensor) -> None:
        predicting_BTD = x_BSD.flip(1)[:, :: x_BSD.shape[1] // steps][:, :tokens]
        means.append(predicting_BTD.float().mean(1).cpu())

    hooks = [block.register_forward_hook(add_mean) for block in blocks]
    label_N = torch.full((len(codes_NT),), model.null_label)
    try:
        for _ in logit_batches(model, codes_NT, label_N, order_NS, batch, name):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    layers = (torch.cat(means[i :: len(blocks)]) for i in range(len(blocks)))
    return torch.stack(list(layers), dim=1)


def probe(train_NF: torch.Tensor, label_N: torch.Tensor, test_MF: torch.Tensor) -> torch.Tensor:
    """Return the labels, int64 (M,), that multinomial logistic regression gives the test images."""
    mean_F, sd_F = train_NF.double().mean(0), train_NF.double().std(0) + 1e-6
    train_NF, test_MF = ((x.double() - mean_F) / sd_F for x in (train_NF, test_MF))
    linear = nn.Linear(train_NF.shape[1], int(label_N.max()) + 1, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=200, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        nats = F.cross_entropy(linear(train_NF), label_N) + DECAY * linear.weight.square().sum()
        nats.backward()
        return nats

    optimizer.step(loss)
    return linear(test_MF).argmax(1)


def main(cfg: FeaturesConfig) -> dict:
    """Take features, write them, probe them, print; return what features.json holds."""
    subject = cfg.load()
    model, order = subject.model, str(cfg.order or subject.order)
    check_order(subject.header["method"], order, model.config.scan)
    if cfg.passes > 1 and not isinstance(model, RandAR):
        raise InputError(f"only RandAR reads twice: expected --passes 1, got {cfg.passes}")
    counts, splits = {"train": cfg.train_images, "test": cfg.images}, {}
    for split, count in counts.items():
        codes = load_codes_of(subject.header, cfg.codes, split, cfg.checkpoint)
        splits[split] = codes.rows(torch.from_numpy(evenly(len(codes.label_N), count)))
    inputs = {f"{split}_codes": codes.header["sha256"] for split, codes in splits.items()}
    inputs |= subject.inputs
    features = {}  # split -> what a probe reads -> (N, F)
    for split, codes in splits.items():
        codes_NT = codes.codes_NAT[:, 0]
        order_NS = orders_for(model, order, len(codes_NT), cfg.seed).repeat(1, cfg.passes)
        layers_NLD = layer_features(model, codes_NT, order_NS, cfg.batch, split)
        head = artifacts.header("layer features", "tools/features.py", cfg, inputs)
        artifacts.save_array(subject.out / f"features_{split}.npy", layers_NLD.numpy(), head)
        counted_NV = torch.zeros(len(codes_NT), model.config.vocab_size)
        counted_NV.scatter_add_(1, codes_NT, torch.ones_like(codes_NT, dtype=torch.float32))
        layers = {f"layer {i}": x_ND for i, x_ND in enumerate(layers_NLD.unbind(1), start=1)}
        features[split] = {"codes, counted": counted_NV} | layers
    label_N, label_M = (codes.label_N for codes in splits.values())
    accuracy = {
        name: mean_of((probe(x_NF, label_N, features["test"][name]) == label_M).double())
        for name, x_NF in features["train"].items()
    }
    numbers = subject.description | {"order": order, "images": len(label_M)}
    numbers |= {"train_images": len(label_N), "accuracy": accuracy}
    record = write_record(subject.out / "features.json", numbers, cfg, inputs)
    rows = [[name, show(value, 1, percent=True)] for name, value in accuracy.items()]
    print(table(["linear probe on", "class accuracy"], rows) + f"-> {subject.out}")
    return record


if __name__ == "__main__":
    run(main, FeaturesConfig)
