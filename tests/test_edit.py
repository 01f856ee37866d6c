"""tools/edit.py: every task end to end, what is kept of an image, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import script
from PIL import Image

from metrics.likelihood import log_p_given_all
from models.artifacts import read_array
from models.checkpoint import load_generator
from models.command import InputError
from models.data import load_split
from models.tokenizer import area, decode_codes, encode_images, load_tokenizer, read_mask

tool = script("tools/edit.py")


@pytest.fixture
def config(cheap):
    """An edit of the third test image by an untrained method; `changes` override it."""

    def make(task: str, method: str = "randar", **changes):
        few = {"image": "3", "count": 3, "cfg_scale": 1.5}
        return cheap(tool.EditConfig, method, "raster", task=task, **few | changes)

    return make


def codes_of(cfg) -> np.ndarray:
    return read_array(cfg.out / cfg.task / "codes.npy", "codes", "")[0]


@pytest.fixture
def own(world):
    """The third test image, its codes (8, 8) and the tokenizer."""
    tokenizer, _ = load_tokenizer(world.tokenizer)
    image_HWC = load_split(world.data, "test").images_NHWC[3]
    return image_HWC, encode_images(tokenizer, image_HWC[None]).view(8, 8).numpy(), tokenizer


@pytest.mark.parametrize("method", ["randar", "rar", "arpg"])
def test_the_cells_outside_of_the_mask_are_kept(config, own, method):
    cfg = config("inpaint", method, mask="left")
    tool.main(cfg)
    codes_Nhw = codes_of(cfg)
    assert (codes_Nhw[:, :, 4:] == own[1][:, 4:]).all()
    assert (codes_Nhw[:, :, :4] != own[1][:, :4]).any() and (codes_Nhw[0] != codes_Nhw[1]).any()
    for name in ("edit.png", "decoding.gif"):
        assert (cfg.out / "inpaint" / name).stat().st_size > 1000
    with Image.open(cfg.out / "inpaint/decoding.gif") as film:
        assert film.n_frames > 16


def test_a_mask_is_white_where_cells_are_drawn(tmp_path, config, own):
    for side in (8, 32):
        white = np.zeros((side, side), np.uint8)
        white[side // 8 : side // 4, 0] = 255  # of cell (1, 0), one pixel or a column of them
        Image.fromarray(white).save(tmp_path / "mask.png")
        open_hw = read_mask(tmp_path / "mask.png", 8, 32)
        assert open_hw.nonzero().tolist() == [[1, 0]]
    cfg = config("inpaint", mask=tmp_path / "mask.png", count=64)
    tool.main(cfg)
    changed = (codes_of(cfg) != own[1]).any(0)
    assert np.argwhere(changed).tolist() == [[1, 0]]


def test_areas_are_halves_the_middle_and_a_share():
    row_T, column_T = torch.arange(64) // 8, torch.arange(64) % 8
    halves = {"top": row_T < 4, "bottom": row_T > 3, "left": column_T < 4, "right": column_T > 3}
    middle_T = ((row_T - 3.5).abs() < 2) & ((column_T - 3.5).abs() < 2)
    for name, open_T in (halves | {"centre": middle_T}).items():
        assert torch.equal(area(name, 8, 32, share=0.5, seed=0), open_T), name
    one_T, other_T = (area("random", 8, 32, share=0.25, seed=seed) for seed in (0, 1))
    assert one_T.sum() == other_T.sum() == 16 and not torch.equal(one_T, other_T)


def test_another_class_redraws_a_share_and_variations_what_the_model_is_least_sure_of(config, own):
    cfg = config("reclass", label="star", share=0.25)
    tool.main(cfg)
    as_star_Nhw = codes_of(cfg)
    assert 48 <= (as_star_Nhw == own[1]).all(0).sum() < 60
    tool.main(replace(cfg, label=None))
    assert (codes_of(cfg) != as_star_Nhw).any()
    cfg = config("variations", share=0.25)
    tool.main(cfg)
    model, codes_T = load_generator(cfg.checkpoint).model, torch.from_numpy(own[1]).flatten()
    label = int(load_split(cfg.data, "test").labels_N[3])
    log_p_T = log_p_given_all(model, codes_T, label)
    changed_T = torch.from_numpy((codes_of(cfg) != own[1]).any(0)).flatten()
    assert changed_T.any() and log_p_T[changed_T].max() <= log_p_T.sort().values[15]
    # by hand: the code of a cell that is visited last
    order_1T = torch.tensor([[*range(10), *range(11, 64), 10]])
    logits_V = model(codes_T[None], torch.tensor([label]), order_1T)[0, -1]
    assert logits_V.log_softmax(-1)[codes_T[10]].item() == pytest.approx(log_p_T[10].item())


def test_a_canvas_holds_the_image_and_every_cell_of_it_is_drawn(config, own):
    for canvas, overlap in (((8, 16), 4), ((11, 9), 2), ((8, 8), 7)):
        cfg = config("outpaint", canvas=canvas, overlap=overlap, count=2)
        images_NHWC = tool.main(cfg)
        codes_Nhw = codes_of(cfg)
        assert codes_Nhw.shape == (2, *canvas) and codes_Nhw.min() >= 0
        assert images_NHWC.shape == (2, 4 * canvas[0], 4 * canvas[1], 3)
        top, left = ((length - 8) // 2 for length in canvas)
        assert (codes_Nhw[:, top : top + 8, left : left + 8] == own[1]).all()
    assert (images_NHWC == decode_codes(own[2], torch.from_numpy(own[1]).view(1, 64))).all()


def test_pasted_pixels_are_those_of_the_image(config, own):
    images_NHWC = tool.main(config("inpaint", mask="left", paste=True))
    assert (images_NHWC[:, :, 20:] == own[0][:, 20:]).all()
    assert not (images_NHWC[:, :, :12] == own[0][:, :12]).all()


def test_an_image_file_needs_a_class(tmp_path, config, own):
    path = tmp_path / "own.png"
    Image.fromarray(own[0]).resize((70, 40)).save(path)
    cfg = config("inpaint", image=str(path), label="4")
    assert tool.main(cfg).shape == (3, 32, 32, 3)
    for changes, told in (
        ({"label": None}, "expected --label of disc"),
        ({"label": "dog"}, "expected --label of disc"),
        ({"image": str(tmp_path / "none.png")}, "none.png: expected an 8-bit RGB still"),
        ({"image": "40"}, "expected --image in 0..39"),
        ({"mask": path}, "own.png: expected centre, .* 8x8 or 32x32 pixels: it is 70x40"),
        ({"mask": cfg.checkpoint}, "last.pth: expected centre"),
        ({"task": "outpaint", "canvas": (7, 16)}, "expected --canvas of at least 8"),
        ({"task": "outpaint", "overlap": 8}, "--overlap below 8"),
    ):
        with pytest.raises(InputError, match=told):
            tool.main(replace(cfg, **changes))
    kept = cfg.out / "inpaint/edit.png"
    content = kept.read_bytes()
    with pytest.raises(InputError, match="edit.png would be written over"):
        tool.main(replace(cfg, image=str(kept)))
    assert kept.read_bytes() == content
    for method in ("gpt", "par"):
        with pytest.raises(InputError, match="order only"):
            tool.main(config("inpaint", method))
