"""The images as arrays: how stage 1 reads what people have, and what every later stage reads.

A split is four files in one folder: `{split}_images.npy`, `{split}_labels.npy` and their sidecars.
The labels' sidecar names the sha256 of the images they belong to, so a pair that a killed run left
half new and half old is noticed.

CIFAR-10 ("Learning Multiple Layers of Features from Tiny Images", Krizhevsky 2009) is published as
pickles of numpy arrays, https://www.cs.toronto.edu/~kriz/cifar.html. They are read here without
letting a pickle call anything but numpy's array constructors.
"""

import codecs
import gzip
import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy._core.multiarray import _reconstruct
from PIL import Image

from models.artifacts import header, load_array, save_array, sha256_of
from models.errors import InputError

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
IMAGE_SHAPE = (32, 32, 3)


@dataclass(frozen=True)
class Split:
    """One split in memory."""

    images_NHWC: np.ndarray
    """uint8 (N, 32, 32, 3), RGB"""
    labels_N: np.ndarray
    """int64 (N,), in [0, 10)"""
    classes: tuple[str, ...]
    """the ten names, by label"""
    dataset: str
    """"cifar10", "shapes", or the name of the image folder it came from"""
    sha256: str
    """of the images; later stages record it in what they write"""


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


def save_split(
    folder: Path,
    split: SplitName,
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    classes: tuple[str, ...],
    dataset: str,
    producer: str,
    config: Any,
    inputs: dict[str, str],
) -> None:
    """Write a split in canonical order: images uint8 (N, 32, 32, 3), then labels int64 (N,).

    Raises ValueError for another shape or dtype, OSError if the folder cannot be written.
    """
    found = (images_NHWC.dtype, images_NHWC.shape, labels_N.dtype, labels_N.shape)
    expected = (np.uint8, (len(labels_N), *IMAGE_SHAPE), np.int64, (len(labels_N),))
    if found != expected:
        raise ValueError(f"expected images and labels of {expected}, got {found}")
    row_N = canonical_rows(images_NHWC, labels_N)
    images_NHWC, labels_N = images_NHWC[row_N], labels_N[row_N]
    about = {"classes": list(classes), "dataset": dataset}
    of_images = inputs | {"images": sha256_of(images_NHWC)}
    save_array(
        folder / f"{split}_images.npy",
        images_NHWC,
        header("images", producer, config, inputs) | about,
    )
    save_array(
        folder / f"{split}_labels.npy",
        labels_N,
        header("labels", producer, config, of_images) | about,
    )


def load_split(folder: Path, split: SplitName) -> Split:
    """Read a split that stage 1 wrote.

    Raises InputError, naming the command to rerun, if a file is missing or changed, the labels were
    written for other images, or a label is not in [0, 10).
    """
    folder = Path(folder)
    drawn = " --dataset shapes" if folder.name == "shapes" else ""
    rerun = f"uv run data/load_CIFAR10.py{drawn} --out {folder}"
    images_NHWC, about = load_array(folder / f"{split}_images.npy", "images", rerun)
    labels_N, of_labels = load_array(folder / f"{split}_labels.npy", "labels", rerun)
    where = f"{folder / split}_labels.npy"
    if of_labels["inputs"].get("images") != about["sha256"]:
        raise InputError(f"{where} was written for other images than lie beside it; run: {rerun}")
    if len(labels_N) != len(images_NHWC):
        raise InputError(
            f"{where}: expected {len(images_NHWC)} labels, found {len(labels_N)}; run: {rerun}"
        )
    if not ((labels_N >= 0) & (labels_N < 10)).all():
        raise InputError(f"{where}: expected labels in 0..9, found others; run: {rerun}")
    return Split(images_NHWC, labels_N, tuple(about["classes"]), about["dataset"], about["sha256"])


def evenly(total: int, count: int) -> np.ndarray:
    """Return min(count, total) row numbers, evenly spaced: images may lie sorted by class."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


@dataclass(frozen=True)
class Source:
    """Both splits as read or drawn, before they are written."""

    arrays: dict[SplitName, tuple[np.ndarray, np.ndarray]]
    """images uint8 (N, 32, 32, 3) and labels int64 (N,) of each split"""
    classes: tuple[str, ...]
    dataset: str
    inputs: dict[str, str]
    """source -> sha256 of the bytes of all batches or images in the order read; {} if drawn"""


ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # numpy 1, so the official batches
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,  # bytes in a protocol 2 pickle written by Python 3
}
"""All that a pickled batch may name; whatever else a pickle asks for could run code."""

BATCHES: dict[SplitName, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test": ("test_batch",),
}


class BatchUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and numpy arrays, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle names. Raises UnpicklingError unless it is in ADMITTED."""
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array")
        return ADMITTED[module, name]


def read_batch(pickled: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, 32, 32, 3) and labels int64 (N,) of one official batch.

    Raises InputError with the batch's name if it is torn, unsafe or not such a batch.
    """
    try:
        batch = BatchUnpickler(io.BytesIO(pickled), encoding="bytes").load()
        planes_NP, labels_N = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as e:  # a torn pickle raises almost any type
        raise InputError(f"{name} is not a safe CIFAR-10 batch and was not read ({e!r})") from None
    expected = ("uint8", (len(labels_N), 3 * 32 * 32), "i", (len(labels_N),))
    found = (planes_NP.dtype.name, planes_NP.shape, labels_N.dtype.kind, labels_N.shape)
    if found != expected:
        raise InputError(f"{name}: expected images and labels of {expected}, found {found}")
    images_NHWC = planes_NP.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images_NHWC), labels_N.astype(np.int64)


def read_batches(read: Callable[[str], bytes]) -> Source:
    """Join the official batches; `read` gives the bytes of a batch by name."""
    digest = hashlib.sha256()
    arrays = {}
    for split, names in BATCHES.items():
        pairs = []
        for name in names:
            pickled = read(name)
            digest.update(pickled)
            pairs.append(read_batch(pickled, name))
        images, labels = zip(*pairs, strict=True)
        arrays[split] = np.concatenate(images), np.concatenate(labels)
    return Source(arrays, CIFAR10_CLASSES, "cifar10", {"source": digest.hexdigest()})


def read_batch_folder(folder: Path) -> Source:
    """Read an extracted cifar-10-batches-py. Raises InputError for a missing or bad batch."""

    def read(name: str) -> bytes:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: expected the batch {name}, found nothing")
        return (folder / name).read_bytes()

    return read_batches(read)


def read_archive(path: Path) -> Source:
    """Read cifar-10-python.tar.gz in memory. Raises InputError if it is torn or lacks a batch."""
    try:
        whole = io.BytesIO(gzip.decompress(path.read_bytes()))  # to its end: that checks its CRC
        with tarfile.open(fileobj=whole, mode="r:") as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        raise InputError(f"{path} is cut off or no .tar.gz ({e}); get it anew") from None

    def read(name: str) -> bytes:
        if (member := f"cifar-10-batches-py/{name}") not in files:
            raise InputError(f"{path}: expected {member} in it, found nothing")
        return files[member]

    return read_batches(read)


def read_image(path: Path, encoded: bytes) -> np.ndarray:
    """Return one image as uint8 (32, 32, 3). Raises InputError with its path otherwise."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            size = image.size
            image_HWC = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{path} is not a readable image ({e})") from None
    if size != (32, 32):
        raise InputError(f"{path}: expected 32x32 pixels, found {size[0]}x{size[1]}")
    return image_HWC


def read_image_folder(folder: Path, watch: Callable[[list], Iterable]) -> Source:
    """Read {train,test}/<class>/*.png, classes and files by name; `watch` shows progress.

    Raises InputError with the path of an image that cannot be read or is not 32x32.
    """
    digest = hashlib.sha256()
    arrays = {}
    classes = tuple(sorted({path.name for split in SPLITS for path in (folder / split).glob("*/")}))
    for split in SPLITS:
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / split / name).glob("*.png"))
        ]
        images_NHWC = np.empty((len(files), *IMAGE_SHAPE), np.uint8)
        for i, (file, _) in enumerate(watch(files)):
            encoded = file.read_bytes()
            digest.update(encoded)
            images_NHWC[i] = read_image(file, encoded)
        arrays[split] = images_NHWC, np.array([label for _, label in files], np.int64)
    dataset = "cifar10" if classes == CIFAR10_CLASSES else folder.resolve().name
    return Source(arrays, classes, dataset, {"source": digest.hexdigest()})


def check_classes(source: Source, where: str) -> None:
    """Raises InputError unless there are ten classes and each has images in both splits."""
    if len(source.classes) != 10:
        names = ", ".join(source.classes[:12])
        raise InputError(f"{where}: expected 10 classes, found {len(source.classes)} ({names})")
    for split, (_, labels_N) in source.arrays.items():
        if outside := set(labels_N.tolist()) - set(range(10)):
            raise InputError(f"{where}: expected labels in 0..9, found {outside} in {split}")
        for label, name in enumerate(source.classes):
            if label not in labels_N:
                raise InputError(f"{where}: class {name!r} has no {split} images")
