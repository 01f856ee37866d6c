"""Exact likelihood of codes under a method: bits per code by step, per image by order.

The product of the conditionals is a distribution over code grids, so bits are those of a real
code. The ceiling is 64 * log2(V): 640 bits an image at V = 1024.

Any order gives an exact log p of the same image, and a true model would give the same in all. How
much they differ says how consistent a model is; the mean over orders of p is itself a distribution
over images, and by Jensen's inequality never a worse one than a single order drawn at random.

What codes cost without a network is the bits that every method has to beat: frequencies of the
train codes given a context, smoothed towards each code's overall frequency by a Dirichlet prior of
the strength that predicts half of the train images best from the other.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

from metrics.calibration import collect, ece, equal_width_edges, estimate, mean_of
from models.command import InputError
from models.data import Codes, evenly
from models.method import Method
from models.orders import SCANS
from models.sampling import sample_chance

RANDOM = "random_"
"""start of the name of a random order that is the same for all images"""
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""pseudo-counts of the prior of the models without a network that are tried"""
EVAL_IMAGES = 2_000
"""images of a likelihood estimate during training; eval_c2i.py takes them all"""


@torch.no_grad()
def bits_BS(
    model: Method, codes_BT: torch.Tensor, label_B: torch.Tensor, order_BS: torch.Tensor
) -> torch.Tensor:
    """Return -log2 p of each code, float32 (B, S), by visiting step. The model is in eval mode."""
    logits_BSV = model(codes_BT, label_B, order_BS)
    target_BS = codes_BT.gather(1, order_BS)
    nats_BS = F.cross_entropy(logits_BSV.transpose(1, 2), target_BS, reduction="none")
    return nats_BS / math.log(2)


def bits_per_code(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 500,
) -> torch.Tensor:
    """Return -log2 p of every code, float32 (N, S) on the CPU; sum over S is bits per image."""
    device = next(model.parameters()).device
    chunks = zip(*(x.split(batch) for x in (codes_NT, label_N, order_NS)), strict=True)
    parts = [bits_BS(model, *(x.to(device) for x in chunk)).cpu() for chunk in chunks]
    return torch.cat(parts)


@torch.no_grad()
def logit_batches(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 100,
    name: str | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits_BSV, target_BS) of consecutive images, with a progress bar if it has a name.

    For measures of whole predictions: all of them at once would take 2.6 GB for 10,000 images.
    """
    device = next(model.parameters()).device
    hidden = name is None
    with tqdm(total=len(label_N), desc=name, unit="image", leave=False, disable=hidden) as bar:
        for rows_B in torch.arange(len(label_N)).split(batch):
            codes_BT, label_B, order_BS = (
                x[rows_B].to(device) for x in (codes_NT, label_N, order_NS)
            )
            yield model(codes_BT, label_B, order_BS), codes_BT.gather(1, order_BS)
            bar.update(len(rows_B))


def orders_for(model: Method, order: str, count: int, seed: int = 0) -> torch.Tensor:
    """Return order_NS, int64: a scan for all, or for `random` one order per image from `seed`."""
    if order == "random":
        return sample_chance(seed, range(count), model.config.tokens)[1]
    return model.order(order).expand(count, -1)


def orders_to_measure(model: Method, random_orders: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return order_S by name: raster, `reverse`, the scans that fit the grid, random_0.. .

    The random ones are the same for every image: then p averaged over them is one distribution,
    and their means can be compared. A method with a fixed order has that one only.
    """
    if not model.any_order:
        return {model.config.scan: model.order(model.config.scan)}
    found = {"raster": model.order("raster"), "reverse": model.order("raster").flip(0)}
    for name in SCANS:
        try:
            found[name] = model.order(name)
        except InputError:  # not defined on this side, for example an odd one
            continue
    if random_orders:
        order_KS = orders_for(model, "random", random_orders, seed)
        found |= {f"{RANDOM}{k}": order_S for k, order_S in enumerate(order_KS)}
    return found


def bits_by_order(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    orders: dict[str, torch.Tensor],
    batch: int = 100,
) -> dict[str, torch.Tensor]:
    """Return -log2 p of every code by order, float32 (N, S) each, with a progress bar."""
    found = {}
    with tqdm(total=len(orders) * len(label_N), desc="orders", unit="image") as bar:
        for name, order_S in orders.items():
            parts = []
            for codes_BT, label_B in zip(codes_NT.split(batch), label_N.split(batch), strict=True):
                order_BS = order_S.expand(len(label_B), -1)
                parts.append(bits_per_code(model, codes_BT, label_B, order_BS, batch))
                bar.update(len(label_B))
            found[name] = torch.cat(parts)
    return found


def ensemble(bits_KN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits_N of p averaged over K orders, and of log p averaged: float64, first <= second.

    The second is what one order drawn at random costs; exp of it is no distribution.
    """
    log_p_KN = -math.log(2) * bits_KN.double()
    log_mean_N = log_p_KN.logsumexp(0) - math.log(len(bits_KN))
    return -log_mean_N / math.log(2), bits_KN.double().mean(0)


def ensemble_report(bits_KN: torch.Tensor, seed: int = 0) -> dict:
    """Return both ensembles of K orders and what the first gains, bits per image."""
    joint_N, geometric_N = ensemble(bits_KN)
    return {
        "orders": len(bits_KN),
        "log_mean_exp": mean_of(joint_N, seed),
        "mean_of_logs": mean_of(geometric_N, seed),
        "gain": mean_of(geometric_N - joint_N, seed),
    }


def order_report(bits: dict[str, torch.Tensor], seed: int = 0) -> dict:
    """Return what `bits_by_order` says, in bits per image, every number with its interval.

    `bits_per_step` holds a curve of S values for each order, and for `random` the mean of the
    random ones. Spreads and ensembles are there if there are two random orders or more.
    """
    per_image = {name: bits_NS.double().sum(1) for name, bits_NS in bits.items()}
    found = {
        "bits_per_image": {
            name: mean_of(bits_N, seed) | {"se": (bits_N.std() / len(bits_N) ** 0.5).item()}
            for name, bits_N in per_image.items()
        },
        "bits_per_step": {name: mean_of(bits_NS, seed) for name, bits_NS in bits.items()},
    }
    drawn = [name for name in bits if name.startswith(RANDOM)]
    if len(drawn) < 2:
        return found
    curves_NS = torch.stack([bits[name] for name in drawn]).mean(0)
    found["bits_per_step"]["random"] = mean_of(curves_NS, seed)
    groups = {"random": drawn, "all": list(bits)}
    found["ensemble"] = {
        group: ensemble_report(torch.stack([per_image[name] for name in names]), seed)
        for group, names in groups.items()
    }
    random_KN = torch.stack([per_image[name] for name in drawn])
    found["sd_over_random_orders"] = {
        "per_image": mean_of(random_KN.std(0), seed),
        "of_their_means": estimate(
            random_KN.T, lambda sums_RK: (sums_RK / len(random_KN[0])).std(1), seed
        ),
        "orders": len(drawn),
    }
    return found


def _to_measure(model: Method, codes: Codes, order: str) -> tuple[torch.Tensor, ...]:
    """Return (codes_NT, label_N, order_NS) of EVAL_IMAGES images, evenly spaced and unmirrored."""
    codes = codes.rows(torch.from_numpy(evenly(len(codes.label_N), EVAL_IMAGES)))
    label_N = codes.label_N
    return codes.codes_NAT[:, 0], label_N, orders_for(model, order, len(label_N))


def split_bits(model: Method, splits: dict[str, Codes], order: str) -> dict[str, float]:
    """Return the mean bits per code of EVAL_IMAGES images of each split, unmirrored."""
    model.eval()
    found = {}
    for name, codes in splits.items():
        found[name] = bits_per_code(model, *_to_measure(model, codes, order)).mean().item()
    return found


def token_ece(model: Method, codes: Codes, order: str) -> float:
    """Return the top-label ECE of EVAL_IMAGES images, unmirrored, in 15 bins of equal width."""
    model.eval()
    tokens = collect(logit_batches(model, *_to_measure(model, codes, order)))
    return ece(tokens, equal_width_edges())["value"]


def class_position(codes_NT: torch.Tensor, label_N: torch.Tensor, codebook_size: int):
    """Return context_NT int64: the label and the cell."""
    cells = codes_NT.shape[1]
    return label_N.unsqueeze(1) * cells + torch.arange(cells)


def raster_bigram(codes_NT: torch.Tensor, label_N: torch.Tensor, codebook_size: int):
    """Return context_NT int64: the code before, in raster order; a mark before the first."""
    first_N1 = torch.full_like(codes_NT[:, :1], codebook_size)
    return torch.cat((first_N1, codes_NT[:, :-1]), dim=1)


BASELINES = {"class_position": class_position, "raster_bigram": raster_bigram}


def smoothed_bits(
    context_M: torch.Tensor, code_M: torch.Tensor, seen_M: torch.Tensor, told_M: torch.Tensor,
    codebook_size: int, strength: float,
) -> torch.Tensor:  # fmt: skip
    """Return -log2 p(code | context) of each code, from pairs (seen context, told code)."""
    contexts = int(max(context_M.max(), seen_M.max())) + 1
    pairs = torch.bincount(seen_M * codebook_size + told_M, minlength=contexts * codebook_size)
    count_XV = pairs.view(contexts, codebook_size).double()
    overall_V = count_XV.sum(0) + 1
    overall_V /= overall_V.sum()
    p_M = (count_XV[context_M, code_M] + strength * overall_V[code_M]) / (
        count_XV.sum(1)[context_M] + strength
    )
    return -p_M.log2()


def baseline_bits(train: Codes, test: Codes) -> dict[str, float]:
    """Return bits per test image, unmirrored, of each of BASELINES and of `uniform` codes."""
    size = train.header["codebook_size"]
    tokens = test.codes_NAT.shape[2]
    views = train.codes_NAT.shape[1]
    train_NT, label_N = train.codes_NAT.flatten(0, 1), train.label_N.repeat_interleave(views)
    test_NT, half = test.codes_NAT[:, 0], len(train.label_N) // 2 * views
    found = {"uniform": tokens * torch.tensor(size).double().log2().item()}
    for name, context in BASELINES.items():
        seen_NT = context(train_NT, label_N, size)
        parts = [x.flatten() for x in (seen_NT[half:], train_NT[half:], seen_NT[:half])]
        told_M = train_NT[:half].flatten()
        tried = {s: smoothed_bits(*parts, told_M, size, s).mean().item() for s in STRENGTHS}
        asked_M, seen_M = context(test_NT, test.label_N, size).flatten(), seen_NT.flatten()
        strength = min(tried, key=tried.get)
        bits_M = smoothed_bits(
            asked_M, test_NT.flatten(), seen_M, train_NT.flatten(), size, strength
        )
        found[name] = tokens * bits_M.mean().item()
    return found
