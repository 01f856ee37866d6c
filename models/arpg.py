"""ARPG: any order, told by the position of a query that carries nothing else.

Paper: Li et al., "Autoregressive Image Generation with Randomized Parallel Decoding", arXiv
2503.10568. Code: github.com/hp-l33/ARPG.

Two passes. Pass 1 runs the content [c, x_1 .. x_{T-1}] through the first half of the layers,
causally, each code turned by the RoPE of its own cell; one shared projection makes its outputs keys
and values. Pass 2 runs one learned vector per cell to come through the second half; its query is
turned by the RoPE of that cell, and it attends to the shared keys and values of what is known.
Queries never attend to each other, so any number of cells can be asked at once.

Differs from it in what `method.py` says, and in:
- causality is in the call, never in `self.training`: the official eval() lets query t see its own
  code, so its validation loss means nothing;
- decoding feeds the new codes of a step to pass 1 causally, in their order. The official loop lets
  them see each other both ways, which training never shows; here every grouping gives the logits of
  teacher forcing;
- each image has its own order.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.command import InputError
from models.gpt import LlamaCache
from models.method import Method, ModelConfig
from models.transformer import (
    Dropout,
    LayerCache,
    RMSNorm,
    SwiGLU,
    after_label,
    attend,
    initialise,
    rotate,
    rotation_at,
    split_heads,
    widened,
)

KeysValues = tuple[torch.Tensor, torch.Tensor]


def keys_values(owner: nn.Module, x_BSD: torch.Tensor, rotation_B1SR: torch.Tensor) -> KeysValues:
    """Return k_BHSK and v_BHSK by the owner's `to_k` and `to_v`, the keys turned to their cells."""
    k_BHSK = rotate(split_heads(owner.to_k(x_BSD), owner.heads), rotation_B1SR)
    return k_BHSK, split_heads(owner.to_v(x_BSD), owner.heads)


class CrossAttention(nn.Module):
    """Pass 2: queries see keys and values that all layers share, never each other."""

    projections = ("to_q", "proj")

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        for name in self.projections:  # apart, as in the published files
            setattr(self, name, nn.Linear(config.width, config.width, bias=False))
        self.dropout = Dropout(config.residual_dropout)

    def forward(
        self, x_BSD: torch.Tensor, rotation_B1SR: torch.Tensor, kv: KeysValues, slots: range
    ) -> torch.Tensor:
        """Let the query of a slot see it and those before it; without `slots` all see all."""
        q_BHSK = rotate(split_heads(self.to_q(x_BSD), self.heads), rotation_B1SR)
        return self.dropout(self.proj(attend(q_BHSK, *kv, slots)))


class SelfAttention(CrossAttention):
    """Pass 1: content sees the content before it, and itself."""

    projections = ("to_q", "to_k", "to_v", "proj")

    def forward(self, x_BSD, rotation_B1SR, cache: LayerCache | None, start: int) -> torch.Tensor:
        """Let token s see tokens <= s of x and, with a cache, its slots before `start`."""
        kv = keys_values(self, x_BSD, rotation_B1SR)
        if cache is not None:
            kv = cache.write(start, *kv)
        slots = range(start, start + x_BSD.shape[1])
        return super().forward(x_BSD, rotation_B1SR, kv, slots)


class Block(nn.Module):
    """Pre-norm block around either attention."""

    def __init__(self, config: ModelConfig, attn: nn.Module):
        super().__init__()
        self.attn = attn
        self.ffn = SwiGLU(config.width, config.ffn_dropout)
        self.attn_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(self, x_BSD: torch.Tensor, rotation_B1SR: torch.Tensor, *seen) -> torch.Tensor:
        """Map (B, S, D) to (B, S, D); `seen` are the attention's further arguments."""
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), rotation_B1SR, *seen)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class TwoPasses(nn.Module):
    """The stack: half of the layers read the content, the other half answer the queries."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = config.layers // 2
        self.heads = config.heads
        self.self_dec = nn.ModuleList(Block(config, SelfAttention(config)) for _ in range(half))
        self.cross_dec = nn.ModuleList(Block(config, CrossAttention(config)) for _ in range(half))
        self.norm = RMSNorm(config.width)
        self.to_k = nn.Linear(config.width, config.width, bias=False)
        self.to_v = nn.Linear(config.width, config.width, bias=False)

    def read(
        self, x_BSD: torch.Tensor, rotation_BSR: torch.Tensor, cache: LlamaCache | None = None
    ) -> KeysValues:
        """Pass 1: return keys and values of the content so far; with a cache, x follows in it.

        Its layers are those of pass 1, and one more for what pass 2 reads, which has none itself.
        """
        rotation_B1SR, start = rotation_BSR.unsqueeze(1), cache.fed if cache else 0
        for i, block in enumerate(self.self_dec):
            x_BSD = block(x_BSD, rotation_B1SR, cache and cache.layers[i], start)
        x_BSD = self.norm(x_BSD)
        kv = keys_values(self, x_BSD, rotation_B1SR)
        if cache is None:
            return kv
        cache.fed += x_BSD.shape[1]
        return cache.layers[-1].write(start, *kv)

    def answer(
        self, query_11D: torch.Tensor, rotation_BSR: torch.Tensor, kv: KeysValues, slots: range
    ) -> torch.Tensor:
        """Pass 2: return x_BSD of the query turned S ways; see attend for `slots`.

        The query is one vector until its first rotation spreads it over the batch and the cells.
        """
        x_BSD, rotation_B1SR = query_11D, rotation_BSR.unsqueeze(1)
        for block in self.cross_dec:
            x_BSD = block(x_BSD, rotation_B1SR, kv, slots)
        return x_BSD


class ARPG(Method):
    """ARPG: the next cell is told by where its query points; several may be asked at once."""

    any_order = True
    parallel = True
    head_name = "head"

    def __init__(self, config: ModelConfig):
        """Raise InputError for an odd number of layers."""
        super().__init__(config)
        if config.layers % 2:
            raise InputError(
                f"arpg gives half of its layers to each of two passes: "
                f"expected an even number of layers, got {config.layers}"
            )
        self.embeddings = nn.Embedding(config.vocab_size + config.classes + 3, config.width)
        self.token_dropout = Dropout(config.token_dropout)
        self.layers = TwoPasses(config)
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self, self.head)

    def _embeddings(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the codes' vectors (V, D), the query's (1, 1, D), the labels' (classes + 1, D).

        Apart, so that an id out of range is an error and not another's vector. The last row of the
        published table belongs to a label of theirs that nothing uses.
        """
        sizes = [self.config.vocab_size, 1, self.config.classes + 1, 1]
        code_VD, query_1D, label_D, _ = self.embeddings.weight.split(sizes)
        return code_VD, query_1D.unsqueeze(0), label_D

    def _rotation(self, cells_BS: torch.Tensor) -> torch.Tensor:
        return rotation_at(self.config, cells_BS, self.head.weight)

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV; see Method. Query s sees slots 0..s of pass 1: c, x_1 .. x_s."""
        code_VD, query_11D, label_D = self._embeddings()
        codes_BS = codes_BT.gather(1, order_BS)
        c_B1D, x_BSD = F.embedding(label_B[:, None], label_D), F.embedding(codes_BS, code_VD)
        x_BSD = self.token_dropout(torch.cat((c_B1D, x_BSD[:, :-1]), dim=1))
        kv = self.layers.read(x_BSD, self._rotation(after_label(order_BS[:, :-1])))
        slots = range(order_BS.shape[1])
        x_BnD = self.layers.answer(query_11D, self._rotation(order_BS), kv, slots)
        return widened(self.head(self.norm(x_BnD)))

    def cache(self, label_B):
        slots = self.config.tokens  # the class token, and all codes but the last
        layers = range(len(self.layers.self_dec) + 1)
        return LlamaCache(label_B, [LayerCache(slots) for _ in layers])

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return logits_BnV; see Method. Each depends on what is committed and its cell alone."""
        code_VD, query_11D, label_D = self._embeddings()
        x_BmD = F.embedding(codes_Bm, code_VD)
        if cache.fed == 0:
            x_BmD = torch.cat((F.embedding(cache.label_B[:, None], label_D), x_BmD), dim=1)
            cells_Bm = after_label(cells_Bm)
        kv = tuple(cache.layers[-1].kv_2)
        if x_BmD.shape[1]:
            kv = self.layers.read(x_BmD, self._rotation(cells_Bm), cache)
        last = range(cache.fed - 1, cache.fed)
        x_BnD = self.layers.answer(query_11D, self._rotation(next_cells_Bn), kv, last)
        return widened(self.head(self.norm(x_BnD)))
