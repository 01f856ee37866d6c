"""The shapes set is what it says it is, and kill -9 while it is written does no lasting harm."""

import contextlib
import signal
import subprocess
import sys
import time

import numpy as np
from helpers import script
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


WARM = """
import os, runpy, sys, time

script = runpy.run_path("data/shapes.py")  # imports take seconds: once here, not per child
for line in sys.stdin:
    delay, *arguments = line.split()
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["data/shapes.py", *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    if float(delay) < 9:
        time.sleep(float(delay))
        os.kill(child, 9)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_any_moment_it_leaves_no_mixture_and_a_rerun_mends_it(tmp_path):
    out, pipe = tmp_path / "shapes", subprocess.PIPE
    warm = [sys.executable, "-c", WARM]
    with subprocess.Popen(warm, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:

        def run(seed: int, delay: float = 9) -> int:
            """Draw the set of this seed, killed after `delay` seconds; return the status."""
            count = f"--count-train {700 + seed} --count-test {200 + seed}"
            line = f"{delay} --seed {seed} {count} --out {out}"
            print(line, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        whole, written = {}, set()
        for seed in (1, 2):
            start = time.perf_counter()
            assert run(seed) == 0
            seconds = time.perf_counter() - start
            whole[seed] = bytes_in(out)
            written |= {load_split(out, split).sha256 for split in SPLITS}
        assert len(written) == 4
        killed, rng = 0, np.random.default_rng()
        while killed < 6:
            if run(1 + killed % 2, delay=rng.uniform(0, seconds)) == signal.SIGKILL:
                killed += 1
            else:
                seconds *= 0.8  # it was done before it was killed
            for split in SPLITS:
                with contextlib.suppress(InputError):  # a torn pair, refused as one
                    assert load_split(out, split).sha256 in written
        assert run(1) == 0
        assert bytes_in(out) == whole[1]  # and nothing that a killed run left
        process.stdin.close()
