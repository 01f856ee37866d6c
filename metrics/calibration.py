"""Do the probabilities mean what they say? Calibration of predicted codes, with intervals.

Top-label ECE, reliability and temperature are those of Guo et al., "On Calibration of Modern Neural
Networks" (arXiv 1706.04599); bins of equal mass are Nguyen and O'Connor's (arXiv 1508.05154);
class-wise ECE is that of Kull et al. (arXiv 1910.12656).

The probabilities of 10,000 images x 64 codes x V do not fit in memory. What is kept of a token are
five numbers (`Predictions`), and for the class-wise ECE sums by class and bin (`ClassBins`).
Intervals resample images, never tokens: the 64 tokens of an image are not independent.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import torch

LN2 = math.log(2)
BINS = 15
RESAMPLES = 1000
CLASS_RESAMPLES = 200
"""of the class-wise ECE, which keeps (resamples, V, bins) sums: 12 MB at V = 1024"""
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""(logits_BSV, target_BS int64) of consecutive images"""


class Predictions(NamedTuple):
    """What calibration needs of tokens: float64 (N, S), by image and step; S = 1 for classes."""

    confidence_NS: torch.Tensor
    """probability of the likeliest code"""
    correct_NS: torch.Tensor
    """1 where that code is the true one, else 0"""
    nats_NS: torch.Tensor
    """-ln p of the true code"""
    brier_NS: torch.Tensor
    """sum over codes of (p - [it is the true one])^2, in [0, 2]"""
    entropy_NS: torch.Tensor
    """of the prediction, nats"""


def predictions(logits_BSV: torch.Tensor, target_BS: torch.Tensor) -> Predictions:
    """Return what calibration needs of these logits, on the CPU. In float64: ln V stays ln V."""
    log_p_BSV = logits_BSV.double().log_softmax(-1)
    p_BSV = log_p_BSV.exp()
    confidence_BS, top_BS = p_BSV.max(-1)
    nats_BS = -log_p_BSV.gather(-1, target_BS.unsqueeze(-1)).squeeze(-1)
    brier_BS = p_BSV.square().sum(-1) - 2 * (-nats_BS).exp() + 1
    entropy_BS = torch.special.entr(p_BSV).sum(-1)
    correct_BS = (top_BS == target_BS).double()
    values = (confidence_BS, correct_BS, nats_BS, brier_BS, entropy_BS)
    return Predictions(*(value_BS.cpu() for value_BS in values))


def collect(
    batches: Batches, temperature: float = 1.0, class_bins: "ClassBins | None" = None
) -> Predictions:
    """Stream over batches; logits are divided by `temperature`, `class_bins` is filled."""
    parts = []
    for logits_BSV, target_BS in batches:
        logits_BSV = logits_BSV / temperature
        parts.append(predictions(logits_BSV, target_BS))
        if class_bins is not None:
            class_bins.add(logits_BSV.softmax(-1), target_BS)
    return Predictions(*map(torch.cat, zip(*parts, strict=True)))


@lru_cache(maxsize=4)
def bootstrap_weights(images: int, resamples: int = RESAMPLES, seed: int = 0) -> torch.Tensor:
    """Return how often each resample drew each image, float64 (R, N), for sums by a product."""
    generator = torch.Generator().manual_seed(seed)
    drawn_RN = torch.randint(images, (resamples, images), generator=generator)
    ones_RN = torch.ones(1, 1, dtype=torch.float64).expand(resamples, images)
    return torch.zeros(resamples, images, dtype=torch.float64).scatter_add(1, drawn_RN, ones_RN)


def spread(value: torch.Tensor, resampled_R: torch.Tensor, images: int) -> dict:
    """Return {value, low, high, images} with the percentile 95% interval; lists for vectors."""
    ends = torch.tensor([0.025, 0.975], dtype=resampled_R.dtype)
    low, high = torch.nanquantile(resampled_R, ends, dim=0)
    return {"value": value.tolist(), "low": low.tolist(), "high": high.tolist(), "images": images}


def moved_back(value: torch.Tensor, resampled_R: torch.Tensor) -> torch.Tensor:
    """Return resamples of a number that is never negative, less what resampling itself adds.

    Where chance makes all of it, as of an ECE near 0, resampling adds as much again, and the whole
    interval would lie above the value.
    """
    return (resampled_R - resampled_R.mean(0) + value).clamp(min=0)


def estimate(
    sums_NK: torch.Tensor,
    statistic: Callable[[torch.Tensor], torch.Tensor],
    seed: int = 0,
    never_negative: bool = False,
) -> dict:
    """Return a statistic of images with its 95% interval, by the bootstrap over images.

    `statistic` maps sums of the images' sufficient statistics, (R, K), to (R,) or (R, L).
    """
    sums_NK = sums_NK.double()
    value = statistic(sums_NK.sum(0, keepdim=True))[0]
    resampled_R = statistic(bootstrap_weights(len(sums_NK), seed=seed) @ sums_NK)
    resampled_R = moved_back(value, resampled_R) if never_negative else resampled_R
    return spread(value, resampled_R, len(sums_NK))


def mean_of(value_N: torch.Tensor, seed: int = 0, keep: bool = False) -> dict:
    """Return the mean over images, (N,) or for each column of (N, L), with its 95% interval.

    `keep` adds the values, `of_images`, for the paired difference to another model's.
    """
    images, *columns = value_N.shape
    values = {"of_images": [round(value, 3) for value in value_N.tolist()]} if keep else {}
    value_NL = value_N.reshape(images, -1)
    return estimate(value_NL, lambda sums: (sums / images).view(-1, *columns), seed) | values


def equal_width_edges(bins: int = BINS) -> torch.Tensor:
    """Return the inner edges of bins ((b - 1) / bins, b / bins], float64 (bins - 1,)."""
    return torch.arange(1, bins, dtype=torch.float64) / bins


def equal_mass_edges(confidence_NS: torch.Tensor, bins: int = BINS) -> torch.Tensor:
    """Return the inner edges of bins with equally many tokens, float64 (bins - 1,).

    Equal confidences share a bin, so that the order of tokens is of no account.
    """
    sorted_M = confidence_NS.flatten().double().sort().values
    last_in_bin = [-(-len(sorted_M) * b // bins) - 1 for b in range(1, bins)]
    return sorted_M[last_in_bin]


def bin_sums(tokens: Predictions, edges: torch.Tensor) -> torch.Tensor:
    """Return each image's sums by bin, float64 (N, 3, bins): tokens, confidence, correct."""
    bin_NS = torch.bucketize(tokens.confidence_NS.contiguous(), edges)
    kinds = (torch.ones_like(tokens.confidence_NS), tokens.confidence_NS, tokens.correct_NS)
    empty_Nb = torch.zeros(len(bin_NS), len(edges) + 1, dtype=torch.float64)
    return torch.stack([empty_Nb.scatter_add(1, bin_NS, kind_NS) for kind_NS in kinds], 1)


def ece(tokens: Predictions, edges: torch.Tensor, seed: int = 0) -> dict:
    """Return the top-label ECE in [0, 1] with its interval; the bins stay fixed over resamples.

    It is the mean over tokens of |confidence - accuracy| of their bin: never negative, so chance
    alone makes some of it, and `ece_if_calibrated` says how much. The interval is of what so many
    images give, chance included.
    """

    def error(sums_R: torch.Tensor) -> torch.Tensor:
        count_Rb, confidence_Rb, correct_Rb = sums_R.unflatten(1, (3, -1)).unbind(1)
        return (confidence_Rb - correct_Rb).abs().sum(1) / count_Rb.sum(1)

    return estimate(bin_sums(tokens, edges).flatten(1), error, seed, never_negative=True)


def trust(tokens: Predictions, seed: int) -> dict:
    """Return how far confidence and accuracy of predictions are apart."""
    gap_NS = tokens.confidence_NS - tokens.correct_NS
    return {
        "ece_equal_width": ece(tokens, equal_width_edges(), seed),
        "overconfidence_gap": mean_of(gap_NS.mean(1), seed),
    }


def ece_if_calibrated(
    tokens: Predictions, *edges: torch.Tensor, draws: int = 100, seed: int = 0
) -> list[dict]:
    """Return the ECE that chance alone gives: the answers are drawn from these confidences.

    For each of `edges`, with the same answers. The control beside `ece`; valid with many tokens an
    image because the errors of a true model are uncorrelated along the chain of conditionals.
    """
    generator = torch.Generator().manual_seed(seed)
    confidence_M = tokens.confidence_NS.flatten()
    bins = [torch.bucketize(confidence_M, edges_b) for edges_b in edges]
    chance_RE = torch.empty(draws, len(bins), dtype=torch.float64)
    for chance_E in chance_RE:
        drawn_M = torch.rand(len(confidence_M), generator=generator, dtype=torch.float64)
        gap_M = confidence_M - (drawn_M < confidence_M).double()
        for i, bin_M in enumerate(bins):
            chance_E[i] = torch.bincount(bin_M, gap_M).abs().sum() / len(gap_M)
    return [spread(x_R.mean(), x_R, len(tokens.confidence_NS)) for x_R in chance_RE.unbind(1)]


def reliability(tokens: Predictions, edges: torch.Tensor, seed: int = 0) -> dict:
    """Return the bins that hold tokens: a list `count`, estimates of lists confidence, accuracy."""
    sums_N3b = bin_sums(tokens, edges)
    sums_N3b = sums_N3b[:, :, sums_N3b[:, 0].sum(0) > 0]

    def share(kind: int) -> dict:
        sums_N = sums_N3b[:, [0, kind]].flatten(1)
        return estimate(sums_N, lambda s: s.chunk(2, 1)[1] / s.chunk(2, 1)[0], seed)

    count = sums_N3b[:, 0].sum(0).long().tolist()
    return {"count": count, "confidence": share(1), "accuracy": share(2)}


def calibration_report(tokens: Predictions, seed: int = 0) -> dict:
    """Return every measure with its interval and its number of images, and the diagram."""
    width, mass = equal_width_edges(), equal_mass_edges(tokens.confidence_NS)
    means = {
        "accuracy": tokens.correct_NS,
        "mean_confidence": tokens.confidence_NS,
        "overconfidence_gap": tokens.confidence_NS - tokens.correct_NS,
        "brier": tokens.brier_NS,
        "nll_nats": tokens.nats_NS,
        "nll_bits": tokens.nats_NS / LN2,
        "entropy_nats": tokens.entropy_NS,
    }
    report = {"tokens": tokens.nats_NS.numel()}
    report |= {name: mean_of(value_NS.mean(1), seed) for name, value_NS in means.items()}
    chance = ece_if_calibrated(tokens, width, mass, seed=seed)
    for kind, edges, by_chance in zip(("width", "mass"), (width, mass), chance, strict=True):
        report[f"ece_equal_{kind}"] = ece(tokens, edges, seed)
        report[f"ece_equal_{kind}_if_calibrated"] = by_chance
    return report | {"reliability": reliability(tokens, mass, seed)}


class ClassBins:
    """Class-wise ECE in one pass, with its resamples: sums by class and bin of p - [true].

    ECE_k compares p_k with how often code k came, over all tokens; the mean over codes is small by
    nature (most p_k are near 0), so it is for comparing models of one V.
    """

    def __init__(self, classes: int, images: int, seed: int = 0):
        self.classes, self.seen, self.tokens = classes, 0, 0
        self.weights_RN = bootstrap_weights(images, CLASS_RESAMPLES, seed).float()
        self.gap_K = torch.zeros(classes * BINS, dtype=torch.float64)
        self.gap_RK = torch.zeros(len(self.weights_RN), classes * BINS)

    def add(self, p_BSV: torch.Tensor, target_BS: torch.Tensor) -> None:
        """Count the next B of the `images`, in their order, a few at a time to save memory."""
        for p_bSV, target_bS in zip(p_BSV.split(16), target_BS.split(16), strict=True):
            p_bSV, (batch, steps), cells = p_bSV.cpu(), target_bS.shape, len(self.gap_K)
            cell_bSV = (p_bSV * BINS).ceil_().sub_(1).clamp_(min=0).int()  # equal_width_edges'
            cell_bSV += torch.arange(0, cells, BINS, dtype=torch.int32)
            cell_bSV += torch.arange(batch, dtype=torch.int32).view(-1, 1, 1) * cells
            true_bS1 = target_bS.cpu().unsqueeze(2)
            gap_bSV = p_bSV.scatter_add(2, true_bS1, -torch.ones_like(p_bSV[..., :1]))
            gap_M = torch.bincount(cell_bSV.flatten(), gap_bSV.flatten(), batch * cells)
            gap_bK = gap_M.view(batch, -1)
            self.gap_K += gap_bK.sum(0)
            self.gap_RK.addmm_(self.weights_RN[:, self.seen : self.seen + batch], gap_bK.float())
            self.seen, self.tokens = self.seen + batch, self.tokens + batch * steps

    def ece(self) -> dict:
        """Return the class-wise ECE, the mean over codes, with its interval."""
        scale = self.tokens * self.classes
        value, resampled_R = (x.abs().sum(-1) / scale for x in (self.gap_K, self.gap_RK))
        return spread(value, moved_back(value, resampled_R), self.seen)
