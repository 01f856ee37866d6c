"""ARPG from its formulas, for one image at a time, with LlamaGen's parts; nothing of models/.

Weights go by their published names. N = T cells, order pi, label y of 0..classes (the last: none).
"""

import math

import torch
from reference_llamagen import CLASS, feed_forward, later, mix, rms, turned


def logits_of_one(w: dict, codes_T: list[int], label: int, order_S: list[int], heads: int, V: int):
    """Return logits_SV of one image; ids of the table: codes, [MASK] = V, label y = V + 1 + y."""
    depth = 1 + max(int(key.split(".")[2]) for key in w if key.startswith("layers.self_dec"))
    grid, hidden_SS = math.isqrt(len(order_S)), later(len(order_S))

    ids = [V + 1 + label] + [codes_T[cell] for cell in order_S[:-1]]
    own = [CLASS, *order_S[:-1]]
    x = w["embeddings.weight"][ids]
    for i in range(depth):  # pass 1
        at = f"layers.self_dec.{i}."
        n = rms(x, w[at + "attn_norm.weight"])
        q, k, v = (n @ w[f"{at}attn.to_{name}.weight"].T for name in "qkv")
        mixed = mix(turned(q, own, heads, grid), turned(k, own, heads, grid), v, hidden_SS)
        x = x + mixed @ w[at + "attn.proj.weight"].T
        x = x + feed_forward(rms(x, w[at + "ffn_norm.weight"]), w, at + "ffn.")

    content = rms(x, w["layers.norm.weight"])
    k = turned(content @ w["layers.to_k.weight"].T, own, heads, grid)
    v = content @ w["layers.to_v.weight"].T
    q = w["embeddings.weight"][[V] * len(order_S)]
    for i in range(depth):  # pass 2
        at = f"layers.cross_dec.{i}."
        query = rms(q, w[at + "attn_norm.weight"]) @ w[at + "attn.to_q.weight"].T
        mixed = mix(turned(query, order_S, heads, grid), k, v, hidden_SS)
        q = q + mixed @ w[at + "attn.proj.weight"].T
        q = q + feed_forward(rms(q, w[at + "ffn_norm.weight"]), w, at + "ffn.")
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
