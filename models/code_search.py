"""Codes that decode best instead of codes that lie nearest: analysis by synthesis.

The nearest code of a cell ignores what the decoder makes of it beside its neighbours. Starting from
the nearest codes, cells are visited in four interleaved lattices; each tries its second nearest
code and keeps the one that decodes with the smaller squared error around the cell, the others held
fixed (iterated conditional modes, Besag 1986). The tokenizer is not changed.
"""

import torch
import torch.nn.functional as F

from models.training import bf16_is_native
from models.vqvae import VQVAE

LATTICE = 2
"""cells two apart, in either direction, are tried at once"""


@torch.no_grad()
def search_codes(tokenizer: VQVAE, images_N3HW: torch.Tensor, sweeps: int) -> torch.Tensor:
    """Return codes_NT, int64, of images in [0, 1]; `sweeps` = 0 gives the nearest codes.

    A sweep takes eight decodings, in bf16 where the device has it.
    """
    vectors_NTC = F.normalize(tokenizer.vectors(images_N3HW).float(), dim=-1)
    near_NT2 = (vectors_NTC @ tokenizer.quantizer.codebook_VC.T).topk(2).indices
    codes_NT = near_NT2[..., 0]
    cell_T = torch.arange(tokenizer.grid**2, device=codes_NT.device)
    phase_T = cell_T // tokenizer.grid % LATTICE * LATTICE + cell_T % LATTICE
    for step in range(sweeps * LATTICE**2):
        other_NT = torch.where(codes_NT == near_NT2[..., 0], near_NT2[..., 1], near_NT2[..., 0])
        tried_NT = torch.where(phase_T == step % LATTICE**2, other_NT, codes_NT)
        before_NT, after_NT = (
            error_around(tokenizer, c, images_N3HW) for c in (codes_NT, tried_NT)
        )
        codes_NT = torch.where(after_NT < before_NT, tried_NT, codes_NT)
    return codes_NT


def error_around(
    tokenizer: VQVAE, codes_NT: torch.Tensor, images_N3HW: torch.Tensor
) -> torch.Tensor:
    """Return the decoding's mean squared error in the 2x2 cells' area around each cell, (N, T)."""
    device = images_N3HW.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16_is_native(images_N3HW.device)):
        decoded_N3HW = tokenizer.render(tokenizer.quantizer.codebook_VC[codes_NT])
    error_N1HW = (decoded_N3HW.float().clamp(0, 1) - images_N3HW).square().mean(1, keepdim=True)
    cell = images_N3HW.shape[-1] // tokenizer.grid
    padded = F.pad(error_N1HW, (cell // 2,) * 4)
    return F.avg_pool2d(padded, 2 * cell, stride=cell).flatten(1)
