"""GPT over codes in one fixed order: LlamaGen.

Paper: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
arXiv 2406.06525. Code: github.com/FoundationVision/LlamaGen.

The sequence is [c, x_1 .. x_{T-1}] and the output of slot s predicts x_{s+1}. Each token carries
the RoPE of its own cell; nothing tells the network which cell is next, so the order is fixed.

Differs from it in: the null label is put in by the training script, not in here; fp32 logits in
every mode; no stochastic depth; any scan can be the fixed order, raster being LlamaGen's.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.method import Method
from models.transformer import (
    Block,
    ClassEmbedding,
    LayerCache,
    ModelConfig,
    RMSNorm,
    initialise,
    rotation_at,
    run_blocks,
    widened,
)


@dataclass
class GPTCache:
    """What has been fed: the labels, the number of codes, and every layer's keys and values."""

    label_B: torch.Tensor
    layers: list[LayerCache]
    committed: int = 0
    label_is_fed: bool = False


class GPT(Method):
    """LlamaGen: the next cell is told by nothing, the order being fixed."""

    any_order = False
    parallel = False

    def __init__(self, config: ModelConfig):
        """Build the network; the output head starts at zero, so the first loss is ln V."""
        super().__init__(config)
        self.cls_embedding = ClassEmbedding(config.classes, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self)
        nn.init.zeros_(self.output.weight)

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV; see Method. Raises ValueError unless every row is the fixed order."""
        self.check_order(order_BS)
        codes_BS = codes_BT.gather(1, order_BS)
        inputs_BSD = torch.cat(
            (self.cls_embedding(label_B), self.tok_embeddings(codes_BS[:, :-1])), dim=1
        )
        own_cell_BS = torch.cat((torch.full_like(order_BS[:, :1], -1), order_BS[:, :-1]), dim=1)
        x_BSD = self.token_dropout(inputs_BSD)
        x_BSD = run_blocks(self.layers, x_BSD, rotation_at(self.config, own_cell_BS))
        return widened(self.output(self.norm(x_BSD)))

    def cache(self, label_B):
        """Return an empty GPTCache."""
        layers = [LayerCache(self.config.tokens) for _ in self.layers]
        return GPTCache(label_B, layers)

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return logits_B1V; see Method."""
        if next_cells_Bn.shape[1] != 1:
            raise ValueError(f"gpt decodes one cell at a time, asked for {next_cells_Bn.shape[1]}")
        x_BmD, fed_Bm = self.tok_embeddings(codes_Bm), cells_Bm
        if not cache.label_is_fed:
            x_BmD = torch.cat((self.cls_embedding(cache.label_B), x_BmD), dim=1)
            fed_Bm = torch.cat((torch.full_like(next_cells_Bn, -1), fed_Bm), dim=1)
        start = cache.committed + cache.label_is_fed
        x_BmD = run_blocks(
            self.layers, x_BmD, rotation_at(self.config, fed_Bm), cache.layers, start
        )
        cache.committed += codes_Bm.shape[1]
        cache.label_is_fed = True
        return widened(self.output(self.norm(x_BmD[:, -1:])))
