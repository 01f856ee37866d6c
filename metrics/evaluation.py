"""Images held against real ones: with every feature extractor at hand, and a control beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from metrics.extractor import Classifier, classifier_extractor, label_accuracy, load_classifier
from metrics.fidelity import (
    FEATURES,
    LEAST,
    FeatureExtractor,
    download_inception,
    features_of,
    fidelity,
    inception_extractor,
)
from metrics.likelihood import bits_per_code, orders_for
from models import command
from models.artifacts import ROOT, read_json, sha256_of, write_text
from models.command import InputError
from models.data import PRODUCERS, SPLITS, Codes, Split, evenly, load_split
from models.method import Method
from models.sampling import Plan, sample_codes
from models.tokenizer import Tokenizer, decode_codes


@dataclass(frozen=True)
class Reference:
    """What images are held against: real images, feature extractors, and a classifier."""

    train_NHWC: np.ndarray
    """uint8, the reference of every distance"""
    test: Split
    """the control: real images in the place of samples"""
    extractors: tuple[FeatureExtractor, ...]
    classifier: Classifier | None
    """says whether a sample shows its label; None: nobody does"""
    device: torch.device

    @property
    def inputs(self) -> dict[str, str]:
        """Return what every measure depends on: name -> sha256."""
        hashes = {f"extractor {e.layer}": e.sha256 for e in self.extractors}
        return {"reference": sha256_of(self.train_NHWC), **hashes}

    def names(self, samples: int) -> list[str]:
        """Return the names of all measures of so many samples."""
        names = [name for e in self.extractors for name in e.names(samples)]
        return names + ["label_accuracy"] * (self.classifier is not None)

    def measure(
        self,
        images_NHWC: np.ndarray,
        label_N: np.ndarray | None,
        real: bool = False,
        done: "Callable[[str, Callable], Any]" = lambda name, compute: compute(),
    ) -> dict[str, float]:
        """Return {name: value} of uint8 images, label_accuracy among them if there are labels.

        Features of `real` images are kept on disk. `done` may know a measure from before.
        """
        found = {}
        for extractor in self.extractors:

            def measured(extractor=extractor) -> dict[str, float]:
                keep = FEATURES if real else None
                samples = features_of(images_NHWC, extractor, self.device, keep)
                reference = features_of(self.train_NHWC, extractor, self.device, FEATURES)
                return fidelity(samples, reference, extractor)

            found |= done(extractor.frechet_name(len(images_NHWC)), measured)
        if self.classifier is not None and label_N is not None:
            found["label_accuracy"] = label_accuracy(images_NHWC, label_N, self.classifier)
        return found

    def report(self, images_NHWC: np.ndarray, label_N: np.ndarray | None, done=None) -> dict:
        """Return {"samples", "control": {name: value}} and how many images both rest on."""
        done = done or (lambda name, compute: compute())
        control = evenly(len(self.test.labels_N), len(images_NHWC))
        label_M = None if label_N is None else self.test.labels_N[control]
        real_NHWC = self.test.images_NHWC[control]
        return {
            "samples": self.measure(images_NHWC, label_N, done=done),
            "control": self.measure(
                real_NHWC, label_M, real=True, done=lambda name, c: done(f"control {name}", c)
            ),
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
        splits = {split: load_split(data, split) for split in SPLITS}
        if labels:
            splits = {split: found.of_labels(labels) for split, found in splits.items()}
        train_NHWC, test = splits["train"].images_NHWC, splits["test"]
        train_NHWC = train_NHWC[evenly(len(train_NHWC), self.reference or len(train_NHWC))]
        for name, count in (("reference", len(train_NHWC)), ("test", len(test.labels_N))):
            if count < LEAST:
                raise InputError(f"expected at least {LEAST} {name} images, got {count}")
        extractors, classifier = [], None
        shipped = ROOT / f"checkpoints/extractor_{test.dataset}.pth"
        if self.extractor or shipped.exists():
            classifier = load_classifier(self.extractor or shipped)[0].to(device)
            extractors.append(classifier_extractor(self.extractor or shipped, device))
        if str(self.inception_weights) != "none":
            if weights := self.inception_weights or download_inception():
                extractors.append(inception_extractor(weights, self.fid_features, device))
            else:
                print(
                    "no Inception weights at hand and none to download: no FID; "
                    "give --inception-weights PATH"
                )
        return Reference(train_NHWC, test, tuple(extractors), classifier, device)


class Done:
    """The parts of a long evaluation as they come, on disk, so that a cut one goes on."""

    def __init__(self, file: Path, inputs: dict):
        """Take what `file` holds if it rests on the same `inputs`, else start afresh."""
        self.file, self.inputs, self.parts = file, inputs, {}
        try:
            found = read_json(file)
            if found["inputs"] == json.loads(json.dumps(inputs)):
                self.parts = dict(found["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a part, computed now or before; it is JSON."""
        if name not in self.parts:
            self.parts[name] = compute()
            write_text(self.file, json.dumps({"inputs": self.inputs, "parts": self.parts}))
        return self.parts[name]


def sample_images(
    model: Method, tokenizer: Tokenizer, label_N: torch.Tensor, plan: Plan, seed: int, batch: int
) -> np.ndarray:
    """Return uint8 (N, H, W, 3), sample i from stream (seed, i), with a progress bar."""
    images = []
    with tqdm(total=len(label_N), desc="sampling", unit="image") as bar:
        for first in range(0, len(label_N), batch):
            part = label_N[first : first + batch]
            codes_BT = sample_codes(model, part, plan, seed, first)
            images.append(decode_codes(tokenizer, codes_BT))
            bar.update(len(part))
    return np.concatenate(images)


def likelihood(model: Method, test: Codes, order: str, random_orders: int = 1) -> dict[str, float]:
    """Return held-out bits per image in an order: mean and standard error over the test images.

    `random` is an order of its own for each image, averaged over `random_orders` of them.
    """
    bits_N = torch.zeros(len(test.label_N))
    count = random_orders if order == "random" else 1
    for seed in range(count):
        order_NS = orders_for(model, order, len(test.label_N), seed)
        bits_NS = bits_per_code(model, test.codes_NAT[:, 0], test.label_N, order_NS)
        bits_N += bits_NS.sum(1) / count
    mean, se = bits_N.mean().item(), (bits_N.std() / len(bits_N) ** 0.5).item()
    return {"mean": mean, "se": se, "orders": count}


def over_seeds(measured: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return {name: {"mean", "sd"}} of the same measures of several samplings, two or more."""
    return {
        name: {
            "mean": float(np.mean([one[name] for one in measured])),
            "sd": float(np.std([one[name] for one in measured], ddof=1)),
        }
        for name in measured[0]
    }
