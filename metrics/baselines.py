"""What codes cost without a network: the bits per image that every method has to beat.

Frequencies of the train codes given a context, smoothed towards each code's overall frequency by a
Dirichlet prior. Its strength is the one that predicts half of the train images best from the other.
"""

import torch

from models.data import Codes

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""pseudo-counts of the prior that are tried"""


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
