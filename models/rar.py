"""RAR: any order, told by a second position embedding, that of the cell to come.

Paper: Yu et al., "Randomized Autoregressive Visual Generation", arXiv 2411.00776. Code:
github.com/bytedance/1d-tokenizer.

The sequence is [cls, y, x_1 .. x_{T-1}] and the output of slot 1 + s predicts the code of step s.
A slot is the sum of what it holds, of P at its own cell, and of T ("target-aware") at the cell
that comes next; the cell pi has row 2 + pi in both tables. Besides, y and the slot's number s make
a condition, E[y] + S[s], from which every block draws its shift, scale and gate (adaLN).

Names and layout of the parameters are RAR's, so that its checkpoints load: fused q | k | v rows,
each head-major; block modulation shift, scale, gate twice; head modulation scale, then shift.

Differs from it in what `method.py` says (the sequence has T + 1 slots, not T + 2), and in: no
dropout of attention probabilities (theirs is 0.1); modulation is computed once per distinct label
and slot instead of per image and slot, the codes having no part in it. There is no dropout of
embeddings, as in theirs: `token_dropout` has no effect.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.method import Cache, Method, ModelConfig
from models.transformer import Dropout, LayerCache, attend, split_heads, widened

EPS = 1e-6


class RARAttention(nn.Module):
    """Causal multi-head attention with biases and a LayerNorm over each head's query and key."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=EPS)
        self.k_norm = nn.LayerNorm(width // heads, eps=EPS)
        self.proj = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x_BSD: torch.Tensor, cache: LayerCache | None, start: int) -> torch.Tensor:
        """Let slot s see slots <= s of x and, with a cache, its slots before `start`."""
        parts = self.qkv(x_BSD).chunk(3, dim=-1)
        q_BHSK, k_BHSK, v_BHSK = (split_heads(part, self.heads) for part in parts)
        q_BHSK, k_BHSK = self.q_norm(q_BHSK), self.k_norm(k_BHSK)
        if cache is not None:
            k_BHSK, v_BHSK = cache.write(start, k_BHSK, v_BHSK)
        slots = range(start, start + x_BSD.shape[1])
        return self.dropout(self.proj(attend(q_BHSK, k_BHSK, v_BHSK, slots)))


def mlp(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Return fc2(GELU(fc1 x)) with the exact GELU, and dropout after both."""
    parts = OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), dropout1=Dropout(dropout))
    parts |= {"fc2": nn.Linear(hidden, width), "dropout2": Dropout(dropout)}
    return nn.Sequential(parts)


class Modulation(nn.Sequential):
    """adaLN: SiLU, then a linear map that starts at zero, to `parts` vectors a slot."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, c_USD: torch.Tensor, row_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return `parts` tensors (B, S, D) of E[y] + S[s] of U labels; row_B: which an image has.

        The product runs over U labels, not B images: it is a third of a block's multiplications.
        """
        return super().forward(c_USD)[row_B].chunk(self.parts, dim=-1)


class RARBlock(nn.Module):
    """x + g1 * attention(modulated norm of x), then x + g2 * MLP(modulated norm of x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, hidden = config.width, config.ffn_width or 4 * config.width
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = RARAttention(width, config.heads, config.residual_dropout)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = mlp(width, hidden, config.ffn_dropout)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x_BSD, c_USD, row_B, cache: LayerCache | None, start: int) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_USD, row_B)
        inner_BSD = self.norm1(x_BSD) * (1 + scale1) + shift1
        x_BSD = x_BSD + gate1 * self.attn(inner_BSD, cache, start)
        inner_BSD = self.norm2(x_BSD) * (1 + scale2) + shift2
        return x_BSD + gate2 * self.mlp(inner_BSD)


class ModulatedNorm(nn.Module):
    """The head's norm, without weights of its own; here the scale comes before the shift."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x_BSD, c_USD, row_B) -> torch.Tensor:
        scale_BSD, shift_BSD = self.adaLN_modulation(c_USD, row_B)
        return self.norm_final(x_BSD) * (1 + scale_BSD) + shift_BSD


@dataclass
class RARCache(Cache):
    """What has been fed. The last slot is open: it is told a cell that was only asked for."""

    label_U: torch.Tensor
    """all labels, or those of the images"""
    row_B: torch.Tensor
    """which of them each image has"""
    slots_BLD: torch.Tensor
    """the slots [cls, y, x_1 ..] without T, written in place"""
    layers: list[LayerCache]
    fed: int = 0
    """slots of the layers' caches that are final: with T of the code that followed"""
    next_is_fed: bool = False
    """the slot after those is in them too, with T of the cell that is committed next"""

    def rewind(self, codes: int) -> None:
        self.fed, self.next_is_fed = codes and 1 + codes, False


class RAR(Method):
    """RAR: the next cell is told by a position embedding added to the code before it."""

    any_order = True
    parallel = False
    head_name = "lm_head"
    # as the official rule: all tables but cls_token, and the head's modulation but not the blocks'
    no_decay = ("embed", "adaln_before_head")

    def __init__(self, config: ModelConfig):
        """Build the network; gates start at zero, so the first loss is about ln V + 2e-4 * D.

        For N cells P and T have 2 + N rows (T's first two are unused) and S has N + 1; with
        `config.spare_rows` they have the rows of the published files, the rest unused. E has a row
        a code, RAR's unused mask row V, and from row V + 1 the labels, null last.
        """
        super().__init__(config)
        width, tokens = config.width, config.tokens
        places, steps = (1024, 100) if config.spare_rows else (2, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + places, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, tokens + places, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, tokens + steps, width))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.layers))
        self.embeddings = nn.Embedding(config.vocab_size + 1 + config.classes + 1, width)
        self.adaln_before_head = ModulatedNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size)
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module[1].weight)

    def _distinct(self, label_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (label_U, row_B): all labels there are, or if the batch is smaller its own.

        Those that occur would be fewer, but to count them waits for the device.
        """
        labels = self.config.classes + 1
        if len(label_B) < labels:
            return label_B, torch.arange(len(label_B), device=label_B.device)
        return torch.arange(labels, device=label_B.device), label_B

    def _label(self, label_B: torch.Tensor) -> torch.Tensor:
        """Return E[y] (B, 1, D)."""
        return self.embeddings(self.config.vocab_size + 1 + label_B).unsqueeze(1)

    def _prefix(self, label_B: torch.Tensor) -> torch.Tensor:
        """Return the slots [cls, y] without T, (B, 2, D)."""
        cls_B1D = self.cls_token.expand(len(label_B), -1, -1)
        return torch.cat((cls_B1D, self._label(label_B)), dim=1) + self.pos_embed[:, :2]

    def _codes(self, codes_Bm: torch.Tensor, cells_Bm: torch.Tensor) -> torch.Tensor:
        """Return the slots of codes without T, (B, m, D)."""
        return self.embeddings(codes_Bm) + self.pos_embed[0, 2 + cells_Bm]

    def _told(self, x_BLD: torch.Tensor, next_BS: torch.Tensor) -> torch.Tensor:
        """Add T of the next cells to the last S of the L slots; only cls is told nothing."""
        t_BSD = self.target_aware_pos_embed[0, 2 + next_BS]
        return x_BLD + F.pad(t_BSD, (0, 0, x_BLD.shape[1] - next_BS.shape[1], 0))

    def _run(self, x_BLD, label_U, row_B, last, caches=None, start=0) -> torch.Tensor:
        """Run slots start..start+L through the blocks; return the logits of the `last` ones."""
        steps_LD = self.timesteps_embeddings[0, start : start + x_BLD.shape[1]]
        c_ULD = self._label(label_U) + steps_LD
        for i, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, c_ULD, row_B, caches and caches[i], start)
        x_BSD = self.adaln_before_head(x_BLD[:, -last:], c_ULD[:, -last:], row_B)
        return widened(self.lm_head(x_BSD))

    def forward(self, codes_BT, label_B, order_BS):
        """Return logits_BSV, taken at slots 1..T; see Method."""
        label_U, row_B = self._distinct(label_B)
        fed_BS = order_BS[:, :-1]
        codes_BSD = self._codes(codes_BT.gather(1, fed_BS), fed_BS)
        x_BLD = self._told(torch.cat((self._prefix(label_B), codes_BSD), dim=1), order_BS)
        return self._run(x_BLD, label_U, row_B, order_BS.shape[1])

    def cache(self, label_B):
        label_U, row_B = self._distinct(label_B)
        layers = [LayerCache(self.config.tokens + 1) for _ in self.blocks]
        slots_BLD = F.pad(self._prefix(label_B), (0, 0, 0, self.config.tokens))
        return RARCache(label_U, row_B, slots_BLD, layers)

    def decode(self, cache, codes_Bm, cells_Bm, next_cells_Bn):
        """Return logits_B1V; see Method.

        A slot is told the cell after it, so the last committed code is fed with the cell asked
        for, and fed again if another is committed next.
        """
        self.check_one(next_cells_Bn)
        first = max(2, cache.fed + 1)  # the slot after the open one, y's or the last code's
        stop = first + codes_Bm.shape[1]
        cache.slots_BLD[:, first:stop] = self._codes(codes_Bm, cells_Bm)
        next_BS, start = torch.cat((cells_Bm, next_cells_Bn), dim=1), cache.fed
        cache.fed = stop - 1
        if cache.next_is_fed and cells_Bm.shape[1]:
            next_BS, start = next_BS[:, 1:], start + 1
        cache.next_is_fed = True
        x_BLD = self._told(cache.slots_BLD[:, start:stop], next_BS)
        return self._run(x_BLD, cache.label_U, cache.row_B, 1, cache.layers, start)
