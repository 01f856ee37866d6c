"""The Llama-style stack that the methods share: RMSNorm, 2-D RoPE, attention, SwiGLU, blocks.

RoPE: Su et al., arXiv 2104.09864, in the axial 2-D form of LlamaGen (Sun et al., arXiv 2406.06525;
github.com/FoundationVision/LlamaGen). RMSNorm: arXiv 1910.07467. SwiGLU: arXiv 2002.05202. It knows
no label, order, code or loss. LlamaGen's sizes, initialisation, names of parameters and their
layout are kept, so that its checkpoints load.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from models.method import ModelConfig

EPS = 1e-5


class RMSNormOnCPU(torch.autograd.Function):
    """F.rms_norm with a gradient in three passes over memory; PyTorch's own takes fifteen there.

    LayerNorm's kernel, told that the mean is 0, gives the gradient less its own mean term.
    """

    @staticmethod
    def forward(ctx, x_BSD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        width = x_BSD.shape[-1]
        norm_BS1 = torch.linalg.vector_norm(x_BSD, dim=-1, keepdim=True)
        scale_BS1 = (norm_BS1.square() / width + EPS).rsqrt()
        ctx.save_for_backward(x_BSD, weight_D, scale_BS1)
        return (x_BSD * scale_BS1).mul_(weight_D)

    @staticmethod
    def backward(ctx, grad_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_BSD, weight_D, scale_BS1 = ctx.saved_tensors
        grad_BSD, mean_BS1 = grad_BSD.contiguous(), torch.zeros_like(scale_BS1)
        norm = x_BSD, weight_D.shape, mean_BS1, scale_BS1, weight_D, None
        through_BSD, of_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_BSD, *norm, (True, True, False)
        )
        mean_BS = torch.mv(grad_BSD.flatten(0, -2), weight_D / len(weight_D))
        return through_BSD.addcmul_(scale_BS1, mean_BS.view_as(scale_BS1)), of_weight_D


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in at least fp32, then times a learned weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if x_BSD.device.type == "cpu" and x_BSD.requires_grad and x_BSD.dtype == self.weight.dtype:
            return RMSNormOnCPU.apply(x_BSD, self.weight)
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, eps=EPS)


class Dropout(nn.Dropout):
    """nn.Dropout, with 16 random bits a value on a CPU: its own draw there is 7% of a training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and 0 < self.p < 1 and x.device.type == "cpu"):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the values that 16 bits can have
        return x * (bits >= dropped - 2**15).to(x.dtype).div_(1 - dropped / 2**16)


@functools.lru_cache(maxsize=32)
def rope_table(grid: int, head_width: int, device: torch.device, dtype: torch.dtype):
    """Return the rotations of 2-D RoPE, complex (1 + T, K/2), one row per cell after row 0.

    Row 1 + p is cell p: K/4 angles from its grid row, then K/4 from its column, at frequencies
    10000^(-4j/K). Row 0 is for the class token and is zero, not the identity: it wipes out query
    and key, so every query gives the class logit 0. LlamaGen, RandAR, ARPG and PAR all rely on it.
    """
    frequency = 10000.0 ** (-4 * torch.arange(head_width // 4, dtype=torch.float64) / head_width)
    cell = torch.arange(grid * grid)
    row_TR, column_TR = (p[:, None] * frequency for p in (cell // grid, cell % grid))
    angle_TR = torch.cat((row_TR, column_TR), dim=1)
    rotation_TR = torch.polar(torch.ones_like(angle_TR), angle_TR)
    return torch.cat((torch.zeros_like(rotation_TR[:1]), rotation_TR)).to(device, dtype)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the adjacent pairs (2i, 2i+1) of x (..., K) by `rotation` (..., K/2); in >= fp32."""
    pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


GROWTH = 16
"""slots by which a cache grows on a CPU, where a step reads them all: a part would be copied"""


class LayerCache:
    """Keys and values of one layer, written in place by slot; `capacity` slots at most.

    All slots are there from the start, so that every step has the same shapes; but for a CPU.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kv_2: list[torch.Tensor] = []  # until batch, device and dtype are known

    def write(self, start: int, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor) -> tuple:
        """Put keys and values at slots start..start+S, in v's dtype; return those of all slots."""
        slots = v_BHSK.shape[2]
        have, need = self.kv_2[0].shape[2] if self.kv_2 else 0, start + slots
        if have < need:
            on_cpu, nothing = v_BHSK.device.type == "cpu", v_BHSK[:, :, :0]
            room = min(self.capacity, -(-need // GROWTH) * GROWTH) if on_cpu else self.capacity
            # zeros, since what is not seen is weighed with 0, and 0 * NaN is NaN
            more = (0, 0, 0, room - have)
            self.kv_2 = [F.pad(x_BHLK, more) for x_BHLK in self.kv_2 or (nothing, nothing)]
        for stored_BHLK, new_BHSK in zip(self.kv_2, (k_BHSK, v_BHSK), strict=True):
            stored_BHLK[:, :, start:need] = new_BHSK
        return tuple(self.kv_2)


class Attention(nn.Module):
    """Causal multi-head attention with rotated queries and keys, no biases, no QK norm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)  # rows q | k | v, each head-major
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = Dropout(dropout)

    def forward(
        self, x_BSD, rotation_B1SR, cache: LayerCache | None, start: int, seen_SL, at: slice
    ) -> torch.Tensor:
        """Let token s see tokens <= s of x and, with a cache, its slots before `start`.

        With `seen_SL`, bool, token s sees the slots l of that row that are true instead. Returned
        are the tokens `at`; of the others nothing but keys and values is computed.
        """
        slots = range(start, start + x_BSD.shape[1])
        if slots[at] == slots:
            q_BSD, k_BSD, v_BSD = self.wqkv(x_BSD).chunk(3, dim=-1)
        else:
            q_DD, kv_2DD = self.wqkv.weight.tensor_split((x_BSD.shape[-1],))
            q_BSD = F.linear(x_BSD[:, at].contiguous(), q_DD)  # else a copy of q_DD for each image
            k_BSD, v_BSD = F.linear(x_BSD, kv_2DD).chunk(2, -1)
        q_BHSK, k_BHSK, v_BHSK = (split_heads(x, self.heads) for x in (q_BSD, k_BSD, v_BSD))
        q_BHSK, k_BHSK = rotate(q_BHSK, rotation_B1SR[:, :, at]), rotate(k_BHSK, rotation_B1SR)
        if cache is not None:
            k_BHSK, v_BHSK = cache.write(start, k_BHSK, v_BHSK)
        seen_SL = seen_SL if seen_SL is None else seen_SL[at]
        return self.dropout(self.wo(attend(q_BHSK, k_BHSK, v_BHSK, slots[at], seen_SL)))


def split_heads(x_BSD: torch.Tensor, heads: int) -> torch.Tensor:
    """Return x_BHSK."""
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


FEW = 16
"""queries up to which two products are faster in bf16 on a CPU than its SDPA: 0.7 against 2.3 ms
for one query of 128 x 8 heads, 64 slots, head width 32 (fp32: no gain); whole samplings of RandAR
in 22 calls and of ARPG in 16 are 1.05 and 1.12 times faster with 16 than with 4"""


def attend(
    q_BHSK: torch.Tensor,
    k_BHLK: torch.Tensor,
    v_BHLK: torch.Tensor,
    slots: range,
    seen_SL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention, heads joined again, (B, S, D), in the dtype of the values.

    The queries are at `slots`; or at one slot, the last that all of them see. Keys and values from
    slots[-1] + 1 on are not there yet. `seen_SL`, bool, says which slots each query sees instead.

    On a CPU gradients go through at least fp32: PyTorch's bf16 backward there took 828 ms where
    fp32 took 25 (64 x 4 heads, 128 tokens, head width 32, one thread, torch 2.15).
    """
    dtype, length, device = v_BHLK.dtype, slots[-1] + 1, q_BHSK.device
    if device.type == "cpu" and q_BHSK.requires_grad:
        dtype = torch.promote_types(dtype, torch.float32)
    few = device.type == "cpu" and dtype == torch.bfloat16 and q_BHSK.shape[2] <= FEW
    if not few:
        k_BHLK, v_BHLK = k_BHLK[:, :, :length], v_BHLK[:, :, :length]
    hidden = slots[0] + 1 < k_BHLK.shape[2]  # from some query
    causal = hidden and slots == range(length) and seen_SL is None and not few
    if hidden and seen_SL is None and not causal:
        slot_S = torch.arange(slots.start, slots.stop, slots.step, device=device)
        seen_SL = torch.arange(k_BHLK.shape[2], device=device) <= slot_S[:, None]
    qkv = q_BHSK.to(dtype), k_BHLK.to(dtype), v_BHLK.to(dtype)
    with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
        if few:
            mixed_BHSK = _attend_few(*qkv, seen_SL)
        else:
            mixed_BHSK = F.scaled_dot_product_attention(*qkv, seen_SL, is_causal=causal)
    return mixed_BHSK.transpose(1, 2).flatten(2).to(v_BHLK.dtype)


def _attend_few(q_BHSK, k_BHLK, v_BHLK, seen_SL: torch.Tensor | None) -> torch.Tensor:
    """Return attention by two products over all slots, seen or not: a part would be copied."""
    score_BHSL = widened((q_BHSK * q_BHSK.shape[-1] ** -0.5) @ k_BHLK.transpose(-1, -2))
    if seen_SL is not None:
        hidden_SL = ~F.pad(seen_SL, (0, k_BHLK.shape[2] - seen_SL.shape[1]))
        score_BHSL = score_BHSL.masked_fill_(hidden_SL, -math.inf)
    return score_BHSL.softmax(-1).to(v_BHLK.dtype) @ v_BHLK


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * w3 x), no biases."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        # LlamaGen's hidden size: 2/3 of 4 x width, rounded up to a multiple of 256
        hidden = -(-int(8 * width / 3) // 256) * 256
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD)))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config.width, config.heads, config.residual_dropout)
        self.feed_forward = SwiGLU(config.width, config.ffn_dropout)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(self, x_BSD: torch.Tensor, *how, at: slice = slice(None)) -> torch.Tensor:
        """Map (B, S, D) to the S `at` of them; `how` are the further arguments of Attention."""
        x_BSD = x_BSD[:, at] + self.attention(self.attention_norm(x_BSD), *how, at)
        return x_BSD + self.feed_forward(self.ffn_norm(x_BSD))


def initialise(model: nn.Module, head: nn.Linear) -> None:
    """Draw every Linear and Embedding weight from N(0, 0.02^2), without depth scaling.

    The output head starts at zero, so that the first loss is ln V.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(head.weight)


def rotation_at(config: ModelConfig, cells_BS: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rotation_BSR of cells, -1 meaning the class token, as wide as a model's weights.

    And at least complex64: what is narrower has too few digits for an angle.
    """
    dtype = torch.complex128 if weight.dtype == torch.float64 else torch.complex64
    return rope_table(config.grid, config.head_width, cells_BS.device, dtype)[cells_BS + 1]


def after_label(cells_BS: torch.Tensor) -> torch.Tensor:
    """Return the cells of [c, x_1 .. x_S], (B, 1 + S): that of the class token is -1."""
    return F.pad(cells_BS, (1, 0), value=-1)


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
