"""Published tokenizers: LlamaGen's and the CIFAR-10 baseline's, their weights and what they do."""

import numpy as np
import pytest
import reference_vq16
import torch
import torch.nn.functional as F
from helpers import eval_config, script
from published_layouts import baseline_vqvae, draw, gpt, vq16

from models.artifacts import load_checkpoint, save_checkpoint
from models.command import InputError
from models.data import load_codes
from models.published.baseline_vqvae import BaselineConfig, BaselineVQVAE
from models.published.sizes import infer_config, recognise
from models.published.vq16 import VQ16, VQ16Config
from models.tokenizer import load_tokenizer
from models.training import parameters

tool, stage = script("tools/import_checkpoint.py"), script("eval_c2i.py")
TINY = {"channels": 32, "multipliers": (1, 2, 2), "vector_width": 12, "codes": 32, "dim": 4}
VQ8 = (1, 2, 2, 4)
SMALL = {"hiddens": 8, "residual": 4, "codes": 32, "dim": 6}


def imported(weights: dict, path, **changes):
    """Save as LlamaGen's trainer does, import beside it, return where."""
    torch.save({"model": weights, "optimizer": {}, "discriminator": {}, "steps": 5}, path)
    return tool.main(tool.ImportConfig(path, out=path.with_suffix(".ours.pth"), **changes))


@pytest.mark.parametrize(
    ("kind", "shapes", "expected", "total"),
    [
        ("vq16", vq16(), VQ16Config(), 71_883_403),
        ("vq16", vq16(multipliers=VQ8), VQ16Config(multipliers=VQ8), 70_109_835),
        ("baseline_vqvae", baseline_vqvae(), BaselineConfig(), None),
    ],
)
def test_the_published_names_and_shapes(kind, shapes, expected, total):
    assert recognise(shapes) == kind
    assert infer_config(kind, shapes, None, None) == expected
    with torch.device("meta"):
        model = (VQ16 if kind == "vq16" else BaselineVQVAE)(expected)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert total is None or parameters(model) == total


def test_an_imported_vq16_computes_what_its_description_says(tmp_path):
    weights = draw(vq16(**TINY), scale=0.1)
    model, head = load_tokenizer(imported(weights, tmp_path / "vq.pt", grid=8))
    assert head["model"] == "vq16" and head["dataset"] == "imagenet"
    assert (model.grid, model.config.codebook_size, model.config.factor) == (8, 32, 4)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    model, wide = model.double(), {name: value.double() for name, value in weights.items()}
    images_N3HW = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    codes_NT = model.encode(images_N3HW)
    assert codes_NT.shape == (3, 64) and codes_NT.dtype == torch.int64
    assert torch.equal(codes_NT, reference_vq16.encode(wide, 2 * images_N3HW - 1))
    assert len(codes_NT.unique()) > 5
    any_NT = torch.randint(32, (18, 64), generator=torch.Generator().manual_seed(0))
    expected_N3HW = ((reference_vq16.decode(wide, any_NT, 8) + 1) / 2).clamp(0, 1)
    assert expected_N3HW.std() > 0.05 and (expected_N3HW % 1 != 0).double().mean() > 0.5
    torch.testing.assert_close(model.decode(any_NT), expected_N3HW, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["vq16", "baseline"])
def test_impossible_images_and_codes_are_refused(kind):
    vq, baseline = VQ16Config(32, 4, 32, (1, 1, 1), 8, grid=8), BaselineConfig(32, 6, 8, 4)
    model = VQ16(vq) if kind == "vq16" else BaselineVQVAE(baseline)
    with pytest.raises(InputError, match="3 x 32 x 32"):
        model.encode(torch.rand(1, 3, 64, 64))
    for code in (-1, 32):
        with pytest.raises(ValueError, match="codes in"):
            model.decode(torch.full((1, 64), code))
    with pytest.raises(InputError, match="multiple of 32"):
        VQ16Config(channels=48)


def their_conv(x: torch.Tensor, w: dict, at: str, **how) -> torch.Tensor:
    run = F.conv_transpose2d if "trans" in at else F.conv2d
    return run(x, w[f"{at}.weight"], w.get(f"{at}.bias"), **how)


def their_stack(x: torch.Tensor, w: dict, side: str) -> torch.Tensor:
    """As in the wild: the first ReLU works in place, so x + .. adds the rectified x."""
    for i in range(2):
        at, x = f"{side}._residual_stack._layers.{i}._block", x.relu()
        x = x + their_conv(their_conv(x, w, f"{at}.1", padding=1).relu(), w, f"{at}.3")
    return x.relu()


@torch.no_grad()
def test_an_imported_baseline_tokenizer_computes_what_its_description_says(tmp_path):
    weights = draw(baseline_vqvae(**SMALL), scale=0.2)
    torch.save(weights, tmp_path / "vqvae_cifar10.pth")  # a bare state dict
    path = tool.main(tool.ImportConfig(tmp_path / "vqvae_cifar10.pth", out=tmp_path / "ours.pth"))
    model, head = load_tokenizer(path)
    assert head["model"] == "baseline_vqvae" and head["dataset"] == "cifar10"
    model, w = model.double(), {name: value.double() for name, value in weights.items()}
    images_N3HW, half = torch.rand(3, 3, 32, 32).double(), {"stride": 2, "padding": 1}
    x = their_conv(images_N3HW - 0.5, w, "_encoder._conv_1", **half).relu()
    x = their_conv(x, w, "_encoder._conv_2", **half).relu()
    x = their_stack(their_conv(x, w, "_encoder._conv_3", padding=1), w, "_encoder")
    cells_NTC = their_conv(x, w, "_pre_vq_conv").flatten(2).transpose(1, 2)
    table_VC = w["_vq_vae._embedding.weight"]
    codes_NT = torch.cdist(cells_NTC, table_VC).argmin(-1)
    assert torch.equal(model.encode(images_N3HW), codes_NT) and len(codes_NT.unique()) > 3

    any_NT = torch.randint(32, (3, 64), generator=torch.Generator().manual_seed(0))
    x = table_VC[any_NT].view(3, 8, 8, 6).permute(0, 3, 1, 2)
    x = their_stack(their_conv(x, w, "_decoder._conv_1", padding=1), w, "_decoder")
    x = their_conv(x, w, "_decoder._conv_trans_1", **half).relu()
    y = their_conv(x, w, "_decoder._conv_trans_2", **half)
    decoded_N3HW = model.decode(any_NT)
    torch.testing.assert_close(decoded_N3HW, (y + 0.5).clamp(0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["vq16", "baseline_vqvae"])
def test_tokenizers_are_imported_strictly(kind, tmp_path):
    shapes = vq16(**TINY) if kind == "vq16" else baseline_vqvae(**SMALL)
    weights = draw(shapes)
    for name in list(weights)[:: 20 if kind == "vq16" else 1]:
        less = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(InputError, match=name):
            imported(less, tmp_path / "w.pt")
    with pytest.raises(InputError, match="unexpected: odd"):
        imported(weights | {"odd": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="is a tokenizer itself"):
        imported(weights, tmp_path / "w.pt", tokenizer=tmp_path / "other.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_tokenizers_of_before_there_were_several_are_still_read(world, tmp_path):
    found = load_checkpoint(world.tokenizer, "tokenizer", "")
    assert found["header"].pop("model") == "vqvae"
    save_checkpoint(tmp_path / "old.pth", found.pop("header"), **found)
    codes_NT = torch.randint(32, (2, 64))
    old, new = load_tokenizer(tmp_path / "old.pth")[0], load_tokenizer(world.tokenizer)[0]
    assert torch.equal(old.decode(codes_NT), new.decode(codes_NT))
    odd = {"kind": "tokenizer", "model": "odd", "inputs": {}}
    save_checkpoint(tmp_path / "odd.pth", odd, model_config={}, model={})
    with pytest.raises(InputError, match="no tokenizer that is whole"):
        load_tokenizer(tmp_path / "odd.pth")


@pytest.mark.parametrize("kind", ["vq16", "baseline_vqvae"])
def test_an_imported_pair_goes_through_the_stages(kind, world, tmp_path):
    """Codes of our images by the imported tokenizer; samples and likelihoods of its generator."""
    shapes = vq16(**TINY) if kind == "vq16" else baseline_vqvae(**SMALL)
    grid = {"grid": 8} if kind == "vq16" else {}
    path = imported(draw(shapes, scale=0.1), tmp_path / "tokenizer.pt", **grid)
    extract = script("tools/extract_latent_codes.py")
    extract.main(extract.ExtractConfig(path, world.data, tmp_path / "codes", device="cpu"))
    codes = load_codes(tmp_path / "codes", "test")
    assert codes.codes_NAT.shape == (40, 2, 64) and codes.header["codebook_size"] == 32
    named = {"grid": 8, "heads": 2, "tokenizer": path, "dataset": "shapes"}
    generator = imported(draw(gpt(1, 16, 256, 32, 10)), tmp_path / "generator.pt", **named)
    own = {"tokenizer": path, "codes": tmp_path / "codes"}
    found = stage.main(eval_config(world, generator, tmp_path / "out", **own))
    assert found["bits_per_image"]["raster"]["mean"] > 200
    images_NHWC = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert images_NHWC.shape == (10, 32, 32, 3) and images_NHWC.std() > 1
