"""Numbers that can be trusted: known answers, names that say the ruler, a cache that cannot lie."""

import hashlib
import http.server
import socket
import threading
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import script
from tiny_extractor import write_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from metrics.extractor import SmallClassifier, extractor_ruler, load_extractor
from metrics.fidelity import Ruler, download_inception, fidelity, inception_ruler
from models.errors import InputError

make_shapes = script("data/shapes.py").make_shapes

measure = partial(fidelity, verbose=False)


@pytest.fixture
def ruler(tmp_path) -> Ruler:
    write_extractor(tmp_path / "small.pth")
    return extractor_ruler(tmp_path / "small.pth")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return make_shapes(300, seed=0)[0]


@pytest.fixture(scope="session")
def inception(tmp_path_factory) -> Path:
    """Return a folder with Inceptions of random weights: whole.pth, and two that end in NaN."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "whole.pth")
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], str(folder / "whole.pth"))
    for name, weight in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    state = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(state, folder / "whole.pth")
    for missing in ("fc", "Mixed_5b"):
        broken = {
            name: torch.full_like(value, torch.nan) if name.startswith(missing) else value
            for name, value in state.items()
        }
        torch.save(broken, folder / f"no_{missing}.pth")
    return folder


def test_a_set_is_at_distance_zero_from_itself_and_noise_moves_it_away(ruler, images, tmp_path):
    distances = []
    for sd in (0, 4, 16, 64):
        noise = np.random.default_rng(0).normal(0, sd, images.shape)
        noisy = (images + noise).clip(0, 255).round().astype(np.uint8)
        found = measure(noisy, images, ruler, tmp_path / "cache")
        distances.append(found["FD_c10"])
    assert abs(distances[0]) < 1e-6 * distances[1]
    assert distances == sorted(distances)


class Linear(FeatureExtractorBase):
    """Pixels times a matrix, so that the features of Gaussian pixels are Gaussian."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.matrix_PF = torch.load(kwargs["feature_extractor_weights_path"], weights_only=True)

    def forward(self, images_N3HW):
        return (images_N3HW.flatten(1).double() @ self.matrix_PF,)

    @staticmethod
    def get_provided_features_list():
        return ("product",)


torch_fidelity.register_feature_extractor("linear-for-tests", Linear)


def linear_ruler(path: Path, matrix_PF: torch.Tensor) -> Ruler:
    torch.save(matrix_PF.double(), path)
    keys = {"frechet_inception_distance": "FD", "precision": "precision", "recall": "recall"}
    return Ruler("linear-for-tests", "product", None, path, keys)


def gaussian_images(mean: float, sd: float, seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).normal(mean, sd, (500, 2, 2, 3))
    return pixels.clip(0, 255).round().astype(np.uint8)


def frechet(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), the root by an eigenbasis of S1."""
    means, covariances = [], []
    for x_NF in (a_NF, b_NF):
        means.append(x_NF.sum(0) / len(x_NF))
        centred_NF = x_NF - means[-1]
        covariances.append(centred_NF.T @ centred_NF / (len(x_NF) - 1))
    values_F, basis_FF = np.linalg.eigh(covariances[0])
    root_FF = basis_FF * np.sqrt(values_F) @ basis_FF.T
    cross_F = np.linalg.eigvalsh(root_FF @ covariances[1] @ root_FF)
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * np.sqrt(cross_F).sum())


def test_gaussians_are_at_the_frechet_distance(tmp_path):
    a, b = gaussian_images(100, 10, seed=0), gaussian_images(110, 20, seed=1)
    pixels = linear_ruler(tmp_path / "pixels.pth", torch.eye(12))
    found = measure(a, b, pixels, tmp_path / "cache")
    assert found["FD"] == pytest.approx(12 * (10**2 + 10**2), rel=0.1)  # the populations'

    mix_PF = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    mixed = linear_ruler(tmp_path / "mixed.pth", mix_PF)
    a_NP, b_NP = (x.transpose(0, 3, 1, 2).reshape(500, 12) for x in (a, b))
    expected = frechet(a_NP @ mix_PF.double().numpy(), b_NP @ mix_PF.double().numpy())
    found = measure(a, b, mixed, tmp_path / "cache")
    assert found["FD"] == pytest.approx(expected, rel=1e-9)


def test_precision_is_about_samples_and_recall_about_the_reference(tmp_path):
    pixels = linear_ruler(tmp_path / "pixels.pth", torch.eye(12))
    narrow, wide = gaussian_images(128, 3, seed=0), gaussian_images(128, 30, seed=1)
    found = measure(narrow, wide, pixels, tmp_path / "cache")
    assert found["precision"] > 0.9 and found["recall"] < 0.1


def test_the_cache_is_keyed_by_content(ruler, images, tmp_path, monkeypatch):
    samples, cache = images[:100].copy(), tmp_path / "cache"
    before = measure(samples, images, ruler, cache)
    with monkeypatch.context() as patched:  # whoever looks at an image again fails
        patched.setattr(SmallClassifier, "forward", None)
        assert measure(samples.copy(), images.copy(), ruler, cache) == before
    samples[:50] = 0
    assert measure(samples, images, ruler, cache)["FD_c10"] > 2 * abs(before["FD_c10"])
    write_extractor(ruler.weights, seed=1)
    assert measure(images[:100], images, ruler, cache) != before


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((20, 32, 32, 3), np.float32),
        np.zeros((20, 3, 32, 32), np.uint8),
        np.zeros((20, 32, 32), np.uint8),
        np.zeros((9, 32, 32, 3), np.uint8),  # no Inception Score in 10 splits
    ],
)
def test_other_arrays_are_refused(ruler, images, tmp_path, bad):
    for pair in ((bad, images), (images, bad)):
        with pytest.raises(InputError, match=r"expected uint8 \(N >= 10, H, W, 3\)"):
            measure(*pair, ruler, tmp_path / "cache")


def test_partial_inception_weights_give_no_fid(inception, images, tmp_path):
    with pytest.raises(InputError, match="no finite weights for the 2048-d layer.*768"):
        inception_ruler(inception / "no_fc.pth")
    ruler = inception_ruler(inception / "no_fc.pth", "768")
    found = measure(images[:10], images[10:20], ruler, tmp_path / "cache")
    assert found.keys() == {"FID768", "KID768", "precision768", "recall768"}
    assert np.isfinite(list(found.values())).all() and found["FID768"] > 0
    with pytest.raises(InputError, match="no finite weights for the 768-d layer"):
        inception_ruler(inception / "no_Mixed_5b.pth", "768")
    assert inception_ruler(inception / "no_Mixed_5b.pth", "192").layer == "192"
    with pytest.raises(InputError, match="layer 2048, 768, 192 or 64"):
        inception_ruler(inception / "whole.pth", "512")


def test_only_the_whole_inception_says_fid(inception):
    ruler = inception_ruler(inception / "whole.pth")
    names = {"FID", "KID", "precision", "recall", "IS"}
    assert set(ruler.names.values()) == names and ruler.logits_layer == "logits_unbiased"


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("read", [inception_ruler, extractor_ruler, load_extractor])
def test_a_pickle_that_runs_code_is_refused(tmp_path, read, zipped):
    mark, weights = tmp_path / "it ran", tmp_path / "weights.pth"
    contents = {"fc.weight": torch.zeros(1), "header": Payload(mark)}
    torch.save(contents, weights, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError):
        read(weights)
    assert not mark.exists()
    torch.load(weights, weights_only=False)
    assert mark.exists()  # so it was dangerous


def test_missing_weights_are_named(tmp_path):
    for read in (inception_ruler, extractor_ruler):
        with pytest.raises(InputError, match="nowhere.pth"):
            read(tmp_path / "nowhere.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return the folder that downloads go to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_inception_is_downloaded_once(hub, tmp_path):
    content = b"weights" * 1000
    good = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for name in (good, "weights-00000000.pth"):
        (tmp_path / name).write_bytes(content)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert download_inception(f"{url}/weights-00000000.pth") is None  # not that content
        assert download_inception(f"{url}/weights-11111111.pth") is None  # 404
        assert list(hub.iterdir()) == []
        assert download_inception(f"{url}/{good}") == hub / good
        server.shutdown()
    assert download_inception(f"{url}/{good}") == hub / good  # the server is gone
    assert [path.read_bytes() for path in hub.iterdir()] == [content]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("server_does", ["nothing", "nonsense", "not exist"])
def test_no_inception_is_no_error(hub, server_does):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights-00000000.pth"
        if server_does == "nonsense":
            answer = b"nonsense\r\n\r\n"
            threading.Thread(target=lambda: server.accept()[0].sendall(answer), daemon=True).start()
        if server_does == "not exist":
            server.close()
        start = time.monotonic()
        assert download_inception(url, timeout=0.5) is None
        assert time.monotonic() - start < 10
    assert list(hub.iterdir()) == []
