"""FID, IS, KID, precision and recall of uint8 images, by torch-fidelity's own functions; PSNR.

FID: Heusel et al., arXiv 1706.08500. IS: Salimans et al., arXiv 1606.03498. KID: Binkowski et al.,
arXiv 1801.01401. Precision and recall: Kynkaanniemi et al., arXiv 1904.06991 (here on the feature
extractor's own layer, not on VGG16).

A number is called FID only if it comes from the 2048-d layer of the standard Inception and from
50,000 samples. 10,000 give `FID-10k`, another layer `FID768`, and the offline classifier of
`metrics/extractor.py` gives `FD_c10`.
"""

import contextlib
import http.client
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from models import artifacts
from models.artifacts import ROOT, load_array, sha256_of
from models.command import InputError, answered_within

FEATURES = ROOT / "results/features"
"""features of real images are kept here, by content; those of samples are not"""
NEEDED = {
    "64": ("Conv2d_1", "Conv2d_2"),
    "192": ("Conv2d_",),
    "768": ("Conv2d_", "Mixed_5", "Mixed_6"),
    "2048": ("Conv2d_", "Mixed_", "fc."),
}
"""Inception layer -> how the names of the weights begin that it is computed from"""
LEAST = 10
"""images a set needs: the Inception Score splits it in 10, precision and recall look at 4"""
FULL = 50_000
"""samples that an FID without a suffix rests on"""
Features = dict[str, torch.Tensor]
"""layer -> float32 (N, F) on the CPU"""


@dataclass(frozen=True)
class FeatureExtractor:
    """A network that images are compared in, and the names that its numbers go by."""

    network: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    """uint8 (B, 3, H, W) -> {layer: float (B, F)}"""
    sha256: str
    """of its weights"""
    layer: str
    """of FID, KID, precision and recall"""
    logits_layer: str | None
    """of the Inception Score; None: no score"""
    suffix: str
    """`_c10` or `768`; empty for the standard 2048-d layer, whose distance may be called FID"""
    prefix: str = "FD"
    classes: tuple[str, ...] = ()
    """by logit, where they are to be compared with labels"""

    def frechet_name(self, samples: int) -> str:
        """Return what its Frechet distance of so many samples, or fewer references, is called."""
        if self.suffix or samples >= FULL:
            return f"{self.prefix}{self.suffix}"
        return f"FID-{samples // 1000}k" if samples % 1000 == 0 else f"FID-{samples}"

    def names(self, samples: int) -> list[str]:
        """Return the names of all its measures of so many samples; the distance comes first."""
        kernel = {"FD": "KD", "FID": "KID"}[self.prefix] + self.suffix
        others = [f"{name}{self.suffix}" for name in ("precision", "recall", "nearest")]
        score = [f"IS{self.suffix}"] if self.logits_layer else []
        label = ["label_accuracy"] * (score != [] and self.prefix == "FD")  # of its own classes
        return [self.frechet_name(samples), kernel, *others, *score, *label]

    def label_accuracy(self, features: Features, label_N: np.ndarray) -> float:
        """Return the share of images, in [0, 1], that the classifier takes for their label."""
        return float((features[self.logits_layer].argmax(1).numpy() == label_N).mean())


def inception_extractor(weights: Path, layer: str = "2048", device="cpu") -> FeatureExtractor:
    """Return the standard Inception; `layer` is 2048, 768, 192 or 64.

    The file is read once, safely; torch-fidelity itself would unpickle whatever lies at a path.
    Channels-last memory, and batch norm as part of each convolution, give the same features (to
    1e-6) in less than half the time on a CPU, 9/10 of it at the fp32 peak. Raises InputError for
    weights that are unreadable, unsafe, or NaN at the layer asked for.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    what, fix = "Inception weights", "give torch-fidelity's state dict, --inception-weights PATH"
    artifacts.expect_file(weights, what, fix)
    state, digest = artifacts.safe_load(weights, fix)
    with artifacts.as_written(weights, what, fix):
        parts = [state[name] for name in state if name.startswith(NEEDED[layer])]
        complete = "fc.weight" in state and all(torch.isfinite(part).all() for part in parts)
        if not complete:
            raise InputError(
                f"{weights} holds no finite weights for the {layer}-d layer (a partial file); "
                "take the full weights, or a lower --fid-features such as 768"
            )
        layers = [layer, "logits_unbiased"] if layer == "2048" else [layer]
        checked = io.BytesIO()  # what was checked, so that no path is opened a second time
        torch.save(state, checked)
        checked.seek(0)
        network = FeatureExtractorInceptionV3("inception", layers, checked)
    for block in network.modules():
        if hasattr(block, "bn"):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), torch.nn.Identity()
    network.to(device).to(memory_format=torch.channels_last)

    def run(images_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(layers, network(images_B3HW), strict=True))

    if layer == "2048":
        return FeatureExtractor(run, digest, layer, "logits_unbiased", "", "FID")
    return FeatureExtractor(run, digest, layer, None, layer, "FID")


def download_inception(url: str | None = None, timeout: float = 10.0) -> Path | None:
    """Return the standard Inception weights from torch's hub folder, downloaded once if need be.

    None when they are not there and cannot be had within `timeout` seconds of silence.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    url = url or URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = path.stem.rsplit("-", 1)[-1]
        with answered_within(timeout):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        return path
    except (OSError, RuntimeError, http.client.HTTPException):  # no network, or another file
        return None


def inception_of(path: Path | None, layer: str, device: torch.device) -> FeatureExtractor | None:
    """Return the Inception at `path`, else the standard one; None, with a line, without any."""
    if weights := path or download_inception():
        return inception_extractor(weights, layer, device)
    print("no Inception weights at hand or to download: no FID; give --inception-weights PATH")
    return None


@torch.inference_mode()
def features_of(
    images_NHWC: np.ndarray,
    extractor: FeatureExtractor,
    device: torch.device | str = "cpu",
    keep: bool = False,
    verbose: bool = True,
    least: int = LEAST,
) -> Features:
    """Return what an extractor sees in uint8 images (N, H, W, 3), N >= `least`.

    With `keep` they are read from FEATURES if the same weights saw the same images before,
    and else written. Raises InputError for images of another type or shape.
    """
    shape, device = images_NHWC.shape, torch.device(device)
    if images_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] < least:
        raise InputError(f"expected uint8 (N >= {least}, H, W, 3), got {images_NHWC.dtype} {shape}")
    layers = [name for name in (extractor.layer, extractor.logits_layer) if name]
    files = {}
    if keep:
        inputs = {"images": sha256_of(images_NHWC), "extractor": extractor.sha256}
        stem = f"{inputs['images'][:16]}-{extractor.sha256[:16]}"
        files = {name: FEATURES / f"{stem}-{name}.npy" for name in layers}
        with contextlib.suppress(InputError):  # missing or damaged: computed anew
            saved = {n: load_array(f, "features", "", np.float32, 2) for n, f in files.items()}
            if all(head["inputs"] == inputs for _, head in saved.values()):
                return {name: torch.from_numpy(array_NF) for name, (array_NF, _) in saved.items()}
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    size = 256 if device.type == "cuda" else 8  # what a core's cache holds
    bar = {"unit": "image", "unit_scale": min(size, len(images_NHWC)), "disable": not verbose}
    for images_BHWC in tqdm(torch.from_numpy(images_NHWC).split(size), "features", **bar):
        computed = extractor.network(images_BHWC.to(device).permute(0, 3, 1, 2))
        for name in layers:
            parts[name].append(computed[name].float().cpu())
    features = {name: torch.cat(part) for name, part in parts.items()}
    for name, file in files.items():
        head = artifacts.header("features", "metrics/fidelity.py", {}, inputs)
        artifacts.save_array(file, features[name].numpy(), head)
    return features


def fidelity(
    samples: Features, reference: Features, extractor: FeatureExtractor, frechet_only: bool = False
) -> dict[str, float]:
    """Measure samples against a reference, both as `features_of` returns them: {name: value}.

    Precision is the share of samples inside the reference's manifold, recall the share of
    references inside the samples'; `frechet_only` gives the distance alone.
    """
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    pair = samples[extractor.layer], reference[extractor.layer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)  # imaginary dust of the root
        statistics = [metric_fid.fid_features_to_statistics(features) for features in pair]
        distance = metric_fid.fid_statistics_to_metric(*statistics, False)
    values = [max(0.0, distance[metric_fid.KEY_METRIC_FID])]
    if not frechet_only:
        subset = min(1000, *map(len, pair))
        kernel = metric_kid.kid_features_to_metric(*pair, kid_subset_size=subset, verbose=False)
        manifold = metric_prc.prc_features_to_metric(*pair, save_cpu_ram=True, verbose=False)
        values += [kernel[metric_kid.KEY_METRIC_KID_MEAN]]
        values += [manifold["precision"], manifold["recall"], nearest(*pair)]
        if extractor.logits_layer:
            score = metric_isc.isc_features_to_metric(samples[extractor.logits_layer])
            values += [score[metric_isc.KEY_METRIC_ISC_MEAN]]
    names = extractor.names(min(map(len, pair)))  # no FID of 50,000 samples to 10 images
    return {name: float(value) for name, value in zip(names, values, strict=False)}


def nearest(samples_NF: torch.Tensor, reference_MF: torch.Tensor) -> float:
    """Return the mean distance of a sample to the nearest reference; of copies it is small."""
    parts = samples_NF.split(500)
    return torch.cat([torch.cdist(part, reference_MF).amin(1) for part in parts]).mean().item()


def psnr(images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> np.ndarray:
    """Return each image's peak signal-to-noise ratio in dB, float64 (N,); equal images give inf."""
    error_N = ((images_NHWC.astype(np.float64) - others_NHWC) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error_N)


def codebook_use(codes_NT: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """Return the share of codes used (0..1) and the perplexity of their frequencies."""
    count_V = torch.bincount(codes_NT.flatten(), minlength=codebook_size).double()
    perplexity = torch.special.entr(count_V / count_V.sum()).sum().exp()
    return {"codebook_usage": (count_V > 0).double().mean().item(), "perplexity": perplexity.item()}
