"""The VQ-VAE of the published CIFAR-10 baseline, to read its weights (vqvae_cifar10.pth).

Code: github.com/lime413/randar, whose tokenizer is that of van den Oord et al., "Neural Discrete
Representation Learning", arXiv 1711.00937, with EMA codes. Names and shapes are theirs.

Two traps. The first ReLU of their residual block works in place, so the skip path carries ReLU(x).
Images are trained in [-0.5, 0.5], so a picture is y + 0.5; their own helper computes (y + 1) / 2,
which halves the contrast, and their FID is measured on such washed-out pictures.

Differs from it in: images are in [0, 1] at both ends; no training, so the EMA sums are only carried
along.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.vqvae import check_codes, check_images


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

    def __init__(self, width: int, inner: int):
        super().__init__()
        self._block = nn.Sequential(
            nn.Identity(),  # the convolutions are at places 1 and 3 in the file
            nn.Conv2d(width, inner, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
        )

    def forward(self, x):
        rectified = F.relu(x)
        return rectified + self._block(rectified)


def residual_stack(config: BaselineConfig) -> nn.Sequential:
    """Return the residual blocks, and a ReLU after the last."""
    sizes = config.hiddens, config.residual_hiddens
    layers = nn.Sequential(*(Residual(*sizes) for _ in range(config.residual_layers)))
    return nn.Sequential(OrderedDict(_layers=layers, relu=nn.ReLU()))


class Codebook(nn.Module):
    """The code vectors, and the sums of their EMA."""

    def __init__(self, config: BaselineConfig):
        super().__init__()
        shape = (config.codebook_size, config.code_dim)
        self._embedding = nn.Embedding(*shape)
        self._ema_w = nn.Parameter(torch.zeros(shape))
        self.register_buffer("_ema_cluster_size", torch.zeros(config.codebook_size))

    def nearest(self, vectors_NTC: torch.Tensor) -> torch.Tensor:
        """Return codes_NT: those at the smallest distance."""
        table_VC = self._embedding.weight
        return (table_VC.square().sum(1) - 2 * vectors_NTC @ table_VC.T).argmin(-1)


class BaselineVQVAE(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] <-> codes (N, T) int64 in [0, V), T = 64 in raster order."""

    grid = 8
    """side of the code grid; T = grid * grid"""

    def __init__(self, config: BaselineConfig):
        super().__init__()
        self.config = config
        width, half, resize = config.hiddens, config.hiddens // 2, {"stride": 2, "padding": 1}
        parts = OrderedDict(
            _conv_1=nn.Conv2d(3, half, 4, **resize),
            relu_1=nn.ReLU(),
            _conv_2=nn.Conv2d(half, width, 4, **resize),
            relu_2=nn.ReLU(),
            _conv_3=nn.Conv2d(width, width, 3, padding=1),
            _residual_stack=residual_stack(config),
        )
        self._encoder = nn.Sequential(parts)
        self._pre_vq_conv = nn.Conv2d(width, config.code_dim, 1)
        self._vq_vae = Codebook(config)
        parts = OrderedDict(
            _conv_1=nn.Conv2d(config.code_dim, width, 3, padding=1),
            _residual_stack=residual_stack(config),
            _conv_trans_1=nn.ConvTranspose2d(width, half, 4, **resize),
            relu=nn.ReLU(),
            _conv_trans_2=nn.ConvTranspose2d(half, 3, 4, **resize),
        )
        self._decoder = nn.Sequential(parts)

    @property
    def codebook_VC(self) -> torch.Tensor:
        return self._vq_vae._embedding.weight

    @torch.no_grad()
    def encode(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Return codes_NT of images in [0, 1]. Raises InputError unless they are 32 x 32."""
        check_images(images_N3HW, 32)
        maps = self._pre_vq_conv(self._encoder(images_N3HW - 0.5))
        return self._vq_vae.nearest(maps.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def decode(self, codes_NT: torch.Tensor) -> torch.Tensor:
        """Return images_N3HW in [0, 1]. Raises ValueError for a code outside [0, V)."""
        check_codes(codes_NT, self.config.codebook_size)
        maps = self._vq_vae._embedding(codes_NT).transpose(1, 2)
        return (self._decoder(maps.unflatten(2, (self.grid, self.grid))) + 0.5).clamp(0, 1)
