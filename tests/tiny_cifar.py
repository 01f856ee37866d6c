"""A tiny CIFAR-10 in the forms that the real one comes in, and the stage run on it."""

import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import script
from PIL import Image

from models.artifacts import sha256_of
from models.dataset import CIFAR10_CLASSES, SPLITS, Split, load_split
from models.errors import InputError

stage = script("data/load_CIFAR10.py")


def tiny_images(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images of noise, sorted by class: two of each in train, one in test."""
    rng = np.random.default_rng(seed)
    return {
        split: (
            rng.integers(0, 256, (10 * each, 32, 32, 3)).astype(np.uint8),
            np.repeat(np.arange(10), each),
        )
        for split, each in (("train", 2), ("test", 1))
    }


def python2_pickle(images_NHWC: np.ndarray, labels_N: np.ndarray) -> bytes:
    """A batch as the official ones are: protocol 2 by Python 2 and numpy 1, where text is bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    rebuild = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    rebuild += text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    shape = number(len(images_NHWC)) + number(3 * 32 * 32) + b"\x86"
    planes = images_NHWC.transpose(0, 3, 1, 2).tobytes()
    data = rebuild + b"(K\x01" + shape + dtype + b"\x89" + text(planes) + b"tb"
    labels = b"](" + b"".join(number(label) for label in labels_N.tolist()) + b"e"
    return b"\x80\x02}(" + text(b"data") + data + text(b"labels") + labels + b"u."


def tiny_batches(seed: int = 0) -> dict[str, bytes]:
    """The six pickles of the tiny set, by name."""
    tiny = tiny_images(seed)
    images, labels = (np.array_split(array, 5) for array in tiny["train"])
    batches = {f"data_batch_{i + 1}": python2_pickle(images[i], labels[i]) for i in range(5)}
    return batches | {"test_batch": python2_pickle(*tiny["test"])}


def write_archive(path: Path, batches: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, pickled in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    return path


def write_batch_folder(folder: Path, batches: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, pickled in batches.items():
        (folder / name).write_bytes(pickled)
    return folder


def write_image_folder(folder: Path) -> Path:
    for split, (images, labels) in tiny_images().items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / split / CIFAR10_CLASSES[label] / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return folder


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def load(out: Path, **options) -> dict[str, Split]:
    """Run the stage and read back what it wrote."""
    stage.main(stage.LoadConfig(out=out, **options))
    return {split: load_split(out, split) for split in SPLITS}


def refused(message: str, folder: Path, **options) -> None:
    """The stage ends in one InputError line that matches, and leaves an earlier result alone."""
    out = folder / "earlier"
    out.mkdir(exist_ok=True)
    for name in ("images.npy", "images.npy.json", "labels.npy", "labels.npy.json"):
        for split in SPLITS:
            (out / f"{split}_{name}").write_text("an earlier result")
    before = bytes_in(out)
    with pytest.raises(InputError, match=message) as error:
        load(out, **options)
    assert "\n" not in str(error.value)
    assert bytes_in(out) == before


def assert_tiny(splits: dict[str, Split]) -> None:
    """The stage's output is the tiny set, value by value."""
    for split, (images, labels) in tiny_images().items():
        np.testing.assert_array_equal(splits[split].images_NHWC, images)
        np.testing.assert_array_equal(splits[split].labels_N, labels)
        assert splits[split].classes == CIFAR10_CLASSES
        assert splits[split].dataset == "cifar10"
        assert splits[split].sha256 == sha256_of(images)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
