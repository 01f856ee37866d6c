"""RandAR from its formulas, over LlamaGen's stack; nothing of models/.

The sequence is [c, p(pi_1), x_1, p(pi_2), x_2, ..], 2N + 1 long; the logits are those of the p.
"""

import torch
from reference_llamagen import CLASS, rope, transformer


def reference_logits(
    weights: dict[str, torch.Tensor],
    codes_BT: torch.Tensor,
    label_B: torch.Tensor,
    order_BS: torch.Tensor,
    heads: int,
    grid: int,
) -> torch.Tensor:
    """Return logits_BSV; logits[b, s] is of the code at cell order[b, s]."""
    vector_HK = weights["pos_instruct_embeddings"].view(heads, -1)
    images = []
    for b, label in enumerate(label_B.tolist()):
        slots, cells = [weights["cls_embedding.embedding_table.weight"][label]], [CLASS]
        for cell in order_BS[b].tolist():
            slots += [rope(vector_HK, cell, grid).flatten()]
            slots += [weights["tok_embeddings.weight"][codes_BT[b, cell]]]
            cells += [cell, cell]
        logits_LV = transformer(torch.stack(slots), weights, cells, heads, grid)
        images.append(logits_LV[1::2])
    return torch.stack(images)
