"""A tiny world that the stage tests share: shapes, a tokenizer of 32 codes, their codes."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import config_of, save_tiny, script
from tiny_extractor import write_extractor

from metrics.evaluation import MeasureConfig
from models.classifier import KIND, PerceptualNet, save_net
from models.method import SIZES
from models.methods import METHODS
from models.vqvae import VQVAEConfig

SIZES["tiny"] = {"layers": 2, "heads": 2, "width": 16}  # before train_c2i.py lists its --model


@dataclass(frozen=True)
class World:
    """Where the artifacts of the first three stages lie."""

    data: Path
    tokenizer: Path
    codes: Path


@pytest.fixture(params=METHODS)
def method(request) -> str:
    """Every method in turn: a new one gets the tests that ask for it."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are faster on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def features_elsewhere(tmp_path_factory):
    """Features of tiny sets are kept, but not among those of the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metrics.fidelity.FEATURES", tmp_path_factory.mktemp("features"))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Run stages 1 to 3 once, at a size that takes seconds."""
    root = tmp_path_factory.mktemp("world")
    shapes, train = script("data/shapes.py"), script("tokenizer_vq/train_vqvae.py")
    extract = script("tools/extract_latent_codes.py")
    made = World(root / "data", root / "tokenizer.pth", root / "codes")
    shapes.main(shapes.ShapesConfig(out=made.data, count_train=120, count_test=40))
    size = VQVAEConfig(codebook_size=32, width=8, blocks=1)
    short = {"model": size, "steps": 6, "batch": 16, "warmup": 2, "init": None, "perceptual": 0}
    train.main(train.TokenizerConfig(data=made.data, out=made.tokenizer, **short))
    extract.main(extract.ExtractConfig(tokenizer=made.tokenizer, data=made.data, out=made.codes))
    return made


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=240, help="of the campaign in tests/hostile")
    parser.addoption("--first-case", type=int, default=0)
    parser.addoption("--kills", type=int, default=1, help="of each command")


@pytest.fixture(scope="session")
def clustered(world, tmp_path_factory) -> World:
    """The world with its codes in 8 clusters of 4."""
    tool, out = script("tools/cluster_codebook.py"), tmp_path_factory.mktemp("clustered")
    tool.main(tool.ClusterConfig(world.tokenizer, world.codes, out, cluster_size=4))
    return replace(world, tokenizer=out / "tokenizer.pth", codes=out)


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory) -> Path:
    """An untrained classifier of shapes: distances need no training to be distances."""
    path = tmp_path_factory.mktemp("extractor") / "extractor.pth"
    write_extractor(path, dataset="shapes")
    return path


@pytest.fixture
def cheap(world, extractor_file, tmp_path):
    """Configs of commands that measure the tiny world, without Inception; `changes` go first.

    Of an untrained generator, if a method is named: in its own order or `trained` in another.
    """

    def make(kind: type, method=None, trained=None, uniform=False, **changes):
        usual = {"tokenizer": world.tokenizer, "codes": world.codes, "data": world.data}
        usual |= {"extractor": extractor_file, "inception_weights": "none"}
        usual |= {"out": tmp_path / "out", "device": "cpu"}
        if method:
            path = tmp_path / "run/last.pth"
            usual["checkpoint"] = save_tiny(path, world, method, trained, uniform)
        names = {f.name for f in fields(kind)}
        names |= {f.name for f in fields(MeasureConfig)} if "against" in names else set()
        return config_of(kind, **{k: v for k, v in usual.items() if k in names} | changes)

    return make


@pytest.fixture(scope="session")
def perceptual(tmp_path_factory) -> Path:
    """An untrained net for the perceptual loss."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("perceptual") / "perceptual.pth"
    save_net(path, PerceptualNet((4, 6, 8, 10)).fold(), {"kind": KIND})
    return path


@pytest.fixture
def no_pictures(monkeypatch):
    """Trainings draw no curves: that takes longer than their steps."""
    for name in ("plot_curves", "save_figure"):
        monkeypatch.setattr(f"metrics.plots.{name}", lambda *_: None)
