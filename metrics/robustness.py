"""How a generator bears a context that is wrong: some codes replaced, the clean ones predicted.

While sampling a method reads its own mistakes, in training it never does (exposure bias: Ranzato et
al., "Sequence Level Training with Recurrent Neural Networks", arXiv 1511.06732). Here a share rho
of the codes is replaced and every step still has to predict its clean code, so NLL and ECE show
what wrong codes cost, and whether the method notices that it knows less.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from metrics.calibration import Batches, collect, ece, equal_width_edges, mean_of
from metrics.likelihood import logit_batches
from models.contract import Method
from models.errors import InputError

Kind = Literal["uniform", "neighbours"]
RHOS = (0.0, 0.05, 0.1, 0.2, 0.4)


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
        corrupted_NT = corrupt_context(codes_NT, rho, model.config.codes, neighbours_VK, seed)
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
