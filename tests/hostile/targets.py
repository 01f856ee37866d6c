"""Every kind of file that a stage reads: tiny ones in a folder of their own, and what reads them.

`read(folder)` returns what counts in them, as arrays, tensors, text or numbers.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from helpers import script
from PIL import Image
from published_layouts import draw
from safetensors.torch import save_file
from tiny_cifar import tiny_batches, write_archive
from tiny_extractor import write_extractor
from tiny_published import layout
from torchvision.datasets.utils import calculate_md5

from metrics.corruptions import OFFICIAL, official
from metrics.extractor import load_classifier
from metrics.fidelity import FeatureExtractor, features_of
from metrics.report import Done, read_run, read_samples
from models.artifacts import header
from models.checkpoint import load_generator, save_generator
from models.classifier import PerceptualNet, load_perceptual, save_net
from models.data import load_codes, load_split, read_image, save_codes, save_splits
from models.method import ModelConfig
from models.methods import METHODS, build
from models.orders import scan
from models.published.weights import read_published, restore
from models.tokenizer import load_tokenizer, save_tokenizer
from models.vqvae import VQVAE, VQVAEConfig

load, export = script("data/load_CIFAR10.py"), script("tools/export_checkpoint.py")
report = script("tools/report.py")
CLASSES = ("one", "two")
LABEL_N = np.arange(20) % 2


@dataclass(frozen=True)
class Target:
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    exact: bool = True
    """whatever its bytes become, it is refused or reads as it was"""


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def write_split(folder: Path) -> None:
    both = dict.fromkeys(("train", "test"), (images(), LABEL_N))
    save_splits(folder, both, CLASSES, "tiny", "tests", {})


def read_split(folder: Path) -> list:
    split = load_split(folder, "test")
    return [split.images_NHWC, split.labels_N]


def write_codes(folder: Path) -> None:
    codes_NAT = np.random.default_rng(0).integers(0, 7, (20, 2, 16))
    about = {"codebook_size": 7, "grid": 4, "classes": CLASSES, "dataset": "tiny"}
    head = header("codes", "tests", {}, {"tokenizer": "0" * 64}) | about
    save_codes(folder, "test", codes_NAT, LABEL_N, head)


def read_codes(folder: Path) -> list:
    codes = load_codes(folder, "test")
    return [codes.codes_NAT, codes.label_N]


def write_tokenizer(folder: Path) -> None:
    model = VQVAE(VQVAEConfig(codebook_size=8, code_dim=2, width=8, blocks=1))
    head = header("tokenizer", "tests", {"steps": 1}) | {"dataset": "tiny", "classes": CLASSES}
    save_tokenizer(folder / "t.pth", model, head)


def generator_of(method: str) -> Target:
    def write(folder: Path) -> None:
        size = ModelConfig(vocab_size=8, classes=2, grid=4, layers=2, heads=2, width=16)
        order = METHODS[method].scans[0]
        head = header("generator", "tests", {"order": order, "steps": 1}, {"tokenizer": "0" * 64})
        head |= {"method": method, "dataset": "tiny", "classes": CLASSES}
        save_generator(folder / "g.pth", head, build(method, replace(size, scan=order)))

    def read(folder: Path) -> list:
        generator = load_generator(folder / "g.pth")
        return [*weights(generator.model), generator.order, generator.sampling]

    return Target(write, read)


def write_perceptual(folder: Path) -> None:
    net = PerceptualNet(widths=(4, 4, 4, 4), folded=True)
    save_net(folder / "p.pth", net, header("perceptual net", "tests", {}))


def read_archive(folder: Path) -> tuple:
    path = folder / "a.tar.gz"
    md5 = calculate_md5(path) if path.is_file() else "0" * 32
    return load.read_source(load.LoadConfig(source=path, md5=md5))[1]


def write_png(folder: Path) -> None:
    Image.fromarray(images()[0]).save(folder / "a.png")


def read_published_weights(name: str) -> Callable:
    return lambda folder: weights(restore(read_published(folder / name), heads=2, grid=4))


def write_run(folder: Path) -> None:
    kept = report.REPORTS / report.PAIR["raster order"]
    for path in kept.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def read_features(folder: Path) -> torch.Tensor:
    """Computed again where the kept file is damaged."""
    mean = FeatureExtractor(lambda x: {"mean": x.float().mean((2, 3))}, "0" * 64, "mean", None, "")
    with patch("metrics.fidelity.FEATURES", folder):
        return features_of(images(), mean, keep=True, verbose=False)["mean"]


def write_corruptions(folder: Path) -> None:
    for name in OFFICIAL:
        np.save(folder / f"{name}.npy", np.tile(images()[:2], (5, 1, 1, 1)))
    np.save(folder / "labels.npy", np.tile(LABEL_N[:2], 5).astype("u1"))


def read_corruptions(folder: Path) -> list:
    versions = official(folder, images()[:2], LABEL_N[:2], np.arange(2))
    return [list(make(1).shape) for make in versions.values()]


def write_npz(folder: Path) -> None:
    packed = io.BytesIO()
    np.savez(packed, arr_0=images(), arr_1=LABEL_N)
    (folder / "s.npz").write_bytes(packed.getvalue())


def read_done(folder: Path) -> float:
    """A cut evaluation: its parts are taken, or computed again."""
    return Done(folder / "done.json", {"a": "1"})("bits", lambda: 2.5)


TARGETS = {
    "images": Target(write_split, read_split),
    "codes": Target(write_codes, read_codes),
    "tokenizer": Target(write_tokenizer, lambda f: weights(load_tokenizer(f / "t.pth")[0])),
    **{f"generator {method}": generator_of(method) for method in METHODS},
    "extractor": Target(
        lambda f: write_extractor(f / "e.pth"), lambda f: weights(load_classifier(f / "e.pth")[0])
    ),
    "perceptual": Target(write_perceptual, lambda f: weights(load_perceptual(f / "p.pth"))),
    "png": Target(write_png, lambda f: read_image(f / "a.png"), exact=False),
    "archive": Target(
        lambda f: write_archive(f / "a.tar.gz", tiny_batches()),
        read_archive,
        exact=False,  # its MD5 is given by whoever trusts it; without, nothing is opened
    ),
    "published": Target(
        lambda f: torch.save({"model": draw(layout("gpt"))}, f / "w.pt"),
        read_published_weights("w.pt"),
        exact=False,
    ),
    "safetensors": Target(
        lambda f: save_file(draw(layout("gpt")), f / "w.safetensors"),
        read_published_weights("w.safetensors"),
        exact=False,
    ),
    "order": Target(
        lambda f: np.save(f / "o.npy", np.arange(16)[::-1]), lambda f: scan(f / "o.npy", 4), False
    ),
    "samples": Target(write_npz, lambda f: read_samples(f / "s.npz", 32, 2)),
    "report": Target(write_run, lambda f: report.side_by_side({"run": read_run(f)}), exact=False),
    "plan": Target(
        write_run, lambda f: export.sampling_of(f / "metrics.json", "randar"), exact=False
    ),
    "features": Target(read_features, read_features),
    "corruptions": Target(write_corruptions, read_corruptions, exact=False),
    "done": Target(
        lambda f: (f / "done.json").write_text(
            json.dumps({"inputs": {"a": "1"}, "parts": {"bits": 2.5}})
        ),
        read_done,
        exact=False,
    ),
}
