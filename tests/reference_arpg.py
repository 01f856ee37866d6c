"""ARPG from its formulas, for one image at a time: no cache, nothing of models/, plain loops.

Weights go by their published names. N = T cells, order pi, label y of 0..classes (the last: none).
"""

import math

import torch


def rms(x_LD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-5) * weight."""
    return x_LD / (x_LD.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight_D


def swiglu(x_LD: torch.Tensor, weights: dict, prefix: str) -> torch.Tensor:
    """W2(SiLU(W1 x) * W3 x)."""
    gate = x_LD @ weights[prefix + "w1.weight"].T
    gate = gate / (1 + (-gate).exp())
    return (gate * (x_LD @ weights[prefix + "w3.weight"].T)) @ weights[prefix + "w2.weight"].T


def turn(x_LD: torch.Tensor, cells: list[int | None], heads: int, grid: int) -> torch.Tensor:
    """2-D RoPE of slots by cell, head by head; None, the class token: cos = sin = 0."""
    width = x_LD.shape[1] // heads
    out = torch.zeros_like(x_LD)
    for slot, cell in enumerate(cells):
        if cell is None:
            continue
        for pair in range(width // 2):
            frequency = 10000 ** (-2 * (pair % (width // 4)) / (width / 2))
            angle = (cell // grid if pair < width // 4 else cell % grid) * frequency
            cos, sin = math.cos(angle), math.sin(angle)
            for head in range(heads):
                at = head * width + 2 * pair
                a, b = x_LD[slot, at], x_LD[slot, at + 1]
                out[slot, at], out[slot, at + 1] = a * cos - b * sin, b * cos + a * sin
    return out


def attention(q_LD: torch.Tensor, k_LD: torch.Tensor, v_LD: torch.Tensor, heads: int):
    """Slot t of q sees slots 0..t of k and v."""
    out = torch.zeros_like(q_LD)
    width = q_LD.shape[1] // heads
    for t in range(len(q_LD)):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            score = torch.einsum("k,lk->l", q_LD[t, part], k_LD[: t + 1, part]) / math.sqrt(width)
            share = (score - score.max()).exp()
            out[t, part] = torch.einsum("l,lk->k", share / share.sum(), v_LD[: t + 1, part])
    return out


def logits_of_one(w: dict, codes_T: list[int], label: int, order_S: list[int], heads: int, V: int):
    """Return logits_SV of one image; ids of the table: codes, [MASK] = V, label y = V + 1 + y."""
    depth = 1 + max(int(key.split(".")[2]) for key in w if key.startswith("layers.self_dec"))
    grid = math.isqrt(len(order_S))

    ids = [V + 1 + label] + [codes_T[cell] for cell in order_S[:-1]]
    own = [None, *order_S[:-1]]
    x = w["embeddings.weight"][ids]
    for i in range(depth):  # pass 1
        at = f"layers.self_dec.{i}."
        n = rms(x, w[at + "attn_norm.weight"])
        q, k, v = (n @ w[f"{at}attn.to_{name}.weight"].T for name in "qkv")
        mixed = attention(turn(q, own, heads, grid), turn(k, own, heads, grid), v, heads)
        x = x + mixed @ w[at + "attn.proj.weight"].T
        x = x + swiglu(rms(x, w[at + "ffn_norm.weight"]), w, at + "ffn.")

    content = rms(x, w["layers.norm.weight"])
    k = turn(content @ w["layers.to_k.weight"].T, own, heads, grid)
    v = content @ w["layers.to_v.weight"].T
    q = w["embeddings.weight"][[V] * len(order_S)]
    for i in range(depth):  # pass 2
        at = f"layers.cross_dec.{i}."
        asked = rms(q, w[at + "attn_norm.weight"]) @ w[at + "attn.to_q.weight"].T
        mixed = attention(turn(asked, order_S, heads, grid), k, v, heads)
        q = q + mixed @ w[at + "attn.proj.weight"].T
        q = q + swiglu(rms(q, w[at + "ffn_norm.weight"]), w, at + "ffn.")
    return rms(q, w["norm.weight"]) @ w["head.weight"].T


def reference_logits(
    weights: dict[str, torch.Tensor],
    codes_BT: torch.Tensor,
    label_B: torch.Tensor,
    order_BS: torch.Tensor,
    heads: int,
    classes: int,
) -> torch.Tensor:
    """Return logits_BSV, float64; logits[b, s] is of the code at cell order[b, s]."""
    codes = weights["head.weight"].shape[0]
    if weights["embeddings.weight"].shape[0] != codes + classes + 3:
        raise ValueError(f"expected {codes + classes + 3} rows of embeddings")
    rows = zip(codes_BT.tolist(), label_B.tolist(), order_BS.tolist(), strict=True)
    return torch.stack([logits_of_one(weights, *row, heads, codes) for row in rows])
