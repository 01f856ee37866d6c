"""PAR from its formulas, for one image at a time: no cache, nothing of models/, plain loops.

Weights go by their published names. N = T cells in n regions; label y of 0..classes (the last:
none). The whole published sequence of N + n - 1 slots is run, its last n - 1 logits discarded.
"""

import math

import torch


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


def visible(slots: int, n: int) -> list[list[bool]]:
    """Lower triangular; besides, rows a..a+n-1 see all columns < a + n for a = n + i n."""
    seen = [[column <= row for column in range(slots)] for row in range(slots)]
    for a in range(n, slots, n):
        for row in range(a, min(a + n, slots)):
            for column in range(min(a + n, slots)):
                seen[row][column] = True
    return seen


def rms(x_LD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-5) * weight."""
    return x_LD / (x_LD.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight_D


def swiglu(x_LD: torch.Tensor, w: dict, prefix: str) -> torch.Tensor:
    """W2(SiLU(W1 x) * W3 x)."""
    gate = x_LD @ w[prefix + "w1.weight"].T
    gate = gate / (1 + (-gate).exp())
    return (gate * (x_LD @ w[prefix + "w3.weight"].T)) @ w[prefix + "w2.weight"].T


def turn(x_LK: torch.Tensor, cells: list[int | None], grid: int) -> torch.Tensor:
    """2-D RoPE of one head's slots by cell; None, class and specials: cos = sin = 0."""
    width = x_LK.shape[1]
    cos, sin = (torch.zeros(len(cells), width // 2, dtype=x_LK.dtype) for _ in range(2))
    for slot, cell in enumerate(cells):
        for pair in range(width // 2):
            if cell is None:
                continue
            frequency = 10000 ** (-4 * (pair % (width // 4)) / width)
            angle = (cell // grid if pair < width // 4 else cell % grid) * frequency
            cos[slot, pair], sin[slot, pair] = math.cos(angle), math.sin(angle)
    out = torch.zeros_like(x_LK)
    for pair in range(width // 2):
        a, b = x_LK[:, 2 * pair], x_LK[:, 2 * pair + 1]
        out[:, 2 * pair] = a * cos[:, pair] - b * sin[:, pair]
        out[:, 2 * pair + 1] = b * cos[:, pair] + a * sin[:, pair]
    return out


def attention(x_LD: torch.Tensor, w: dict, prefix: str, heads: int, cells: list, seen: list, grid):
    """Multi-head attention; slot t sees the slots l with seen[t][l]."""
    width = x_LD.shape[1] // heads
    q_LD, k_LD, v_LD = (x_LD @ w[prefix + "wqkv.weight"].T).split(x_LD.shape[1], dim=1)
    mixed_LD = torch.zeros_like(x_LD)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        q_LK, k_LK = turn(q_LD[:, part], cells, grid), turn(k_LD[:, part], cells, grid)
        for t in range(len(x_LD)):
            those = [j for j in range(len(x_LD)) if seen[t][j]]
            score = (k_LK[those] * q_LK[t]).sum(1) / math.sqrt(width)
            share = (score - score.max()).exp()
            share = share / share.sum()
            mixed_LD[t, part] = (share[:, None] * v_LD[those, part]).sum(0)
    return mixed_LD @ w[prefix + "wo.weight"].T


def logits_of_one(w: dict, codes_T: list[int], label: int, heads: int, n: int) -> torch.Tensor:
    """Return logits_SV of one image."""
    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("layers."))
    tokens, grid = len(codes_T), math.isqrt(len(codes_T))
    order = region_cells(grid, n)
    embed = w["tok_embeddings.weight"]
    inputs, cells = [w["cls_embedding.embedding_table.weight"][label]], [None]
    for t in range(tokens - 1):
        inputs.append(embed[codes_T[order[t]]])
        cells.append(order[t])
        if t == n - 1:  # the special tokens, after the first n codes
            for i in range(n - 1):
                inputs.append(w["spe_tok_embeddings.special_embeddings.weight"][i])
                cells.append(None)
    assert len(inputs) == tokens + n - 1
    x, seen = torch.stack(inputs), visible(len(inputs), n)
    for i in range(depth):
        at = f"layers.{i}."
        inner = rms(x, w[at + "attention_norm.weight"])
        x = x + attention(inner, w, at + "attention.", heads, cells, seen, grid)
        x = x + swiglu(rms(x, w[at + "ffn_norm.weight"]), w, at + "feed_forward.")
    return rms(x[:tokens], w["norm.weight"]) @ w["output.weight"].T


def reference_logits(
    weights: dict, codes_BT: torch.Tensor, label_B: torch.Tensor, heads: int, regions: int
) -> torch.Tensor:
    """Return logits_BSV, in region order."""
    pairs = zip(codes_BT.tolist(), label_B.tolist(), strict=True)
    return torch.stack([logits_of_one(weights, codes, y, heads, regions) for codes, y in pairs])
