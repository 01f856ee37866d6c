"""Corrupted images: how much they change, what is known of each, and CIFAR-10-C's files."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import script
from torchvision.transforms.v2 import functional

from metrics import corruptions
from metrics.corruptions import CORRUPTIONS, OFFICIAL, SEVERITIES, corrupt, drawn, official
from models.command import InputError
from models.tokenizer import to_float

make_shapes = script("data/shapes.py").make_shapes

SHAPES_NHWC = make_shapes(20, seed=0)[0]
DRAWN = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "haze", "elastic"}
"""those with chance in them"""


def grey(value: int, count: int = 8) -> np.ndarray:
    return np.full((count, 32, 32, 3), value, np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_change_more_with_severity_and_alike_with_the_seed(name):
    before_NHWC = SHAPES_NHWC.copy()
    found = [SHAPES_NHWC] + [corrupt(SHAPES_NHWC, name, s, seed=1) for s in SEVERITIES]
    for corrupted_NHWC in found:
        assert corrupted_NHWC.dtype == np.uint8 and corrupted_NHWC.shape == before_NHWC.shape
    assert np.array_equal(SHAPES_NHWC, before_NHWC)
    errors = [((x_NHWC - before_NHWC.astype(float)) ** 2).mean() for x_NHWC in found]
    assert all(a < b for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.15 * 255**2  # still an image
    assert np.array_equal(found[3], drawn(SHAPES_NHWC, seed=1)[name](3))
    same = np.array_equal(found[3], corrupt(SHAPES_NHWC, name, 3, seed=2))
    assert same == (name not in DRAWN)


def test_there_are_fifteen_and_no_two_draw_alike(monkeypatch):
    assert len(CORRUPTIONS) == len(OFFICIAL) == len(SEVERITIES) * 3 == 15
    images = set()
    for name in CORRUPTIONS:
        noise = lambda x_N3HW, _, generator: torch.rand(x_N3HW.shape, generator=generator)  # noqa: E731
        monkeypatch.setitem(CORRUPTIONS, name, (noise, range(5)))
        found = {corrupt(SHAPES_NHWC[:1], name, severity).tobytes() for severity in SEVERITIES}
        assert len(found) == 1  # severities differ in amount alone
        images |= found
    assert len(images) == 15


def test_known_values():
    assert (corrupt(grey(200), "darkness", 3) == 100).all()
    assert (corrupt(grey(100), "brightness", 2) == 120).all()
    assert (corrupt(grey(230), "brightness", 5) == 255).all()  # clipped, not wrapped
    for name in ("gaussian_blur", "motion_blur", "zoom_blur", "elastic", "pixelate", "contrast"):
        assert abs(corrupt(grey(77), name, 5).astype(int) - 77).max() <= 1, name
    faded_NHWC = corrupt(SHAPES_NHWC, "saturation", 5)
    assert (faded_NHWC.max(-1) == faded_NHWC.min(-1)).all()
    assert set(np.unique(corrupt(SHAPES_NHWC, "posterize", 5))) == {0, 64, 128, 191}
    spoilt_NHWC = corrupt(grey(100, 50), "impulse_noise", 5)
    assert set(np.unique(spoilt_NHWC)) == {0, 100, 255}
    for value in (0, 255):
        assert (spoilt_NHWC == value).mean() == pytest.approx(0.035, abs=0.002)
    assert corrupt(grey(128, 50), "gaussian_noise", 5).std() / 255 == pytest.approx(0.1, rel=0.02)
    # 50 photons in white: at half of it 25, of standard deviation 5
    assert corrupt(grey(128, 50), "shot_noise", 5).std() / 255 == pytest.approx(0.1, rel=0.02)
    hazy_NHWC = corrupt(grey(0, 50), "haze", 5) / 255
    assert 0.27 <= hazy_NHWC.min() < 0.29 and 0.52 < hazy_NHWC.max() <= 0.541  # 0.9 * 0.6 * 1/2..1


def looked_at(images_N3HW: torch.Tensor, scale: float, shift_N2: torch.Tensor) -> torch.Tensor:
    """Return what a window of this size, in images, sees, moved by pixels (right, down)."""
    theta_N23 = torch.zeros(len(images_N3HW), 2, 3)
    theta_N23[:, 0, 0] = theta_N23[:, 1, 1] = scale
    theta_N23[:, :, 2] = shift_N2 / 16
    grid_NHW2 = F.affine_grid(theta_N23, images_N3HW.shape, align_corners=False)
    return F.grid_sample(images_N3HW, grid_NHW2, padding_mode="reflection", align_corners=False)


@pytest.mark.parametrize("amount", [1.0, 2.5, 7.0])
def test_blurs_are_means_of_resampled_images(amount):
    images_N3HW, chance = to_float(SHAPES_NHWC).contiguous(), torch.Generator()
    angle_N = (torch.rand(20, generator=chance.manual_seed(0)) - 0.5) * math.pi / 2
    along_N2 = torch.stack((angle_N.cos(), angle_N.sin()), 1) * amount
    moved = [looked_at(images_N3HW, 1, p * along_N2) for p in torch.linspace(-0.5, 0.5, 15)]
    blurred_N3HW = corruptions.motion_blur(images_N3HW, amount, chance.manual_seed(0))
    torch.testing.assert_close(blurred_N3HW, torch.stack(moved).mean(0), rtol=0, atol=1e-5)
    scales = torch.linspace(1, 1 + amount / 10, 11).reciprocal()
    zoomed = [looked_at(images_N3HW, scale, torch.zeros(20, 2)) for scale in scales]
    blurred_N3HW = corruptions.zoom_blur(images_N3HW, 1 + amount / 10, chance)
    torch.testing.assert_close(blurred_N3HW, torch.stack(zoomed).mean(0), rtol=0, atol=1e-5)
    blurred_N3HW = corruptions.gaussian_blur(images_N3HW, amount, chance)
    expected_N3HW = functional.gaussian_blur(images_N3HW, [9, 9], [amount, amount])
    torch.testing.assert_close(blurred_N3HW, expected_N3HW, rtol=0, atol=1e-5)
    small_N3hw = F.interpolate(images_N3HW, (20, 20), mode="area")
    expected_N3HW = F.interpolate(small_N3hw, (32, 32), mode="area")
    small_N3HW = corruptions.pixelate(images_N3HW, 20, chance)
    torch.testing.assert_close(small_N3HW, expected_N3HW, rtol=0, atol=1e-5)


COUNT = 6
LABELS = np.array([0, 1, 1, 0, 2, 1])
IMAGES = np.random.default_rng(0).integers(20, 230, (COUNT, 32, 32, 3)).astype(np.uint8)
ROWS = np.array([4, 0, 3, 5, 1, 2])
"""which of the test images, as stage 1 sorts them, each row of the official files shows"""


@pytest.fixture
def folder(tmp_path):
    """A CIFAR-10-C of six test images: a pixel says the corruption, the severity and the image."""
    noise_NHWC = np.random.default_rng(1).integers(-17, 18, (COUNT, 32, 32, 3))  # its mildest
    for i, name in enumerate(OFFICIAL):
        images_NHWC = np.zeros((5 * COUNT, 32, 32, 3), np.uint8)
        images_NHWC[:COUNT] = IMAGES[ROWS] + noise_NHWC
        images_NHWC[:, 0, 0, 0] = i
        images_NHWC[:, 0, 0, 1] = np.repeat(SEVERITIES, COUNT)
        images_NHWC[:, 0, 0, 2] = np.tile(ROWS, 5)
        np.save(tmp_path / f"{name}.npy", images_NHWC)
    np.save(tmp_path / "labels.npy", np.tile(LABELS[ROWS], 5).astype(np.uint8))
    np.save(tmp_path / "speckle_noise.npy", np.zeros(3))  # not one of the fifteen
    return tmp_path


def test_the_official_files_are_read_by_severity_and_image_whatever_their_row_order(folder):
    rows_M = np.array([1, 3, 5])
    found = official(folder, IMAGES, LABELS, rows_M)
    assert tuple(found) == OFFICIAL
    for i, make in enumerate(found.values()):
        for severity in SEVERITIES:
            images_NHWC = make(severity)
            assert images_NHWC.shape == (3, 32, 32, 3) and images_NHWC.dtype == np.uint8
            assert images_NHWC[:, 0, 0].tolist() == [[i, severity, row] for row in rows_M]


def test_a_folder_that_is_no_cifar10_c_is_refused_in_one_line(folder):
    def refused(message: str, where=folder, images_NHWC=IMAGES, labels_N=LABELS) -> None:
        with pytest.raises(InputError, match=message) as error:
            official(where, images_NHWC, labels_N, np.arange(2))
        assert "\n" not in str(error.value)

    refused("expected CIFAR-10-C at .*nowhere", folder / "nowhere")
    refused("of other test images", labels_N=np.arange(COUNT))
    refused("of other test images", images_NHWC=IMAGES[[0] * COUNT])
    refused(r"expected uint8 \(10, 32, 32, 3\)", labels_N=LABELS[:2])
    np.save(folder / "labels.npy", np.zeros(7, np.uint8))
    refused(r"labels.npy: expected uint8 \(30,\)")
    (folder / "labels.npy").unlink()
    refused("labels.npy, found nothing")
    for array in (np.zeros((30, 32, 32), np.uint8), np.zeros((30, 32, 32, 3), np.float32)):
        np.save(folder / "fog.npy", array)
        refused("fog.npy: expected uint8")
    for torn in ((folder / "fog.npy").read_bytes()[:-1000], b"", b"no array at all"):
        (folder / "fog.npy").write_bytes(torn)
        refused("fog.npy is torn")
