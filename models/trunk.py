"""The Llama-style stack that the methods share: vectors in, vectors out.

It knows no label, order, code or loss. LlamaGen (Sun et al., arXiv 2406.06525) is its source; its
sizes, initialisation and parameter names are kept.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.errors import InputError
from models.layers import Attention, LayerCache, RMSNorm, SwiGLU


@dataclass(frozen=True)
class ModelConfig:
    """Everything a method needs to be built; saved in every checkpoint."""

    codes: int = 1024
    """V, size of the codebook"""
    classes: int = 10
    """labels are 0..classes-1; `classes` itself is the null label"""
    grid: int = 8
    """side of the token grid"""
    layers: int = 4
    heads: int = 4
    width: int = 128
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    scan: str = "raster"
    """the one order of a method that cannot choose"""
    regions: int = 4
    """of the order `regions`: PAR generates as many codes side by side, its n"""
    ffn_width: int | None = None
    """RAR: hidden width of the feed-forward; None: 4 x width"""
    spare_rows: bool = False
    """RAR: position tables with the unused rows that its published files have"""

    def __post_init__(self):
        """Raise InputError for sizes that do not fit together."""
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(
                f"expected width / heads to be a multiple of 4, got {self.width} / {self.heads}"
            )

    @property
    def tokens(self) -> int:
        """T, cells of the grid."""
        return self.grid * self.grid

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.heads


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
        """Build one layer."""
        super().__init__()
        self.attention = Attention(config.width, config.heads, config.residual_dropout)
        self.feed_forward = SwiGLU(config.width, config.ffn_dropout)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rotation_B1SR: torch.Tensor,
        cache: LayerCache | None = None,
        start: int = 0,
        seen_SL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, S, D) to (B, S, D); see Attention for the rest."""
        inner_BSD = self.attention_norm(x_BSD)
        x_BSD = x_BSD + self.attention(inner_BSD, rotation_B1SR, cache, start, seen_SL)
        return x_BSD + self.feed_forward(self.ffn_norm(x_BSD))


def run_blocks(
    blocks: nn.ModuleList,
    x_BSD: torch.Tensor,
    rotation_BSR: torch.Tensor,
    caches: list[LayerCache] | None = None,
    start: int = 0,
    seen_SL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run x through the blocks; with caches, x sits at slots start..start+S of them.

    Causally, or each token seeing the slots that `seen_SL`, bool, says.
    """
    rotation_B1SR = rotation_BSR.unsqueeze(1)
    for i, block in enumerate(blocks):
        x_BSD = block(x_BSD, rotation_B1SR, caches[i] if caches else None, start, seen_SL)
    return x_BSD


def initialise(model: nn.Module) -> None:
    """Draw every Linear and Embedding weight from N(0, 0.02^2), without depth scaling."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class ClassEmbedding(nn.Module):
    """Labels, with one more row for the null label, to vectors."""

    def __init__(self, classes: int, width: int):
        """Build the table (classes + 1, width)."""
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, label_B: torch.Tensor) -> torch.Tensor:
        """Return (B, 1, D)."""
        return self.embedding_table(label_B).unsqueeze(1)
