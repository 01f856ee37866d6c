"""How well a tokenizer gives an image back: PSNR, codebook usage and perplexity."""

import numpy as np
import torch

from models.tokenizer import Tokenizer, decode_codes, encode_images


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
    return {"codebook_usage": (count_V > 0).double().mean().item(), "perplexity": perplexity.item()}


def reconstruction_report(model: Tokenizer, images_NHWC: np.ndarray) -> dict[str, float]:
    """Encode and decode uint8 images; return mean PSNR (dB), codebook usage and perplexity."""
    codes_NT = encode_images(model, images_NHWC)
    decibels_N = psnr(images_NHWC, decode_codes(model, codes_NT))
    use = codebook_use(codes_NT, model.config.codebook_size)
    return {"psnr": float(decibels_N.mean()), **use, "images": len(images_NHWC)}
