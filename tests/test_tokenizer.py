"""The tokenizer: what it promises, and the search for codes that decode better."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import script

from metrics.fidelity import codebook_use, psnr
from models.artifacts import ROOT
from models.command import InputError
from models.data import SPLITS, load_codes, load_split
from models.tokenizer import (
    decode_codes,
    encode_images,
    error_around,
    find_tokenizer,
    load_tokenizer,
    mirror,
    nearest_codes,
    search_codes,
    to_float,
    to_uint8,
)
from models.vqvae import VQVAE, CosineQuantizer, GroupNorm, VQVAEConfig

SHIPPED = ROOT / "checkpoints/vqvae_cifar10_perceptual_long.pth"
TINY = VQVAEConfig(codebook_size=32, width=8, blocks=1)


def started(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    model = VQVAE(TINY)
    model.quantizer.start(model.vectors(torch.rand(4, 3, 32, 32)).detach())
    return model.eval()


def test_encode_and_decode_are_the_two_halves_of_forward():
    model, images_N3HW = started(), torch.rand(5, 3, 32, 32)
    decoded_N3HW, codes_NT, _ = model(images_N3HW)
    assert torch.equal(model.encode(images_N3HW), codes_NT)
    assert codes_NT.shape == (5, 64) and codes_NT.dtype == torch.int64
    torch.testing.assert_close(
        model.decode(codes_NT), decoded_N3HW.clamp(0, 1), rtol=1e-5, atol=1e-5
    )


def test_a_code_is_the_nearest_by_cosine():
    model = started()
    vectors_NTC = torch.randn(2, 9, 8)
    distance = torch.cdist(F.normalize(vectors_NTC, dim=-1), model.quantizer.codebook_VC)
    assert torch.equal(model.quantizer.nearest(vectors_NTC), distance.argmin(-1))
    assert torch.allclose(model.quantizer.codebook_VC.norm(dim=1), torch.ones(32), atol=1e-5)


def test_a_norm_in_bf16_is_pytorchs_own():
    x_N64HW = torch.randn(4, 64, 16, 16).to(torch.bfloat16, memory_format=torch.channels_last)
    norm = GroupNorm(64)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    found = norm(x_N64HW)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.group_norm(x_N64HW, 8, norm.weight, norm.bias))


def test_grid_cells_are_in_raster_order():
    """Changing one corner of the image changes the codes near the same corner of the grid."""
    model, images = started(), torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 28:, :4] = torch.rand(3, 4, 4)  # bottom left
    moved = (model.vectors(images) - model.vectors(changed)).norm(dim=-1)[0]
    assert moved.argmax() == 56


def test_codes_out_of_range_and_too_few_vectors_to_start_are_refused():
    for bad in (-1, 32):
        with pytest.raises(ValueError, match="codes in"):
            started().decode(torch.full((1, 64), bad))
    with pytest.raises(InputError, match="at least 32 vectors"):
        CosineQuantizer(32, 8, 0.0).start(torch.randn(1, 31, 8))


def test_evaluation_moves_no_code_and_training_does():
    model = started()
    before = model.quantizer.codebook_VC.clone()
    model(torch.rand(4, 3, 32, 32))
    assert torch.equal(model.quantizer.codebook_VC, before)
    model.train()(torch.rand(4, 3, 32, 32))
    assert not torch.equal(model.quantizer.codebook_VC, before)


def test_dead_codes_come_back_to_life():
    def usage(revive_below: float) -> float:
        """Share of codes used after the vectors have moved to one side of the sphere."""
        torch.manual_seed(0)
        quantizer = CosineQuantizer(16, 8, revive_below, decay=0.5).train()
        quantizer.start(torch.randn(1, 400, 8))
        narrow = F.normalize(torch.randn(8), dim=0) + 0.05 * torch.randn(40, 50, 8)
        for batch in narrow:
            quantizer(batch.unsqueeze(0))
        return codebook_use(quantizer.nearest(narrow), 16)["codebook_usage"]

    assert usage(0.5) > 0.9 > 0.7 > usage(0.0)


def test_pixels_round_and_psnr_and_perplexity_are_their_formulas():
    every_value = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    assert np.array_equal(to_uint8(to_float(every_value)), every_value)
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx([10 * np.log10(25)] * 2)
    assert np.isinf(psnr(black, black)).all()
    found = codebook_use(torch.arange(8).view(2, 4), 16)
    assert found == {"codebook_usage": 0.5, "perplexity": pytest.approx(8)}


def test_the_right_tokenizer_is_found_by_its_hash_where_commands_write_them(
    world, tmp_path, monkeypatch
):
    sha256 = load_tokenizer(world.tokenizer)[1]["sha256"]
    assert find_tokenizer(sha256, world.tokenizer) == world.tokenizer
    with pytest.raises(InputError, match="trained on codes of tokenizer"):
        find_tokenizer("0" * 64, world.tokenizer)
    with pytest.raises(InputError, match="found nothing"):
        find_tokenizer(sha256, tmp_path / "nowhere.pth")
    monkeypatch.setattr("models.tokenizer.ROOT", tmp_path)
    for place in ("tokenizer_vq/a.pth", "checkpoints/b.pth", "data/codes_clustered/tokenizer.pth"):
        with pytest.raises(InputError, match="none of tokenizer_vq.* is it"):
            find_tokenizer(sha256)
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        shutil.copy(world.tokenizer, path)
        assert find_tokenizer(sha256) == path
        path.write_bytes(b"another")


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


def test_stage_3_searches_and_says_what_it_gained(world, tmp_path):
    stage = script("tools/extract_latent_codes.py")
    options = {"tokenizer": world.tokenizer, "data": world.data, "out": tmp_path}
    stage.main(stage.ExtractConfig(**options, search=1))
    found, plain = (
        json.loads((folder / "test_codes.npy.json").read_text())["test_psnr"]
        for folder in (tmp_path, world.codes)
    )
    assert found > plain


def test_more_views_are_of_moved_images_and_of_train_images_only(world, tmp_path):
    stage = script("tools/extract_latent_codes.py")
    options = {"tokenizer": world.tokenizer, "data": world.data}
    stage.main(stage.ExtractConfig(**options, out=tmp_path / "codes", views=5))
    found, plain = (
        {split: load_codes(folder, split).codes_NAT for split in SPLITS}
        for folder in (tmp_path / "codes", world.codes)
    )
    assert torch.equal(found["test"], plain["test"])
    assert found["train"].shape[1] == 5 and torch.equal(found["train"][:, :2], plain["train"])
    images_NHWC = load_split(world.data, "train").images_NHWC[:8]
    wide_NHWC = np.pad(images_NHWC, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    model, places = load_tokenizer(world.tokenizer)[0], []
    for top, left in itertools.product(range(7), range(7)):
        moved_NHWC = wide_NHWC[:, top : top + 32, left : left + 32]
        places += [encode_images(model, moved_NHWC), encode_images(model, mirror(moved_NHWC))]
    codes_NPT = torch.stack(places, dim=1)
    same_NAP = (found["train"][:8, 2:, None] == codes_NPT[:, None]).all(-1)
    assert same_NAP.any(-1).all()
    assert len({tuple(view) for view in found["train"][:, 2:].flatten(0, 1).tolist()}) > 300


def test_an_image_decodes_alike_alone_and_among_others():
    """Products of a single row are rounded otherwise; some of these images would differ."""
    tokenizer, _ = load_tokenizer(SHIPPED)
    codes_NT = torch.randint(1024, (65, 64), generator=torch.Generator().manual_seed(0))
    whole_NHWC = decode_codes(tokenizer, codes_NT)
    alone = [decode_codes(tokenizer, codes_1T) for codes_1T in codes_NT.split(1)]
    assert np.array_equal(whole_NHWC, np.concatenate(alone))


def test_a_small_codebook_has_as_many_nearest_codes_as_others():
    nearest_VK = nearest_codes(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert [sorted(row) for row in nearest_VK.tolist()] == [
        [i for i in range(4) if i != code] for code in range(4)
    ]
