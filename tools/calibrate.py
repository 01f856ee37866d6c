#!/usr/bin/env -S uv run
"""Does a generator mean its probabilities? Calibration, orders, entropy, confidence in samples.

checkpoint + test codes -> results/<run>/{calibration.json, reliability.png, class_reliability.png,
likelihood_by_order.png, steps.png, risk.png}
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from metrics.calibration import ClassBins, calibration_report, collect
from metrics.extractor import Classifier, class_probabilities, load_classifier
from metrics.likelihood import (
    bits_by_order,
    logit_batches,
    order_report,
    orders_for,
    orders_to_measure,
)
from metrics.pictures import save_figure
from metrics.plots import plot_by_order, plot_reliability, plot_risk, plot_steps
from metrics.report import Run
from metrics.sample_calibration import (
    class_log_p,
    class_report,
    entropy_report,
    own_samples,
    quality_report,
    temperature_report,
)
from metrics.tables import by_order, calibration
from models import command
from models.artifacts import ROOT, git_commit, plain, sha256_of, this_command, write_text
from models.checkpoint import load_generator, results_of
from models.command import run
from models.data import Codes, evenly, load_codes_of
from models.method import Method
from models.tokenizer import Tokenizer, decode_codes, find_tokenizer, load_tokenizer
from models.training import parameters, pick_device

STEPS = {"t < 8": (0, 8), "t 8-32": (8, 33), "t > 32": (33, None)}
"""buckets of the visiting step, from 0: little context, some, much"""


@dataclass(frozen=True)
class CalibrateConfig(command.Config):
    """Measure the calibration of a generator on test codes and on its own samples."""

    checkpoint: Path
    """last.pth of a run, or a file in checkpoints/"""
    codes: Path = ROOT / "data/codes"
    """test codes from stage 3"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made the generator's codes"""
    extractor: Path | None = None
    """judge of samples; default: checkpoints/extractor_<dataset>.pth if it is there"""
    images: Annotated[int, command.Range(4, 10**7)] = 2000
    """test images used, evenly spaced"""
    random_orders: Annotated[int, command.Range(0, 1000)] = 8
    """K, random orders whose likelihood is measured, for methods that take any"""
    num_samples: command.Images = 500
    """own samples, sample i of class i modulo 10"""
    seed: command.Seed = 0
    """orders, samples and resamples follow from it"""
    batch: command.Batch = 100
    out: command.OutFolder | None = None
    """default results/<name of the run or file>"""
    device: command.DeviceName = "auto"


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
        name: calibration_report(tokens[:, first:last], cfg.seed)
        for name, (first, last) in STEPS.items()
        if first < model.config.tokens
    }
    scaled = temperature_report(batches, len(label_N), cfg.seed)
    return {"overall": overall, "by_step": by_step, "temperature": scaled}, tokens


def order_stage(cfg: CalibrateConfig, model: Method, test: Codes) -> dict:
    """Return bits per image by order, their spread, ensembles and curves by step."""
    orders = orders_to_measure(model, cfg.random_orders, cfg.seed)
    bits = bits_by_order(model, test.codes_NAT[:, 0], test.label_N, orders, cfg.batch)
    return order_report(bits, cfg.seed)


Judge = tuple[Tokenizer, Classifier, str]
"""what turns codes into images, what looks at them, and the sha256 of the latter's file"""


def find_judge(cfg: CalibrateConfig, head: dict, device: torch.device) -> Judge | None:
    """Return who judges samples, read before the long part; None, with a line, without one."""
    tokenizer = find_tokenizer(head["inputs"]["tokenizer"], cfg.tokenizer)
    path = cfg.extractor or ROOT / f"checkpoints/extractor_{head['dataset']}.pth"
    if cfg.extractor is None and not path.exists():
        print(f"no {path}: quality of samples not judged; run: uv run tools/train_extractor.py")
        return None
    extractor = load_classifier(path)[0].to(device)
    return load_tokenizer(tokenizer)[0].to(device), extractor, sha256_of(path)


def sample_stage(cfg: CalibrateConfig, model: Method, order: str, judge: Judge | None):
    """Return the predictions along own samples, and {kind of confidence: does it tell quality}."""
    label_N = torch.arange(cfg.num_samples) % model.config.classes
    codes_NT, own = own_samples(model, label_N, order, cfg.seed, cfg.batch)
    if judge is None:
        return own, {}
    p_NC = class_probabilities(decode_codes(judge[0], codes_NT), judge[1])
    quality_N = torch.from_numpy(p_NC)[torch.arange(len(label_N)), label_N]
    order_NS = orders_for(model, order, len(label_N), cfg.seed)
    posterior_NC = class_log_p(model, codes_NT, order_NS, cfg.batch).log_softmax(1)
    confidences = {
        "ln p(sample | class)": -own.nats_NS.sum(1),
        "ln p(class | sample)": posterior_NC[torch.arange(len(label_N)), label_N],
    }
    return own, {
        name: quality_report(confidence_N, quality_N, cfg.seed)
        for name, confidence_N in confidences.items()
    }


def main(cfg: CalibrateConfig) -> dict:
    """Measure, write, print; return what calibration.json holds."""
    device = pick_device(cfg.device)
    generator = load_generator(cfg.checkpoint)
    head, model = generator.header, generator.model.to(device)
    test = load_codes_of(head, cfg.codes, "test", cfg.checkpoint)
    test = test.rows(torch.from_numpy(evenly(len(test.label_N), cfg.images)))
    judge = find_judge(cfg, head, device)
    order = generator.order
    out = cfg.out or results_of(cfg.checkpoint)

    order_NS = orders_for(model, order, len(test.label_N), cfg.seed)
    tokens, held_out = token_stage(cfg, model, test, order_NS)
    orders = order_stage(cfg, model, test)
    log_p_NC = class_log_p(model, test.codes_NAT[:, 0], order_NS, cfg.batch)
    own, quality = sample_stage(cfg, model, order, judge)
    found = {
        "method": head["method"],
        "trained_order": head["config"]["order"],
        "order": order,
        "parameters": parameters(model),
        "images": len(test.label_N),
        "num_samples": cfg.num_samples,
        "tokens": tokens,
        "orders": orders,
        "classes": class_report(log_p_NC, test.label_N, cfg.seed),
        "entropy": entropy_report(own, held_out, cfg.seed),
        "quality": quality,
        "command": this_command(),
        "config": plain(cfg),
        "git_commit": git_commit(),
        "inputs": {
            **head["inputs"],
            "checkpoint": head["sha256"],
            "test_codes": test.header["sha256"],
            **({"extractor": judge[2]} if judge else {}),
        },
    }
    write_text(out / "calibration.json", json.dumps(found, indent=1) + "\n")
    report(found, math.log2(model.config.vocab_size), out)
    return found


def report(found: dict, ceiling: float, out: Path) -> None:
    """Draw what calibration.json holds and print its tables; `ceiling` is log2 V."""
    run = Run(out.name, {"calibration": found}, [])
    save_figure(plot_reliability([run]), out / "reliability.png")
    save_figure(plot_reliability([run], "classes.before"), out / "class_reliability.png")
    save_figure(plot_by_order([run]), out / "likelihood_by_order.png")
    save_figure(plot_steps([run], ceiling), out / "steps.png")
    if found["quality"]:
        save_figure(plot_risk([run]), out / "risk.png")
    print(f"{found['method']} ({found['trained_order']}), {found['images']} test images")
    print(by_order({run.name: run}), calibration({run.name: run}), f"-> {out}", sep="\n")


if __name__ == "__main__":
    run(main, CalibrateConfig)
