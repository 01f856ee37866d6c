#!/usr/bin/env -S uv run
"""What does a generator make of corrupted images, a wrong context, and codes that it misreads?

checkpoint + tokenizer + test images and codes -> results/<run>/{robustness.json, corruptions.png,
context.png, misread.png}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from metrics.calibration import mean_of
from metrics.corruptions import SEVERITIES, Corrupted, drawn, official
from metrics.extractor import Classifier, classifier_extractor, load_classifier
from metrics.fidelity import FULL
from metrics.likelihood import orders_for
from metrics.pictures import save_figure
from metrics.plots import plot_context, plot_corruptions, plot_misread
from metrics.report import Run
from metrics.robustness import (
    RHOS,
    code_vectors,
    context_report,
    features_of,
    frechet,
    misread_samples,
    nearest_codes,
    read_images,
)
from metrics.tables import robustness
from models import command
from models.artifacts import ROOT, git_commit, plain, sha256_of, this_command, write_text
from models.checkpoint import load_generator, results_of
from models.command import InputError, run
from models.data import Codes, Split, evenly, load_codes_of, load_split
from models.method import Method
from models.sampling import Plan
from models.tokenizer import Tokenizer, decode_codes, find_tokenizer, load_tokenizer
from models.training import parameters, pick_device


@dataclass(frozen=True)
class RobustnessConfig(command.Config):
    """Measure a generator on corrupted images and contexts, and on samples that it misreads."""

    checkpoint: Path
    """last.pth of a run, or a file in checkpoints/"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made the generator's codes"""
    extractor: Path | None = None
    """ruler and judge of images; default: checkpoints/extractor_<dataset>.pth"""
    codes: Path = ROOT / "data/codes"
    """test codes from stage 3, for the corrupted context"""
    data: Path | None = None
    """test images from stage 1; default data/<dataset>"""
    cifar10_c: Path | None = None
    """folder of the official CIFAR-10-C; default: corruptions made here, after it"""
    images: Annotated[int, command.Range(4, 10**7)] = 1000
    """test images whose context is corrupted, evenly spaced"""
    corrupted_images: Annotated[int, command.Range(4, 10**7, or_zero=True)] = 200
    """test images that are corrupted themselves, in every way and severity: 80 times the work for
    an image; 0 for none"""
    num_samples: command.ImagesOrNone = 1000
    """samples for each rho, sample i of class i modulo 10; 0 for none"""
    cfg_scale: command.Amount = 1.0
    """guidance scale of the samples; 1 for none"""
    seed: command.Seed = 0
    """corruptions, orders, samples and resamples follow from it"""
    batch: command.Batch = 100
    out: command.OutFolder | None = None
    """default results/<name of the run or file>"""
    device: command.DeviceName = "auto"


@dataclass(frozen=True)
class Inputs:
    """What is measured, and on what, read before the long part."""

    tokenizer: Tokenizer
    extractor: Classifier
    distance: str
    """name of the extractor's distance, as FD_c10"""
    test: Codes
    """the --images test codes"""
    split: Split
    """all test images"""
    rows_N: np.ndarray
    """which of them are corrupted"""
    corrupted: Corrupted
    sha256: dict[str, str]


def load_inputs(cfg: RobustnessConfig, head: dict, device: torch.device) -> Inputs:
    """Read what belongs to a generator. Raises InputError for a file that is another's."""
    test = load_codes_of(head, cfg.codes, "test", cfg.checkpoint)
    tokenizer = find_tokenizer(head["inputs"]["tokenizer"], cfg.tokenizer)
    folder = cfg.data or ROOT / "data" / head["dataset"]
    split = load_split(folder, "test")
    if split.sha256 != test.header["inputs"]["images"]:
        raise InputError(
            f"{folder} holds other test images than those whose codes are in {cfg.codes}; give "
            "the --data they were made from, or run: uv run tools/extract_latent_codes.py "
            f"--data {folder} --out NEW, then give --codes NEW"
        )
    rows_N = evenly(len(split.labels_N), cfg.corrupted_images)
    corrupted = drawn(split.images_NHWC[rows_N], cfg.seed)
    if cfg.cifar10_c:
        corrupted = official(cfg.cifar10_c, split.labels_N, rows_N)
    extractor = cfg.extractor or ROOT / f"checkpoints/extractor_{head['dataset']}.pth"
    return Inputs(
        load_tokenizer(tokenizer)[0].to(device),
        load_classifier(extractor)[0].to(device),
        classifier_extractor(extractor).frechet_name(FULL),
        test.rows(torch.from_numpy(evenly(len(test.label_N), cfg.images))),
        split,
        rows_N,
        corrupted,
        {"test_codes": test.header["sha256"], "test_images": split.sha256}
        | {"extractor": sha256_of(extractor)},
    )


def image_stage(cfg: RobustnessConfig, model: Method, inputs: Inputs, order: str) -> dict:
    """Return the measures of images by severity, 0 being the clean ones, and by corruption."""
    about = {"source": inputs.corrupted.source, "images": len(inputs.rows_N)}
    if not cfg.corrupted_images:
        return about | {"by_severity": [], "by_corruption": {}}
    clean_NHWC = inputs.split.images_NHWC[inputs.rows_N]
    label_N = torch.from_numpy(inputs.split.labels_N[inputs.rows_N])
    order_NS = orders_for(model, order, len(label_N), cfg.seed)
    reference_NF, by_severity = None, []
    by_corruption = {name: [] for name in inputs.corrupted.names}
    for severity in (0, *SEVERITIES):
        images_NAHWC = inputs.corrupted.at(severity) if severity else clean_NHWC[:, None]
        rest = (clean_NHWC, label_N, order_NS, cfg.batch, f"severity {severity}")
        reading = read_images(model, inputs.tokenizer, images_NAHWC, *rest)
        decoded_MHWC = reading.decoded_NAHWC.reshape(-1, *clean_NHWC.shape[1:])
        features_MF, _ = features_of(decoded_MHWC, inputs.extractor)
        reference_NF = features_MF if reference_NF is None else reference_NF
        distance = {inputs.distance: frechet(features_MF, reference_NF)}
        by_severity.append({"severity": severity} | reading.row(seed=cfg.seed) | distance)
        for i, name in enumerate(inputs.corrupted.names if severity else ()):
            row = reading.row(slice(i, i + 1), cfg.seed)
            by_corruption[name].append({"severity": severity} | row)
    return about | {"by_severity": by_severity, "by_corruption": by_corruption}


def context_stage(cfg: RobustnessConfig, model: Method, inputs: Inputs, order: str) -> dict:
    """Return what replaced codes cost: by any others, and by those with the nearest vectors."""
    neighbours_VK = nearest_codes(code_vectors(inputs.tokenizer)).cpu()
    codes_NT, label_N = inputs.test.codes_NAT[:, 0], inputs.test.label_N
    order_NS = orders_for(model, order, len(label_N), cfg.seed)
    return {
        kind: context_report(model, codes_NT, label_N, order_NS, RHOS, others, cfg.batch, cfg.seed)
        for kind, others in (("uniform", None), ("neighbours", neighbours_VK))
    }


def sampling_stage(cfg: RobustnessConfig, model: Method, inputs: Inputs, order: str) -> list[dict]:
    """Return how good samples are whose codes were misread; the distance is to real test images."""
    if not cfg.num_samples:
        return []
    label_N = torch.arange(cfg.num_samples) % model.config.classes
    reference_MF, _ = features_of(inputs.split.images_NHWC, inputs.extractor)
    plan, rows = Plan(order=order, cfg_scale=cfg.cfg_scale), []
    for rho in RHOS:
        codes_NT = misread_samples(model, label_N, plan, rho, cfg.seed, cfg.batch)
        images_NHWC = decode_codes(inputs.tokenizer, codes_NT)
        features_NF, class_N = features_of(images_NHWC, inputs.extractor)
        accuracy = mean_of((class_N == label_N).double(), cfg.seed)
        distance = {inputs.distance: frechet(features_NF, reference_MF)}
        rows.append({"rho": rho, "label_accuracy": accuracy} | distance)
    return rows


def main(cfg: RobustnessConfig) -> dict:
    """Measure, write, print; return what robustness.json holds."""
    device = pick_device(cfg.device)
    generator = load_generator(cfg.checkpoint)
    head, model = generator.header, generator.model.to(device)
    inputs = load_inputs(cfg, head, device)
    order = generator.order
    out = cfg.out or results_of(cfg.checkpoint)

    found = {
        "method": head["method"],
        "trained_order": head["config"]["order"],
        "order": order,
        "parameters": parameters(model),
        "images": len(inputs.test.label_N),
        "num_samples": cfg.num_samples,
        "corruptions": image_stage(cfg, model, inputs, order),
        "context": context_stage(cfg, model, inputs, order),
        "sampling": sampling_stage(cfg, model, inputs, order),
        "command": this_command(),
        "config": plain(cfg),
        "git_commit": git_commit(),
        "inputs": {**head["inputs"], "checkpoint": head["sha256"], **inputs.sha256},
    }
    write_text(out / "robustness.json", json.dumps(found, indent=1) + "\n")
    run = Run(out.name, {"robustness": found}, [])
    for plot in (plot_context, plot_corruptions, plot_misread):
        save_figure(plot([run]), out / f"{plot.__name__.removeprefix('plot_')}.png")
    print(found["corruptions"]["source"], robustness({run.name: run}), f"-> {out}", sep="\n\n")
    return found


if __name__ == "__main__":
    run(main, RobustnessConfig)
