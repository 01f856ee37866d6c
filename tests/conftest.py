"""A tiny world that the stage tests share: shapes, a tokenizer of 32 codes, their codes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import script

from models.vqvae import VQVAEConfig


@dataclass(frozen=True)
class World:
    """Where the artifacts of the first three stages lie."""

    data: Path
    tokenizer: Path
    codes: Path


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are faster on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Run stages 1 to 3 once, at a size that takes seconds."""
    root = tmp_path_factory.mktemp("world")
    shapes, train = script("data/shapes.py"), script("tokenizer_vq/train_vqvae.py")
    extract = script("tools/extract_latent_codes.py")
    made = World(root / "data", root / "tokenizer.pth", root / "codes")
    shapes.main(shapes.ShapesConfig(out=made.data, count_train=120, count_test=40))
    size = VQVAEConfig(codebook_size=32, width=8, blocks=1)
    train.main(
        train.TokenizerConfig(
            data=made.data,
            out=made.tokenizer,
            model=size,
            steps=6,
            batch=16,
            warmup=2,
            init=None,
            perceptual=0,
        )
    )
    extract.main(extract.ExtractConfig(tokenizer=made.tokenizer, data=made.data, out=made.codes))
    return made


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=400, help="of the campaign in tests/hostile")
    parser.addoption("--first-case", type=int, default=0)
