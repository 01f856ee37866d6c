"""The VQ-VAE of the published CIFAR-10 baseline, to read its weights (vqvae_cifar10.pth).

Code: github.com/lime413/randar, whose tokenizer is that of van den Oord et al., "Neural Discrete
Representation Learning", arXiv 1711.00937, with EMA codes. Names and shapes are theirs.

Two traps. The first ReLU of their residual block works in place, so the skip path carries ReLU(x).
Images are trained in [-0.5, 0.5], so a picture is y + 0.5; their own helper computes (y + 1) / 2,
which halves the contrast, and their FID is measured on such washed-out pictures.

Differs from it in: images are in [0, 1] at both ends; no training, so the EMA sums are only carried
along.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.command import InputError
from models.vqvae import check_codes


@dataclass(frozen=True)
class BaselineConfig:
    """Size of the tokenizer; the defaults are the published ones."""

    codebook_size: int = 512
    """V"""
    code_dim: int = 64
    """C, length of a code vector"""
    hiddens: int = 128
    residual_hiddens: int = 32
    residual_layers: int = 2


class Residual(nn.Module):
    """ReLU(x) + conv1x1(ReLU(conv3x3(ReLU(x)))): the skip path is rectified too."""

    def __init__(self, config: BaselineConfig):
        """Build the two convolutions at places 1 and 3, as in the file."""
        super().__init__()
        self._block = nn.Sequential(
            nn.Identity(),
            nn.Conv2d(config.hiddens, config.residual_hiddens, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(config.residual_hiddens, config.hiddens, 1, bias=False),
        )

    def forward(self, x):
        """Map (N, hiddens, h, w) to the same shape."""
        rectified = F.relu(x)
        return rectified + self._block(rectified)


class ResidualStack(nn.Module):
    """The residual blocks, and a ReLU after the last."""

    def __init__(self, config: BaselineConfig):
        """Build them."""
        super().__init__()
        self._layers = nn.ModuleList(Residual(config) for _ in range(config.residual_layers))

    def forward(self, x):
        """Map (N, hiddens, h, w) to the same shape."""
        for layer in self._layers:
            x = layer(x)
        return F.relu(x)


class Encoder(nn.Module):
    """Images to maps a quarter of their size."""

    def __init__(self, config: BaselineConfig):
        """Build it."""
        super().__init__()
        half = config.hiddens // 2
        self._conv_1 = nn.Conv2d(3, half, 4, stride=2, padding=1)
        self._conv_2 = nn.Conv2d(half, config.hiddens, 4, stride=2, padding=1)
        self._conv_3 = nn.Conv2d(config.hiddens, config.hiddens, 3, padding=1)
        self._residual_stack = ResidualStack(config)

    def forward(self, x):
        """Map (N, 3, 4h, 4w) to (N, hiddens, h, w)."""
        x = F.relu(self._conv_2(F.relu(self._conv_1(x))))
        return self._residual_stack(self._conv_3(x))


class Decoder(nn.Module):
    """Code vectors to images."""

    def __init__(self, config: BaselineConfig):
        """Build it."""
        super().__init__()
        half = config.hiddens // 2
        self._conv_1 = nn.Conv2d(config.code_dim, config.hiddens, 3, padding=1)
        self._residual_stack = ResidualStack(config)
        self._conv_trans_1 = nn.ConvTranspose2d(config.hiddens, half, 4, stride=2, padding=1)
        self._conv_trans_2 = nn.ConvTranspose2d(half, 3, 4, stride=2, padding=1)

    def forward(self, x):
        """Map (N, C, h, w) to (N, 3, 4h, 4w)."""
        x = self._residual_stack(self._conv_1(x))
        return self._conv_trans_2(F.relu(self._conv_trans_1(x)))


class Codebook(nn.Module):
    """The code vectors, compared by plain squared distance."""

    def __init__(self, config: BaselineConfig):
        """Build the table and the sums of its EMA."""
        super().__init__()
        shape = (config.codebook_size, config.code_dim)
        self._embedding = nn.Embedding(*shape)
        self._ema_w = nn.Parameter(torch.zeros(shape))
        self.register_buffer("_ema_cluster_size", torch.zeros(config.codebook_size))

    def nearest(self, vectors_NTC: torch.Tensor) -> torch.Tensor:
        """Return codes_NT."""
        table_VC = self._embedding.weight
        return (table_VC.square().sum(1) - 2 * vectors_NTC @ table_VC.T).argmin(-1)

    def vectors(self, codes_NT: torch.Tensor) -> torch.Tensor:
        """Return vectors_NTC."""
        return self._embedding(codes_NT)


class BaselineVQVAE(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] <-> codes (N, T) int64 in [0, V), T = 64 in raster order."""

    grid = 8
    """side of the code grid; T = grid * grid"""

    def __init__(self, config: BaselineConfig):
        """Build encoder, codebook and decoder."""
        super().__init__()
        self.config = config
        self._encoder = Encoder(config)
        self._pre_vq_conv = nn.Conv2d(config.hiddens, config.code_dim, 1)
        self._vq_vae = Codebook(config)
        self._decoder = Decoder(config)

    @torch.no_grad()
    def encode(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Return codes_NT of images in [0, 1]. Raises InputError unless they are 32 x 32."""
        if images_N3HW.shape[1:] != (3, 32, 32):
            raise InputError(f"expected images of 3 x 32 x 32, got {tuple(images_N3HW.shape[1:])}")
        maps = self._pre_vq_conv(self._encoder(images_N3HW - 0.5))
        return self._vq_vae.nearest(maps.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def decode(self, codes_NT: torch.Tensor) -> torch.Tensor:
        """Return images_N3HW in [0, 1]. Raises ValueError for a code outside [0, V)."""
        check_codes(codes_NT, self.config.codebook_size)
        vectors_NTC = self._vq_vae.vectors(codes_NT)
        maps = vectors_NTC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return (self._decoder(maps) + 0.5).clamp(0, 1)
