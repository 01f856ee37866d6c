#!/usr/bin/env -S uv run
"""Stage 1: CIFAR-10, from the network, an archive or a folder of images, becomes .npy arrays.

Reads     the official archive (downloaded, or given by --source), the extracted
          cifar-10-batches-py, or a folder of {train,test}/<class>/ images
Writes    {train,test}_{images,labels}.npy with sidecars, and classes.png to look at
All is read and checked before the first file is written. Rows are sorted by the sha256 of their
pixels, so every source of the same images gives the same bytes. CIFAR-10: "Learning Multiple Layers
of Features from Tiny Images", Krizhevsky 2009, read by torchvision.
"""

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from metrics.pictures import plot_first_images, save_figure
from models import command
from models.artifacts import ROOT, as_written
from models.command import InputError, answered_within, one_line, run
from models.data import (
    CLASSES,
    SPLITS,
    SUFFIXES,
    canonical_rows,
    load_split,
    read_image,
    save_splits,
)


@dataclass(frozen=True)
class LoadConfig(command.Config):
    """Turn CIFAR-10 (or CIFAR-100, or your own images) into the arrays that later stages read."""

    source: Path | None = None
    """official archive, its extracted folder, or {train,test}/<class>/*.png; none: download"""
    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """which archive; a folder of images brings its own classes, two or more"""
    size: Literal[32] | None = None
    """for images that are not 32x32: resize the shorter side to this and crop the middle"""
    out: command.OutFolder | None = None
    """folder to write to; default data/<dataset>, or data/<name of the image folder>"""
    url: str | None = None
    """where the archive is downloaded from; default: torchvision's address"""
    md5: str | None = None
    """MD5 of an archive that is not the official one. An archive holds pickles, which can run
    code: give this only for one that you trust"""
    downloads: command.OutFolder = ROOT / "data" / "downloads"
    """folder that keeps the downloaded archive"""


Source = tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...], str]
"""What was read: images uint8 (N, 32, 32, 3) and labels int64 (N,) by split, classes, data set."""


def download(url: str, md5: str, archive: Path) -> Path:
    """Return the archive, fetching it unless it is there. Raises InputError if that fails."""
    from torchvision.datasets.utils import check_integrity, download_url

    if check_integrity(archive, md5):
        return archive
    part = archive.with_name(archive.name + ".part")  # what is there may be of use to somebody
    try:
        with answered_within(30):
            download_url(url, part.parent, part.name, md5)
        part.replace(archive)
    except (OSError, RuntimeError, ValueError) as e:
        part.unlink(missing_ok=True)
        raise InputError(
            f"download of {url} failed ({e}); run the same command again, or give a local copy "
            "with --source"
        ) from None
    return archive


def read_archive(archive: Path, md5: str | None, kind: Any) -> Source:
    """Read an official archive. Raises InputError unless it has this MD5 (None: the official)."""
    from torchvision.datasets.utils import calculate_md5

    expected, digest = md5 or kind.tgz_md5, calculate_md5(archive)
    if digest != expected:
        raise InputError(
            f"{archive}: expected MD5 {expected}, found {digest}; get the archive anew"
        )
    with tempfile.TemporaryDirectory() as folder:
        with as_written(archive, ".tar.gz", "get it anew"):
            shutil.unpack_archive(archive, folder, "gztar", filter="data")
        return read_batches(Path(folder) / kind.base_folder, kind, archive)


def read_batches(folder: Path, kind: Any, archive: Path | None = None) -> Source:
    """Read the extracted archive through torchvision, which checks each file's MD5 before it opens.

    Those of an `archive`, whose own MD5 was right, may have any. Raises InputError for a file that
    is missing or another.
    """
    source = archive or folder
    files = {"train_list": kind.train_list, "test_list": kind.test_list}
    for name in [name for pairs in files.values() for name, _ in pairs] + [kind.meta["filename"]]:
        if not (folder / name).is_file():
            raise InputError(f"{source}: expected {name} in it, found nothing")
    changes = {"base_folder": folder.name}
    if archive:  # torchvision checks no MD5 that is None
        changes |= {key: [(name, None) for name, _ in pairs] for key, pairs in files.items()}
        changes["meta"] = kind.meta | {"md5": None}
    reader = type(kind.__name__, (kind,), changes)
    try:
        both = {split: reader(folder.parent, train=split == "train") for split in SPLITS}
        arrays = {s: (np.asarray(b.data), np.array(b.targets, np.int64)) for s, b in both.items()}
    except RuntimeError:  # torchvision's word for a wrong MD5
        raise InputError(
            f"{folder}: its files do not have the official MD5s, and pickles of others are not "
            "opened; get the archive anew"
        ) from None
    except Exception as e:  # an archive of another thing: almost any type
        raise InputError(f"{source} is no {kind.__name__} ({one_line(repr(e), 150)})") from None
    return arrays, tuple(both["train"].classes), kind.__name__.lower()


def read_image_folder(folder: Path, size: int | None) -> Source:
    """Read {train,test}/<class>/ images. Raises InputError with the path of a bad one."""
    from torchvision.datasets import ImageFolder

    def is_image(path: str) -> bool:  # hidden files are none
        return Path(path).suffix.lower() in SUFFIXES and not Path(path).name.startswith(".")

    arrays, classes = {}, {}
    for split in SPLITS:
        try:
            files = ImageFolder(folder / split, is_valid_file=is_image)
        except FileNotFoundError as e:
            raise InputError(f"{folder / split}: {one_line(e, 150)}") from None
        bar = tqdm(files.samples, split, unit="image")
        images = [read_image(Path(path), size) for path, _ in bar]
        arrays[split] = np.stack(images), np.array(files.targets, np.int64)
        classes[split] = tuple(files.classes)
    if classes["train"] != classes["test"]:
        differ = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise InputError(f"{folder}: classes in one split only: {', '.join(differ[:12])}")
    cifar10 = classes["train"] == CLASSES["cifar10"] and size is None
    return arrays, classes["train"], "cifar10" if cifar10 else folder.resolve().name


def read_source(cfg: LoadConfig) -> Source:
    """Read what the config names, downloading it if it names nothing."""
    from torchvision import datasets  # takes seconds

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[cfg.dataset]
    archive = cfg.downloads / kind.filename
    source = cfg.source or download(cfg.url or kind.url, cfg.md5 or kind.tgz_md5, archive)
    if source.is_file():
        return read_archive(source, cfg.md5, kind)
    for folder in (source, source / kind.base_folder):
        if (folder / kind.meta["filename"]).exists():
            return read_batches(folder.resolve(), kind)
    if any((source / split).is_dir() for split in SPLITS):
        return read_image_folder(source, cfg.size)
    raise InputError(
        f"--source {source}: expected {kind.filename}, the folder {kind.base_folder}, or a "
        "folder of {train,test}/<class>/ images, found none of them"
    )


def other_images(folder: Path, images_NHWC: np.ndarray, labels_N: np.ndarray) -> bool:
    """Whether a whole set of other train images lies there: CINIC-10's classes are CIFAR-10's."""
    try:
        there_NHWC = load_split(folder, "train").images_NHWC
    except InputError:
        return False
    return not np.array_equal(there_NHWC, images_NHWC[canonical_rows(images_NHWC, labels_N)])


def main(cfg: LoadConfig) -> None:
    """Read and check everything, then write the four arrays and the picture."""
    if cfg.out:
        cfg.out.mkdir(parents=True, exist_ok=True)  # before the long part, should it be impossible
    with contextlib.redirect_stdout(None):  # torchvision prints "Files already downloaded"
        arrays, classes, dataset = read_source(cfg)
    out = cfg.out or ROOT / "data" / dataset
    if cfg.out is None and other_images(out, *arrays["train"]):
        raise InputError(f"{out} holds other images; delete it, or give another --out")
    save_splits(out, arrays, classes, dataset, "data/load_CIFAR10.py", cfg)
    save_figure(plot_first_images(*arrays["train"], classes), out / "classes.png")
    counts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in arrays.items())
    print(f"{dataset}: {counts} images -> {out}")


if __name__ == "__main__":
    run(main, LoadConfig)
