"""GPT, as in LlamaGen: one fixed order, and nothing that tells the network which cell comes next.

Paper: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
arXiv 2406.06525. Code: github.com/FoundationVision/LlamaGen.

The sequence is [c, x_1, .. x_{T-1}] and slot s predicts the code of step s. Each code carries the
2-D RoPE of its own cell.

Differs from it in what `method.py` says, and in: any scan can be the fixed order.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from models.method import Cache, Method, ModelConfig
from models.transformer import (
    Block,
    Dropout,
    LayerCache,
    RMSNorm,
    after_label,
    initialise,
    rotation_at,
    widened,
)


class Llama(Method):
    """LlamaGen's network, which RandAR and PAR have too: embeddings, blocks, head."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        table = nn.Embedding(config.classes + 1, config.width)  # its last row: the null label
        self.cls_embedding = nn.Sequential(OrderedDict(embedding_table=table))
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.token_dropout = Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self, self.output)

    def logits(self, x_BLD, cells_BL, at=slice(None), layers=None, start=0, seen_LL=None):
        """Run slots that lie at cells_BL (-1: nowhere) through the blocks; logits of those `at`.

        With a LayerCache for each of `layers`, the slots are start..start+L of them; see Attention
        for what a slot sees.
        """
        rotation_B1LR = rotation_at(self.config, cells_BL, self.output.weight).unsqueeze(1)
        for i, block in enumerate(self.layers):
            wanted = at if block is self.layers[-1] else slice(None)  # nothing reads the others
            how = (rotation_B1LR, layers and layers[i], start, seen_LL)
            x_BLD = block(x_BLD, *how, at=wanted)
        return widened(self.output(self.norm(x_BLD)))


@dataclass
class LlamaCache(Cache):
    """The label, and keys and values of what has been fed."""

    label_B: torch.Tensor
    layers: list[LayerCache]
    fed: int = 0
    """slots of the layers' caches that are final"""

    def rewind(self, codes: int) -> None:
        self.fed = codes and 1 + codes  # the class token is fed with the first call


class GPT(Llama):
    """LlamaGen: the next cell is told by nothing, the order being fixed."""

    any_order = False
    parallel = False

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV; see Method. Raises ValueError unless every row is the fixed order."""
        self.check_order(order_BS)
        x_BSD = self.tok_embeddings(codes_BT.gather(1, order_BS)[:, :-1])
        x_BSD = torch.cat((self.cls_embedding(label_B[:, None]), x_BSD), dim=1)
        x_BSD = self.token_dropout(x_BSD)
        return self.logits(x_BSD, after_label(order_BS[:, :-1]))

    def cache(self, label_B):
        return LlamaCache(label_B, [LayerCache(self.config.tokens) for _ in self.layers])

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        self.check_one(next_cells_Bn)
        x_BmD, start = self.tok_embeddings(codes_Bm), cache.fed
        if start == 0:
            x_BmD = torch.cat((self.cls_embedding(cache.label_B[:, None]), x_BmD), dim=1)
            cells_Bm = after_label(cells_Bm)
        cache.fed += x_BmD.shape[1]
        return self.logits(x_BmD, cells_Bm, slice(-1, None), cache.layers, start)
