"""The one temperature that makes held-out codes likeliest, and what it gains on other images.

Temperature scaling: Guo et al., arXiv 1706.04599. The mean of -ln softmax(z / T) is convex in
beta = 1 / T (a log-sum-exp minus a line), so Newton's method with a bracket finds its one minimum.
It streams: each iteration is a pass over the batches, three to six in all.
"""

import math
from collections.abc import Callable

import torch

from metrics.calibration import Batches, collect, equal_width_edges, mean_of
from metrics.calibration import ece as ece_of

HOTTEST = 100.0
"""temperatures are looked for in [1 / HOTTEST, HOTTEST]"""


def slopes(batches: Batches, beta: float) -> tuple[torch.Tensor, float]:
    """Return the slope in beta of each image's nats, float64 (N,), and the sum's curvature.

    The slope of a token is E[z] - z_target and the curvature Var[z], under softmax(beta z).
    """
    parts, curvature = [], 0.0
    for logits_BSV, target_BS in batches:
        z_BSV = logits_BSV.double()
        z_BSV = z_BSV - z_BSV.amax(-1, keepdim=True)
        p_BSV = (beta * z_BSV).softmax(-1)
        mean_BS = (p_BSV * z_BSV).sum(-1)
        target_z_BS = z_BSV.gather(-1, target_BS.unsqueeze(-1)).squeeze(-1)
        curvature += (p_BSV * (z_BSV - mean_BS.unsqueeze(-1)).square()).sum().item()
        parts.append((mean_BS - target_z_BS).sum(-1).cpu())
    return torch.cat(parts), curvature


def best_temperature(batches: Callable[[], Batches], tolerance: float = 1e-4) -> dict:
    """Return the temperature of least NLL as {value, low, high, images}; `batches` is a new pass.

    The interval is the delta method's with images as clusters: sd of beta = |slopes| / curvature.
    Logits that say nothing (all equal) give 1, with the whole range as interval.
    """
    low, high, beta = 1 / HOTTEST, HOTTEST, 1.0
    for _ in range(40):
        slope_N, curvature = slopes(batches(), beta)
        slope = slope_N.sum().item()
        if curvature == 0 or slope == 0:
            break
        low, high = (low, beta) if slope > 0 else (beta, high)
        wanted = beta - slope / curvature
        if not low < wanted < high:
            wanted = math.sqrt(low * high)
        moved, beta = abs(wanted / beta - 1), wanted
        if moved < tolerance:
            break
    sd = slope_N.square().sum().sqrt().item() / curvature if curvature else math.inf
    warm, cold = max(beta - 1.96 * sd, 1 / HOTTEST), min(beta + 1.96 * sd, HOTTEST)
    return {"value": 1 / beta, "low": 1 / cold, "high": 1 / warm, "images": len(slope_N)}


def halves(images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows to fit on and the rows to report on: all images, at random.

    Not even and odd rows: drawn data has label = row modulo 10, and the halves would share no class
    (measured on shapes: a temperature of 0.93 that lost likelihood on the other half).
    """
    shuffled_N = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return shuffled_N[: images // 2].sort().values, shuffled_N[images // 2 :].sort().values


def temperature_report(
    batches: Callable[[torch.Tensor], Batches], images: int, seed: int = 0
) -> dict:
    """Fit a temperature on half of the images, and report on the others what it does.

    `batches` makes a pass over the rows it is given. The gain is in bits per image (per prediction
    where S = 1), before minus after: negative where the temperature does not carry over.
    """
    fit_N, rest_N = halves(images, seed)
    fitted = best_temperature(lambda: batches(fit_N))
    before, after = collect(batches(rest_N)), collect(batches(rest_N), fitted["value"])
    edges = equal_width_edges()
    return {
        "temperature": fitted,
        "gain_bits_per_image": mean_of((before.nats_NS - after.nats_NS).sum(1) / math.log(2), seed),
        **{
            f"{name}_{when}": measure
            for when, found in (("before", before), ("after", after))
            for name, measure in {
                "nll_nats": mean_of(found.nats_NS.mean(1), seed),
                "ece_equal_width": ece_of(found, edges, seed),
                "overconfidence_gap": mean_of(
                    (found.confidence_NS - found.correct_NS).mean(1), seed
                ),
            }.items()
        },
    }
