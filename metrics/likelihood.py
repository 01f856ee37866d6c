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

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

from metrics.calibration import collect, ece, equal_width_edges, estimate, mean_of
from models.command import InputError
from models.data import Codes, evenly
from models.method import Method
from models.orders import ORDERS, sample_chance
from models.sampling import log_p

RANDOM = "random_"
"""start of the name of a random order that is the same for all images"""
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
"""pseudo-counts of the prior of the models without a network that are tried"""
EVAL_IMAGES = 2_000
"""images of a likelihood estimate during training; eval_c2i.py takes them all"""


@torch.no_grad()
def logit_batches(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 100,
    name: str | None = None,
    target_NT: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits_BSV, target_BS) of consecutive images, with a progress bar if it has a name.

    The targets are the codes that are read, or others. For measures of whole predictions: all of
    them at once would take 2.6 GB for 10,000 images.
    """
    device = next(model.parameters()).device
    batch = batch if device.type == "cuda" else min(batch, 16)  # what a core's cache holds
    inputs = codes_NT, label_N, order_NS, codes_NT if target_NT is None else target_NT
    chunks = list(zip(*(x.split(batch) for x in inputs), strict=True))
    bar = {"unit": "image", "unit_scale": batch, "leave": False, "disable": name is None}
    for chunk in tqdm(chunks, name, **bar):
        codes_BT, label_B, order_BS, target_BT = (x.to(device) for x in chunk)
        yield model(codes_BT, label_B, order_BS), target_BT.gather(1, order_BS)


def bits_per_code(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    order_NS: torch.Tensor,
    batch: int = 500,
    name: str | None = None,
) -> torch.Tensor:
    """Return -log2 p of every code, float32 (N, S) on the CPU, by visiting step."""
    parts = [
        F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten(), reduction="none")
        .view_as(target_BS)
        .cpu()
        for logits_BSV, target_BS in logit_batches(model, codes_NT, label_N, order_NS, batch, name)
    ]
    return torch.cat(parts) / math.log(2)


def likelihood(model: Method, test: Codes, order: str, random_orders: int = 1) -> dict[str, float]:
    """Return held-out bits per image in an order: mean and standard error over the test images.

    `random` is an order of its own for each image, averaged over `random_orders` of them.
    """
    count = random_orders if order == "random" else 1
    inputs, images = (test.codes_NAT[:, 0], test.label_N), len(test.label_N)
    bits_N = torch.zeros(images)
    for seed in range(count):
        order_NS, name = orders_for(model, order, images, seed), f"bits, {order} order"
        bits_N += bits_per_code(model, *inputs, order_NS, name=name).sum(1) / count
    mean, se = bits_N.mean().item(), (bits_N.std() / images**0.5).item()
    return {"mean": mean, "se": se, "orders": count}


def log_p_given_all(model: Method, codes_T: torch.Tensor, label: int) -> torch.Tensor:
    """Return log p of each code given all the others and the label, nats (T,)."""
    cell_T = torch.arange(len(codes_T), device=codes_T.device)
    # row t visits all the others before cell t
    order_TT = (cell_T == cell_T.unsqueeze(1)).int().argsort(dim=1, stable=True)
    label_T = torch.full_like(cell_T, label)
    return log_p(model, codes_T.expand(len(cell_T), -1), label_T, order_TT)[:, -1]


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
    orders = {"raster": model.order("raster"), "reverse": model.order("raster").flip(0)}
    orders[model.config.scan] = model.order(model.config.scan)  # perhaps one of its own
    for name in ORDERS:
        with contextlib.suppress(InputError):  # not defined on this side, for example an odd one
            orders[name] = model.order(name)
    if random_orders:
        order_KS = orders_for(model, "random", random_orders, seed)
        orders |= {f"{RANDOM}{k}": order_S for k, order_S in enumerate(order_KS)}
    return orders


def ensemble(bits_KN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits_N of p averaged over K orders, and of log p averaged: float64, first <= second.

    The second is what one order drawn at random costs; exp of it is no distribution.
    """
    log_p_KN = -math.log(2) * bits_KN.double()
    log_mean_N = log_p_KN.logsumexp(0) - math.log(len(bits_KN))
    return -log_mean_N / math.log(2), bits_KN.double().mean(0)


def order_report(
    model: Method,
    codes_NT: torch.Tensor,
    label_N: torch.Tensor,
    random_orders: int,
    batch: int = 100,
    seed: int = 0,
) -> dict:
    """Return the likelihood in `orders_to_measure`, in bits per image, each with its interval.

    `bits_per_step` holds a curve of S values for each order, and for `random` the mean of the
    random ones. Spreads and ensembles are there if there are two random orders or more.
    """
    orders, bits = orders_to_measure(model, random_orders, seed), {}
    for name, order_S in tqdm(orders.items(), desc="orders", unit="order"):
        order_NS = order_S.expand(len(label_N), -1)
        bits[name] = bits_per_code(model, codes_NT, label_N, order_NS, batch, name)
    per_image = {name: bits_NS.double().sum(1) for name, bits_NS in bits.items()}
    report = {
        "bits_per_image": {
            name: mean_of(bits_N, seed) | {"se": (bits_N.std() / len(bits_N) ** 0.5).item()}
            for name, bits_N in per_image.items()
        },
        "bits_per_step": {name: mean_of(bits_NS, seed) for name, bits_NS in bits.items()},
    }
    drawn = [name for name in bits if name.startswith(RANDOM)]
    if len(drawn) < 2:
        return report
    curves_NS = torch.stack([bits[name] for name in drawn]).mean(0)
    report["bits_per_step"]["random"] = mean_of(curves_NS, seed)
    random_KN, report["ensemble"] = torch.stack([per_image[name] for name in drawn]), {}
    images = random_KN.shape[1]
    for group, bits_KN in (("random", random_KN), ("all", torch.stack([*per_image.values()]))):
        joint_N, geometric_N = ensemble(bits_KN)
        report["ensemble"][group] = {
            "orders": len(bits_KN),
            "log_mean_exp": mean_of(joint_N, seed),
            "mean_of_logs": mean_of(geometric_N, seed),
            "gain": mean_of(geometric_N - joint_N, seed),
        }
    report["sd_over_random_orders"] = {
        "per_image": mean_of(random_KN.std(0), seed),
        "of_their_means": estimate(random_KN.T, lambda sums_RK: (sums_RK / images).std(1), seed),
        "orders": len(drawn),
    }
    return report


def _to_measure(model: Method, codes: Codes, order: str) -> tuple[torch.Tensor, ...]:
    """Return (codes_NT, label_N, order_NS) of EVAL_IMAGES images, evenly spaced and unmirrored."""
    codes = codes.rows(torch.from_numpy(evenly(len(codes.label_N), EVAL_IMAGES)))
    return codes.codes_NAT[:, 0], codes.label_N, orders_for(model, order, len(codes.label_N))


def split_bits(model: Method, splits: dict[str, Codes], order: str) -> dict[str, float]:
    """Return the mean bits per code of EVAL_IMAGES images of each split, unmirrored."""
    model.eval()
    return {
        name: bits_per_code(model, *_to_measure(model, codes, order)).mean().item()
        for name, codes in splits.items()
    }


def token_ece(model: Method, codes: Codes, order: str) -> float:
    """Return the top-label ECE of EVAL_IMAGES images, unmirrored, in 15 bins of equal width."""
    model.eval()
    tokens = collect(logit_batches(model, *_to_measure(model, codes, order)))
    return ece(tokens, equal_width_edges())["value"]


def smoothed_bits(seen: tuple, test: tuple, codebook_size: int, strength: float) -> float:
    """Return the mean of -log2 p(code | context) over `test`, learned from `seen`.

    Both are (contexts, codes), int64 of one shape each.
    """
    (context_M, code_M), (seen_L, next_L) = ([x.flatten() for x in pair] for pair in (test, seen))
    contexts = int(max(context_M.max(), seen_L.max())) + 1
    pairs = torch.bincount(seen_L * codebook_size + next_L, minlength=contexts * codebook_size)
    count_XV = pairs.view(contexts, codebook_size).double()
    overall_V = count_XV.sum(0) + 1
    overall_V /= overall_V.sum()
    count_M = count_XV[context_M, code_M] + strength * overall_V[code_M]
    return -(count_M / (count_XV.sum(1)[context_M] + strength)).log2().mean().item()


def baseline_bits(train: Codes, test: Codes) -> dict[str, float]:
    """Return bits per test image, unmirrored, of what codes cost without a network.

    `uniform` knows nothing, `class_position` the label and the cell, `raster_bigram` the last code.
    """
    size, views = train.header["codebook_size"], train.codes_NAT.shape[1]
    train_NT, label_N = train.codes_NAT.flatten(0, 1), train.label_N.repeat_interleave(views)
    test_NT, half = test.codes_NAT[:, 0], len(train.label_N) // 2 * views
    tokens, cell_T = test_NT.shape[1], torch.arange(test_NT.shape[1])
    contexts = {
        "class_position": lambda codes_NT, label_N: label_N[:, None] * tokens + cell_T,
        # a mark before the first
        "raster_bigram": lambda codes_NT, _: F.pad(codes_NT[:, :-1], (1, 0), value=size),
    }
    bits = {"uniform": tokens * math.log2(size)}
    for name, context in contexts.items():
        seen_NT, pairs = context(train_NT, label_N), (context(test_NT, test.label_N), test_NT)
        first, second = (seen_NT[:half], train_NT[:half]), (seen_NT[half:], train_NT[half:])
        best = min(STRENGTHS, key=lambda strength: smoothed_bits(first, second, size, strength))
        bits[name] = tokens * smoothed_bits((seen_NT, train_NT), pairs, size, best)
    return bits
