"""RandAR: any order, told by a position-instruction token before every code.

Paper: Pang et al., "RandAR: Decoder-only Autoregressive Visual Generation in Random Orders", arXiv
2412.01827. Code: github.com/ziqipang/RandAR.

The sequence is [c, p_1, x_1, p_2, x_2, ..]. The instruction p_i is one learned vector, turned by
the 2-D RoPE of the cell to come; x_i is the code there. Both are turned again in attention by the
same cell. The output of p_i predicts x_i.

Differs from it in what `method.py` says: the sequence of training has 2T slots, not 2T + 1.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.gpt import Llama, LlamaCache
from models.method import ModelConfig
from models.transformer import LayerCache, after_label, rotate, rotation_at


@dataclass
class RandARCache(LlamaCache):
    """What has been fed. Final slots are [c, p_1, x_1, .. p_q, x_q] of q committed codes."""

    next_is_fed: bool = False
    """the slot after them holds the instruction of the cell that is committed next"""

    def rewind(self, codes: int) -> None:
        self.fed, self.next_is_fed = codes and 1 + 2 * codes, False


class RandAR(Llama):
    """RandAR: the next cell is told by an instruction token; several may be asked at once."""

    any_order = True
    parallel = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.pos_instruct_embeddings = nn.Parameter(0.02 * torch.randn(1, config.width))

    def _instructions(self, cells_BS: torch.Tensor) -> torch.Tensor:
        """Return p_BSD, the learned vector turned head by head to each cell."""
        vector_HK = self.pos_instruct_embeddings.view(self.config.heads, self.config.head_width)
        rotation_BS1R = rotation_at(self.config, cells_BS, vector_HK).unsqueeze(2)
        return rotate(vector_HK.expand(*cells_BS.shape, -1, -1), rotation_BS1R).flatten(2)

    def _pairs(self, codes_BS: torch.Tensor, cells_BS: torch.Tensor) -> tuple:
        """Return [p_1, x_1, p_2, x_2, ..] as (B, 2S, D), and their cells (B, 2S)."""
        x_BSD = self.token_dropout(self.tok_embeddings(codes_BS))
        p_BSD = self._instructions(cells_BS).to(x_BSD.dtype)
        return torch.stack((p_BSD, x_BSD), dim=2).flatten(1, 2), cells_BS.repeat_interleave(2, 1)

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV, taken at the instruction slots; see Method."""
        x_BLD, cells_BL = self._pairs(codes_BT.gather(1, order_BS), order_BS)
        x_BLD = torch.cat((self.cls_embedding(label_B[:, None]), x_BLD[:, :-1]), dim=1)
        return self.logits(x_BLD, after_label(cells_BL[:, :-1]), slice(1, None, 2))

    def cache(self, label_B):
        return RandARCache(label_B, [LayerCache(2 * self.config.tokens) for _ in self.layers])

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return logits_BnV; see Method.

        The committed codes take their final slots [.. p, x, p, x], overwriting the instructions of
        the last call, and the new instructions follow in consecutive slots. The first of those
        overwritten is not fed again: it is in its final slot, and saw its final context.
        """
        (x_BLD, cells_BL), start = self._pairs(codes_Bm, cells_Bm), cache.fed
        if start == 0:
            x_BLD = torch.cat((self.cls_embedding(cache.label_B[:, None]), x_BLD), dim=1)
            cells_BL = after_label(cells_BL)
        cache.fed += x_BLD.shape[1]
        if cache.next_is_fed and x_BLD.shape[1]:
            x_BLD, cells_BL, start = x_BLD[:, 1:], cells_BL[:, 1:], start + 1
        cache.next_is_fed = True
        x_BLD = torch.cat((x_BLD, self._instructions(next_cells_Bn).to(x_BLD.dtype)), dim=1)
        cells_BL = torch.cat((cells_BL, next_cells_Bn), dim=1)
        last = slice(-next_cells_Bn.shape[1], None)
        return self.logits(x_BLD, cells_BL, last, cache.layers, start)
