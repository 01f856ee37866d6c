"""The codes as an artifact: what stage 3 writes and stages 4 and 5 read."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from models.artifacts import header, load_array, save_array
from models.errors import InputError

KIND = "codes"
VIEWS = 2
"""A, encodings of an image: as it is, and mirrored"""


@dataclass(frozen=True)
class Codes:
    """One split's codes in memory."""

    codes_NAT: torch.Tensor
    """int64 (N, A, T)"""
    label_N: torch.Tensor
    """int64 (N,)"""
    header: dict
    """with codebook_size, grid, classes, dataset, and the sha256 of the array"""

    def to(self, device: torch.device) -> "Codes":
        """Return the same codes on a device; all of CIFAR-10 takes 51 MB."""
        return replace(self, codes_NAT=self.codes_NAT.to(device), label_N=self.label_N.to(device))

    def rows(self, rows_N: torch.Tensor) -> "Codes":
        """Return the images of these row numbers."""
        return replace(self, codes_NAT=self.codes_NAT[rows_N], label_N=self.label_N[rows_N])


def save_codes(
    folder: Path, split: str, codes_NAT: np.ndarray, labels_N: np.ndarray, head: dict
) -> None:
    """Write {split}_codes.npy, uint16 (N, A, T), and {split}_labels.npy, int64 (N,)."""
    save_array(folder / f"{split}_codes.npy", codes_NAT.astype(np.uint16), head)
    labels_head = header("code labels", head["producer"], head["config"], head["inputs"])
    save_array(folder / f"{split}_labels.npy", labels_N, labels_head)


def load_codes(folder: Path, split: str) -> Codes:
    """Read a split's codes and labels.

    Raises InputError for files that are missing, changed, from different runs of stage 3, or out of
    range.
    """
    rerun = f"uv run tools/extract_latent_codes.py --out {folder}"
    codes_NAT, head = load_array(Path(folder) / f"{split}_codes.npy", KIND, rerun)
    labels_N, labels_head = load_array(Path(folder) / f"{split}_labels.npy", "code labels", rerun)
    if labels_head["inputs"] != head["inputs"] or len(labels_N) != len(codes_NAT):
        raise InputError(f"{folder}: {split} codes and labels are not of one run; run: {rerun}")
    if codes_NAT.size and int(codes_NAT.max()) >= head["codebook_size"]:
        raise InputError(
            f"{folder}: expected codes in [0, {head['codebook_size']}), found {codes_NAT.max()}; "
            f"run: {rerun}"
        )
    classes = len(head["classes"])
    if not ((labels_N >= 0) & (labels_N < classes)).all():
        raise InputError(
            f"{folder}: expected labels in 0..{classes - 1}, found others; run: {rerun}"
        )
    return Codes(torch.from_numpy(codes_NAT.astype(np.int64)), torch.from_numpy(labels_N), head)


def load_codes_of(tokenizer: str, folder: Path, split: str, whose: Path) -> Codes:
    """Read codes that must be of the tokenizer with this sha256, that of the generator `whose`.

    Raises InputError if they are of another one, or as `load_codes`.
    """
    codes = load_codes(folder, split)
    if codes.header["inputs"]["tokenizer"] != tokenizer:
        raise InputError(
            f"{folder} holds codes of another tokenizer than {whose} was trained on; "
            "run: uv run tools/extract_latent_codes.py --tokenizer THE_ONE --out NEW, "
            "then give --codes NEW"
        )
    return codes


def draw_batch(
    codes: Codes, rows_B: torch.Tensor, drop_label: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes_BT, label_B) of these rows: a random view of each, some labels made null."""
    device, null = generator.device, len(codes.header["classes"])
    rows_B = rows_B.to(device)
    views = codes.codes_NAT.shape[1]
    view_B = torch.randint(views, rows_B.shape, generator=generator, device=device)
    drop_B = torch.rand(rows_B.shape, generator=generator, device=device) < drop_label
    return codes.codes_NAT[rows_B, view_B], torch.where(drop_B, null, codes.label_N[rows_B])


def split_heldout(codes: Codes, heldout: int, seed: int) -> tuple[Codes, Codes]:
    """Return (train, held-out): `heldout` images at random, with all their views, kept apart.

    Raises InputError if nothing would be left to train on.
    """
    if not 1 <= heldout < len(codes.label_N):
        raise InputError(f"expected --heldout in 1..{len(codes.label_N) - 1}, got {heldout}")
    shuffled_N = torch.randperm(
        len(codes.label_N), generator=torch.Generator().manual_seed(seed)
    ).to(codes.label_N.device)
    return codes.rows(shuffled_N[heldout:]), codes.rows(shuffled_N[:heldout])
