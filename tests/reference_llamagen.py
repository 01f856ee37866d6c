"""LlamaGen from its formulas: no cache, no fused attention, nothing of models/.

Weights go by their published names. One image at a time: its sequence is [c, x_0 .. x_{N-2}].
"""

import math

import torch

CLASS = None
"""in the place of a cell: the class token, whose rotation is zero"""


def rms(x_LD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    return weight_D * x_LD / torch.sqrt((x_LD**2).mean(-1, keepdim=True) + 1e-5)


def rope(x_HK: torch.Tensor, cell: int | None, grid: int) -> torch.Tensor:
    """Turn adjacent pairs, head by head: the first half of the angles by row, then by column."""
    if cell is CLASS:
        return torch.zeros_like(x_HK)
    row, column = divmod(cell, grid)
    width = x_HK.shape[1]
    out_HK = torch.empty_like(x_HK)
    for pair in range(width // 2):
        quarter = width // 4
        where, j = (row, pair) if pair < quarter else (column, pair - quarter)
        angle = where * 10000 ** (-4 * j / width)
        u, v = x_HK[:, 2 * pair], x_HK[:, 2 * pair + 1]
        out_HK[:, 2 * pair] = u * math.cos(angle) - v * math.sin(angle)
        out_HK[:, 2 * pair + 1] = v * math.cos(angle) + u * math.sin(angle)
    return out_HK


def turned(x_LD: torch.Tensor, cells: list, heads: int, grid: int) -> torch.Tensor:
    """Return x_LHK with each slot turned by its cell."""
    x_LHK = x_LD.view(len(x_LD), heads, -1)
    return torch.stack([rope(x_HK, cell, grid) for x_HK, cell in zip(x_LHK, cells, strict=True)])


def mix(q_LHK: torch.Tensor, k_LHK: torch.Tensor, v_LD: torch.Tensor, hidden_SL: torch.Tensor):
    score_HSL = torch.einsum("shk,lhk->hsl", q_LHK, k_LHK) / math.sqrt(q_LHK.shape[-1])
    weight_HSL = score_HSL.masked_fill(hidden_SL, -math.inf).softmax(-1)
    return torch.einsum("hsl,lhk->shk", weight_HSL, v_LD.view(k_LHK.shape)).flatten(1)


def later(length: int) -> torch.Tensor:
    """Return what slot s of a causal model does not see: all after it."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def attention(x_LD: torch.Tensor, w: dict, at: str, cells: list, heads: int, grid: int, hidden_SL):
    q_LD, k_LD, v_LD = (x_LD @ w[at + "wqkv.weight"].T).chunk(3, dim=1)
    q_LHK, k_LHK = (turned(part, cells, heads, grid) for part in (q_LD, k_LD))
    return mix(q_LHK, k_LHK, v_LD, hidden_SL) @ w[at + "wo.weight"].T


def feed_forward(x_LD: torch.Tensor, w: dict, at: str) -> torch.Tensor:
    gate_LD = x_LD @ w[at + "w1.weight"].T
    silu_LD = gate_LD * torch.sigmoid(gate_LD)
    return (silu_LD * (x_LD @ w[at + "w3.weight"].T)) @ w[at + "w2.weight"].T


def transformer(
    x_LD: torch.Tensor, w: dict, cells: list, heads: int, grid: int, hidden_SL=None
) -> torch.Tensor:
    """Return logits_LV of a sequence of vectors that lie at `cells`; what comes later is hidden."""
    i, hidden_SL = 0, later(len(x_LD)) if hidden_SL is None else hidden_SL
    while f"layers.{i}.attention.wo.weight" in w:
        at = f"layers.{i}."
        norm_LD = rms(x_LD, w[at + "attention_norm.weight"])
        x_LD = x_LD + attention(norm_LD, w, at + "attention.", cells, heads, grid, hidden_SL)
        norm_LD = rms(x_LD, w[at + "ffn_norm.weight"])
        x_LD = x_LD + feed_forward(norm_LD, w, at + "feed_forward.")
        i += 1
    return rms(x_LD, w["norm.weight"]) @ w["output.weight"].T


def reference_logits(
    weights: dict[str, torch.Tensor],
    codes_BT: torch.Tensor,
    label_B: torch.Tensor,
    heads: int,
    grid: int,
) -> torch.Tensor:
    """Return logits_BTV, in raster order."""
    images = []
    for codes_T, label in zip(codes_BT, label_B.tolist(), strict=True):
        c_1D = weights["cls_embedding.embedding_table.weight"][label : label + 1]
        x_LD = torch.cat((c_1D, weights["tok_embeddings.weight"][codes_T[:-1]]))
        cells = [CLASS, *range(len(codes_T) - 1)]
        images.append(transformer(x_LD, weights, cells, heads, grid))
    return torch.stack(images)
