"""How well a tokenizer gives an image back: PSNR, codebook usage and perplexity."""

import numpy as np
import torch

from models.code_search import search_codes
from models.vqvae import VQVAE


def to_float(images_NHWC: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Turn uint8 (N, H, W, 3) into float (N, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(images_NHWC).to(device).permute(0, 3, 1, 2).float() / 255


def to_uint8(images_N3HW: torch.Tensor) -> np.ndarray:
    """Turn float (N, 3, H, W) in [0, 1] into uint8 (N, H, W, 3), rounded, not truncated."""
    pixels = (images_N3HW.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode_images(
    model: VQVAE, images_NHWC: np.ndarray, batch: int = 512, sweeps: int = 0
) -> torch.Tensor:
    """Return codes_NT int64, on the CPU, of uint8 images; `sweeps` > 0 searches for better ones."""
    device = next(model.parameters()).device
    chunks = [images_NHWC[i : i + batch] for i in range(0, len(images_NHWC), batch)]
    images = (to_float(chunk, device) for chunk in chunks)
    if sweeps == 0:
        return torch.cat([model.encode(images_N3HW).cpu() for images_N3HW in images])
    return torch.cat([search_codes(model, images_N3HW, sweeps).cpu() for images_N3HW in images])


def decode_codes(model: VQVAE, codes_NT: torch.Tensor, batch: int = 512) -> np.ndarray:
    """Return uint8 images (N, H, W, 3) of codes_NT."""
    device = next(model.parameters()).device
    return np.concatenate([to_uint8(model.decode(c.to(device))) for c in codes_NT.split(batch)])


def mirror(images_NHWC: np.ndarray) -> np.ndarray:
    """Swap left and right of images."""
    return np.ascontiguousarray(images_NHWC[:, :, ::-1])


def mirror_grid(codes_NT: torch.Tensor, grid: int) -> torch.Tensor:
    """Swap left and right of code grids; the codes of mirrored images are others."""
    return codes_NT.unflatten(1, (grid, grid)).flip(2).flatten(1)


def psnr(images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> np.ndarray:
    """Return each image's peak signal-to-noise ratio in dB, float64 (N,); equal images give inf."""
    error_N = ((images_NHWC.astype(np.float64) - others_NHWC) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error_N)


def codebook_use(codes_NT: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """Return the share of codes used (0..1) and the perplexity of their frequencies."""
    count_V = torch.bincount(codes_NT.flatten(), minlength=codebook_size).double()
    p_V = count_V / count_V.sum()
    perplexity = torch.exp(-torch.special.xlogy(p_V, p_V).sum())
    return {
        "codebook_usage": (count_V > 0).double().mean().item(),
        "perplexity": perplexity.item(),
    }


def reconstruction_report(model: VQVAE, images_NHWC: np.ndarray) -> dict[str, float]:
    """Encode and decode uint8 images; return mean PSNR (dB), codebook usage and perplexity."""
    codes_NT = encode_images(model, images_NHWC)
    decibels_N = psnr(images_NHWC, decode_codes(model, codes_NT))
    use = codebook_use(codes_NT, model.config.codebook_size)
    return {"psnr": float(decibels_N.mean()), **use, "images": len(images_NHWC)}
