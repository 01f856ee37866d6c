"""The tokenizer: what it promises, that it learns, and that a cut run ends the same."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize

from metrics.fidelity import codebook_use, psnr
from models.command import InputError
from models.tokenizer import find_tokenizer, load_tokenizer, to_float, to_uint8
from models.vqvae import VQVAE, CosineQuantizer, VQVAEConfig

TINY = VQVAEConfig(codebook_size=32, width=8, blocks=1)


def started(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    model = VQVAE(TINY)
    model.quantizer.start(model.vectors(torch.rand(4, 3, 32, 32)).detach())
    return model.eval()


def test_shapes_ranges_and_types():
    model, images_N3HW = started(), torch.rand(5, 3, 32, 32)
    codes_NT = model.encode(images_N3HW)
    assert codes_NT.shape == (5, 64) and codes_NT.dtype == torch.int64
    decoded = model.decode(codes_NT)
    assert decoded.shape == (5, 3, 32, 32) and decoded.min() >= 0 and decoded.max() <= 1


def test_encode_and_decode_are_the_two_halves_of_forward():
    model, images_N3HW = started(), torch.rand(5, 3, 32, 32)
    decoded_N3HW, codes_NT, _ = model(images_N3HW)
    assert torch.equal(model.encode(images_N3HW), codes_NT)
    torch.testing.assert_close(
        model.decode(codes_NT), decoded_N3HW.clamp(0, 1), rtol=1e-5, atol=1e-5
    )


def test_a_code_is_the_nearest_by_cosine():
    model = started()
    vectors_NTC = torch.randn(2, 9, 8)
    distance = torch.cdist(F.normalize(vectors_NTC, dim=-1), model.quantizer.codebook_VC)
    assert torch.equal(model.quantizer.nearest(vectors_NTC), distance.argmin(-1))
    assert torch.allclose(model.quantizer.codebook_VC.norm(dim=1), torch.ones(32), atol=1e-5)


def test_grid_cells_are_in_raster_order():
    """Changing one corner of the image changes the codes near the same corner of the grid."""
    model, images = started(), torch.zeros(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 28:, :4] = torch.rand(3, 4, 4)  # bottom left
    moved = (model.vectors(images) - model.vectors(changed)).norm(dim=-1)[0]
    assert moved.argmax() == 56


def test_decode_refuses_codes_out_of_range():
    for bad in (-1, 32):
        with pytest.raises(ValueError, match="codes in"):
            started().decode(torch.full((1, 64), bad))


def test_start_refuses_too_few_vectors():
    with pytest.raises(InputError, match="at least 32 vectors"):
        CosineQuantizer(32, 8, 0.0).start(torch.randn(1, 31, 8))


def test_evaluation_moves_no_code_and_training_does():
    model = started()
    before = model.quantizer.codebook_VC.clone()
    model(torch.rand(4, 3, 32, 32))
    assert torch.equal(model.quantizer.codebook_VC, before)
    model.train()(torch.rand(4, 3, 32, 32))
    assert not torch.equal(model.quantizer.codebook_VC, before)


def test_straight_through_gradient_is_the_identity():
    quantizer = CosineQuantizer(16, 8, 0.0)
    quantizer.start(torch.randn(4, 16, 8))
    vectors_NTC = F.normalize(torch.randn(2, 9, 8), dim=-1).requires_grad_()
    quantized_NTC, _, _ = quantizer.train()(vectors_NTC)
    wanted_NTC = torch.randn(2, 9, 8)
    (grad_NTC,) = torch.autograd.grad((quantized_NTC * wanted_NTC).sum(), vectors_NTC)
    # through the normalisation of a unit vector: the part of the gradient along it is removed
    along = (wanted_NTC * vectors_NTC).sum(-1, keepdim=True) * vectors_NTC
    torch.testing.assert_close(grad_NTC, wanted_NTC - along, rtol=1e-4, atol=1e-5)


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


def test_the_library_trap_that_the_adapter_avoids_is_still_there():
    """If this fails, vector-quantize-pytorch has mended get_output_from_indices."""
    torch.manual_seed(0)
    vq = VectorQuantize(dim=16, codebook_size=32, codebook_dim=8, accept_image_fmap=True).eval()
    quantized, codes, _ = vq(torch.randn(1, 16, 8, 8))
    assert vq.get_output_from_indices(codes).shape != quantized.shape


def test_pixels_round_and_psnr_is_the_formula():
    every_value = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 32, 32, 3)
    assert np.array_equal(to_uint8(to_float(every_value)), every_value)
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx([10 * np.log10(25)] * 2)
    assert np.isinf(psnr(black, black)).all()


def test_usage_and_perplexity():
    assert codebook_use(torch.arange(8).view(2, 4), 16) == {
        "codebook_usage": 0.5,
        "perplexity": pytest.approx(8),
    }


def test_codes_are_perturbed_to_near_ones_at_the_rate_asked_for():
    quantizer = started().quantizer
    codes_NT = torch.randint(32, (100, 64), generator=torch.Generator().manual_seed(0))
    near_NT = quantizer.perturb(codes_NT, 0.25, 3, torch.Generator().manual_seed(1))
    moved = near_NT != codes_NT
    assert moved.double().mean() == pytest.approx(0.25, abs=0.02)
    likeness_VV = quantizer.codebook_VC @ quantizer.codebook_VC.T
    rank_VV = likeness_VV.argsort(descending=True).argsort()
    assert rank_VV[codes_NT[moved], near_NT[moved]].unique().tolist() == [1, 2, 3]
    again = quantizer.perturb(codes_NT, 0.25, 3, torch.Generator().manual_seed(1))
    assert torch.equal(near_NT, again)


def test_the_right_tokenizer_is_found_by_its_hash(world):
    sha256 = load_tokenizer(world.tokenizer)[1]["sha256"]
    assert find_tokenizer(sha256, world.tokenizer) == world.tokenizer
    with pytest.raises(InputError, match="trained on codes of tokenizer"):
        find_tokenizer("0" * 64, world.tokenizer)
    with pytest.raises(InputError, match="found nothing"):
        find_tokenizer(sha256, world.tokenizer.with_name("nowhere.pth"))


def test_the_right_tokenizer_is_found_where_commands_write_them(world, tmp_path, monkeypatch):
    sha256 = load_tokenizer(world.tokenizer)[1]["sha256"]
    monkeypatch.setattr("models.tokenizer.ROOT", tmp_path)
    for place in ("tokenizer_vq/a.pth", "checkpoints/b.pth", "data/codes_clustered/tokenizer.pth"):
        with pytest.raises(InputError, match="none of tokenizer_vq.* is it"):
            find_tokenizer(sha256)
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        shutil.copy(world.tokenizer, path)
        assert find_tokenizer(sha256) == path
        path.write_bytes(b"another")
