"""The two data sets that the stages share, as arrays on disk: images (stage 1) and codes (stage 3).

A split of images is `{train,test}_images.npy` and `{train,test}_labels.npy` in one folder, with a
sidecar each; a split of codes is `{train,test}_codes.npy` and `{train,test}_labels.npy`. The
labels' sidecar names the sha256 of what they belong to, so a pair that a killed run left half new
and half old is noticed.
"""

import hashlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from models.artifacts import header, load_array, save_array, sha256_of
from models.command import InputError

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")
CLASSES = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "shapes": (
        *("disc", "ring", "square", "triangle", "plus"),
        *("star", "heart", "crescent", "bars", "checker"),
    ),
}
"""class names by label, of the data sets whose names are known beforehand"""
IMAGE_SHAPE = (32, 32, 3)
PRODUCERS = {
    "cifar10": "data/load_CIFAR10.py",
    "cifar100": "data/load_CIFAR10.py --dataset cifar100",
    "shapes": "data/shapes.py",
}
"""name of a folder in data/ -> the command that makes it"""
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""images that are read, and what they must really be"""


@dataclass(frozen=True)
class Split:
    """One split in memory."""

    images_NHWC: np.ndarray
    """uint8 (N, 32, 32, 3), RGB, in canonical order"""
    labels_N: np.ndarray
    """int64 (N,), in [0, len(classes))"""
    classes: tuple[str, ...]
    """names by label"""
    dataset: str
    """"cifar10", "cifar100", "shapes", or the name of the image folder it came from"""
    sha256: str
    """of the images; later stages record it in what they write"""
    labels_sha256: str

    def of_labels(self, labels: tuple[int, ...]) -> "Split":
        """Return the images of these classes only."""
        keep_N = np.isin(self.labels_N, labels)
        return replace(self, images_NHWC=self.images_NHWC[keep_N], labels_N=self.labels_N[keep_N])


def canonical_rows(images_NHWC: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Return the row numbers int64 (N,) that sort images by the sha256 of their pixels.

    The official archive, its folder and a folder of PNGs hold the same images in three orders; all
    that is derived from a split (hashes, codes, shipped tokenizers) depends on the order.
    """
    keys = [
        (hashlib.sha256(image_HWC.tobytes()).digest(), label)  # the label decides between twins
        for image_HWC, label in zip(images_NHWC, labels_N.tolist(), strict=True)
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def save_splits(
    folder: Path,
    arrays: dict[SplitName, tuple[np.ndarray, np.ndarray]],
    classes: tuple[str, ...],
    dataset: str,
    producer: str,
    config: Any,
) -> None:
    """Write both splits in canonical order.

    `arrays` holds images uint8 (N, 32, 32, 3) and labels int64 (N,) of each split. Raises
    InputError unless there are two or more classes with images in both, and OSError if the folder
    cannot be written.
    """
    if len(classes) < 2:
        raise InputError(f"expected images of at least 2 classes, found {len(classes)}")
    for split, (images_NHWC, labels_N) in arrays.items():
        assert images_NHWC.dtype == np.uint8 and images_NHWC.shape[1:] == IMAGE_SHAPE
        if outside := set(labels_N.tolist()) - set(range(len(classes))):
            raise InputError(
                f"expected labels in 0..{len(classes) - 1}, found {outside} in {split}"
            )
        if missing := set(range(len(classes))) - set(labels_N.tolist()):
            raise InputError(f"class {classes[min(missing)]!r} has no {split} images")
    names = {"classes": list(classes), "dataset": dataset}
    for split, (images_NHWC, labels_N) in arrays.items():
        row_N = canonical_rows(images_NHWC, labels_N)
        images_NHWC, labels_N = images_NHWC[row_N], labels_N[row_N]
        head = header("images", producer, config) | names
        save_array(folder / f"{split}_images.npy", images_NHWC, head)
        head = header("labels", producer, config, {"images": sha256_of(images_NHWC)}) | names
        save_array(folder / f"{split}_labels.npy", labels_N, head)


def load_split(folder: Path, split: SplitName) -> Split:
    """Read a split that stage 1 wrote.

    Raises InputError, naming the command to rerun, if a file is missing or changed, the labels were
    written for other images, or a label is of no class.
    """
    folder = Path(folder)
    rerun = f"uv run {PRODUCERS.get(folder.name, PRODUCERS['cifar10'])} --out {folder}"
    images_NHWC, head = load_array(folder / f"{split}_images.npy", "images", rerun, np.uint8, 4)
    path = folder / f"{split}_labels.npy"
    labels_N, labels_head = load_array(path, "labels", rerun, np.int64, 1)
    if labels_head["inputs"].get("images") != head["sha256"]:
        raise InputError(f"{path} was written for other images than lie beside it; run: {rerun}")
    shape = (len(labels_N), *IMAGE_SHAPE)
    if images_NHWC.shape != shape:
        found = images_NHWC.shape
        raise InputError(f"{folder}: expected images of {shape}, found {found}; run: {rerun}")
    classes = check_labels(path, labels_N, head, rerun)
    hashes = head["sha256"], labels_head["sha256"]
    return Split(images_NHWC, labels_N, classes, head["dataset"], *hashes)


def load_splits(folder: Path) -> list[Split]:
    """Read train and test. Raises InputError as `load_split`, or if they are of other classes."""
    both = [load_split(folder, split) for split in SPLITS]
    if len({(one.dataset, one.classes) for one in both}) > 1:
        raise InputError(f"{folder}: train and test images are not of one set; make both anew")
    return both


def check_labels(path: Path, labels_N: np.ndarray, head: dict, rerun: str) -> tuple[str, ...]:
    """Return the class names in a header. Raises InputError unless all labels are among them."""
    classes = head.get("classes")
    if not isinstance(classes, list) or not isinstance(head.get("dataset"), str):
        raise InputError(f"{path}: its header does not name data set and classes; run: {rerun}")
    if not ((labels_N >= 0) & (labels_N < len(classes))).all():
        raise InputError(
            f"{path}: expected labels in 0..{len(classes) - 1}, found others; run: {rerun}"
        )
    return tuple(map(str, classes))


def evenly(total: int, count: int) -> np.ndarray:
    """Return min(count, total) row numbers, evenly spaced: images may lie sorted by class."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


KIND = "codes"


@dataclass(frozen=True)
class Codes:
    """One split's codes in memory."""

    codes_NAT: torch.Tensor
    """int64 (N, A, T), A = 2 encodings of an image: as it is, and mirrored"""
    label_N: torch.Tensor
    """int64 (N,)"""
    header: dict
    """with codebook_size, grid, classes, dataset, sha256 of the array, and `labels`, theirs"""

    def to(self, device: torch.device) -> "Codes":
        """Return the same codes on a device; all of CIFAR-10 takes 51 MB."""
        return replace(self, codes_NAT=self.codes_NAT.to(device), label_N=self.label_N.to(device))

    def rows(self, rows_N: torch.Tensor) -> "Codes":
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
    folder = Path(folder)
    rerun = f"uv run tools/extract_latent_codes.py --out {folder}"
    path = folder / f"{split}_labels.npy"
    codes_NAT, head = load_array(folder / f"{split}_codes.npy", KIND, rerun, np.uint16, 3)
    labels_N, labels_head = load_array(path, "code labels", rerun, np.int64, 1)
    if labels_head["inputs"] != head["inputs"] or len(labels_N) != len(codes_NAT):
        raise InputError(f"{folder}: {split} codes and labels are not of one run; run: {rerun}")
    size, grid = head.get("codebook_size"), head.get("grid")
    if not isinstance(size, int) or not isinstance(grid, int) or codes_NAT.shape[2] != grid**2:
        raise InputError(f"{folder}: {split} codes do not fit their header; run: {rerun}")
    if codes_NAT.size and int(codes_NAT.max()) >= size:
        raise InputError(
            f"{folder}: expected codes in [0, {size}), found {codes_NAT.max()}; run: {rerun}"
        )
    check_labels(path, labels_N, head, rerun)
    head = head | {"labels": labels_head["sha256"]}
    return Codes(torch.from_numpy(codes_NAT.astype(np.int64)), torch.from_numpy(labels_N), head)


def load_both_codes(folder: Path) -> list[Codes]:
    """Read train and test codes. Raises InputError as `load_codes`, or if one alone is new."""
    both = [load_codes(folder, split) for split in SPLITS]
    keys = ("codebook_size", "grid", "classes", "dataset", "cluster_size")
    kinds = [
        [one.header["inputs"].get("tokenizer"), one.header["config"].get("search", 0)]
        + [one.header.get(key) for key in keys]
        for one in both
    ]
    if kinds[0] != kinds[1]:  # stage 3 was killed between the two
        raise InputError(
            f"{folder}: train and test codes are not of one run; run: uv run "
            f"tools/extract_latent_codes.py --out {folder}"
        )
    return both


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


def swap_codes(
    codes_NT: torch.Tensor, rate: float, others: int | torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return codes with each swapped for another at probability `rate`; the input is unchanged.

    `others` is the vocabulary's size, for any other code, all alike, or others_VK, for one of K
    each. With a generator of one seed a smaller rate swaps among the cells of a larger one, for the
    same codes.
    """
    draw = {"generator": generator, "device": generator.device}
    swapped_NT = torch.rand(codes_NT.shape, **draw) < rate
    if isinstance(others, int):
        other_NT = (codes_NT + torch.randint(1, others, codes_NT.shape, **draw)) % others
    else:
        other_NT = others[codes_NT, torch.randint(others.shape[1], codes_NT.shape, **draw)]
    return torch.where(swapped_NT, other_NT, codes_NT)


def split_heldout(codes: Codes, heldout: int, seed: int) -> tuple[Codes, Codes]:
    """Return (train, held-out): `heldout` images at random, with all their views, kept apart.

    Raises InputError if nothing would be left to train on.
    """
    if not 1 <= heldout < len(codes.label_N):
        raise InputError(f"expected --heldout in 1..{len(codes.label_N) - 1}, got {heldout}")
    generator = torch.Generator().manual_seed(seed)
    shuffled_N = torch.randperm(len(codes.label_N), generator=generator).to(codes.label_N.device)
    return codes.rows(shuffled_N[heldout:]), codes.rows(shuffled_N[:heldout])


def read_image(file: Path, size: int | None = None) -> np.ndarray:
    """Return one image as uint8 (32, 32, 3).

    Raises InputError, with the path, for anything but an 8-bit RGB still of that size: what would
    have to be clipped, flattened or chosen from is refused, not guessed.
    """
    try:
        if not file.is_file():  # a FIFO would wait for ever
            raise OSError("it is no file")
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            bits = file.read_bytes()[24] if image.format == "PNG" else 8
            kind = image.format, image.mode, getattr(image, "n_frames", 1), bits
            if kind != (SUFFIXES.get(file.suffix.lower()), "RGB", 1, 8):
                raise ValueError("it is {} of mode {}, {} frames, {} bits".format(*kind))
            if "transparency" in image.info:
                raise ValueError("it has transparent pixels")
            if size is None and image.size != IMAGE_SHAPE[1::-1]:
                raise ValueError(f"it is {image.width}x{image.height}; --size 32 would resize it")
            return np.array(ImageOps.fit(image, IMAGE_SHAPE[:2], Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as e:
        raise InputError(f"{file}: expected an 8-bit RGB still of 32x32 pixels: {e}") from None
