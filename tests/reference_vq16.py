"""LlamaGen's VQ-16 from its description: functions over published names, nothing of models/.

Images are in [-1, 1] at both ends, as published.
"""

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


def conv(x: torch.Tensor, w: Weights, at: str, **how) -> torch.Tensor:
    return F.conv2d(x, w[f"{at}.weight"], w[f"{at}.bias"], **how)


def norm(x: torch.Tensor, w: Weights, at: str) -> torch.Tensor:
    """GroupNorm of 32 groups by hand, biased variance, eps 1e-6."""
    groups = x.reshape(len(x), 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    flat = ((groups - mean) / torch.sqrt(variance + 1e-6)).reshape(x.shape)
    return flat * w[f"{at}.weight"][:, None, None] + w[f"{at}.bias"][:, None, None]


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def residual(x: torch.Tensor, w: Weights, at: str) -> torch.Tensor:
    inner = conv(swish(norm(x, w, f"{at}.norm1")), w, f"{at}.conv1", padding=1)
    inner = conv(swish(norm(inner, w, f"{at}.norm2")), w, f"{at}.conv2", padding=1)
    if f"{at}.nin_shortcut.weight" in w:
        x = conv(x, w, f"{at}.nin_shortcut")
    return x + inner


def attention(x: torch.Tensor, w: Weights, at: str) -> torch.Tensor:
    inner = norm(x, w, f"{at}.norm")
    q, k, v = (conv(inner, w, f"{at}.{name}").flatten(2) for name in "qkv")  # (N, C, cells)
    share = (torch.einsum("nci,ncj->nij", q, k) / q.shape[1] ** 0.5).softmax(-1)
    mixed = torch.einsum("nij,ncj->nci", share, v).reshape(x.shape)
    return x + conv(mixed, w, f"{at}.proj_out")


def levels(x: torch.Tensor, w: Weights, side: str) -> torch.Tensor:
    i = 0
    while f"{side}.conv_blocks.{i}.res.0.norm1.weight" in w:
        at, j = f"{side}.conv_blocks.{i}", 0
        while f"{at}.res.{j}.norm1.weight" in w:
            x = residual(x, w, f"{at}.res.{j}")
            if f"{at}.attn.{j}.norm.weight" in w:
                x = attention(x, w, f"{at}.attn.{j}")
            j += 1
        if f"{at}.downsample.conv.weight" in w:  # a zero row below, a zero column at the right
            wider = x.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)
            wider[:, :, :-1, :-1] = x
            x = conv(wider, w, f"{at}.downsample.conv", stride=2)
        if f"{at}.upsample.conv.weight" in w:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(x, w, f"{at}.upsample.conv", padding=1)
        i += 1
    return x


def middle(x: torch.Tensor, w: Weights, at: str) -> torch.Tensor:
    x = attention(residual(x, w, f"{at}.0"), w, f"{at}.1")
    return residual(x, w, f"{at}.2")


def unit(x_VC: torch.Tensor) -> torch.Tensor:
    return x_VC / x_VC.norm(dim=-1, keepdim=True)


def encode(w: Weights, images: torch.Tensor) -> torch.Tensor:
    """Return codes_NT: the code whose unit vector is nearest to the cell's unit vector."""
    x = conv(images, w, "encoder.conv_in", padding=1)
    x = middle(levels(x, w, "encoder"), w, "encoder.mid")
    x = conv(swish(norm(x, w, "encoder.norm_out")), w, "encoder.conv_out", padding=1)
    cells = conv(x, w, "quant_conv").flatten(2).transpose(1, 2)
    return torch.cdist(unit(cells), unit(w["quantize.embedding.weight"])).argmin(-1)


def decode(w: Weights, codes_NT: torch.Tensor, grid: int) -> torch.Tensor:
    """Return images, not clamped."""
    cells = unit(w["quantize.embedding.weight"])[codes_NT].view(len(codes_NT), grid, grid, -1)
    x = conv(cells.permute(0, 3, 1, 2), w, "post_quant_conv")
    x = middle(conv(x, w, "decoder.conv_in", padding=1), w, "decoder.mid")
    x = swish(norm(levels(x, w, "decoder"), w, "decoder.norm_out"))
    return conv(x, w, "decoder.conv_out", padding=1)
