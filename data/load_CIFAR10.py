#!/usr/bin/env -S uv run
"""Stage 1: CIFAR-10, from the network, an archive or a folder of images, becomes .npy arrays.

Reads     the official archive (downloaded, or given by --source), the extracted
          cifar-10-batches-py, or a folder of {train,test}/<class>/*.png; or draws the shapes set.
Writes    {train,test}_{images,labels}.npy with sidecars, and classes.png to look at.
All is read and checked before the first file is written.
"""

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from models.artifacts import ROOT, replace_file
from models.dataset import (
    SPLITS,
    Source,
    check_classes,
    read_archive,
    read_batch_folder,
    read_image_folder,
    save_split,
)
from models.errors import InputError, one_line_errors
from models.shapes import SHAPE_CLASSES, make_shapes

PRODUCER = "data/load_CIFAR10.py"
ARCHIVE = "cifar-10-python.tar.gz"


@dataclass(frozen=True)
class LoadConfig:
    """Turn CIFAR-10 (or the drawn shapes set) into the arrays that the later stages read."""

    source: Path | None = None
    """official archive, cifar-10-batches-py, or {train,test}/<class>/*.png; none: download"""
    dataset: Literal["cifar10", "shapes"] = "cifar10"
    """shapes: ten kinds of drawn figures, made here in seconds, for a quick look at every stage"""
    out: Path | None = None
    """folder to write to; data/cifar10 or data/shapes if not given"""
    count_train: int = 10_000
    """shapes: training images"""
    count_test: int = 2_000
    """shapes: test images"""
    seed: int = 0
    """shapes: everything drawn follows from it"""
    url: str | None = None
    """where the archive is downloaded from; torchvision's CIFAR10.url if not given"""
    md5: str | None = None
    """MD5 that the archive must have; torchvision's CIFAR10.tgz_md5 if not given"""
    downloads: Path = ROOT / "data" / "downloads"
    """folder that keeps the downloaded archive"""

    def check(self) -> None:
        """Raises InputError for values that fit no run."""
        if self.dataset == "shapes" and self.source is not None:
            raise InputError("--dataset shapes is drawn, not read: leave out --source")
        if min(self.count_train, self.count_test) < 10:
            raise InputError("--count-train and --count-test must be at least 10, one per class")
        if self.seed < 0:
            raise InputError(f"--seed must be at least 0, got {self.seed}")

    @property
    def folder(self) -> Path:
        """Where the arrays go."""
        return self.out or ROOT / "data" / self.dataset


def official(name: Literal["url", "tgz_md5"]) -> str:
    """Return what torchvision says of the archive; imported here only, because it takes seconds."""
    from torchvision.datasets import CIFAR10

    return getattr(CIFAR10, name)


def md5_of(path: Path) -> str:
    """Return the MD5 hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`, or write it anew where the server cannot resume.

    Raises OSError, HTTPException or ValueError when the connection or the address fails.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing is left to send: the part is whole, or not this file
            return
        raise
    with response:
        have = have if response.status == 206 else 0
        left = response.headers.get("Content-Length")
        total = have + int(left) if left else None
        bar = tqdm(initial=have, total=total, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "ab" if have else "wb") as file, bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total and part.stat().st_size < total:  # read() ends without an error on a cut connection
        raise ConnectionError(f"connection closed after {part.stat().st_size} of {total} bytes")


def download(url: str, md5: str, folder: Path) -> Path:
    """Return the archive at `url` in `folder`, fetching what is not there yet.

    Raises InputError if the network fails (what came is kept) or the MD5 is wrong (it is deleted).
    """
    archive = folder / ARCHIVE
    if archive.exists() and md5_of(archive) == md5:
        return archive
    part = archive.with_name(archive.name + ".part")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, part)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise InputError(
            f"download of {url} failed ({e}); the same command again continues it, "
            "--source PATH takes a local copy"
        ) from None
    if (found := md5_of(part)) != md5:
        part.unlink()
        raise InputError(
            f"{url}: expected MD5 {md5}, found {found}; deleted, the same command starts afresh"
        )
    return part.replace(archive)


def read_folder(folder: Path) -> Source:
    """Read the extracted archive or a folder of images, whichever this is.

    Raises InputError, in one line, if it is neither or something in it is wrong.
    """
    if any(folder.glob("*_batch*")):
        return read_batch_folder(folder)
    if any((folder / split).is_dir() for split in SPLITS):
        return read_image_folder(folder, lambda files: tqdm(files, unit="image"))
    raise InputError(
        f"--source {folder}: expected {ARCHIVE}, the folder cifar-10-batches-py, "
        "or a folder of {train,test}/<class>/*.png, found none of them"
    )


def read_source(cfg: LoadConfig) -> Source:
    """Read what the config names, downloading it if it names nothing.

    Raises InputError, in one line, for anything wrong with it.
    """
    if cfg.source is not None and not cfg.source.is_file():
        return read_folder(cfg.source)
    md5 = cfg.md5 or official("tgz_md5")
    if cfg.source is None:
        return read_archive(download(cfg.url or official("url"), md5, cfg.downloads))
    if (found := md5_of(cfg.source)) != md5:
        raise InputError(f"{cfg.source}: expected MD5 {md5}, found {found}; get the archive anew")
    return read_archive(cfg.source)


def draw_shapes(count_train: int, count_test: int, seed: int) -> Source:
    """Draw the shapes set: the test images are the ones that follow the training images."""
    images_NHWC, labels_N = make_shapes(count_train + count_test, seed)
    arrays = {
        "train": (images_NHWC[:count_train], labels_N[:count_train]),
        "test": (images_NHWC[count_train:], labels_N[count_train:]),
    }
    return Source(arrays, SHAPE_CLASSES, "shapes", inputs={})


def save_picture(
    path: Path, images_NHWC: np.ndarray, labels_N: np.ndarray, classes: tuple[str, ...]
) -> None:
    """Write a PNG of ten rows, a class each, with the first ten images of the class."""
    canvas = np.full((10, 10, 34, 34, 3), 255, np.uint8)  # a white pixel around each image
    for label in range(10):
        first_NHWC = images_NHWC[labels_N == label][:10]
        canvas[label, : len(first_NHWC), 1:33, 1:33] = first_NHWC
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas.transpose(0, 2, 1, 3, 4).reshape(340, 340, 3))
    axes.set_yticks(np.arange(10) * 34 + 16.5, classes)
    axes.set_xticks([])
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(cfg: LoadConfig) -> None:
    """Read and check everything, then write the four arrays and the picture."""
    cfg.check()
    start = time.perf_counter()
    cfg.folder.mkdir(parents=True, exist_ok=True)  # before the long part, should it be impossible
    if cfg.dataset == "shapes":
        source = draw_shapes(cfg.count_train, cfg.count_test, cfg.seed)
    else:
        source = read_source(cfg)
    check_classes(source, str(cfg.source or "the archive"))
    about = (source.classes, source.dataset, PRODUCER, cfg, source.inputs)
    for split in SPLITS:
        save_split(cfg.folder, split, *source.arrays[split], *about)
    save_picture(cfg.folder / "classes.png", *source.arrays["train"], source.classes)
    counts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in source.arrays.items())
    seconds = time.perf_counter() - start
    print(f"{source.dataset}: {counts} images -> {cfg.folder} in {seconds:.1f} s")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(LoadConfig))
