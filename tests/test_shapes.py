"""The shapes set is what it says it is, and kill -9 while it is written does no lasting harm."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import script
from PIL import Image
from tiny_cifar import bytes_in

from models.artifacts import ROOT
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


def figure_of(image_HWC: np.ndarray) -> np.ndarray:
    """Find the figure without its label and stretch it to float32 (16 * 16,), 1 inside.

    The figure is what differs from the plane that fits the image's border.
    """
    up, right = np.mgrid[-1:1:32j, -1:1:32j]
    plane_HWK = np.stack([np.ones((32, 32)), up, right], -1)
    border_HW = np.maximum(abs(up), abs(right)) == 1
    fit_KC = np.linalg.lstsq(plane_HWK[border_HW], image_HWC[border_HW] / 255)[0]
    mask_HW = (abs(image_HWC / 255 - plane_HWK @ fit_KC).max(-1) > 0.2).astype(np.float32)
    rows, columns = mask_HW.any(1).nonzero()[0], mask_HW.any(0).nonzero()[0]
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return np.asarray(Image.fromarray(mask_HW).resize((16, 16), Image.Resampling.BOX, box)).ravel()


def test_a_figure_shows_its_class():
    """A figure's nearest neighbour among others is of its class: seen alone, no label needed."""
    images, labels = make_shapes(600, 0)
    figures_NP = np.stack([figure_of(image) for image in images])
    assert (figures_NP.mean(1) > 0.2).all()  # every image shows something
    product_NN = figures_NP @ figures_NP.T
    distance_NN = product_NN.diagonal()[:, None] + product_NN.diagonal() - 2 * product_NN
    np.fill_diagonal(distance_NN, np.inf)
    right_C = np.bincount(labels[labels[distance_NN.argmin(1)] == labels], minlength=10)
    assert right_C.min() >= 57, dict(zip(CLASSES["shapes"], right_C, strict=True))  # of 60


WARM = """
import json, os, runpy, sys, time

script = runpy.run_path("data/shapes.py")  # imports take seconds: once here, not per child
for line in sys.stdin:
    delay, arguments = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["data/shapes.py", *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, 9)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def command():
    """Run the command in a process of its own, killed after `delay` seconds; return its status."""
    process = subprocess.Popen(
        [sys.executable, "-c", WARM],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments: str, delay: float | None = None) -> int:
        print(json.dumps([delay, arguments]), file=process.stdin, flush=True)
        return int(process.stdout.readline())

    yield run
    process.communicate()


def test_killed_at_any_moment_it_leaves_no_mixture_and_a_rerun_mends_it(tmp_path, command):
    out = tmp_path / "shapes"

    def arguments(seed):
        count = ["--count-train", str(700 + seed), "--count-test", str(200 + seed)]
        return ["--seed", str(seed), *count, "--out", str(out)]

    whole, written = {}, set()
    for seed in (1, 2):
        start = time.perf_counter()
        assert command(*arguments(seed)) == 0
        seconds = time.perf_counter() - start
        whole[seed] = bytes_in(out)
        written |= {load_split(out, split).sha256 for split in SPLITS}
    assert len(written) == 4
    rng = np.random.default_rng()
    killed = 0
    while killed < 10:
        if command(*arguments(1 + killed % 2), delay=rng.uniform(0, seconds)) == signal.SIGKILL:
            killed += 1
        else:
            seconds *= 0.8  # it was done before it was killed
        for split in SPLITS:
            with contextlib.suppress(InputError):  # a torn pair, refused as one
                assert load_split(out, split).sha256 in written
    assert command(*arguments(1)) == 0
    assert bytes_in(out) == whole[1]  # and nothing that a killed run left
