"""The Llama-style stack that the methods share: RMSNorm, 2-D RoPE, attention, SwiGLU, blocks.

RoPE: Su et al., arXiv 2104.09864, in the axial 2-D form of LlamaGen (Sun et al., arXiv 2406.06525;
github.com/FoundationVision/LlamaGen). RMSNorm: arXiv 1910.07467. SwiGLU: arXiv 2002.05202. It knows
no label, order, code or loss. LlamaGen's sizes, initialisation, names of parameters and their
layout are kept, so that its checkpoints load.
"""

import functools
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from models import command
from models.command import InputError


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) in at least fp32, then times a learned weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, eps=1e-5)


@functools.lru_cache(maxsize=32)
def rope_table(grid: int, head_width: int, device: torch.device) -> torch.Tensor:
    """Return the rotations of 2-D RoPE, complex128 (1 + T, K/2), one row per cell after row 0.

    Row 1 + p is cell p: K/4 angles from its grid row, then K/4 from its column, at frequencies
    10000^(-4j/K). Row 0 is for the class token and is zero, not the identity: it wipes out query
    and key, so every query gives the class logit 0. LlamaGen, RandAR, ARPG and PAR all rely on it.
    """
    frequency = 10000.0 ** (-4 * torch.arange(head_width // 4, dtype=torch.float64) / head_width)
    cell = torch.arange(grid * grid)
    row_TR, column_TR = (p[:, None] * frequency for p in (cell // grid, cell % grid))
    angle_TR = torch.cat((row_TR, column_TR), dim=1)
    rotation_TR = torch.polar(torch.ones_like(angle_TR), angle_TR)
    return torch.cat((torch.zeros_like(rotation_TR[:1]), rotation_TR)).to(device)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the adjacent pairs (2i, 2i+1) of x (..., K) by `rotation` (..., K/2), in >= fp32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    turned = pairs * rotation.to(torch.complex128 if wide == torch.float64 else torch.complex64)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class LayerCache:
    """Keys and values of one layer, written by slot; `capacity` slots at most."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kv: torch.Tensor | None = None  # until batch, device and dtype are known

    def write(self, start: int, kv_2BHSK: torch.Tensor) -> torch.Tensor:
        """Put keys and values at slots start..start+S; return all up to there, (2, B, H, L, K)."""
        _, batch, heads, slots, width = kv_2BHSK.shape
        if self.kv is None:
            self.kv = kv_2BHSK.new_empty(2, batch, heads, self.capacity, width)
        self.kv[:, :, :, start : start + slots] = kv_2BHSK
        return self.kv[:, :, :, : start + slots]


class Attention(nn.Module):
    """Causal multi-head attention with rotated queries and keys, no biases, no QK norm."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)  # rows q | k | v, each head-major
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rotation_B1SR: torch.Tensor,
        cache: LayerCache | None = None,
        start: int = 0,
        seen_SL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let token s see tokens <= s of x and, with a cache, its slots before `start`.

        With `seen_SL`, bool, token s sees the slots l of that row that are true instead.
        """
        qkv_3BHSK = self.wqkv(x_BSD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        qk_2BHSK = rotate(qkv_3BHSK[:2], rotation_B1SR)
        q_BHSK, k_BHSK, v_BHSK = qk_2BHSK[0], qk_2BHSK[1], qkv_3BHSK[2]
        if cache is not None:
            k_BHSK, v_BHSK = cache.write(start, torch.stack((k_BHSK, v_BHSK)))
        mixed_BHSK = attend(q_BHSK, k_BHSK, v_BHSK, start, seen_SL)
        return self.dropout(self.wo(mixed_BHSK.transpose(1, 2).flatten(2)))


def attend(
    q_BHSK: torch.Tensor,
    k_BHLK: torch.Tensor,
    v_BHLK: torch.Tensor,
    start: int | None,
    seen_SL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention of S new tokens over L = start + S slots; None: all see all L.

    `seen_SL`, bool, says which slots each token sees in place of that.

    On a CPU in at least fp32: PyTorch's bf16 backward there took 828 ms where fp32 took 25
    (64 x 4 heads, 128 tokens, head width 32, one thread, torch 2.15).
    """
    masked = {"attn_mask": seen_SL}
    if seen_SL is None:
        masked = _causal(q_BHSK.shape[2], start, q_BHSK.device)
    if q_BHSK.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHSK, k_BHLK, v_BHLK, **masked)
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        mixed_BHSK = F.scaled_dot_product_attention(
            q_BHSK.to(wide), k_BHLK.to(wide), v_BHLK.to(wide), **masked
        )
    return mixed_BHSK.to(q_BHSK.dtype)


def _causal(tokens: int, start: int | None, device: torch.device) -> dict:
    """Return how `tokens` new tokens after `start` cached ones are masked, cheapest form first."""
    if tokens == 1 or start is None:
        return {}
    if start == 0:
        return {"is_causal": True}
    seen = torch.ones(tokens, start + tokens, dtype=torch.bool, device=device).tril(start)
    return {"attn_mask": seen}


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * w3 x), no biases."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        # LlamaGen's hidden size: 2/3 of 4 x width, rounded up to a multiple of 256
        hidden = -(-int(8 * width / 3) // 256) * 256
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD)))


@dataclass(frozen=True)
class ModelConfig(command.Config):
    """Everything a method needs to be built; saved in every checkpoint."""

    vocab_size: command.Vocabulary = 1024
    """V, size of the codebook"""
    classes: Annotated[int, command.Range(1, 10**5)] = 10
    """labels are 0..classes-1; `classes` itself is the null label"""
    grid: Annotated[int, command.Range(1, 256)] = 8
    """side of the token grid"""
    layers: Annotated[int, command.Range(1, 256)] = 4
    heads: Annotated[int, command.Range(1, 256)] = 4
    width: Annotated[int, command.Range(1, 2**14)] = 128
    token_dropout: command.Fraction = 0.1
    residual_dropout: command.Fraction = 0.1
    ffn_dropout: command.Fraction = 0.1
    scan: str = "raster"
    """the one order of a method that cannot choose"""
    cells: tuple[int, ...] = ()
    """the cells in the order `scan`, if that is no function of the grid: read from a file, drawn"""
    regions: int = 4
    """of the order `regions`: PAR generates as many codes side by side, its n"""
    ffn_width: Annotated[int, command.Range(1, 2**16)] | None = None
    """RAR: hidden width of the feed-forward; None: 4 x width"""
    spare_rows: bool = False
    """RAR: position tables with the unused rows that its published files have"""

    def check(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(
                f"expected width / heads to be a multiple of 4, got {self.width} / {self.heads}"
            )

    @property
    def tokens(self) -> int:
        return self.grid * self.grid  # T

    @property
    def head_width(self) -> int:
        return self.width // self.heads  # K


SIZES = {
    "nano": {"layers": 4, "heads": 4, "width": 128},
    "small": {"layers": 6, "heads": 4, "width": 256},
    "base": {"layers": 8, "heads": 6, "width": 384},
    "large": {"layers": 12, "heads": 8, "width": 512},
}
"""The presets of --model: 1.3, 5.6, 15 and 42 million parameters at V = 1024."""


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config.width, config.heads, config.residual_dropout)
        self.feed_forward = SwiGLU(config.width, config.ffn_dropout)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(self, x_BSD: torch.Tensor, *how) -> torch.Tensor:
        """Map (B, S, D) to (B, S, D); `how` are the further arguments of Attention."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), *how)
        return x_BSD + self.feed_forward(self.ffn_norm(x_BSD))


def initialise(model: nn.Module, head: nn.Linear) -> None:
    """Draw every Linear and Embedding weight from N(0, 0.02^2), without depth scaling.

    The output head starts at zero, so that the first loss is ln V.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(head.weight)


def rotation_at(config: ModelConfig, cells_BS: torch.Tensor) -> torch.Tensor:
    """Return rotation_BSR of cells, -1 meaning the class token."""
    return rope_table(config.grid, config.head_width, cells_BS.device)[cells_BS + 1]


def after_label(cells_BS: torch.Tensor) -> torch.Tensor:
    """Return the cells of [c, x_1 .. x_S], (B, 1 + S): that of the class token is -1."""
    return F.pad(cells_BS, (1, 0), value=-1)


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
