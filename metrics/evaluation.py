"""Samples of a generator, measured with every ruler at hand, beside real images in their place."""

import numpy as np
import torch
from tqdm import tqdm

from metrics.extractor import Extractor, label_accuracy
from metrics.fidelity import Ruler, fidelity
from metrics.likelihood import bits_per_code, orders_for
from metrics.reconstruction import decode_codes
from models.artifacts import ROOT
from models.codes import Codes
from models.contract import Method
from models.dataset import Split, evenly
from models.sampling import Plan, sample_codes
from models.vqvae import VQVAE


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


def likelihoods(model: Method, test: Codes, order: str) -> dict[str, dict[str, float]]:
    """Return held-out bits per image by order: mean and standard error over the test images.

    The orders are `order`, raster and random where the method can choose, else its one scan.
    """
    found = {}
    orders = {order, "raster", "random"} if model.any_order else {model.config.scan}
    for order in sorted(orders):
        order_NS = orders_for(order, len(test.label_N), model.config.grid)
        bits_N = bits_per_code(model, test.codes_NAT[:, 0], test.label_N, order_NS).sum(1)
        found[order] = {
            "mean": bits_N.mean().item(),
            "se": (bits_N.std() / len(bits_N) ** 0.5).item(),
        }
    return found


def quality(
    images_NHWC: np.ndarray,
    label_N: np.ndarray,
    real: dict[str, Split],
    reference: int | None,
    rulers: list[Ruler],
    judge: Extractor | None,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Measure uint8 samples, and real test images in their place, against real train images.

    Returns {"samples": {name: value}, "control": the same names} and the numbers of images.
    `reference` limits the train images; `judge` says whether a sample shows its label.
    """
    train, test = real["train"].images_NHWC, real["test"]
    train = train[evenly(len(train), reference or len(train))]
    control = evenly(len(test.labels_N), len(images_NHWC))
    found = {"samples": {}, "control": {}}
    for ruler in rulers:
        for name, images in (("samples", images_NHWC), ("control", test.images_NHWC[control])):
            found[name] |= fidelity(images, train, ruler, ROOT / "results/features", device.type)
    if judge is not None:
        found["samples"]["label_accuracy"] = label_accuracy(images_NHWC, label_N, judge)
        found["control"]["label_accuracy"] = label_accuracy(
            test.images_NHWC[control], test.labels_N[control], judge
        )
    sizes = {"reference_images": len(train), "control_images": len(control)}
    return found | sizes
