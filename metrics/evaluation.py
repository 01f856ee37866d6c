"""Images held against real ones: with every feature extractor at hand, and a control beside it.

And what the commands that measure a generator share: their flags, and their samples.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from metrics.extractor import extractor_of
from metrics.fidelity import LEAST, FeatureExtractor, Features, features_of, fidelity, inception_of
from metrics.report import at_once
from models import command
from models.artifacts import ROOT, sha256_of
from models.checkpoint import Generator, load_codes_of, load_generator, results_of
from models.command import InputError
from models.data import PRODUCERS, Codes, Split, evenly, load_splits
from models.machine import Precision, Workers, pick_device, pick_precision
from models.method import Method
from models.methods import check_order
from models.orders import CHOSEN, FIXED_RANDOM, ORDERS
from models.sampling import ImageSampler, Plan, sample_codes
from models.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from models.training import parameters

OrderFlag = Literal[(*ORDERS, FIXED_RANDOM, "random")] | Path | None
"""--order of a trained generator"""
SamplingOrder = Literal[(*ORDERS, FIXED_RANDOM, "random", *CHOSEN)] | Path | None
"""the same, or one that the model chooses while it samples"""


@dataclass(frozen=True)
class Subject(Generator):
    """A generator to measure, with the tokenizer of its codes."""

    tokenizer: Tokenizer
    device: torch.device
    """where both are"""
    out: Path
    """folder for what is measured"""

    @property
    def description(self) -> dict:
        """What every record of a measurement says of the generator."""
        trained, size = self.header["config"]["order"], parameters(self.model)
        return {"method": self.header["method"], "trained_order": trained, "parameters": size}

    @property
    def inputs(self) -> dict[str, str]:
        """What every measure of the generator depends on: name -> sha256."""
        return {"checkpoint": self.header["sha256"], **self.header["inputs"]}


@dataclass(frozen=True)
class GeneratorConfig(command.Config):
    """The flags of every command that measures a generator."""

    checkpoint: Path
    """last.pth of a run, or a file in checkpoints/"""
    tokenizer: Path | None = None
    """default: the one in tokenizer_vq/, checkpoints/ or data/*/ that made the generator's codes;
    given: that, or one with a new decoder for them (train_vqvae.py --train decoder)"""
    seed: command.Seed = 0
    """orders, samples, corruptions and resamples follow from it"""
    batch: command.Batch = 100
    """images at once; a likelihood on a CPU takes 16, what a cache holds"""
    out: command.OutFolder | None = None
    """default results/<name of the run or file>"""
    device: command.DeviceName = "auto"

    @property
    def folder(self) -> Path:
        """What is measured goes here."""
        return self.out or results_of(self.checkpoint)

    def load(self) -> Subject:
        """Read the generator and its tokenizer. Raises InputError for files that are not these."""
        device, generator = pick_device(self.device), load_generator(self.checkpoint)
        path = find_tokenizer(generator.header["inputs"]["tokenizer"], self.tokenizer)
        tokenizer, head = load_tokenizer(path)
        if head["sha256"] != generator.header["inputs"]["tokenizer"]:
            generator.header["inputs"]["decoder"] = head["sha256"]
        model = generator.model.to(device)
        return Subject(model, generator.header, tokenizer.to(device), device, self.folder)


@dataclass(frozen=True)
class SamplingConfig(GeneratorConfig):
    """The flags of the commands that draw many samples."""

    batch: command.Batch = 500
    precision: Precision = "auto"
    """of sampling; auto: bf16 where the hardware has it, which flips a draw here and there"""
    devices: command.Devices = 1
    """processes that share the samples, on a GPU each or on the threads of the CPU"""

    def sampler(self, subject: Subject) -> Workers:
        """Return what `sample_images` takes. Likelihoods are the subject's own model's, in fp32."""
        model = subject.model
        if pick_precision(self.precision, subject.device) == "bf16":
            model = copy.deepcopy(model).bfloat16()  # cast once
        return Workers(ImageSampler(model, subject.tokenizer), subject.device, self.devices)


@dataclass(frozen=True)
class Reference:
    """What images are held against: real images, and the networks that compare."""

    train_NHWC: np.ndarray
    """uint8, the reference of every distance"""
    test: Split
    """the control: real images in the place of samples"""
    extractors: tuple[FeatureExtractor, ...]
    device: torch.device

    @property
    def inputs(self) -> dict[str, str]:
        """Return what every measure depends on: name -> sha256."""
        hashes = {f"extractor {e.layer}": e.sha256 for e in self.extractors}
        test = {"test_images": self.test.sha256, "test_labels": self.test.labels_sha256}
        return {"reference": sha256_of(self.train_NHWC), **test, **hashes}

    @cached_property
    def features(self) -> list[Features]:
        """Features of the train images, for each extractor; kept on disk."""
        return [features_of(self.train_NHWC, e, self.device, keep=True) for e in self.extractors]

    def names(self, samples: int) -> list[str]:
        """Return the names of all measures of so many samples; a distance comes first."""
        least = min(samples, len(self.train_NHWC))
        return [name for e in self.extractors for name in e.names(least)]

    def measure(
        self, images_NHWC: np.ndarray, label_N: np.ndarray | None, real: bool = False, done=at_once
    ) -> dict[str, float]:
        """Return {name: value} of uint8 images, label_accuracy among them if there are labels.

        Features of `real` images are kept on disk. `done` may know a measure from before.
        """

        def by(i: int) -> dict[str, float]:
            extractor = self.extractors[i]
            features = features_of(images_NHWC, extractor, self.device, keep=real)
            values = fidelity(features, self.features[i], extractor)
            if label_N is not None and "label_accuracy" in extractor.names(len(images_NHWC)):
                values["label_accuracy"] = extractor.label_accuracy(features, label_N)
            return values

        values: dict[str, float] = {}
        for i, extractor in enumerate(self.extractors):
            name = "control " * real + extractor.layer
            values |= done(name, by, i)
        return values

    def report(
        self, images_NHWC: np.ndarray, label_N: np.ndarray | None, done: Callable = at_once
    ) -> dict:
        """Return {"samples", "control": {name: value}} and how many images both rest on."""
        control = evenly(len(self.test.labels_N), len(images_NHWC))
        label_M = None if label_N is None else self.test.labels_N[control]
        real_NHWC = self.test.images_NHWC[control]
        return {
            "samples": self.measure(images_NHWC, label_N, done=done),
            "control": self.measure(real_NHWC, label_M, real=True, done=done),
            "reference_images": len(self.train_NHWC),
            "control_images": len(control),
        }


@dataclass(frozen=True)
class MeasureConfig:
    """What images are measured with and against; the same flags in every command that does."""

    data: Path | None = None
    """real images from stage 1; default data/<dataset>"""
    reference: command.Images | None = None
    """use this many real train images, evenly spaced, as the reference; default all"""
    extractor: Path | None = None
    """offline classifier; default: checkpoints/extractor_<dataset>.pth if it is there"""
    inception_weights: Path | None = None
    """FID-Inception state dict; default: torch-fidelity's download; `none`: do without"""
    fid_features: Literal["2048", "768", "192", "64"] = "2048"
    """Inception layer; any but 2048 is printed as FID768 and so on"""

    def load(
        self, dataset: str, device: torch.device, labels: tuple[int, ...] = ()
    ) -> Reference | None:
        """Read it all; only images of `labels`, if given. None, with a line, without real images.

        Raises InputError for what is broken, or for fewer reference images than can be measured.
        """
        data = self.data or ROOT / "data" / dataset
        if self.data is None and not data.exists():
            run = f"; run: uv run {PRODUCERS[dataset]}" if dataset in PRODUCERS else ""
            print(f"no real images at {data}: no distances{run}")
            return None
        train, test = load_splits(data)
        if labels:
            train, test = train.of_labels(labels), test.of_labels(labels)
        train_NHWC = train.images_NHWC
        train_NHWC = train_NHWC[evenly(len(train_NHWC), self.reference or len(train_NHWC))]
        for name, count in (("reference", len(train_NHWC)), ("test", len(test.labels_N))):
            if count < LEAST:
                raise InputError(f"expected at least {LEAST} {name} images, got {count}")
        extractors = [extractor_of(test.dataset, test.classes, self.extractor, device)]
        if str(self.inception_weights) != "none":
            extractors.append(inception_of(self.inception_weights, self.fid_features, device))
        return Reference(train_NHWC, test, tuple(e for e in extractors if e), device)


def plan_of(generator: Generator, **flags) -> Plan:
    """Return how to sample: as asked, where it is not None, else as the checkpoint recommends."""
    flags = {name: value for name, value in flags.items() if value is not None}
    if "order" in flags:
        flags["order"] = str(flags["order"])
    plan = Plan(**{"cfg_scale": 2.0, "order": generator.order} | generator.sampling | flags)
    check_order(generator.header["method"], plan.order, generator.model.config.scan)
    plan.groups(generator.model)  # refuses a number of steps that the method cannot take
    return plan


def codes_of_images(made_with: dict, folder: Path, whose: Path, test: Split | None) -> Codes:
    """Read test codes. Raises InputError as `load_codes_of`, or if they are not of these images."""
    codes = load_codes_of(made_with, folder, "test", whose)
    if test and codes.header["inputs"].get("images") != test.sha256:
        raise InputError(
            f"{folder} holds codes of other test images than those to measure on; give the --data "
            "they were made from, or run: uv run tools/extract_latent_codes.py --data YOURS "
            "--out NEW, then give --codes NEW"
        )
    return codes


def likelihood_codes(
    subject: Subject, folder: Path, checkpoint: Path, reference: Reference | None
) -> dict[str, Codes]:
    """Return {split: codes} to measure the likelihood of; empty, with a line, without any."""
    if not (folder / "test_codes.npy").exists():
        print(f"no codes at {folder}: no likelihood; run: uv run tools/extract_latent_codes.py")
        return {}
    test = codes_of_images(subject.header, folder, checkpoint, reference and reference.test)
    return {"test": test, "train": load_codes_of(subject.header, folder, "train", checkpoint)}


def sampled_codes(
    model: Method, label_N: torch.Tensor, plan: Plan, seed: int, batch: int, wrap=None
) -> torch.Tensor:
    """Return codes_NT on the CPU, sample i from stream (seed, i), with a progress bar.

    `wrap` makes what samples in place of the model, for a range of samples.
    """
    parts, count = [], min(batch, len(label_N))
    for label_B in tqdm(label_N.split(count), "sampling", unit="image", unit_scale=count):
        first = count * len(parts)
        sampler = wrap(range(first, first + len(label_B))) if wrap else model
        parts.append(sample_codes(sampler, label_B, plan, seed, first).cpu())
    return torch.cat(parts)


def sample_images(
    sampler: Workers, label_N: torch.Tensor, plan: Plan, seed: int, batch: int
) -> np.ndarray:
    """Return uint8 (N, H, W, 3), sample i from stream (seed, i), with a progress bar."""
    calls = [(label_N[i : i + batch], plan, seed, i) for i in range(0, len(label_N), batch)]
    bar = {"total": len(calls), "unit": "image", "unit_scale": min(batch, len(label_N))}
    return np.concatenate([*tqdm(sampler.map(calls), "sampling", **bar)])
