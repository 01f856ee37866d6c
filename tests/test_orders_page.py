"""The page of orders: a picture of each, and animations with a frame for every network call."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from helpers import script
from models.pictures import order_figure
from PIL import Image

from models.artifacts import header
from models.checkpoint import save_generator
from models.errors import InputError
from models.gallery import TITLE, stacked_frames
from models.methods import build
from models.orders import SCANS, scan
from models.tokenizer import load_tokenizer
from models.transformer import ModelConfig

stage = script("tools/orders.py")


@pytest.mark.parametrize(("method", "frames"), [("gpt", [65]), ("par", [20]), ("randar", [65, 8])])
def test_an_animation_has_a_frame_for_every_call(world, tmp_path, method, frames):
    torch.manual_seed(0)
    model = build(method, ModelConfig(codes=32, layers=1, width=16, heads=2))
    order = "random" if model.any_order else model.config.scan
    inputs = {"tokenizer": load_tokenizer(world.tokenizer)[1]["sha256"]}
    head = header("generator", "tests", {"order": order}, inputs) | {"method": method}
    save_generator(tmp_path / "model.pth", head, model)
    cfg = stage.OrdersConfig(
        checkpoints=(tmp_path / "model.pth",),
        tokenizer=world.tokenizer,
        steps=(64, 7),
        out=tmp_path / "out",
    )
    content = stage.main(cfg).read_text()
    found = []
    for packed in re.findall(r"data:image/gif;base64,([^\"]*)", content):
        with Image.open(io.BytesIO(base64.b64decode(packed))) as moving:
            found.append(moving.n_frames)
    assert found == frames
    assert all(f"{count - 1} steps" in content for count in frames)
    assert (tmp_path / "out/orders.png").exists()
    with Image.open(tmp_path / "out/decoding.gif") as together:
        assert together.n_frames == max(frames)


def test_animations_together_start_together_and_wait_for_each_other():
    short, long = ([np.full((4, 6, 3), k, np.uint8) for k in range(count)] for count in (2, 4))
    frames = stacked_frames([("short", short), ("long", long)], scale=3)
    assert [frame.shape for frame in frames] == [(2 * (TITLE + 12), 18, 3)] * 4
    lower = TITLE + 12 + TITLE
    assert [frame[TITLE, 0, 0] for frame in frames] == [0, 1, 1, 1]
    assert [frame[lower, 0, 0] for frame in frames] == [0, 1, 2, 3]
    assert len({frame[:TITLE].tobytes() for frame in frames}) == 1


def test_the_orders_are_drawn_as_ranks():
    drawn = order_figure({name: scan(name, 4).numpy() for name in SCANS[:5]}, 4).axes
    assert [axes.get_title() for axes in drawn] == [*SCANS[:5], "", "", ""]
    for name, axes in zip(SCANS[:5], drawn, strict=False):
        (image,) = axes.images
        assert (image.get_array() == scan(name, 4).argsort().view(4, 4).numpy()).all()


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(InputError, match="steps"):
        stage.main(stage.OrdersConfig(steps=(), out=tmp_path))
