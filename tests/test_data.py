"""Stage 1: every source gives the same arrays, bad ones are refused, and nothing is half done."""

import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_cifar import (
    assert_tiny,
    load,
    md5,
    python2_pickle,
    refused,
    stage,
    tiny_batches,
    tiny_images,
    write_archive,
    write_batch_folder,
    write_image_folder,
)

from models.artifacts import ROOT, sidecar
from models.dataset import CIFAR10_CLASSES, SPLITS, load_split, read_batch, save_split
from models.errors import InputError, one_line_errors


def test_every_source_gives_the_same_arrays(tmp_path):
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    sources = {
        "archive": {"source": archive, "md5": md5(archive)},
        "batches": {"source": write_batch_folder(tmp_path / "cifar-10-batches-py", tiny_batches())},
        "images": {"source": write_image_folder(tmp_path / "pngs")},
    }
    hashes = []
    for name, options in sources.items():
        assert_tiny(load(tmp_path / name, **options))
        with Image.open(tmp_path / name / "classes.png") as picture:
            assert min(picture.size) > 500
        about = json.loads((tmp_path / name / "train_labels.npy.json").read_text())
        hashes.append(about["inputs"]["source"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_batch_pickled_by_python_3_is_read():
    images, labels = tiny_images()["train"]
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for protocol in (2, 4):
        pickled = pickle.dumps({b"data": planes, b"labels": labels.tolist()}, protocol)
        read_images, read_labels = read_batch(pickled, "batch")
        np.testing.assert_array_equal(read_images, images)
        np.testing.assert_array_equal(read_labels, labels)


def test_other_class_names_are_kept_and_grey_images_become_rgb(tmp_path):
    folder = write_image_folder(tmp_path / "pets")
    for split in SPLITS:
        (folder / split / "cat").rename(folder / split / "zebra")
    grey = folder / "train" / "airplane" / "00.png"
    with Image.open(grey) as image:
        image.convert("L").save(grey)
    train = load(tmp_path / "out", source=folder)["train"]
    assert train.classes == tuple(sorted({*CIFAR10_CLASSES, "zebra"} - {"cat"}))
    assert train.dataset == "pets"
    np.testing.assert_array_equal(train.images_NHWC[0], train.images_NHWC[0][..., [1, 2, 0]])
    np.testing.assert_array_equal(train.images_NHWC[-2:], tiny_images()["train"][0][6:8])  # cats


class Payload:
    """Pickles to a call that makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_cannot_run_code(tmp_path, protocol):
    pickled = pickle.dumps({b"data": Payload(tmp_path / "ran"), b"labels": []}, protocol)
    with pytest.raises(InputError, match="not a safe CIFAR-10 batch"):
        read_batch(pickled, "data_batch_1")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickled)  # to show that the payload is a real one
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy save", "numpy.core.multiarray scalar"])
def test_a_pickle_may_name_array_constructors_only(name):
    module, attribute = name.split()
    with pytest.raises(InputError, match=f"asks for {module}.{attribute}"):
        read_batch(f"c{module}\n{attribute}\n.".encode(), "data_batch_1")


def test_a_bad_batch_is_refused(tmp_path):
    good = tiny_batches()
    images, labels = tiny_images()["test"]
    bad = {
        "expected the batch data_batch_3, found nothing": {"data_batch_3": None},
        "test_batch is not a safe": {"test_batch": good["test_batch"][:-100]},
        "data_batch_2 is not a safe": {"data_batch_2": b""},
        "test_batch: expected images": {"test_batch": python2_pickle(images, labels[:-1])},
        "'truck' has no test images": {"test_batch": python2_pickle(images[:9], labels[:9])},
        r"labels in 0\.\.9, found \{10\} in test": {
            "test_batch": python2_pickle(images, labels + 1)
        },
    }
    for i, (message, change) in enumerate(bad.items()):
        batches = {
            name: pickled for name, pickled in (good | change).items() if pickled is not None
        }
        refused(message, tmp_path, source=write_batch_folder(tmp_path / f"bad{i}", batches))


def test_a_bad_archive_is_refused(tmp_path):
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    whole = archive.read_bytes()
    refused(
        f"cifar.tgz: expected MD5 0123, found {md5(archive)}", tmp_path, source=archive, md5="0123"
    )
    for cut in (0, 5, 1000, len(whole) // 2, len(whole) - 4):
        archive.write_bytes(whole[:cut])
        refused("cifar.tgz is cut off or no .tar.gz", tmp_path, source=archive, md5=md5(archive))
    archive.write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    refused("cifar.tgz", tmp_path, source=archive, md5=md5(archive))
    batches = tiny_batches()
    del batches["data_batch_5"]
    write_archive(archive, batches)
    refused("expected cifar-10-batches-py/data_batch_5", tmp_path, source=archive, md5=md5(archive))


def test_the_md5_is_the_official_one_unless_another_is_given(tmp_path):
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    refused("expected MD5 c58f30108f718f92721af3b95e74349a", tmp_path, source=archive)
    assert stage.official("url").endswith("/cifar-10-python.tar.gz")


def remove_class(folder: Path, split: str) -> None:
    for path in (folder / split / "dog").iterdir():
        path.unlink()
    (folder / split / "dog").rmdir()


def shrink(image: Path) -> None:
    with Image.open(image) as whole:
        whole.resize((28, 28)).save(image)


FROG = "test/frog/06.png"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: remove_class(folder, "test"), "class 'dog' has no test images"),
        (lambda folder: remove_class(folder, "train"), "class 'dog' has no train images"),
        (lambda folder: (folder / "test/zebra").mkdir(), "10 classes, found 11 .*zebra"),
        (lambda folder: shrink(folder / FROG), f"{FROG}: expected 32x32 pixels, found 28x28"),
        (lambda folder: (folder / FROG).write_bytes(b""), f"{FROG} is not a readable image"),
        (lambda folder: (folder / FROG).write_bytes(b"no"), f"{FROG} is not a readable image"),
        (lambda folder: os.truncate(folder / FROG, 900), f"{FROG} is not a readable image"),
    ],
)
def test_a_bad_image_folder_is_refused(tmp_path, spoil, message):
    folder = write_image_folder(tmp_path / "pngs")
    spoil(folder)
    refused(message, tmp_path, source=folder)


def test_a_source_of_no_known_kind_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        refused("expected cifar-10-python.tar.gz, .* found none of them", tmp_path, source=source)


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "shapes", "source": Path("images")},
        {"dataset": "shapes", "count_test": 9},
        {"dataset": "shapes", "seed": -1},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError):
        stage.main(stage.LoadConfig(**options))


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"^error: .*file/out'$"), one_line_errors():
        load(tmp_path / "file" / "out", dataset="shapes")


@pytest.fixture
def split_folder(tmp_path):
    for split, arrays in tiny_images().items():
        save_split(tmp_path, split, *arrays, CIFAR10_CLASSES, "cifar10", "a test", {}, {})
    return tmp_path


def test_load_split_refuses_labels_of_other_images(split_folder):
    other = split_folder / "other"
    arrays = tiny_images(seed=1)["train"]
    save_split(other, "train", *arrays, CIFAR10_CLASSES, "cifar10", "a test", {}, {})
    for name in ("train_images.npy", "train_images.npy.json"):
        (other / name).replace(split_folder / name)
    with pytest.raises(InputError, match="other images .*run: uv run data/load_CIFAR10.py --out"):
        load_split(split_folder, "train")
    load_split(split_folder, "test")


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy"])
def test_load_split_refuses_a_changed_torn_or_missing_file(split_folder, name):
    path = split_folder / name
    whole = path.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.*; run: uv run data/load_CIFAR10.py --out"):
            load_split(split_folder, "train")
    path.write_bytes(whole)
    about = sidecar(path).read_text()
    sidecar(path).unlink()
    with pytest.raises(InputError, match=f"{name}.*; run: uv run"):
        load_split(split_folder, "train")
    sidecar(path).write_text(about)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}, found nothing; run: uv run"):
        load_split(split_folder, "train")


def test_load_split_refuses_labels_outside_the_classes(tmp_path):
    images, labels = tiny_images()["train"]
    for wrong in (labels - 1, labels + 1):
        save_split(tmp_path, "train", images, wrong, CIFAR10_CLASSES, "cifar10", "a test", {}, {})
        with pytest.raises(InputError, match=r"labels in 0\.\.9"):
            load_split(tmp_path, "train")


def test_save_split_refuses_other_shapes(tmp_path):
    images, labels = tiny_images()["train"]
    for bad in ((images[:, :28], labels), (images, labels[1:]), (images, labels.astype(np.int32))):
        with pytest.raises(ValueError, match="expected images and labels"):
            save_split(tmp_path, "train", *bad, CIFAR10_CLASSES, "cifar10", "a test", {}, {})


def test_the_command_line_ends_in_one_line(tmp_path, monkeypatch):
    options = ["--source", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["load_CIFAR10.py", *options])
    with pytest.raises(SystemExit, match=r"^error: --source [^\n]* found none of them$"):
        runpy.run_path(str(ROOT / "data/load_CIFAR10.py"), run_name="__main__")
