"""Likelihood over orders: bits per image in each, their spread, and ensembles of orders.

Any order gives an exact log p of the same image, and a true model would give the same in all. How
much they differ says how consistent a model is; the mean over orders of p is itself a distribution
over images, and by Jensen's inequality never a worse one than a single order drawn at random.
"""

import math

import torch
from tqdm import tqdm

from metrics.calibration import estimate, mean_of
from metrics.likelihood import bits_per_code, orders_for
from models.errors import InputError
from models.method import Method
from models.orders import SCANS

RANDOM = "random_"


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
