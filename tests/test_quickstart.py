"""The quickstart: every stage as a command, and one page that holds all it shows."""

import base64
import io
import json
import re

import pytest
from helpers import script
from PIL import Image

from models.errors import InputError

stage = script("tools/quickstart.py")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a quickstart of two steps a training, in raster and random order."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    stage.main(stage.QuickstartConfig(out=out, effort=0.001, images=200))
    return out


def test_the_page_is_one_file_with_every_number(finished):
    page = (finished / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 8 and all(source.startswith("data:image/") for source in sources)
    assert "<script" not in page
    for order in ("raster", "random"):
        found = json.loads((finished / f"samples_{order}/metrics.json").read_text())
        for name, value in found["samples"].items():
            assert name in page and f"{value:.3f}" in page
            assert f"{found['control'][name]:.3f}" in page
        for bits in found["bits_per_image"].values():
            assert f"{bits['mean']:.1f}" in page
        assert f"--order={order}" in page


def test_its_numbers_can_be_kept(finished):
    found = json.loads((finished / "quickstart.json").read_text())
    assert list(found["orders"]) == ["raster", "random"] and found["minutes"] > 0
    for order, one in found["orders"].items():
        measured = json.loads((finished / f"samples_{order}/metrics.json").read_text())
        assert one == {"num_samples": 500} | measured["samples"]
    assert len(found["seconds"]) == 8 and sum(found["seconds"].values()) > 0


def test_the_animations_uncover_the_image_in_their_order(finished):
    page = (finished / "index.html").read_text()
    gifs = re.findall(r"data:image/gif;base64,([^\"]*)", page)
    assert len(gifs) == 2
    for packed in gifs:
        with Image.open(io.BytesIO(base64.b64decode(packed))) as moving:
            assert moving.n_frames == 65


def test_a_stage_that_fails_is_named_with_its_message(tmp_path):
    cfg = stage.QuickstartConfig(dataset="cifar10", source=tmp_path / "nowhere", out=tmp_path / "o")
    with pytest.raises(InputError, match="stage '1 data' failed: .*nowhere"):
        stage.main(cfg)


@pytest.mark.parametrize("changes", [{"effort": -1.0}, {"source": "somewhere"}])
def test_options_that_make_no_sense_are_refused(tmp_path, changes):
    with pytest.raises(InputError):
        stage.main(stage.QuickstartConfig(out=tmp_path, **changes))


def test_methods_of_one_order_show_one(tmp_path):
    assert stage.QuickstartConfig(method="gpt", out=tmp_path).orders == ("raster",)
    assert stage.QuickstartConfig(method="par", out=tmp_path).orders == ("regions",)
    assert stage.QuickstartConfig(method="rar", out=tmp_path).orders == ("raster", "random")
