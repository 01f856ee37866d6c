#!/usr/bin/env -S uv run
"""What does a generator make of corrupted images, a wrong context, and codes that it misreads?

checkpoint + tokenizer + test images and codes -> results/<run>/{robustness.json, corruptions.png,
context.png, misread.png}. What a cut run had measured is not measured again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from metrics.calibration import mean_of
from metrics.corruptions import SEVERITIES, SOURCE, drawn, official
from metrics.evaluation import GeneratorConfig, OrderFlag, Subject, codes_of_images
from metrics.extractor import extractor_of
from metrics.fidelity import FeatureExtractor, features_of, fidelity
from metrics.likelihood import orders_for
from metrics.pictures import save_figure
from metrics.plots import ROBUSTNESS, plot_robustness
from metrics.report import Done, Run, write_record
from metrics.robustness import RHOS, context_report, misread_samples, read_images
from metrics.tables import robustness
from models import command
from models.artifacts import ROOT
from models.command import InputError, run
from models.data import Codes, Split, evenly, load_split
from models.methods import check_order
from models.sampling import Plan
from models.tokenizer import decode_codes, encode_images, nearest_codes


@dataclass(frozen=True)
class RobustnessConfig(GeneratorConfig):
    """Measure a generator on corrupted images and contexts, and on samples that it misreads."""

    order: OrderFlag = None
    """of reading and sampling; default: the one it was trained in (anneal, adaptive: the scan)"""
    extractor: Path | None = None
    """ruler and extractor of images; default: checkpoints/extractor_<dataset>.pth"""
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


def image_stage(
    cfg: RobustnessConfig,
    subject: Subject,
    order: str,
    split: Split,
    extractor: FeatureExtractor,
    done: Callable,
) -> dict:
    """Return the measures of images by severity, 0 being the clean ones, and by corruption."""
    rows_N = evenly(len(split.labels_N), cfg.corrupted_images)
    clean_NHWC, label_N = split.images_NHWC[rows_N], torch.from_numpy(split.labels_N[rows_N])
    source, versions = SOURCE, drawn(clean_NHWC, cfg.seed)
    if cfg.cifar10_c:
        versions = official(cfg.cifar10_c, split.images_NHWC, split.labels_N, rows_N)
        source = "CIFAR-10-C"
    numbers = {"source": source, "images": len(rows_N)}
    if not cfg.corrupted_images:
        return numbers | {"by_severity": [], "by_corruption": {}}
    order_NS = orders_for(subject.model, order, len(label_N), cfg.seed)
    clean = decode_codes(subject.tokenizer, encode_images(subject.tokenizer, clean_NHWC))
    reference = features_of(clean, extractor, subject.device, least=1)

    def of_severity(severity: int) -> list[dict]:
        """Return the measures over all corruptions, and of each."""
        images = [make(severity) for make in versions.values()] if severity else [clean_NHWC]
        rest = (clean_NHWC, label_N, order_NS, cfg.batch, f"severity {severity}")
        reading = read_images(subject.model, subject.tokenizer, np.stack(images, 1), *rest)
        decoded_MHWC = reading.decoded_NAHWC.reshape(-1, *clean_NHWC.shape[1:])
        features = features_of(decoded_MHWC, extractor, subject.device, least=1)
        whole = reading.row(seed=cfg.seed, keep=True)
        whole |= fidelity(features, reference, extractor, frechet_only=True)
        parts = range(len(images) if severity else 0)
        rows = [whole, *(reading.row(slice(i, i + 1), cfg.seed) for i in parts)]
        return [{"severity": severity} | row for row in rows]

    rows = [done(f"severity {n}", of_severity, n) for n in (0, *SEVERITIES)]
    by_corruption = {name: [row[i] for row in rows[1:]] for i, name in enumerate(versions, 1)}
    return numbers | {"by_severity": [row[0] for row in rows], "by_corruption": by_corruption}


def context_stage(cfg: RobustnessConfig, subject: Subject, order: str, test: Codes) -> dict:
    """Return what replaced codes cost: by any others, and by those with the nearest vectors."""
    neighbours_VK = nearest_codes(subject.tokenizer.codebook_VC).cpu()
    codes_NT, label_N = test.codes_NAT[:, 0], test.label_N
    inputs = codes_NT, label_N, orders_for(subject.model, order, len(label_N), cfg.seed)
    return {
        kind: context_report(subject.model, *inputs, RHOS, others, cfg.batch, cfg.seed)
        for kind, others in (("uniform", None), ("neighbours", neighbours_VK))
    }


def sampling_stage(
    cfg: RobustnessConfig, subject: Subject, order: str, split: Split, extractor: FeatureExtractor
) -> list[dict]:
    """Return how good samples are whose codes were misread; the distance is to real test images."""
    if not cfg.num_samples:
        return []
    label_N, rows = torch.arange(cfg.num_samples) % subject.model.config.classes, []
    reference = features_of(split.images_NHWC, extractor, subject.device, least=1)
    plan = Plan(order=order, cfg_scale=cfg.cfg_scale)
    for rho in RHOS:
        codes_NT = misread_samples(subject.model, label_N, plan, rho, cfg.seed, cfg.batch)
        images_NHWC = decode_codes(subject.tokenizer, codes_NT)
        features = features_of(images_NHWC, extractor, subject.device)
        right_N = features[extractor.logits_layer].argmax(1) == label_N
        row = {"rho": rho, "label_accuracy": mean_of(right_N.double(), cfg.seed)}
        rows.append(row | fidelity(features, reference, extractor, frechet_only=True))
    return rows


def main(cfg: RobustnessConfig) -> dict:
    """Measure, write, print; return what robustness.json holds."""
    subject = cfg.load()
    header, order = subject.header, str(cfg.order or subject.order)
    check_order(header["method"], order, subject.model.config.scan)
    split = load_split(cfg.data or ROOT / "data" / header["dataset"], "test")
    test = codes_of_images(header, cfg.codes, cfg.checkpoint, split)
    test = test.rows(torch.from_numpy(evenly(len(test.label_N), cfg.images)))
    dataset, classes = header["dataset"], header["classes"]
    extractor = extractor_of(dataset, classes, cfg.extractor, subject.device)
    if extractor is None:
        raise InputError(
            f"no classifier of {header['dataset']}; run: uv run tools/train_extractor.py"
        )
    inputs = {"test_codes": test.header["sha256"], "test_images": split.sha256}
    inputs |= subject.inputs | {"extractor": extractor.sha256}
    named = ("seed", "images", "corrupted_images", "num_samples", "cfg_scale", "cifar10_c")
    settings = {"order": order} | {name: str(getattr(cfg, name)) for name in named}
    done = Done(subject.out / ".partial_robustness.json", inputs | settings)
    numbers = subject.description | {
        "order": order,
        "images": len(test.label_N),
        "num_samples": cfg.num_samples,
        "corruptions": image_stage(cfg, subject, order, split, extractor, done),
        "context": done("context", context_stage, cfg, subject, order, test),
        "sampling": done("sampling", sampling_stage, cfg, subject, order, split, extractor),
    }
    record = write_record(subject.out / "robustness.json", numbers, cfg, inputs)
    done.file.unlink(missing_ok=True)
    run = Run(subject.out.name, {"robustness": record}, [])
    for picture in ROBUSTNESS:
        save_figure(plot_robustness([run], picture), subject.out / f"{picture}.png")
    source = record["corruptions"]["source"]
    print(source, robustness({run.name: run}), f"-> {subject.out}", sep="\n\n")
    return record


if __name__ == "__main__":
    run(main, RobustnessConfig)
