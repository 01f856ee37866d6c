"""Numbers that can be trusted: known answers, names that say what with, features that are kept."""

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
from helpers import Evil, script
from tiny_extractor import write_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from metrics.extractor import Classifier, classifier_extractor, extractor_of, load_classifier
from metrics.fidelity import (
    FeatureExtractor,
    download_inception,
    features_of,
    fidelity,
    inception_extractor,
)
from models.command import InputError
from models.data import CLASSES

make_shapes = script("data/shapes.py").make_shapes


def measure(samples_NHWC, reference_NHWC, extractor, keep=False):
    """What the features of both give, those of the reference kept if asked for."""
    samples = features_of(samples_NHWC, extractor, verbose=False)
    reference = features_of(reference_NHWC, extractor, keep=keep, verbose=False)
    return fidelity(samples, reference, extractor)


@pytest.fixture
def extractor(tmp_path) -> FeatureExtractor:
    write_extractor(tmp_path / "small.pth")
    return classifier_extractor(tmp_path / "small.pth")


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
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
        if name.endswith(("bn.weight", "running_var")):
            torch.nn.init.uniform_(value, 0.5, 1.5)
        if name.endswith("running_mean"):
            torch.nn.init.normal_(value, std=0.2)
    state = {name: value.half() for name, value in network.state_dict().items()}
    torch.save(state, folder / "whole.pth")
    for missing in ("fc", "Mixed_5b"):
        broken = {
            name: torch.full_like(value, torch.nan) if name.startswith(missing) else value
            for name, value in state.items()
        }
        torch.save(broken, folder / f"no_{missing}.pth")
    return folder


def test_a_set_is_at_distance_zero_from_itself_and_noise_moves_it_away(extractor, images):
    noise = np.random.default_rng(0).normal(0, 1, images.shape)
    noisy = [(images + sd * noise).clip(0, 255).round().astype(np.uint8) for sd in (0, 4, 16, 64)]
    distances = [measure(x_NHWC, images, extractor)["FD_c10"] for x_NHWC in noisy]
    assert abs(distances[0]) < 1e-6 * distances[1]
    assert distances == sorted(distances)


def linear_extractor(matrix_PF: torch.Tensor) -> FeatureExtractor:
    """Pixels times a matrix, so that the features of Gaussian pixels are Gaussian."""

    def run(images_B3HW):
        return {"product": images_B3HW.flatten(1).double() @ matrix_PF.double()}

    return FeatureExtractor(run, "", "product", None, "_linear")


def gaussian_images(mean: float, sd: float, seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).normal(mean, sd, (500, 2, 2, 3))
    return pixels.clip(0, 255).round().astype(np.uint8)


def test_gaussians_are_at_the_frechet_distance():
    a, b = gaussian_images(100, 10, seed=0), gaussian_images(110, 20, seed=1)
    mix_PF = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    one_N5, other_N5 = (
        x.transpose(0, 3, 1, 2).reshape(500, 12) @ mix_PF.double().numpy() for x in (a, b)
    )
    one_55, other_55 = np.cov(one_N5.T), np.cov(other_N5.T)
    apart_5 = one_N5.mean(0) - other_N5.mean(0)
    # |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), the trace of the root by eigenvalues
    roots_5 = np.sqrt(np.linalg.eigvals(one_55 @ other_55).real)
    expected = (apart_5**2).sum() + np.trace(one_55 + other_55) - 2 * roots_5.sum()
    found = measure(a, b, linear_extractor(mix_PF))
    assert found["FD_linear"] == pytest.approx(expected, rel=1e-4)


def test_precision_is_about_samples_and_recall_about_the_reference():
    pixels = linear_extractor(torch.eye(12))
    narrow, wide = gaussian_images(128, 3, seed=0), gaussian_images(128, 30, seed=1)
    found = measure(narrow, wide, pixels)
    assert found["precision_linear"] > 0.9 and found["recall_linear"] < 0.1


def test_copies_of_the_reference_are_nearest_to_it():
    pixels, train = linear_extractor(torch.eye(12)), gaussian_images(128, 30, seed=0)
    fresh = np.concatenate([gaussian_images(128, 30, seed) for seed in (1, 2)])
    a, b = (x.transpose(0, 3, 1, 2).reshape(len(x), -1).astype(float) for x in (fresh, train))
    expected = np.linalg.norm(a[:, None] - b, axis=2).min(1).mean()
    assert measure(fresh, train, pixels)["nearest_linear"] == pytest.approx(expected, rel=1e-4)
    assert measure(train[:300], train, pixels)["nearest_linear"] < 0.01 * expected


def test_kept_features_are_of_this_content_and_these_weights(images, tmp_path, monkeypatch):
    samples, folder = images[:100].copy(), tmp_path / "features"
    monkeypatch.setattr("metrics.fidelity.FEATURES", folder)
    write_extractor(tmp_path / "small.pth")
    first = classifier_extractor(tmp_path / "small.pth")
    before = measure(samples, images, first, keep=True)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(kept) == 4  # features and logits of the reference, each with its header
    with monkeypatch.context() as patched:  # whoever looks at an image again fails
        patched.setattr(Classifier, "forward", None)
        features_of(images.copy(), first, keep=True)
    write_extractor(tmp_path / "small.pth", seed=1)
    second = classifier_extractor(tmp_path / "small.pth")
    assert measure(samples, images, second, keep=True) != before
    for path in folder.iterdir():  # damaged ones are made anew, and nothing in them is run
        path.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert measure(samples, images, first, keep=True) == before
    assert kept.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()
    measure(samples, images, second, keep=True)
    stem = next(iter(kept)).rsplit("-", 1)[0]
    other = next(path for path in folder.iterdir() if not path.name.startswith(stem))
    for path in folder.glob(f"{stem}-*"):  # whole, but of other weights under this name
        path.write_bytes(
            (folder / path.name.replace(stem, other.name.rsplit("-", 1)[0])).read_bytes()
        )
    assert measure(samples, images, first, keep=True) == before


def test_other_arrays_are_refused(extractor, images):
    for bad in (
        np.zeros((20, 32, 32, 3), np.float32),
        np.zeros((20, 3, 32, 32), np.uint8),
        np.zeros((20, 32, 32), np.uint8),
        np.zeros((9, 32, 32, 3), np.uint8),  # no Inception Score in 10 splits
    ):
        for pair in ((bad, images), (images, bad)):
            with pytest.raises(InputError, match=r"expected uint8 \(N >= 10, H, W, 3\)"):
                measure(*pair, extractor)


def test_partial_inception_weights_give_no_fid(inception, images):
    partial_one = inception_extractor(inception / "no_fc.pth", "768")
    found = measure(images[:10], images[10:20], partial_one)
    assert found.keys() == {"FID768", "KID768", "precision768", "recall768", "nearest768"}
    assert np.isfinite(list(found.values())).all() and found["FID768"] > 0
    assert inception_extractor(inception / "no_Mixed_5b.pth", "192").layer == "192"
    for name, layer, message in (
        ("no_fc", "2048", "no finite weights for the 2048-d layer.*768"),
        ("no_Mixed_5b", "768", "no finite weights for the 768-d layer"),
    ):
        with pytest.raises(InputError, match=message):
            inception_extractor(inception / f"{name}.pth", layer)


def test_only_the_whole_inception_with_50_000_samples_says_fid(inception):
    whole = inception_extractor(inception / "whole.pth")
    assert whole.names(50_000) == ["FID", "KID", "precision", "recall", "nearest", "IS"]
    names = {10_000: "FID-10k", 49_999: "FID-49999", 60_000: "FID"}
    assert {count: whole.frechet_name(count) for count in names} == names
    assert inception_extractor(inception / "whole.pth", "768").frechet_name(50_000) == "FID768"


def test_the_network_is_torch_fidelitys(inception, images):
    layers = ["768", "2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("theirs", layers, str(inception / "whole.pth"))
    images_N3HW = torch.from_numpy(images[:20]).permute(0, 3, 1, 2)
    theirs = dict(zip(layers, theirs(images_N3HW), strict=True))
    ours, at_768 = (inception_extractor(inception / "whole.pth", layer) for layer in layers[1::-1])
    found = features_of(images[:20], ours) | features_of(images[:20], at_768)
    for layer in layers:
        scale = theirs[layer].abs().mean().item()
        torch.testing.assert_close(found[layer], theirs[layer], rtol=1e-5, atol=1e-5 * scale)
    distances = [
        fidelity({"768": at[:10]}, {"768": at[10:]}, at_768, frechet_only=True)["FID768"]
        for at in (found["768"], theirs["768"])
    ]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("read", [inception_extractor, classifier_extractor, load_classifier])
def test_a_pickle_that_runs_code_is_refused(tmp_path, read, zipped):
    mark, weights = tmp_path / "it ran", tmp_path / "weights.pth"
    contents = {"fc.weight": torch.zeros(1), "header": Evil(mark)}
    torch.save(contents, weights, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError):
        read(weights)
    assert not mark.exists()
    with pytest.raises(InputError, match="nowhere.pth"):
        read(tmp_path / "nowhere.pth")
    torch.load(weights, weights_only=False)
    assert mark.exists()  # so it was dangerous


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


@pytest.mark.parametrize("answer", [None, b"nonsense\r\n\r\n"])
def test_no_inception_is_no_error(hub, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/weights-00000000.pth"
        if answer:
            threading.Thread(target=lambda: server.accept()[0].sendall(answer), daemon=True).start()
        start = time.monotonic()
        assert download_inception(url, timeout=0.5) is None
        assert time.monotonic() - start < 10
    assert download_inception(url, timeout=0.5) is None  # nobody listens
    assert list(hub.iterdir()) == []


def test_a_classifier_of_other_classes_does_not_judge(extractor_file):
    """A folder of one's own images may be called cifar10 too."""
    device, cifar10 = torch.device("cpu"), CLASSES["cifar10"]
    assert extractor_of("cifar10", cifar10, None, device).classes == cifar10
    assert extractor_of("cifar10", ("cat", "dog", "ship"), None, device) is None
    assert extractor_of("unheard of", cifar10, None, device) is None
    with pytest.raises(InputError, match="expected --extractor of the classes cat, dog, and"):
        extractor_of("pets", ("cat", "dog"), extractor_file, device)
