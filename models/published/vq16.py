"""LlamaGen's tokenizer VQ-16 (72M parameters; with one level fewer, VQ-8), to read its weights.

Paper: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
arXiv 2406.06525, after VQGAN (Esser et al., arXiv 2012.09841). Code:
github.com/FoundationVision/LlamaGen. RandAR, ARPG and PAR generate its codes too.

Names and shapes of the parameters are LlamaGen's. Differs from it in: images are in [0, 1] at both
ends; pixels are rounded once, by the caller (their clip(127.5 y + 128) truncated to uint8 gives the
same bytes); no training, so no losses, no straight-through gradient, no dropout (theirs is 0).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from models.command import InputError
from models.vqvae import check_codes, check_images

AT_ONCE = 16
"""images run through the convolutions together: one takes 32 MB a layer at 256 pixels"""


@dataclass(frozen=True)
class VQ16Config:
    """Size of the tokenizer; the defaults are VQ-16 at 256 pixels."""

    codebook_size: int = 16384
    """V"""
    code_dim: int = 8
    """C, length of a code vector; codes lie on the unit sphere"""
    channels: int = 128
    """at full resolution; a multiple of 32"""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """of `channels`, level by level, each level half the size of the one before"""
    vector_width: int = 256
    """channels between encoder or decoder and the projection to code_dim"""
    grid: int = 16
    """side of the code grid: 16 for 256 pixels, 24 for 384"""

    def __post_init__(self):
        if self.channels < 32 or self.channels % 32 or min(self.multipliers, default=0) < 1:
            raise InputError(
                f"expected channels to be a multiple of 32, and multipliers >= 1, "
                f"got {self.channels} and {self.multipliers}"
            )

    @property
    def factor(self) -> int:
        """Pixels a side of one code."""
        return 2 ** (len(self.multipliers) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x through a 1x1 convolution if it must widen."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        same = inputs == outputs
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class SpatialAttention(nn.Module):
    """Pre-norm attention of one head among the cells of a map, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        inner = self.norm(x)
        q, k, v = (each(inner).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, h w, channels)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


def downsample(channels: int) -> nn.Sequential:
    """Halve the size: a stride of 2 after one row below and one column at the right."""
    pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(channels: int) -> nn.Sequential:
    """Double the size: every pixel four times, then a convolution."""
    repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(repeat=repeat, conv=_conv(channels, channels)))


class Level(nn.Module):
    """The residual blocks at one size, attention after each at the smallest, then a resize."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool):
        super().__init__()
        widths = [inputs, *[outputs] * blocks]
        self.res = nn.ModuleList(Residual(*pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(SpatialAttention(outputs) for _ in range(blocks * attention))
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x):
        for i, residual in enumerate(self.res):
            x = residual(x)
            x = self.attn[i](x) if len(self.attn) else x
        return self.upsample(self.downsample(x))


def levels(widths: list[int], blocks: int, smallest: int, resize: Callable) -> nn.Sequential:
    """Return a level for each pair of widths; all but the last end in a resize, under its name."""
    parts = [Level(*pair, blocks, n == smallest) for n, pair in enumerate(pairwise(widths))]
    for level, width in zip(parts[:-1], widths[1:-1], strict=True):
        setattr(level, resize.__name__, resize(width))
    return nn.Sequential(*parts)


def middle(channels: int) -> nn.Sequential:
    """Return what stands at the smallest size, between the levels and the codes."""
    attention = SpatialAttention(channels)
    return nn.Sequential(Residual(channels, channels), attention, Residual(channels, channels))


def encoder(config: VQ16Config) -> nn.Sequential:
    """Images to maps of `vector_width` channels, two residual blocks a level."""
    widths = [config.channels, *(config.channels * m for m in config.multipliers)]
    parts = OrderedDict(conv_in=_conv(3, config.channels))
    parts["conv_blocks"] = levels(widths, 2, len(widths) - 2, downsample)
    parts |= {"mid": middle(widths[-1]), "norm_out": _norm(widths[-1]), "silu": nn.SiLU()}
    return nn.Sequential(parts | {"conv_out": _conv(widths[-1], config.vector_width)})


def decoder(config: VQ16Config) -> nn.Sequential:
    """Maps of `vector_width` channels to images, three residual blocks a level."""
    widths = [config.channels * m for m in reversed(config.multipliers)]
    parts = OrderedDict(conv_in=_conv(config.vector_width, widths[0]), mid=middle(widths[0]))
    parts["conv_blocks"] = levels([widths[0], *widths], 3, 0, upsample)
    parts |= {"norm_out": _norm(widths[-1]), "silu": nn.SiLU()}
    return nn.Sequential(parts | {"conv_out": _conv(widths[-1], 3)})


class Codebook(nn.Module):
    """The code vectors, stored at any length and used at length 1."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))  # a log of theirs, carried along


class VQ16(nn.Module):
    """Images (N, 3, h, h) in [0, 1] <-> codes (N, T) int64 in [0, V), in raster order."""

    def __init__(self, config: VQ16Config):
        super().__init__()
        self.config = config
        self.grid = config.grid
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        self.quantize = Codebook(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.vector_width, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.vector_width, 1)

    @property
    def codebook_VC(self) -> torch.Tensor:
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    @torch.no_grad()
    def encode(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Return codes_NT of images in [0, 1]: the code of largest cosine.

        Raises InputError for images of another size than the grid was imported for.
        """
        check_images(images_N3HW, self.grid * self.config.factor)
        return torch.cat([self._nearest(part) for part in images_N3HW.split(AT_ONCE)])

    def _nearest(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        maps = self.quant_conv(self.encoder(2 * images_N3HW - 1))
        vectors_NTC = F.normalize(maps.flatten(2).transpose(1, 2), dim=-1)
        return (vectors_NTC @ self.codebook_VC.T).argmax(-1)

    @torch.no_grad()
    def decode(self, codes_NT: torch.Tensor) -> torch.Tensor:
        """Return images_N3HW in [0, 1]. Raises ValueError for a code outside [0, V)."""
        check_codes(codes_NT, self.config.codebook_size)
        return torch.cat([self._render(part) for part in codes_NT.split(AT_ONCE)])

    def _render(self, codes_NT: torch.Tensor) -> torch.Tensor:
        vectors_NTC = F.normalize(F.embedding(codes_NT, self.quantize.embedding.weight), dim=-1)
        maps = vectors_NTC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return ((self.decoder(self.post_quant_conv(maps)) + 1) / 2).clamp(0, 1)
