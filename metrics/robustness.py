"""How a generator bears what is wrong: corrupted images, a wrong context, samples it misreads.

While sampling a method reads its own mistakes, in training it never does (exposure bias: Ranzato et
al., "Sequence Level Training with Recurrent Neural Networks", arXiv 1511.06732). Context: a share
rho of the codes is replaced and every step still has to predict its clean code, so NLL and ECE show
what wrong codes cost, and whether the method notices that it knows less. Sampling: the method
misreads a share rho of what it wrote, and the samples show what comes of it.

Images: corrupted as in `metrics/corruptions.py`, encoded to the nearest codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from tqdm import tqdm

from metrics.calibration import Batches, Predictions, collect, ece, equal_width_edges, mean_of
from metrics.extractor import Classifier
from metrics.fidelity import psnr
from metrics.likelihood import logit_batches
from metrics.sample_calibration import class_log_p
from models.command import InputError
from models.method import Method
from models.sampling import Plan, sample_codes
from models.tokenizer import Tokenizer, decode_codes, encode_images, to_float

RHOS = (0.0, 0.05, 0.1, 0.2, 0.4)


def code_vectors(tokenizer: Tokenizer) -> torch.Tensor:
    """Return the vectors by whose distance the tokenizer picks a code: float (V, C)."""
    from models.published.baseline_vqvae import BaselineVQVAE
    from models.published.vq16 import VQ16

    if isinstance(tokenizer, VQ16):
        return tokenizer.quantize.vectors_VC
    if isinstance(tokenizer, BaselineVQVAE):
        return tokenizer._vq_vae._embedding.weight
    return tokenizer.quantizer.codebook_VC


def nearest_codes(codebook_VC: torch.Tensor, count: int = 8) -> torch.Tensor:
    """Return the `count` codes with the nearest vectors, without the code itself: (V, count)."""
    distance_VV = torch.cdist(codebook_VC.float(), codebook_VC.float())
    return distance_VV.fill_diagonal_(math.inf).topk(count, largest=False).indices


def corrupt_context(
    codes_NT: torch.Tensor,
    rho: float,
    codebook_size: int,
    neighbours_VK: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Return codes with each replaced by another at probability `rho`; the input is unchanged.

    By any other code, all alike, or by one of its K neighbours. The cells that a small rho replaces
    are among those of a larger one, with the same new codes, so that rhos can be compared. Raises
    InputError for a rho outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise InputError(f"expected rho in [0, 1], got {rho}")
    generator = torch.Generator().manual_seed(seed)
    replaced_NT = torch.rand(codes_NT.shape, generator=generator) < rho
    if neighbours_VK is None:
        step_NT = torch.randint(1, codebook_size, codes_NT.shape, generator=generator)
        other_NT = (codes_NT + step_NT) % codebook_size
    else:
        nth_NT = torch.randint(neighbours_VK.shape[1], codes_NT.shape, generator=generator)
        other_NT = neighbours_VK[codes_NT, nth_NT]
    return torch.where(replaced_NT, other_NT, codes_NT)


def corrupted_batches(
    model: Method,
    clean_NT: torch.Tensor,
    corrupted_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 100,
    name: str | None = None,
) -> Batches:
    """Yield logits that saw the corrupted codes, with the clean codes as targets.

    One forward is enough: the contract is causal, so a step never reads the code in its own cell.
    """
    target_NS = clean_NT.gather(1, order_NS)
    batches = logit_batches(model, corrupted_NT, label_N, order_NS, batch, name)
    for (logits_BSV, _), target_BS in zip(batches, target_NS.split(batch), strict=True):
        yield logits_BSV, target_BS.to(logits_BSV.device)


def context_report(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    rhos: Sequence[float] = RHOS,
    neighbours_VK: torch.Tensor | None = None,
    batch: int = 100,
    seed: int = 0,
) -> list[dict]:
    """Return for each rho how well the clean codes are predicted; a clean context comes first.

    `more_bits_per_image` is paired with the clean context of the same image.
    """
    clean_N, rows = None, []
    for rho in [0.0, *(rho for rho in rhos if rho)]:
        corrupted_NT = corrupt_context(codes_NT, rho, model.config.vocab_size, neighbours_VK, seed)
        inputs = (codes_NT, corrupted_NT, label_N, order_NS)
        tokens = collect(corrupted_batches(model, *inputs, batch, f"rho {rho:g}"))
        bits_NS = tokens.nats_NS / math.log(2)
        clean_N = bits_NS.sum(1) if clean_N is None else clean_N
        gap_NS = tokens.confidence_NS - tokens.correct_NS
        rows.append(
            {
                "rho": rho,
                "replaced": (corrupted_NT != codes_NT).double().mean().item(),
                "bits_per_image": mean_of(bits_NS.sum(1), seed),
                "more_bits_per_image": mean_of(bits_NS.sum(1) - clean_N, seed),
                "bits_per_step": mean_of(bits_NS, seed),
                "accuracy": mean_of(tokens.correct_NS.mean(1), seed),
                "ece_equal_width": ece(tokens, equal_width_edges(), seed),
                "overconfidence_gap": mean_of(gap_NS.mean(1), seed),
            }
        )
    return rows


class MisreadContext(Method):
    """A method that takes a code it is given for another with probability `rho`, when it samples.

    Made for one batch of samples. Which codes it misreads, and as what, depends on (seed, sample,
    cell) alone: not on the batch, the order, the grouping, or on guidance, whose two halves misread
    alike. What a small rho misreads is among what a larger one does. `forward` reads what it gets.
    """

    def __init__(self, model: Method, rho: float, seed: int, samples: range):
        """Wrap `model` for these samples of the stream `seed`."""
        super().__init__(model.config)
        self.model, self.rho = model, rho
        self.any_order, self.parallel, self.scans = model.any_order, model.parallel, model.scans
        device = next(model.parameters()).device
        # the 1 makes it another stream than the one that `sample_chance` picks the codes by
        streams = [np.random.default_rng([seed, sample, 1]) for sample in samples]
        tokens, codes = model.config.tokens, model.config.vocab_size
        chance_BT = np.stack([stream.random(tokens) for stream in streams])
        step_BT = np.stack([stream.integers(1, codes, tokens) for stream in streams])
        self.chance_BT = torch.from_numpy(chance_BT).to(device)
        self.step_BT = torch.from_numpy(step_BT).to(device)

    def order(self, name):
        """Return the wrapped method's order; see Method."""
        return self.model.order(name)

    def groups(self, steps, grouping="cosine"):
        """Return the wrapped method's groups; see Method."""
        return self.model.groups(steps, grouping)

    def forward(self, codes_BT, label_B, order_BS):
        """Return the wrapped method's logits; see Method."""
        return self.model(codes_BT, label_B, order_BS)

    def cache(self, label_B):
        """Return the wrapped method's cache; see Method."""
        return self.model.cache(label_B)

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return the logits after the codes as misread; the batch is the samples once, or twice."""
        halves = len(codes_Bm) // len(self.chance_BT)
        chance_BT, step_BT = (x.repeat(halves, 1) for x in (self.chance_BT, self.step_BT))
        other_Bm = (codes_Bm + step_BT.gather(1, cells_Bm)) % self.config.vocab_size
        misread_Bm = chance_BT.gather(1, cells_Bm) < self.rho
        read_Bm = torch.where(misread_Bm, other_Bm, codes_Bm)
        return self.model.decode(cache, read_Bm, cells_Bm, next_cells_Bn)


def misread_samples(
    model: Method, label_N: torch.Tensor, plan: Plan, rho: float, seed: int, batch: int
) -> torch.Tensor:
    """Return codes_NT on the CPU, as written, of samples whose own codes were misread."""
    parts = []
    with tqdm(total=len(label_N), desc=f"sampling, rho {rho:g}", unit="image", leave=False) as bar:
        for first in range(0, len(label_N), batch):
            label_B = label_N[first : first + batch]
            misreads = MisreadContext(model, rho, seed, range(first, first + len(label_B)))
            parts.append(sample_codes(misreads, label_B, plan, seed, first).cpu())
            bar.update(len(label_B))
    return torch.cat(parts)


@torch.inference_mode()
def features_of(
    images_NHWC: np.ndarray, extractor: Classifier, batch: int = 500
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (features_NF float32, class int64 (N,)) of uint8 images, on the CPU."""
    device, parts = next(extractor.parameters()).device, []
    for start in range(0, len(images_NHWC), batch):
        features_BF, logits_BC = extractor(to_float(images_NHWC[start : start + batch], device))
        parts.append((features_BF.float().cpu(), logits_BC.argmax(1).cpu()))
    features, classes = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(classes)


def frechet(features_NF: torch.Tensor, others_MF: torch.Tensor) -> float:
    """Return the distance that FID is, between these features, by torch-fidelity; never below 0."""
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    both = (fid_features_to_statistics(features) for features in (features_NF, others_MF))
    return max(0.0, fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])


@dataclass(frozen=True)
class Reading:
    """What a generator makes of N images, each in A versions."""

    tokens: Predictions
    """(N, A, S): its codes, under its label"""
    classes: Predictions
    """(N, A, 1): its class, by Bayes"""
    decibels_NA: torch.Tensor
    """PSNR of what its codes decode to, against the clean image"""
    decoded_NAHWC: np.ndarray
    """uint8, what its codes decode to"""

    def row(self, versions: slice = slice(None), seed: int = 0) -> dict:
        """Return the measures over these versions; an image counts once, as their mean.

        Resampling draws images, each with all of its versions.
        """
        tokens, classes = (_flat(x[:, versions]) for x in (self.tokens, self.classes))
        decibels_NA = self.decibels_NA[:, versions]
        bits_N = tokens.nats_NS.sum(1) / math.log(2) / decibels_NA.shape[1]
        return {
            "bits_per_image": mean_of(bits_N, seed),
            "ece_equal_width": ece(tokens, equal_width_edges(), seed),
            "overconfidence_gap": mean_of((tokens.confidence_NS - tokens.correct_NS).mean(1), seed),
            "class_accuracy": mean_of(classes.correct_NS.mean(1), seed),
            "class_ece": ece(classes, equal_width_edges(), seed),
            "psnr": mean_of(decibels_NA.mean(1), seed),
        }


def _flat(found: Predictions) -> Predictions:
    """Put an image's versions side by side: (N, A, S) -> (N, A * S)."""
    return Predictions(*(getattr(found, field.name).flatten(1) for field in fields(found)))


def read_images(
    model: Method,
    tokenizer: Tokenizer,
    images_NAHWC: np.ndarray,
    clean_NHWC: np.ndarray,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 100,
    name: str | None = None,
) -> Reading:
    """Encode A versions of N images, all in their image's order, and see what the model says."""
    images, versions = images_NAHWC.shape[:2]
    codes_MT = encode_images(tokenizer, images_NAHWC.reshape(-1, *clean_NHWC.shape[1:]))
    label_M = label_N.repeat_interleave(versions)
    order_MS = order_NS.repeat_interleave(versions, dim=0)
    tokens = collect(logit_batches(model, codes_MT, label_M, order_MS, batch, name))
    log_p_MC = class_log_p(model, codes_MT, order_MS, batch)
    classes = collect([(log_p_MC.unsqueeze(1), label_M.unsqueeze(1))])
    decoded_MHWC = decode_codes(tokenizer, codes_MT)
    decibels_M = torch.from_numpy(psnr(decoded_MHWC, clean_NHWC.repeat(versions, axis=0)))

    def by_image(found: Predictions) -> Predictions:
        parts = (getattr(found, field.name) for field in fields(found))
        return Predictions(*(x_MS.unflatten(0, (images, versions)) for x_MS in parts))

    return Reading(
        by_image(tokens),
        by_image(classes),
        decibels_M.view(images, versions),
        decoded_MHWC.reshape(images_NAHWC.shape),
    )
