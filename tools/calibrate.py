#!/usr/bin/env -S uv run
"""Does a generator mean its probabilities? Calibration, orders, entropy, confidence in samples.

checkpoint + test codes -> results/<run>/{calibration.json, reliability.png, class_reliability.png,
likelihood_by_order.png, steps.png, risk.png}
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from metrics import sample_calibration
from metrics.calibration import ClassBins, Predictions, calibration_report, collect
from metrics.evaluation import GeneratorConfig, Subject
from metrics.extractor import extractor_of
from metrics.fidelity import FeatureExtractor, features_of
from metrics.likelihood import logit_batches, order_report, orders_for
from metrics.pictures import save_figure
from metrics.plots import plot_by_order, plot_reliability, plot_risk, plot_steps
from metrics.report import Run, write_record
from metrics.tables import by_order, calibration
from models import command
from models.artifacts import ROOT
from models.checkpoint import load_codes_of
from models.data import Codes, evenly
from models.method import Method
from models.tokenizer import decode_codes

STEPS = {"t < 8": slice(0, 8), "t 8-32": slice(8, 33), "t > 32": slice(33, None)}
"""buckets of the visiting step, from 0: little context, some, much"""


@dataclass(frozen=True)
class CalibrateConfig(GeneratorConfig):
    """Measure the calibration of a generator on test codes and on its own samples."""

    codes: Path = ROOT / "data/codes"
    """test codes from stage 3"""
    extractor: Path | None = None
    """extractor of samples; default: checkpoints/extractor_<dataset>.pth if it is there"""
    images: Annotated[int, command.Range(4, 10**7)] = 2000
    """test images used, evenly spaced"""
    random_orders: Annotated[int, command.Range(0, 1000)] = 8
    """K, random orders whose likelihood is measured, for methods that take any"""
    class_orders: Annotated[int, command.Range(1, 64)] = 1
    """orders, the trained one and random ones; 1, 2, 4, .. readings tell the class together"""
    class_views: bool = False
    """in each of them all views of an image that stage 3 stored too, as the mirrored one"""
    num_samples: command.Images = 500
    """own samples, sample i of class i modulo 10"""


def token_stage(cfg: CalibrateConfig, model: Method, test: Codes, order_NS: torch.Tensor):
    """Return the calibration of the predicted codes, and the predictions themselves."""
    codes_NT, label_N = test.codes_NAT[:, 0], test.label_N

    def batches(rows_N: torch.Tensor, name: str = "temperature"):
        inputs = (x[rows_N] for x in (codes_NT, label_N, order_NS))
        return logit_batches(model, *inputs, batch=cfg.batch, name=name)

    class_bins = ClassBins(model.config.vocab_size, len(label_N), cfg.seed)
    tokens = collect(batches(torch.arange(len(label_N)), "tokens"), class_bins=class_bins)
    overall = calibration_report(tokens, cfg.seed) | {"ece_class_wise": class_bins.ece()}
    by_step = {
        name: calibration_report(Predictions(*(x_NS[:, steps] for x_NS in tokens)), cfg.seed)
        for name, steps in STEPS.items()
        if steps.start < model.config.tokens
    }
    scaled = sample_calibration.temperature_report(batches, len(label_N), cfg.seed)
    return {"overall": overall, "by_step": by_step, "temperature": scaled}, tokens


def class_stage(cfg: CalibrateConfig, subject: Subject, codes_NAT: torch.Tensor) -> torch.Tensor:
    """Return ln p(codes | label) for every label, (K, N, classes): order by order, each view."""
    log_p, count = [], cfg.class_orders if subject.model.any_order else 1
    views_NAT = codes_NAT if cfg.class_views else codes_NAT[:, :1]
    for k in range(count):
        order = subject.order if k == 0 else "random"
        order_NS = orders_for(subject.model, order, len(codes_NAT), cfg.seed + k)
        for codes_NT in views_NAT.unbind(1):
            how = subject.model, codes_NT, order_NS, cfg.batch
            log_p.append(sample_calibration.class_log_p(*how))
    return torch.stack(log_p)


def sample_stage(cfg: CalibrateConfig, subject: Subject, extractor: FeatureExtractor | None):
    """Return the predictions along own samples, and {kind of confidence: does it tell quality}."""
    model, rows_N = subject.model, torch.arange(cfg.num_samples)
    label_N = rows_N % model.config.classes
    how = (model, label_N, subject.order, cfg.seed, cfg.batch)
    codes_NT, own = sample_calibration.own_samples(*how)
    if extractor is None:
        return own, {}
    images_NHWC = decode_codes(subject.tokenizer, codes_NT)
    seen = features_of(images_NHWC, extractor, subject.device)
    quality_N = seen[extractor.logits_layer].softmax(1)[rows_N, label_N]
    order_NS = orders_for(model, subject.order, len(label_N), cfg.seed)
    log_p_NC = sample_calibration.class_log_p(model, codes_NT, order_NS, cfg.batch)
    confidences = {
        "ln p(sample | class)": -own.nats_NS.sum(1),
        "ln p(class | sample)": log_p_NC.log_softmax(1)[rows_N, label_N],
    }
    return own, {
        name: sample_calibration.quality_report(confidence_N, quality_N, cfg.seed)
        for name, confidence_N in confidences.items()
    }


def main(cfg: CalibrateConfig) -> dict:
    """Measure, write, print; return what calibration.json holds."""
    subject = cfg.load()
    header, model = subject.header, subject.model
    test = load_codes_of(header, cfg.codes, "test", cfg.checkpoint)
    test = test.rows(torch.from_numpy(evenly(len(test.label_N), cfg.images)))
    dataset, classes = header["dataset"], header["classes"]
    extractor = extractor_of(dataset, classes, cfg.extractor, subject.device)
    if extractor is None:
        print("no classifier: quality of samples not judged; run: uv run tools/train_extractor.py")

    codes_NT, label_N = test.codes_NAT[:, 0], test.label_N
    order_NS = orders_for(model, subject.order, len(label_N), cfg.seed)
    tokens, held_out = token_stage(cfg, model, test, order_NS)
    log_p_KNC = class_stage(cfg, subject, test.codes_NAT)
    own, quality = sample_stage(cfg, subject, extractor)
    numbers = subject.description | {
        "order": subject.order,
        "images": len(label_N),
        "num_samples": cfg.num_samples,
        "tokens": tokens,
        "orders": order_report(model, codes_NT, label_N, cfg.random_orders, cfg.batch, cfg.seed),
        "classes": sample_calibration.class_report(log_p_KNC[0], label_N, cfg.seed),
        "class_orders": sample_calibration.order_ensembles(log_p_KNC, label_N, cfg.seed),
        "entropy": sample_calibration.entropy_report(own, held_out, cfg.seed),
        "quality": quality,
    }
    inputs = subject.inputs | {"test_codes": test.header["sha256"]}
    inputs |= {"extractor": extractor.sha256} if extractor else {}
    record = write_record(subject.out / "calibration.json", numbers, cfg, inputs)
    run = Run(subject.out.name, {"calibration": record}, [])
    figures = {
        "reliability": plot_reliability([run]),
        "class_reliability": plot_reliability([run], "classes.before"),
        "likelihood_by_order": plot_by_order([run]),
        "steps": plot_steps([run], math.log2(model.config.vocab_size)),
    } | ({"risk": plot_risk([run])} if quality else {})
    for name, figure in figures.items():
        save_figure(figure, subject.out / f"{name}.png")
    print("{method} ({trained_order}), {images} test images".format(**record))
    print(by_order({run.name: run}), calibration({run.name: run}), f"-> {subject.out}", sep="\n")
    return record


if __name__ == "__main__":
    command.run(main, CalibrateConfig)
