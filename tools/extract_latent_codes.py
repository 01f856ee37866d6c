#!/usr/bin/env -S uv run
"""Stage 3: encode every image and its mirror image. Images + tokenizer -> data/codes/*.npy.

The speeds it prints count an image with all its views as one image, and the encoding only.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

from metrics.fidelity import codebook_use, psnr
from models import command
from models.artifacts import ROOT, header
from models.classifier import crop_and_flip, padded
from models.command import InputError, run
from models.data import SPLITS, evenly, load_splits, save_codes
from models.machine import pick_device
from models.tokenizer import decode_codes, encode_images, load_tokenizer, mirror
from models.vqvae import VQVAE

SHIFT = 3
"""pixels that a view may be moved by"""


@dataclass(frozen=True)
class ExtractConfig(command.Config):
    """Encode images to codes (stage 3)."""

    tokenizer: Path = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    """from stage 2"""
    data: Path = ROOT / "data/cifar10"
    """from stage 1; must be the images that the tokenizer was trained on, if it says which"""
    out: command.OutFolder = ROOT / "data/codes"
    """folder for {train,test}_{codes,labels}.npy"""
    search: Annotated[int, command.Range(0, 100)] = 0
    """sweeps over the grid that try each cell's second nearest code and keep what decodes better:
    one gains about half a dB and takes nine times as long"""
    views: Annotated[int, command.Range(2, 64)] = 2
    """of a train image: itself, its mirror image, then others that are moved by up to 3 pixels (the
    edge filled with its mirror image), half of them mirrored: other codes, for longer trainings"""
    batch: command.Batch = 64
    """images encoded at once; 64 stay in a core's cache, a GPU is faster with more"""
    device: command.DeviceName = "auto"


def views_of(images_NHWC: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yield `count` >= 2 views of images, each uint8 (N, H, W, 3)."""
    yield from (images_NHWC, mirror(images_NHWC))
    if count == 2:
        return
    wide_NHWC, generator = padded(images_NHWC, SHIFT), torch.Generator().manual_seed(0)
    for _ in range(count - 2):
        rows_N = torch.arange(len(images_NHWC))
        moved_N3HW = crop_and_flip(wide_NHWC, rows_N, generator, SHIFT)
        yield moved_N3HW.permute(0, 2, 3, 1).numpy()


def main(cfg: ExtractConfig) -> None:
    """Encode both splits; write nothing before everything is encoded."""
    began = time.time()
    model, head = load_tokenizer(cfg.tokenizer)
    if cfg.search and not isinstance(model, VQVAE):
        raise InputError(f"--search works with a VQVAE of ours, {cfg.tokenizer} is an imported one")
    splits = dict(zip(SPLITS, load_splits(cfg.data), strict=True))
    for split, images in splits.items():
        known = head["inputs"].get(f"{split}_images")  # an imported tokenizer does not say
        if known not in (None, images.sha256):
            raise InputError(
                f"{cfg.tokenizer} was trained on other images ({head['dataset']}) than the "
                f"{split} images in {cfg.data} ({images.dataset}); give the --data it was trained "
                f"on, or run: uv run tokenizer_vq/train_vqvae.py --data {cfg.data} --out NEW.pth"
            )
    model.to(pick_device(cfg.device)).to(memory_format=torch.channels_last)
    encoded, speed = {}, {}
    for split, images in splits.items():
        since = time.time()
        count, views_NAT = cfg.views if split == "train" else 2, []
        for view_NHWC in views_of(images.images_NHWC, count):
            parts = np.array_split(view_NHWC, max(1, len(view_NHWC) // cfg.batch))
            bar = tqdm(parts, f"{split}, view {len(views_NAT) + 1} of {count}", unit="batch")
            codes = [encode_images(model, part, cfg.batch, cfg.search) for part in bar]
            views_NAT.append(torch.cat(codes))
        encoded[split] = torch.stack(views_NAT, dim=1)
        speed[split] = len(images.labels_N) / (time.time() - since)
    test_NHWC = splits["test"].images_NHWC
    shown = evenly(len(test_NHWC), 10_000)
    decoded_NHWC = decode_codes(model, encoded["test"][shown, 0])
    decibels = float(psnr(test_NHWC[shown], decoded_NHWC).mean())
    for split, images in splits.items():
        inputs = {"images": images.sha256, "tokenizer": head["sha256"]}
        codes_head = header("codes", "tools/extract_latent_codes.py", cfg, inputs) | {
            "codebook_size": model.config.codebook_size,
            "grid": model.grid,
            "classes": list(images.classes),
            "dataset": images.dataset,
            "test_psnr": decibels,
        }
        save_codes(cfg.out, split, encoded[split].numpy(), images.labels_N, codes_head)
        use = codebook_use(encoded[split], model.config.codebook_size)
        print(
            f"wrote {cfg.out}/{split}_codes.npy {tuple(encoded[split].shape)}: "
            f"usage {use['codebook_usage']:.1%}, perplexity {use['perplexity']:.0f}; "
            f"{speed[split]:.1f} images/s"
        )
    print(f"test images decode from their codes at {decibels:.2f} dB; {time.time() - began:.0f} s")


if __name__ == "__main__":
    run(main, ExtractConfig)
