"""Samples of a generator, measured with every ruler at hand, beside real images in their place."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from metrics.extractor import Extractor, extractor_ruler, label_accuracy, load_extractor
from metrics.fidelity import Ruler, download_inception, fidelity, inception_ruler
from metrics.likelihood import bits_per_code, orders_for
from models.artifacts import ROOT
from models.data import SPLITS, Codes, Split, evenly, load_split
from models.method import Method
from models.sampling import Plan, sample_codes
from models.tokenizer import decode_codes
from models.vqvae import VQVAE

FEATURES = ROOT / "results/features"


def sample_images(
    model: Method, tokenizer: VQVAE, label_N: torch.Tensor, plan: Plan, seed: int, batch: int
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


def likelihoods(
    model: Method, test: Codes, order: str, random_orders: int = 1
) -> dict[str, dict[str, float]]:
    """Return held-out bits per image by order: mean and standard error over the test images.

    The orders are `order`, raster and random where the method can choose, else its one scan.
    Random is an order of its own for each image, averaged over `random_orders` of them.
    """
    found = {}
    orders = {order, "raster", "random"} if model.any_order else {model.config.scan}
    for order in sorted(orders):
        bits_N = torch.zeros(len(test.label_N))
        count = random_orders if order == "random" else 1
        for seed in range(count):
            order_NS = orders_for(model, order, len(test.label_N), seed)
            bits_NS = bits_per_code(model, test.codes_NAT[:, 0], test.label_N, order_NS)
            bits_N += bits_NS.sum(1) / count
        found[order] = {
            "mean": bits_N.mean().item(),
            "se": (bits_N.std() / len(bits_N) ** 0.5).item(),
            "orders": count,
        }
    return found


@dataclass(frozen=True)
class Reference:
    """What samples are held against: real images, the rulers, and the judge of labels."""

    train_NHWC: np.ndarray
    """uint8, the reference of every distance"""
    test: Split
    """the control: real images in the place of samples"""
    rulers: tuple[Ruler, ...]
    judge: Extractor | None
    """says whether a sample shows its label; None: nobody does"""
    device: torch.device

    def measure(self, images_NHWC: np.ndarray, label_N: np.ndarray | None) -> dict[str, float]:
        """Return {name: value} of uint8 samples; label_accuracy if they have labels and a judge."""
        found = {}
        for ruler in self.rulers:
            found |= fidelity(images_NHWC, self.train_NHWC, ruler, FEATURES, self.device.type)
        if self.judge is not None and label_N is not None:
            found["label_accuracy"] = label_accuracy(images_NHWC, label_N, self.judge)
        return found

    def report(self, images_NHWC: np.ndarray, label_N: np.ndarray | None) -> dict:
        """Return {"samples", "control": {name: value}} and how many images both rest on."""
        control = evenly(len(self.test.labels_N), len(images_NHWC))
        label_M = None if label_N is None else self.test.labels_N[control]
        return {
            "samples": self.measure(images_NHWC, label_N),
            "control": self.measure(self.test.images_NHWC[control], label_M),
            "reference_images": len(self.train_NHWC),
            "control_images": len(control),
        }


def find_reference(
    data: Path,
    images: int | None,
    extractor: Path | None,
    inception_weights: Path | None,
    fid_features: str,
    device: torch.device,
) -> Reference:
    """Read the real images in `data` (`images` of the train set, evenly spaced; None: all).

    The extractor is by default the one that the repo ships for these images, and the Inception
    weights are downloaded (`none`: do without). Raises InputError for what is missing or broken.
    """
    splits = {split: load_split(data, split) for split in SPLITS}
    train_NHWC, dataset = splits["train"].images_NHWC, splits["train"].dataset
    rulers, judge = [], None
    shipped = ROOT / f"checkpoints/extractor_{dataset}.pth"
    if extractor or shipped.exists():
        judge = load_extractor(extractor or shipped).to(device)
        rulers.append(extractor_ruler(extractor or shipped))
    if str(inception_weights) != "none":
        weights = inception_weights or download_inception()
        if weights:
            rulers.append(inception_ruler(weights, fid_features))
        else:
            print(
                "no Inception weights at hand and none to download: no FID; "
                "give --inception-weights PATH"
            )
    train_NHWC = train_NHWC[evenly(len(train_NHWC), images or len(train_NHWC))]
    return Reference(train_NHWC, splits["test"], tuple(rulers), judge, device)


def over_seeds(measured: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return {name: {"mean", "sd"}} of the same measures of several samplings, two or more."""
    return {
        name: {
            "mean": float(np.mean([one[name] for one in measured])),
            "sd": float(np.std([one[name] for one in measured], ddof=1)),
        }
        for name in measured[0]
    }
