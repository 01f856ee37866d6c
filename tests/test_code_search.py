"""Searching for codes: what it finds, that it never makes an image worse here, and its command."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import script

from metrics.fidelity import psnr
from models.command import InputError
from models.data import load_split
from models.tokenizer import decode_codes, encode_images, error_around, load_tokenizer, search_codes


class Misleading:
    """A tokenizer of two codes, black and white, whose encoder gets every cell wrong by a hair."""

    grid = 4
    quantizer = SimpleNamespace(codebook_VC=torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

    def vectors(self, images_N3HW):
        white_NT = torch.nn.functional.avg_pool2d(images_N3HW[:, :1], 4).flatten(1)
        return torch.stack((0.7 + 0.01 * white_NT, 0.71 - 0.01 * white_NT), dim=2)

    def render(self, vectors_NTC):
        white_N1hw = vectors_NTC[..., 1].unflatten(1, (1, 4, 4))
        return white_N1hw.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def test_a_sweep_finds_the_codes_that_decode_best():
    codes_NT = (torch.arange(32).view(2, 16) * 7 % 5 < 2).long()
    tokenizer = Misleading()
    images_N3HW = tokenizer.render(tokenizer.quantizer.codebook_VC[codes_NT])
    assert torch.equal(search_codes(tokenizer, images_N3HW, 0), 1 - codes_NT)
    # one sweep judges a cell beside neighbours that are still wrong, two mend everything
    assert torch.equal(search_codes(tokenizer, images_N3HW, 2), codes_NT)


def test_the_error_around_a_cell_is_that_of_its_surroundings():
    tokenizer, codes_NT = Misleading(), torch.zeros(1, 16, dtype=torch.long)
    images_N3HW = torch.zeros(1, 3, 16, 16)
    images_N3HW[:, :, 4:8, 8:12] = 1  # the cell in row 1, column 2
    error_hw = error_around(tokenizer, codes_NT, images_N3HW).view(4, 4)
    expected = torch.zeros(4, 4)
    expected[0:3, 1:4] = torch.tensor([[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125]] * 2)[:3]
    torch.testing.assert_close(error_hw, expected)


def test_searched_codes_decode_better_than_nearest_ones(world):
    model, _ = load_tokenizer(world.tokenizer)
    images_NHWC = load_split(world.data, "test").images_NHWC
    nearest, once, thrice = (
        psnr(images_NHWC, decode_codes(model, encode_images(model, images_NHWC, sweeps=sweeps)))
        for sweeps in (0, 1, 3)
    )
    assert once.mean() > nearest.mean() + 0.01
    assert thrice.mean() > once.mean() - 0.05
    assert torch.equal(encode_images(model, images_NHWC[:9]), encode_images(model, images_NHWC)[:9])


def test_stage_3_searches_and_says_what_it_gained(world, tmp_path):
    stage = script("tools/extract_latent_codes.py")
    options = {"tokenizer": world.tokenizer, "data": world.data, "out": tmp_path}
    stage.main(stage.ExtractConfig(**options, search=1))
    found, plain = (
        json.loads((folder / "test_codes.npy.json").read_text())["test_psnr"]
        for folder in (tmp_path, world.codes)
    )
    assert found > plain
    with pytest.raises(InputError, match="search"):
        stage.main(stage.ExtractConfig(**options, search=-1))
