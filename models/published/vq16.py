"""LlamaGen's tokenizer VQ-16 (72M parameters; with one level fewer, VQ-8), to read its weights.

Paper: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
arXiv 2406.06525, after VQGAN (Esser et al., arXiv 2012.09841). Code:
github.com/FoundationVision/LlamaGen. RandAR, ARPG and PAR generate its codes too.

Names and shapes of the parameters are LlamaGen's. Differs from it in: images are in [0, 1] at both
ends; pixels are rounded once, by the caller (their clip(127.5 y + 128) truncated to uint8 gives the
same bytes); no training, so no losses, no straight-through gradient, no dropout (theirs is 0).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from models.command import InputError
from models.vqvae import check_codes

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
        """Raise InputError for a size that no tokenizer can have."""
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


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), x through a 1x1 convolution if it must widen."""

    def __init__(self, inputs: int, outputs: int):
        """Build the two 3x3 convolutions, and the shortcut."""
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        """Map (N, inputs, h, w) to (N, outputs, h, w)."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class SpatialAttention(nn.Module):
    """Pre-norm attention of one head among the cells of a map, added to its input."""

    def __init__(self, channels: int):
        """Build the norm and the four 1x1 projections."""
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        """Map (N, channels, h, w) to the same shape."""
        inner = self.norm(x)
        q, k, v = (each(inner).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, h w, channels)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the size: a stride of 2 after one row below and one column at the right."""

    def __init__(self, channels: int):
        """Build the convolution, which pads nothing itself."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        """Map (N, channels, 2h, 2w) to (N, channels, h, w)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size: every pixel four times, then a convolution."""

    def __init__(self, channels: int):
        """Build the convolution."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        """Map (N, channels, h, w) to (N, channels, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks at one size, attention after each at the smallest, then a resize."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, **resize):
        """Build them; `resize` is `downsample` or `upsample`, or nothing: the name in the file."""
        super().__init__()
        widths = [inputs, *[outputs] * blocks]
        self.res = nn.ModuleList(Residual(*pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(SpatialAttention(outputs) for _ in range(blocks * attention))
        for name, module in resize.items():
            self.add_module(name, module)
        self.resize = tuple(resize)

    def forward(self, x):
        """Map (N, inputs, h, w) to (N, outputs, ..)."""
        for i, residual in enumerate(self.res):
            x = residual(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in self.resize:
            x = getattr(self, name)(x)
        return x


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        Residual(channels, channels), SpatialAttention(channels), Residual(channels, channels)
    )


class Encoder(nn.Module):
    """Images to maps of `vector_width` channels, two residual blocks a level."""

    def __init__(self, config: VQ16Config):
        """Build it."""
        super().__init__()
        widths = [config.channels, *(config.channels * m for m in config.multipliers)]
        last = len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(i, o, 2, n == last, **({} if n == last else {"downsample": Downsample(o)}))
            for n, (i, o) in enumerate(pairwise(widths))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.vector_width, 3, padding=1)

    def forward(self, x):
        """Map (N, 3, h, w) to (N, vector_width, h / factor, w / factor)."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Maps of `vector_width` channels to images, three residual blocks a level."""

    def __init__(self, config: VQ16Config):
        """Build it; its levels run from the smallest map to the image."""
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        widths, last = [widths[0], *widths], len(widths) - 1
        self.conv_in = nn.Conv2d(config.vector_width, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(i, o, 3, n == 0, **({} if n == last else {"upsample": Upsample(o)}))
            for n, (i, o) in enumerate(pairwise(widths))
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        """Map (N, vector_width, h, w) to (N, 3, factor * h, factor * w)."""
        x = self.mid(self.conv_in(x))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The code vectors, stored at any length and used at length 1."""

    def __init__(self, codebook_size: int, code_dim: int):
        """Build the table; `codebook_used`, a log of theirs, is only carried along."""
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))

    @property
    def vectors_VC(self) -> torch.Tensor:
        """The unit-length code vectors."""
        return F.normalize(self.embedding.weight, dim=-1)


class VQ16(nn.Module):
    """Images (N, 3, h, h) in [0, 1] <-> codes (N, T) int64 in [0, V), in raster order."""

    def __init__(self, config: VQ16Config):
        """Build encoder, codebook and decoder."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.vector_width, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.vector_width, 1)

    @property
    def grid(self) -> int:
        """Side of the code grid; T = grid * grid."""
        return self.config.grid

    @torch.no_grad()
    def encode(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Return codes_NT of images in [0, 1]: the code of largest cosine.

        Raises InputError for images of another size than the grid was imported for.
        """
        side = self.grid * self.config.factor
        if images_N3HW.shape[1:] != (3, side, side):
            raise InputError(
                f"expected images of 3 x {side} x {side} for a grid of {self.grid}, "
                f"got {tuple(images_N3HW.shape[1:])}"
            )
        return torch.cat([self._nearest(part) for part in images_N3HW.split(AT_ONCE)])

    def _nearest(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        maps = self.quant_conv(self.encoder(2 * images_N3HW - 1))
        vectors_NTC = F.normalize(maps.flatten(2).transpose(1, 2), dim=-1)
        return (vectors_NTC @ self.quantize.vectors_VC.T).argmax(-1)

    @torch.no_grad()
    def decode(self, codes_NT: torch.Tensor) -> torch.Tensor:
        """Return images_N3HW in [0, 1]. Raises ValueError for a code outside [0, V)."""
        check_codes(codes_NT, self.config.codebook_size)
        return torch.cat([self._render(part) for part in codes_NT.split(AT_ONCE)])

    def _render(self, codes_NT: torch.Tensor) -> torch.Tensor:
        vectors_NTC = F.normalize(F.embedding(codes_NT, self.quantize.embedding.weight), dim=-1)
        maps = vectors_NTC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return ((self.decoder(self.post_quant_conv(maps)) + 1) / 2).clamp(0, 1)
