"""Calibration of whole images: entropy of own samples, classes by Bayes, confidence in a sample.

Entropy calibration: Braverman et al., "Calibration, Entropy Rates, and Memory in Language Models"
(arXiv 1906.05664): along a model's own samples its entropy should be that of the data. Classes by
Bayes: Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv 2303.16203), here
with an exact likelihood. Risk-coverage: Geifman and El-Yaniv, "Selective Classification for Deep
Neural Networks" (arXiv 1705.08500).

The one temperature that makes held-out codes likeliest: Guo et al., arXiv 1706.04599. The mean of
-ln softmax(z / T) is convex in beta = 1 / T (a log-sum-exp minus a line), so Newton's method with a
bracket finds its one minimum. It streams: an iteration is a pass over the batches, three to six.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tqdm import tqdm

from metrics import calibration
from metrics.calibration import LN2, Predictions, calibration_report, collect, mean_of, spread
from metrics.evaluation import sampled_codes
from metrics.likelihood import bits_per_code, logit_batches, orders_for
from models.method import Method
from models.sampling import Plan

HOTTEST = 100.0
"""temperatures are looked for in [1 / HOTTEST, HOTTEST]"""


def slopes(batches: calibration.Batches, beta: float) -> tuple[torch.Tensor, float]:
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


def best_temperature(batches: Callable[[], calibration.Batches]) -> dict:
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
        if moved < 1e-4:
            break
    sd = slope_N.square().sum().sqrt().item() / curvature if curvature else math.inf
    warm, cold = max(beta - 1.96 * sd, 1 / HOTTEST), min(beta + 1.96 * sd, HOTTEST)
    return {"value": 1 / beta, "low": 1 / cold, "high": 1 / warm, "images": len(slope_N)}


def halves(images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows to fit on and the rows to report on: all images, at random."""
    # not even and odd rows: in drawn data, of label row modulo 10, the halves would share no class
    # (measured on shapes: a temperature of 0.93 that lost likelihood on the other half)
    shuffled_N = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return tuple(rows_N.sort().values for rows_N in shuffled_N.tensor_split([images // 2]))


def temperature_report(
    batches: Callable[[torch.Tensor], calibration.Batches], images: int, seed: int = 0
) -> dict:
    """Fit a temperature on half of the images, and report on the others what it does.

    `batches` makes a pass over the rows it is given. The gain is in bits per image (per prediction
    where S = 1), before minus after: negative where the temperature does not carry over.
    """
    fit_N, rest_N = halves(images, seed)
    fitted = best_temperature(lambda: batches(fit_N))
    before, after = collect(batches(rest_N)), collect(batches(rest_N), fitted["value"])
    report = {
        "temperature": fitted,
        "gain_bits_per_image": mean_of((before.nats_NS - after.nats_NS).sum(1) / LN2, seed),
    }
    for when, tokens in (("before", before), ("after", after)):
        measures = {"nll_nats": mean_of(tokens.nats_NS.mean(1), seed)}
        measures |= calibration.trust(tokens, seed)
        report |= {f"{name}_{when}": value for name, value in measures.items()}
    return report


def own_samples(
    model: Method, label_N: torch.Tensor, order: str, seed: int, batch: int
) -> tuple[torch.Tensor, Predictions]:
    """Sample without guidance (that is another distribution); return codes_NT, predictions."""
    codes_NT = sampled_codes(model, label_N, Plan(order=order), seed, batch)
    order_NS = orders_for(model, order, len(label_N), seed)  # those it sampled in
    return codes_NT, collect(logit_batches(model, codes_NT, label_N, order_NS, batch))


def class_log_p(
    model: Method, codes_NT: torch.Tensor, order_NS: torch.Tensor, batch: int = 100
) -> torch.Tensor:
    """Return ln p(codes | label) for every label, float64 (N, classes), with a progress bar."""
    bar = tqdm(range(model.config.classes), desc="classes", unit="class", leave=False)
    columns = [
        bits_per_code(model, codes_NT, torch.full((len(codes_NT),), label), order_NS, batch)
        for label in bar
    ]
    return torch.stack([-LN2 * bits_NS.double().sum(1) for bits_NS in columns], 1)


def class_report(log_p_NC: torch.Tensor, label_N: torch.Tensor, seed: int = 0) -> dict:
    """Return how calibrated p(class | image) is: the posterior of a uniform prior, by Bayes.

    The temperature is of ln p(codes | label), fitted on half of the images; `before` and
    `after` are of the others.
    """
    fit, rest = (
        [(log_p_NC[rows_N].unsqueeze(1), label_N[rows_N].unsqueeze(1))]
        for rows_N in halves(len(label_N), seed)
    )
    fitted = best_temperature(lambda: fit)
    return {
        "temperature": fitted,
        "before": calibration_report(collect(rest), seed),
        "after": calibration_report(collect(rest, fitted["value"]), seed),
    }


def order_ensembles(log_p_KNC: torch.Tensor, label_N: torch.Tensor, seed: int = 0) -> dict:
    """Return accuracy and calibration of p(class | image) over the first 1, 2, 4, .. of K orders.

    `probabilities` averages p(codes | label) over orders, `logs` its logarithm, before Bayes.
    """
    reports, count = {}, 1
    while count <= len(log_p_KNC):
        some_kNC = log_p_KNC[:count]
        kinds = {"probabilities": some_kNC.logsumexp(0), "logs": some_kNC.mean(0)}
        reports[str(count)] = {}
        for kind, log_p_NC in kinds.items():
            report = calibration_report(collect([(log_p_NC[:, None], label_N[:, None])]), seed)
            wanted = ("accuracy", "mean_confidence", "nll_bits", "ece_equal_width")
            reports[str(count)][kind] = {name: report[name] for name in wanted}
        count *= 2
    return reports


def entropy_report(own: Predictions, held_out: Predictions, seed: int = 0) -> dict:
    """Return entropy on own samples minus held-out NLL, in bits: by step, and per image.

    Above 0 the samples are less predictable than images, below 0 more. `sampler_check`, the NLL of
    own samples minus their entropy, is 0 up to chance if they are of the likelihood's distribution.
    """
    entropy_NS, nll_MS = own.entropy_NS / LN2, held_out.nats_NS / LN2
    images, difference_S = len(entropy_NS), entropy_NS.mean(0) - nll_MS.mean(0)
    own_RN = calibration.bootstrap_weights(images, seed=seed)
    held_out_RM = calibration.bootstrap_weights(len(nll_MS), seed=seed + 1)
    difference_RS = own_RN @ entropy_NS / images - held_out_RM @ nll_MS / len(nll_MS)
    check_N = (own.nats_NS / LN2 - entropy_NS).sum(1)
    return {
        "entropy_bits_per_step": mean_of(entropy_NS, seed),
        "held_out_bits_per_step": mean_of(nll_MS, seed + 1),
        "difference_bits_per_step": spread(difference_S, difference_RS, images),
        "entropy_bits_per_image": mean_of(entropy_NS.sum(1), seed),
        "held_out_bits_per_image": mean_of(nll_MS.sum(1), seed + 1),
        "difference_bits_per_image": spread(difference_S.sum(), difference_RS.sum(1), images),
        "sampler_check_bits_per_image": mean_of(check_N, seed),
    }


def ranks(x_N: torch.Tensor, weight_RN: torch.Tensor) -> torch.Tensor:
    """Return ranks less their mean in each resample, float64 (R, N); equal values share one."""
    group_N = x_N.unique(return_inverse=True)[1]
    count_RG = torch.zeros_like(weight_RN).index_add_(1, group_N, weight_RN)
    return (count_RG.cumsum(1) - count_RG / 2)[:, group_N] - len(x_N) / 2


def spearman(x_N: torch.Tensor, y_N: torch.Tensor, weight_RN: torch.Tensor) -> torch.Tensor:
    """Return the rank correlation in each resample, (R,) in [-1, 1]; 0 if one is constant."""
    x_RN, y_RN = ranks(x_N, weight_RN), ranks(y_N, weight_RN)
    weighted_RN = weight_RN * x_RN
    scale_R = ((weighted_RN * x_RN).sum(1) * (weight_RN * y_RN.square()).sum(1)).sqrt()
    return (weighted_RN * y_RN).sum(1) / torch.where(scale_R > 0, scale_R, 1)


def aurc(confidence_N: torch.Tensor, quality_N: torch.Tensor, weight_RN: torch.Tensor):
    """Return the mean of `risk_coverage` in each resample, float64 (R,)."""
    order_N, images = confidence_N.argsort(descending=True, stable=True), len(confidence_N)
    # the j-th most confident counts 1 / k in the risk at every k >= j
    share_N = torch.arange(images, 0, -1).double().reciprocal().cumsum(0).flip(0) / images
    until_RN = F.pad(share_N.cumsum(0), (1, 0))[weight_RN[:, order_N].cumsum(1).long()]
    return F.pad(until_RN, (1, 0)).diff(dim=1) @ (1 - quality_N[order_N])


def risk_coverage(confidence_N: torch.Tensor, quality_N: torch.Tensor) -> torch.Tensor:
    """Return 1 - the mean quality of the k most confident, k = 1..N; coverage is k / N."""
    risk_N = 1 - quality_N.double()[confidence_N.argsort(descending=True, stable=True)]
    return risk_N.cumsum(0) / torch.arange(1, len(risk_N) + 1)


def quality_report(confidence_N: torch.Tensor, quality_N: torch.Tensor, seed: int = 0) -> dict:
    """Return whether confidence in a sample predicts its quality in [0, 1], as the judge has it.

    AURC lies between `aurc_oracle`, sorted by quality itself, and about `risk`, if it is of no use.
    """
    confidence_N, quality_N = confidence_N.double(), quality_N.double()
    count = len(quality_N)

    def measure(statistic, *values_N: torch.Tensor) -> dict:
        resampled_R = statistic(*values_N, calibration.bootstrap_weights(count, seed=seed))
        return spread(statistic(*values_N, torch.ones(1, count).double())[0], resampled_R, count)

    return {
        "spearman": measure(spearman, confidence_N, quality_N),
        "aurc": measure(aurc, confidence_N, quality_N),
        "aurc_oracle": measure(aurc, quality_N, quality_N),
        "risk": mean_of(1 - quality_N, seed),
        "risk_coverage": risk_coverage(confidence_N, quality_N).tolist(),
    }
