"""PAR from its formulas, over LlamaGen's stack, for one image at a time; nothing of models/.

Weights go by their published names. N = T cells in n regions; label y of 0..classes (the last:
none). The whole published sequence of N + n - 1 slots is run, its last n - 1 logits discarded.
"""

import math

import torch
from reference_llamagen import CLASS, later, transformer


def region_cells(grid: int, n: int) -> list[int]:
    """The cell of step t, from t = ((r h + c) s + R) s + C: cell (r, c) of region (R, C)."""
    s = math.isqrt(n)
    h, cells = grid // s, [-1] * grid**2
    for r in range(h):
        for c in range(h):
            for R in range(s):
                for C in range(s):
                    cells[((r * h + c) * s + R) * s + C] = (R * h + r) * grid + C * h + c
    return cells


def hidden(slots: int, n: int) -> torch.Tensor:
    """Upper triangular; but rows a..a+n-1 see all columns < a + n, for a = n + i n."""
    hidden_SL = later(slots)
    for a in range(n, slots, n):
        hidden_SL[a : a + n, : a + n] = False
    return hidden_SL


def logits_of_one(w: dict, codes_T: list[int], label: int, heads: int, n: int) -> torch.Tensor:
    """Return logits_SV of one image."""
    tokens, grid = len(codes_T), math.isqrt(len(codes_T))
    order = region_cells(grid, n)
    embed = w["tok_embeddings.weight"]
    inputs, cells = [w["cls_embedding.embedding_table.weight"][label]], [CLASS]
    for t in range(tokens - 1):
        inputs.append(embed[codes_T[order[t]]])
        cells.append(order[t])
        if t == n - 1:  # the special tokens, after the first n codes
            for i in range(n - 1):
                inputs.append(w["spe_tok_embeddings.special_embeddings.weight"][i])
                cells.append(CLASS)  # they are not turned either
    assert len(inputs) == tokens + n - 1
    hidden_SL = hidden(len(inputs), n)
    return transformer(torch.stack(inputs), w, cells, heads, grid, hidden_SL)[:tokens]


def reference_logits(
    weights: dict, codes_BT: torch.Tensor, label_B: torch.Tensor, heads: int, regions: int
) -> torch.Tensor:
    """Return logits_BSV, in region order."""
    pairs = zip(codes_BT.tolist(), label_B.tolist(), strict=True)
    return torch.stack([logits_of_one(weights, codes, y, heads, regions) for codes, y in pairs])
