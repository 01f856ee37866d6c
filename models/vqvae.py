"""The tokenizer: a convolutional VQ-VAE from a 32x32 image to an 8x8 grid of codes and back.

VQ-VAE: van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937, with EMA
codes (its appendix A.1). Unit-length codes of few dimensions: Yu et al., "Vector-quantized Image
Modeling with Improved VQGAN", arXiv 2110.04627. The quantizer itself is vector-quantize-pytorch's.

Differs from LlamaGen's VQ-16 tokenizer in: factor 4 instead of 16, pixel (un)shuffle in place of
strided and upsampling convolutions, no attention, no adversarial term in its training.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from models import command
from models.command import InputError


@dataclass(frozen=True)
class VQVAEConfig(command.Config):
    """Size of the tokenizer."""

    codebook_size: command.Vocabulary = 1024
    """K, number of codes"""
    code_dim: Annotated[int, command.Range(2, 1024)] = 8
    """length of a code vector; codes lie on the unit sphere"""
    width: Annotated[int, command.Range(8, 2**12)] = 64
    """channels at 16x16; twice as many at 8x8"""
    blocks: Annotated[int, command.Range(1, 64)] = 2
    """residual blocks at each resolution, in the encoder and in the decoder"""


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 8 groups."""

    def __init__(self, channels: int):
        super().__init__(8, channels)

    def forward(self, x):
        # PyTorch's bf16 on a CPU, channels last, takes 60 us for 64 x 16 x 16, its fp32 9 us. The
        # bits are the same; of groups of 16 channels they are not, and those are fast
        narrow = self.num_channels < 16 * self.num_groups
        if narrow and x.is_cpu and x.dtype == torch.bfloat16:
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class Residual(nn.Module):
    """Pre-norm residual block: x + conv(SiLU(norm(conv(SiLU(norm(x))))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        inner = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(inner)))


class CosineQuantizer(nn.Module):
    """Nearest code on the unit sphere, with EMA codes, k-means start and revival of dead codes.

    An adapter over vector-quantize-pytorch that takes tokens (N, T, C) only and never calls its
    `get_output_from_indices` (wrong for image maps with a projection). Plain straight-through
    gradient, not the library's default rotation trick.
    """

    def __init__(self, codebook_size: int, code_dim: int, revive_below: float, decay: float = 0.99):
        """Leave the codebook empty; `start` fills it.

        A code whose EMA count of uses in a batch falls under `revive_below` is placed anew.
        """
        from vector_quantize_pytorch import VectorQuantize  # imports torch._dynamo: seconds

        super().__init__()
        self.vq = VectorQuantize(
            dim=code_dim,
            codebook_size=codebook_size,
            use_cosine_sim=True,
            decay=decay,
            kmeans_init=True,
            threshold_ema_dead_code=revive_below,
            commitment_weight=1.0,
            rotation_trick=False,
        )

    @property
    def codebook_VC(self) -> torch.Tensor:
        return self.vq.codebook  # of unit length

    @torch.no_grad()
    def start(self, vectors_NTC: torch.Tensor) -> None:
        """Place the codes by k-means; wants about 50 vectors a code, and at least one.

        Raises InputError with fewer vectors than codes (the library would leave zero codes).
        """
        vectors, codes = vectors_NTC.shape[0] * vectors_NTC.shape[1], len(self.codebook_VC)
        if vectors < codes:
            raise InputError(
                f"expected at least {codes} vectors to start {codes} codes, got {vectors}"
            )
        self.vq(vectors_NTC.float(), freeze_codebook=True)

    @torch.no_grad()
    def relabel(self, old_of_new_V: torch.Tensor) -> None:
        """Renumber the codes: code `new` becomes what code old_of_new[new] was, uses included."""
        book = self.vq._codebook
        for value in (book.embed, book.embed_avg, book.cluster_size):  # each (1, V, ..)
            value.copy_(value[:, old_of_new_V])

    def forward(self, vectors_NTC: torch.Tensor):
        """Return (quantized_NTC, codes_NT int64, commitment scalar); in train() the codes move."""
        return self.vq(vectors_NTC)

    def nearest(self, vectors_NTC: torch.Tensor) -> torch.Tensor:
        """Return codes_NT, int64 in [0, V): the code of largest cosine. Moves nothing."""
        return (F.normalize(vectors_NTC.float(), dim=-1) @ self.codebook_VC.T).argmax(-1)


def check_codes(codes_NT: torch.Tensor, codebook_size: int) -> None:
    """Raise ValueError for a code outside [0, codebook_size)."""
    if codes_NT.min() < 0 or codes_NT.max() >= codebook_size:
        raise ValueError(
            f"expected codes in [0, {codebook_size}), got {codes_NT.min()}..{codes_NT.max()}"
        )


def check_images(images_N3HW: torch.Tensor, side: int) -> None:
    """Raise InputError for images of another size."""
    if images_N3HW.shape[1:] != (3, side, side):
        raise InputError(
            f"expected images of 3 x {side} x {side}, got {tuple(images_N3HW.shape[1:])}"
        )


class VQVAE(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] <-> codes (N, T) int64 in [0, V), T = 64 in raster order."""

    grid = 8
    """side of the code grid; T = grid * grid"""

    def __init__(self, config: VQVAEConfig, revive_below: float = 0.0):
        """Build encoder, quantizer and decoder; `revive_below` is for training the codebook."""
        super().__init__()
        self.config = config
        wide, wider = config.width, 2 * config.width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, wide, 3, padding=1),
            *[Residual(wide) for _ in range(config.blocks)],
            nn.Conv2d(wide, wider, 4, stride=2, padding=1),
            *[Residual(wider) for _ in range(config.blocks)],
            GroupNorm(wider),
            nn.SiLU(),
            nn.Conv2d(wider, config.code_dim, 1),
        )
        self.quantizer = CosineQuantizer(config.codebook_size, config.code_dim, revive_below)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, wider, 3, padding=1),
            *[Residual(wider) for _ in range(config.blocks)],
            nn.Conv2d(wider, 4 * wide, 3, padding=1),
            nn.PixelShuffle(2),
            *[Residual(wide) for _ in range(config.blocks)],
            GroupNorm(wide),
            nn.SiLU(),
            nn.Conv2d(wide, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    @property
    def codebook_VC(self) -> torch.Tensor:
        return self.quantizer.codebook_VC

    def vectors(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Encode to vectors_NTC before quantization."""
        return self.encoder(2 * images_N3HW - 1).flatten(2).transpose(1, 2)

    def render(self, vectors_NTC: torch.Tensor) -> torch.Tensor:
        """Decode quantized vectors to images_N3HW, not clamped."""
        maps = vectors_NTC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return (self.decoder(maps.contiguous(memory_format=torch.channels_last)) + 1) / 2

    def forward(self, images_N3HW: torch.Tensor, codes_NT: torch.Tensor | None = None):
        """Return (reconstruction_N3HW, codes_NT, commitment scalar), for training.

        With `codes_NT` the decoder alone is run, on these, and the commitment is 0.
        """
        if codes_NT is not None:
            return self.render(self.codebook_VC[codes_NT]), codes_NT, torch.zeros(())
        quantized_NTC, codes_NT, commitment = self.quantizer(self.vectors(images_N3HW))
        return self.render(quantized_NTC), codes_NT, commitment

    @torch.no_grad()
    def encode(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Return codes_NT of images in [0, 1]."""
        return self.quantizer.nearest(self.vectors(images_N3HW))

    @torch.no_grad()
    def decode(self, codes_NT: torch.Tensor) -> torch.Tensor:
        """Return images_N3HW in [0, 1]. Raises ValueError for a code outside [0, V)."""
        check_codes(codes_NT, self.config.codebook_size)
        return self.render(self.codebook_VC[codes_NT]).clamp(0, 1)
