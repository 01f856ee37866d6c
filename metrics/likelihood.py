"""Exact likelihood of codes under a method: bits per code, by order and by step.

The product of the conditionals is a distribution over code grids, so bits are those of a real
code. The ceiling is 64 * log2(V): 640 bits an image at V = 1024.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models.method import Method
from models.sampling import sample_chance


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
