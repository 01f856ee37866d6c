#!/usr/bin/env -S uv run
"""How much of an image does a tokenizer keep? rFID, PSNR, class and codebook use of test images.

tokenizer + test images (+ their codes) -> results/<tokenizer>/{tokenizer.json, reconstructions.png}

Test images are decoded from the codes that lie nearest, and from those that stage 3 stored. rFID is
the distance of decoded test images to the same images. Their distance to train images is what a
perfect generator of these codes would have, and stands beside that of the test images themselves.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes

from metrics.calibration import mean_of
from metrics.evaluation import MeasureConfig, Reference, codes_of_images
from metrics.fidelity import codebook_use, features_of, fidelity, psnr
from metrics.pictures import plot_reconstructions, save_figure
from metrics.report import Run, write_record
from metrics.tables import tokenizers
from models import command
from models.artifacts import ROOT
from models.command import InputError, run
from models.data import evenly
from models.machine import pick_device
from models.tokenizer import decode_codes, encode_images, load_tokenizer
from models.training import parameters


@dataclass(frozen=True)
class MeasureTokenizerConfig(command.Config):
    """Measure what a tokenizer keeps of test images."""

    tokenizer: Path = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    """from stage 2, imported, or a file in checkpoints/"""
    codes: Path = ROOT / "data/codes"
    """test codes from stage 3, measured too; `none`: do without"""
    images: command.Images = 10_000
    """test images used, evenly spaced"""
    against: OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    batch: command.Batch = 64
    out: command.OutFolder | None = None
    """default results/<name of the tokenizer's file>"""
    device: command.DeviceName = "auto"


def measure(
    decoded_NHWC: np.ndarray, images_NHWC: np.ndarray, label_N: np.ndarray, reference: Reference
) -> dict:
    """Return what is known of decoded images: to the same images, and in the place of samples."""
    values = {"psnr": mean_of(torch.from_numpy(psnr(images_NHWC, decoded_NHWC)))}
    for extractor in reference.extractors:
        both = (  # kept on disk: needed twice, and Inception takes long
            features_of(images, extractor, reference.device, keep=True)
            for images in (decoded_NHWC, images_NHWC)
        )
        distance = fidelity(*both, extractor, frechet_only=True)
        values |= {f"r{name}": value for name, value in distance.items()}
    return values | {"as_samples": reference.measure(decoded_NHWC, label_N, real=True)}


def main(cfg: MeasureTokenizerConfig) -> dict:
    """Measure, write, print; return what tokenizer.json holds."""
    device = pick_device(cfg.device)
    model, header = load_tokenizer(cfg.tokenizer)
    model.to(device).to(memory_format=torch.channels_last)
    reference = cfg.against.load(header["dataset"], device)
    if reference is None:
        raise InputError("expected real images to measure on; give --data")
    test = reference.test
    rows_N = evenly(len(test.labels_N), cfg.images)
    images_NHWC, label_N = test.images_NHWC[rows_N], test.labels_N[rows_N]
    out = cfg.out or ROOT / "results" / cfg.tokenizer.stem

    kinds, measured = {}, {}  # of codes: themselves, and the sweeps of the search that found them
    if str(cfg.codes) != "none":
        made_with = {"inputs": {"tokenizer": header["sha256"]}}
        codes = codes_of_images(made_with, cfg.codes, cfg.tokenizer, test)
        stored_NT = codes.codes_NAT[torch.from_numpy(rows_N), 0]
        kinds["stored"] = stored_NT, codes.header["config"].get("search", 0)
    kinds = {"nearest": (encode_images(model, images_NHWC, cfg.batch), 0)} | kinds
    for name, (codes_NT, sweeps) in kinds.items():
        decoded_NHWC = decode_codes(model, codes_NT, cfg.batch)
        use = codebook_use(codes_NT, model.config.codebook_size)
        values = measure(decoded_NHWC, images_NHWC, label_N, reference)
        measured[name] = {"search": sweeps} | use | values
    numbers = {
        "parameters": parameters(model),
        "codebook_size": model.config.codebook_size,
        "grid": model.grid,
        "train_steps": header["config"].get("steps"),
        "train_batch": header["config"].get("batch"),
        "images": len(rows_N),
        "reference_images": len(reference.train_NHWC),
        "codes": measured,
        "control": reference.measure(images_NHWC, label_N, real=True),
    }
    inputs = {"tokenizer": header["sha256"], "test_images": test.sha256}
    record = write_record(out / "tokenizer.json", numbers, cfg, inputs)
    shown = evenly(len(rows_N), 16)
    figure = plot_reconstructions(images_NHWC[shown], decoded_NHWC[shown])
    save_figure(figure, out / "reconstructions.png")
    result = Run(out.name, {"tokenizer": record}, [])
    print(tokenizers({result.name: result}) + f"-> {out}")
    return record


if __name__ == "__main__":
    run(main, MeasureTokenizerConfig)
