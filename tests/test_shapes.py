"""The shapes set is what it says it is, and a cut while it is written does no lasting harm."""

import contextlib
import itertools

import numpy as np
from helpers import cut_at, script
from tiny_cifar import bytes_in

from models import artifacts
from models.command import InputError
from models.data import CLASSES, SPLITS, canonical_rows, load_split

stage = script("data/shapes.py")
make_shapes = stage.make_shapes


def test_shapes_follow_from_the_seed_and_are_balanced():
    images, labels = make_shapes(1500, 0)
    shorter, _ = make_shapes(730, 0)
    other, _ = make_shapes(1500, 1)
    assert (images.shape, images.dtype, labels.dtype) == ((1500, 32, 32, 3), np.uint8, np.int64)
    assert (np.bincount(labels) == 150).all()
    np.testing.assert_array_equal(images[:730], shorter)
    assert len({image.tobytes() for image in (*images, *other)}) == 3000  # none comes twice


def test_train_and_test_shapes_are_different_images(tmp_path):
    stage.main(stage.ShapesConfig(tmp_path, count_train=95, count_test=25))
    splits = {split: load_split(tmp_path, split) for split in SPLITS}
    assert [len(splits[split].labels_N) for split in SPLITS] == [95, 25]
    images = np.concatenate([splits[split].images_NHWC for split in SPLITS])
    assert len({image.tobytes() for image in images}) == 120
    assert splits["test"].classes == CLASSES["shapes"]
    assert splits["test"].dataset == "shapes"
    images, labels = (array[95:] for array in make_shapes(120, 0))
    rows = canonical_rows(images, labels)
    np.testing.assert_array_equal(splits["test"].images_NHWC, images[rows])
    np.testing.assert_array_equal(splits["test"].labels_N, labels[rows])


def hashes(split) -> tuple[str, str]:
    return split.sha256, split.labels_sha256


def test_cut_between_any_two_files_it_leaves_no_mixture_and_a_rerun_mends_it(tmp_path, monkeypatch):
    """Of two sets that are drawn into one folder in turn, one cut at each rename."""
    whole, written = {}, set()
    sets = [stage.ShapesConfig(tmp_path, 100 + seed, 20 + seed, seed) for seed in (1, 2)]
    for cfg in sets:
        stage.main(cfg)
        whole[cfg.seed] = bytes_in(tmp_path)
        written |= {hashes(load_split(tmp_path, split)) for split in SPLITS}
    assert len(written) == 4
    for renames in itertools.count(1):
        with monkeypatch.context() as patched:
            calls = cut_at(patched, artifacts.os, "replace", renames)
            with contextlib.suppress(KeyboardInterrupt):
                stage.main(sets[renames % 2])
        if len(calls) < renames:
            break
        for split in SPLITS:
            with contextlib.suppress(InputError):  # a torn pair, refused as one
                assert hashes(load_split(tmp_path, split)) in written
    assert renames > 8
    stage.main(sets[0])
    assert bytes_in(tmp_path) == whole[1]  # and nothing that a cut run left
