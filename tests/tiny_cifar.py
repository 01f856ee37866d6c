"""A tiny CIFAR-10 in the forms that the real one comes in, and the stage run on it."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import script
from PIL import Image
from torchvision.datasets import CIFAR10

from models.command import InputError
from models.data import CLASSES, SPLITS, Split, canonical_rows, load_split

stage = script("data/load_CIFAR10.py")


def tiny_images(seed: int = 0, classes: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images of noise, sorted by class: two of each in train, one in test."""
    rng = np.random.default_rng(seed)
    return {
        split: (
            rng.integers(0, 256, (classes * each, 32, 32, 3)).astype(np.uint8),
            np.repeat(np.arange(classes), each),
        )
        for split, each in (("train", 2), ("test", 1))
    }


def batch(images_NHWC: np.ndarray | None, labels, key: str = "labels") -> bytes:
    """A batch as the official ones are: text is str to torchvision, which reads latin1."""
    contents = {key: [value if isinstance(value, str) else int(value) for value in labels]}
    if images_NHWC is not None:
        contents["data"] = images_NHWC.transpose(0, 3, 1, 2).reshape(len(images_NHWC), -1)
    return pickle.dumps(contents, protocol=2)


def tiny_batches(shuffle: int | None = None) -> dict[str, bytes]:
    """The pickles of the tiny set by name, its rows in another order if `shuffle` is a seed."""
    tiny = tiny_images()
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(tiny["train"][1]))
        tiny["train"] = tuple(array[order] for array in tiny["train"])
    images, labels = (np.array_split(array, 5) for array in tiny["train"])
    batches = {f"data_batch_{i + 1}": batch(images[i], labels[i]) for i in range(5)}
    names = batch(None, CLASSES["cifar10"], key="label_names")
    return batches | {"test_batch": batch(*tiny["test"]), "batches.meta": names}


def make_official(monkeypatch, files: dict[str, bytes]) -> None:
    """Let torchvision expect the MD5s of these files."""

    def md5s(names):
        return [[name, hashlib.md5(files[name]).hexdigest()] for name, _ in names]

    meta = hashlib.md5(files["batches.meta"]).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", md5s(CIFAR10.train_list))
    monkeypatch.setattr(CIFAR10, "test_list", md5s(CIFAR10.test_list))
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})


def write_archive(path: Path, files: dict[str, bytes], folder="cifar-10-batches-py") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, pickled in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    return path


def write_batch_folder(folder: Path, batches: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, pickled in batches.items():
        (folder / name).write_bytes(pickled)
    return folder


def write_image_folder(folder: Path, classes=CLASSES["cifar10"], size=(32, 32)) -> Path:
    for split, (images, labels) in tiny_images(classes=len(classes)).items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / split / classes[label] / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize(size).save(file)
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
    """The stage's output is the tiny set in canonical order, value by value."""
    for split, (images, labels) in tiny_images().items():
        rows = canonical_rows(images, labels)
        np.testing.assert_array_equal(splits[split].images_NHWC, images[rows])
        np.testing.assert_array_equal(splits[split].labels_N, labels[rows])
        assert splits[split].classes == CLASSES["cifar10"]
        assert splits[split].dataset == "cifar10"


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
