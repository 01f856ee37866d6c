"""RAR a second time, from the formulas alone: one slot, one image, one head at a time, no cache.

Paper: Yu et al., arXiv 2411.00776. Nothing is shared with models/: it is here to disagree with
models/rar.py. The sequence has all N + 2 slots of the published code, the useless last one too.
"""

import math

import torch

Weights = dict[str, torch.Tensor]


def _linear(weights: Weights, name: str, x_D: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oi,i->o", weights[f"{name}.weight"], x_D) + weights[f"{name}.bias"]


def _normalised(x_D: torch.Tensor) -> torch.Tensor:
    centred_D = x_D - x_D.sum() / len(x_D)
    return centred_D / ((centred_D**2).sum() / len(x_D) + 1e-6).sqrt()


def _layer_norm(weights: Weights, name: str, x_D: torch.Tensor) -> torch.Tensor:
    return _normalised(x_D) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _modulation(weights: Weights, name: str, c_D: torch.Tensor, parts: int) -> list[torch.Tensor]:
    out = _linear(weights, f"{name}.adaLN_modulation.1", c_D / (1 + torch.exp(-c_D)))
    width = len(c_D)
    return [out[i * width : (i + 1) * width] for i in range(parts)]


def _attention(weights: Weights, name: str, u: list[torch.Tensor], heads: int) -> list:
    """Return the attention output of every slot, given its modulated input u[s]."""
    width = len(u[0])
    head_width = width // heads
    projected = [_linear(weights, f"{name}.qkv", u_D) for u_D in u]
    answers = [[] for _ in u]
    for head in range(heads):
        first = head * head_width
        q = [x[first : first + head_width] for x in projected]
        k = [x[width + first : width + first + head_width] for x in projected]
        v = [x[2 * width + first : 2 * width + first + head_width] for x in projected]
        q = [_layer_norm(weights, f"{name}.q_norm", x) for x in q]
        k = [_layer_norm(weights, f"{name}.k_norm", x) for x in k]
        for s in range(len(u)):
            scores = [math.exp(float(q[s] @ k[j]) / math.sqrt(head_width)) for j in range(s + 1)]
            mixed = sum(score * v[j] for j, score in enumerate(scores)) / sum(scores)
            answers[s].append(mixed)
    return [_linear(weights, f"{name}.proj", torch.cat(parts)) for parts in answers]


def _mlp(weights: Weights, name: str, x_D: torch.Tensor) -> torch.Tensor:
    hidden = _linear(weights, f"{name}.fc1", x_D)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return _linear(weights, f"{name}.fc2", gelu)


def _block(weights: Weights, name: str, x: list, c: list, heads: int) -> list[torch.Tensor]:
    """x + g1 * attention(norm1(x) * (1 + sc1) + sh1), then the same with the MLP."""
    m = [_modulation(weights, name, c_D, 6) for c_D in c]  # sh1 sc1 g1 sh2 sc2 g2
    slots = range(len(x))
    u = [_layer_norm(weights, f"{name}.norm1", x[s]) * (1 + m[s][1]) + m[s][0] for s in slots]
    a = _attention(weights, f"{name}.attn", u, heads)
    x = [x[s] + m[s][2] * a[s] for s in slots]
    w = [_layer_norm(weights, f"{name}.norm2", x[s]) * (1 + m[s][4]) + m[s][3] for s in slots]
    return [x[s] + m[s][5] * _mlp(weights, f"{name}.mlp", w[s]) for s in slots]


def _slots(weights: Weights, code: list, label_row: int, order: list) -> tuple[list, list]:
    """Return (inputs, conditions) of the N + 2 slots of one image."""
    embedding, n = weights["embeddings.weight"], len(order)
    position = weights["pos_embed"][0]
    target = weights["target_aware_pos_embed"][0]
    x = [weights["cls_token"][0, 0] + position[0]]
    x.append(embedding[label_row] + position[1] + target[2 + order[0]])
    for t in range(n):
        slot = embedding[code[order[t]]] + position[2 + order[t]]
        x.append(slot + target[2 + order[t + 1]] if t + 1 < n else slot)
    c = [embedding[label_row] + weights["timesteps_embeddings"][0, s] for s in range(n + 2)]
    return x, c


def reference_logits(
    weights: Weights,
    codes_BT: torch.Tensor,
    label_B: torch.Tensor,
    order_BS: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Return logits_BSV of RAR with `weights` under their published names, in their dtype.

    logits[:, s] is about the code at cell order[:, s]. label_B is 0..classes-1, or classes for the
    null label; S needs N + 2 rows.
    """
    codebook = len(weights["lm_head.bias"])
    layers = len([name for name in weights if name.endswith("mlp.fc1.bias")])
    images = []
    for code, label, order in zip(
        codes_BT.tolist(), label_B.tolist(), order_BS.tolist(), strict=True
    ):
        x, c = _slots(weights, code, codebook + 1 + label, order)
        for layer in range(layers):
            x = _block(weights, f"blocks.{layer}", x, c, heads)
        logits = []
        for s in range(1, len(order) + 1):  # cls and the last slot predict nothing
            scale, shift = _modulation(weights, "adaln_before_head", c[s], 2)
            logits.append(_linear(weights, "lm_head", _normalised(x[s]) * (1 + scale) + shift))
        images.append(torch.stack(logits))
    return torch.stack(images)
