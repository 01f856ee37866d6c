"""Stage 1: every source gives the same bytes, bad ones are refused, and nothing is half done."""

import http.server
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny_cifar import (
    assert_tiny,
    batch,
    bytes_in,
    load,
    make_official,
    md5,
    refused,
    stage,
    tiny_batches,
    tiny_images,
    write_archive,
    write_batch_folder,
    write_image_folder,
)

from models.artifacts import sidecar
from models.command import InputError
from models.data import CLASSES, canonical_rows, load_split, save_splits

ARCHIVE = "cifar-10-python.tar.gz"


def test_every_source_gives_the_same_bytes_whatever_its_row_order(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    shuffled = write_archive(tmp_path / "shuffled.tgz", tiny_batches(shuffle=7))
    make_official(monkeypatch, tiny_batches())
    sources = {
        "archive": {"source": archive, "md5": md5(archive)},
        "shuffled": {"source": shuffled, "md5": md5(shuffled)},
        "batches": {"source": write_batch_folder(tmp_path / "cifar-10-batches-py", tiny_batches())},
        "above": {"source": tmp_path},
        "images": {"source": write_image_folder(tmp_path / "pngs")},
    }
    made = {}
    for name, options in sources.items():
        out = tmp_path / "out" / name
        assert_tiny(load(out, **options))
        made[name] = {path.name: path.read_bytes() for path in sorted(out.glob("*.npy"))}
        with Image.open(out / "classes.png") as picture:
            assert min(picture.size) > 200
    assert all(arrays == made["archive"] for arrays in made.values())


def test_canonical_rows_are_sorted_by_content_and_the_label_decides_between_twins():
    images, labels = tiny_images()["train"]
    twins = np.concatenate((images, images[:1])), np.concatenate((labels, labels[:1] + 1))
    shuffled = np.random.default_rng(0).permutation(len(twins[1]))
    first, second = canonical_rows(*twins), canonical_rows(*(a[shuffled] for a in twins))
    for array in twins:
        np.testing.assert_array_equal(array[first], array[shuffled][second])


def test_other_classes_in_any_number_go_through_under_the_folders_name(tmp_path):
    folder = write_image_folder(tmp_path / "pets", classes=("cat", "dog", "zebra"))
    splits = load(tmp_path / "out", source=folder)
    assert splits["train"].classes == ("cat", "dog", "zebra") and splits["test"].dataset == "pets"
    assert set(splits["train"].labels_N.tolist()) == {0, 1, 2}


def test_no_other_images_of_the_same_classes_are_written_over(tmp_path, monkeypatch):
    """CINIC-10 has the classes of CIFAR-10, and its folder would go by that name."""
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    folder = write_image_folder(tmp_path / "first")
    for _ in range(2):  # the same ones may be written again
        stage.main(stage.LoadConfig(source=folder))
    before = bytes_in(tmp_path / "data/cifar10")
    (folder / "train/frog/12.png").unlink()
    with pytest.raises(InputError, match="data/cifar10 holds other images; delete it, or give an"):
        stage.main(stage.LoadConfig(source=folder))
    assert bytes_in(tmp_path / "data/cifar10") == before
    (tmp_path / "data/cifar10/train_labels.npy").write_bytes(b"torn")
    stage.main(stage.LoadConfig(source=folder))
    assert len(load_split(tmp_path / "data/cifar10", "train").labels_N) == 19


def test_images_of_another_size_are_resized_on_request_only(tmp_path):
    folder = write_image_folder(tmp_path / "big", size=(48, 40))
    refused("it is 48x40; --size 32 would resize it", tmp_path, source=folder)
    images_NHWC = load(tmp_path / "out", source=folder, size=32)["train"].images_NHWC
    assert images_NHWC.shape[1:3] == (32, 32)


def test_cifar100_is_read_with_its_hundred_classes(tmp_path):
    images, labels = tiny_images(classes=100)["train"]
    names = [f"class{i:02d}" for i in range(100)]
    files = {
        "train": batch(images, labels, key="fine_labels"),
        "test": batch(images, labels, key="fine_labels"),
        "meta": batch(None, names, key="fine_label_names"),
    }
    archive = write_archive(tmp_path / "c100.tgz", files, "cifar-100-python")
    splits = load(tmp_path / "out", source=archive, md5=md5(archive), dataset="cifar100")
    assert splits["train"].dataset == "cifar100" and splits["train"].classes == tuple(names)
    assert set(splits["test"].labels_N.tolist()) == set(range(100))


def test_archives_and_batches_of_another_checksum_are_not_opened(tmp_path):
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    refused("expected MD5 c58f30108f718f92721af3b95e74349a, found", tmp_path, source=archive)
    refused(f"expected MD5 0123, found {md5(archive)}", tmp_path, source=archive, md5="0123")
    evil = b"cos\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR."
    folder = write_batch_folder(tmp_path / "batches", tiny_batches() | {"data_batch_1": evil})
    refused("do not have the official MD5s", tmp_path, source=folder)
    assert not (tmp_path / "ran").exists()


def test_a_bad_archive_is_refused(tmp_path):
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    whole = archive.read_bytes()
    for cut in (0, 5, len(whole) // 2):
        archive.write_bytes(whole[:cut])
        refused("cifar.tgz", tmp_path, source=archive, md5=md5(archive))
    for name, message in (
        ("data_batch_5", "cifar.tgz: expected data_batch_5"),
        ("batches.meta", "meta"),
    ):
        files = {key: content for key, content in tiny_batches().items() if key != name}
        write_archive(archive, files)
        refused(message, tmp_path, source=archive, md5=md5(archive))
    write_archive(archive, tiny_batches() | {"test_batch": b"no pickle"})
    refused("cifar.tgz is no CIFAR10", tmp_path, source=archive, md5=md5(archive))


def sixteen_bits(image, path):
    """Write a 16-bit RGB PNG by hand: Pillow reads such files, but writes none."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = zlib.compress(bytes(32 * (1 + 32 * 6)))
    head = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def to_fifo(image, path):
    path.unlink()
    os.mkfifo(path)


FROG = "test/frog/06.png"
SPOILERS = {
    "mode L": lambda image, path: image.convert("L").save(path),
    "mode P": lambda image, path: image.convert("P").save(path),
    "mode RGBA": lambda image, path: image.convert("RGBA").save(path),
    "transparent": lambda image, path: image.save(path, transparency=(1, 2, 3)),
    "2 frames": lambda image, path: image.save(
        path, save_all=True, append_images=[image.rotate(90)]
    ),
    "it is JPEG": lambda image, path: image.save(path, "JPEG"),
    "16 bits": sixteen_bits,
    "it is 28x28": lambda image, path: image.resize((28, 28)).save(path),
    "it is no file": to_fifo,
    "cannot identify": lambda image, path: path.write_bytes(b"no"),
    "RGB still": lambda image, path: os.truncate(path, 900),
}
"""what the frog's picture becomes, by what is said of it"""


@pytest.mark.parametrize("message", SPOILERS)
def test_images_that_are_no_8_bit_rgb_stills_are_refused_by_name(tmp_path, message):
    folder = write_image_folder(tmp_path / "pngs")
    with Image.open(folder / FROG) as image:
        SPOILERS[message](image.copy(), folder / FROG)
    refused(f"{FROG}.*{message}", tmp_path, source=folder)


def test_classes_must_agree_and_have_images(tmp_path):
    folder = write_image_folder(tmp_path / "pngs")
    (folder / "test/frog").rename(folder / "test/zebra")
    refused("classes in one split only: frog, zebra", tmp_path, source=folder)
    for path in (folder / "test/zebra").iterdir():
        path.unlink()
    refused("pngs/test: .*zebra", tmp_path, source=folder)
    one = write_image_folder(tmp_path / "one", classes=("cat",))
    refused("at least 2 classes", tmp_path, source=one)


@pytest.fixture
def split_folder(tmp_path):
    save_splits(tmp_path, tiny_images(), CLASSES["cifar10"], "cifar10", "a test", {})
    return tmp_path


def test_load_split_refuses_labels_of_other_images(split_folder):
    other = split_folder / "other"
    save_splits(other, tiny_images(seed=1), CLASSES["cifar10"], "cifar10", "a test", {})
    for name in ("train_images.npy", "train_images.npy.json"):
        (other / name).replace(split_folder / name)
    with pytest.raises(InputError, match="other images .*run: uv run data/load_CIFAR10.py --out"):
        load_split(split_folder, "train")


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy"])
def test_load_split_refuses_a_changed_torn_or_missing_file(split_folder, name):
    path = split_folder / name
    whole, about = path.read_bytes(), sidecar(path).read_text()
    contents = (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b"", None)
    other = about.replace('"kind": "', '"kind": "other ')
    sidecars = ("[]", "null", "{", "[" * 100_000, "{}", None, other)
    for content, beside in [(c, about) for c in contents] + [(whole, s) for s in sidecars]:
        for file, text in ((path, content), (sidecar(path), beside and beside.encode())):
            file.unlink(missing_ok=True)
            if text is not None:
                file.write_bytes(text)
        with pytest.raises(InputError, match=f"{name}.*; run: uv run data/load_CIFAR10.py --out"):
            load_split(split_folder, "train")


def test_save_splits_refuses_labels_outside_the_classes_and_empty_ones(tmp_path):
    arrays = tiny_images()
    images, labels = arrays["test"]
    for message, test in (
        ("labels in 0..9, found", (images, labels + 1)),
        ("'truck' has no", (images[:9], labels[:9])),
    ):
        with pytest.raises(InputError, match=message):
            save_splits(tmp_path, arrays | {"test": test}, CLASSES["cifar10"], "cifar10", "t", {})
    assert bytes_in(tmp_path) == {}


class Page(http.server.BaseHTTPRequestHandler):
    """Serves the server's `content`, and hangs up after `cut` bytes of it."""

    def do_GET(self):  # noqa: N802
        self.server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])

    def do_HEAD(self):  # noqa: N802
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A web server with the tiny archive, and the options that download from it."""
    monkeypatch.setenv("no_proxy", "*")
    archive = write_archive(tmp_path / "cifar.tgz", tiny_batches())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.content, server.cut, server.asked = archive.read_bytes(), None, 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
    yield server, {"url": url, "md5": md5(archive), "downloads": tmp_path / "downloads"}
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_checked_kept_and_fetched_again_if_damaged(tmp_path, served):
    server, options = served
    asked = []
    for damage in (False, False, True):
        if damage:
            (options["downloads"] / ARCHIVE).write_bytes(server.content[:-1])
        assert_tiny(load(tmp_path / "out", **options))
        asked.append(server.asked)
    assert 0 < asked[0] == asked[1] == asked[2] / 2
    assert [path.name for path in options["downloads"].iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("cut", [0, 700])
def test_a_cut_or_wrong_download_is_one_line_and_the_next_one_mends_it(tmp_path, served, cut):
    server, options = served
    server.cut = cut
    options["downloads"].mkdir()
    (options["downloads"] / ARCHIVE).write_bytes(b"of another kind")
    refused(f"download of {options['url']} failed .* --source", tmp_path, **options)
    (left,) = options["downloads"].iterdir()
    assert (left.name, left.read_bytes()) == (ARCHIVE, b"of another kind")
    server.cut = None
    refused("failed .* --source", tmp_path, **options | {"md5": "0" * 32})
    assert_tiny(load(tmp_path / "out", **options))
    for url in ("http://127.0.0.1:1/x", "nonsense", "file:///nowhere"):
        elsewhere = options | {"url": url, "downloads": tmp_path / "elsewhere"}
        refused(f"download of {url} failed", tmp_path, **elsewhere)
