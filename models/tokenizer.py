"""The tokenizer as a file, images <-> codes, areas of cells, and a search for better codes.

Saved by stage 2 or imported, read by stages 3 to 5.
"""

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models.artifacts import ROOT, as_written, load_checkpoint, restored, save_checkpoint, sha256_of
from models.command import InputError
from models.data import Codes
from models.machine import bf16_is_native

KIND = "tokenizer"
TOKENIZERS = {
    "vqvae": ("models.vqvae", "VQVAE", "VQVAEConfig"),
    "vq16": ("models.published.vq16", "VQ16", "VQ16Config"),
    "baseline_vqvae": ("models.published.baseline_vqvae", "BaselineVQVAE", "BaselineConfig"),
}
"""Module, class and config by the `model` of a header; a header without one is of a `vqvae`."""
Tokenizer = nn.Module
"""One of TOKENIZERS: has config, grid, encode, decode, and codebook_VC, which it compares with"""
Area = Literal["centre", "left", "right", "top", "bottom", "random"]
"""names of some of the cells"""
CODES_OF = "codes_of"
"""in a header: the sha256 of the tokenizer whose encoder and codebook it has, with a new decoder"""


def build_tokenizer(name: str, config: Any) -> Tokenizer:
    """Return a tokenizer by its name in TOKENIZERS; `config` is its own, or a dict of its fields.

    Imported here and not before: the library behind one of them takes seconds.
    """
    path, kind, config_kind = TOKENIZERS[name]
    module = importlib.import_module(path)
    if isinstance(config, dict):
        config = getattr(module, config_kind)(**config)
    return getattr(module, kind)(config)


def save_tokenizer(path: Path, model: Tokenizer, head: dict) -> None:
    """Write the weights of a tokenizer under the header `head`, of kind "tokenizer"."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    kind = type(model).__name__
    head = head | {"model": next(n for n, (_, name, _) in TOKENIZERS.items() if name == kind)}
    save_checkpoint(path, head, model_config=asdict(model.config), model=state)


def load_tokenizer(path: Path) -> tuple[Tokenizer, dict]:
    """Return a tokenizer in eval mode and its header, `sha256` of the file added.

    Raises InputError for a file that is missing, broken or no tokenizer.
    """
    rerun = "uv run tokenizer_vq/train_vqvae.py"
    saved = load_checkpoint(path, KIND, rerun)
    with as_written(path, KIND, f"run: {rerun}"):
        what = saved["header"].get("model", "vqvae"), saved["model_config"]
        model = restored(lambda: build_tokenizer(*what), saved["model"])  # half becomes fp32
    return model.requires_grad_(False).eval(), saved["header"]


def decodes(header: dict, sha256: str) -> bool:
    """Tell whether a tokenizer, by its header, decodes the codes of the one with this sha256."""
    return sha256 in (header["sha256"], header.get(CODES_OF))


def find_tokenizer(sha256: str | None, given: Path | None = None) -> Path:
    """Return the tokenizer file with this sha256: `given`, or one the repo has.

    What is given may have a new decoder for its codes. Raises InputError if `given` is another
    tokenizer, if none of the repo's is the one, or for a generator that was imported without one
    (None).
    """
    if sha256 is None:
        raise InputError(
            "the generator was imported without a tokenizer, so nothing says what its codes mean; "
            "run tools/import_checkpoint.py again with --tokenizer"
        )
    places = ("tokenizer_vq/*.pth", "checkpoints/*.pth", "data/*/tokenizer.pth")
    here = [path for place in places for path in sorted(ROOT.glob(place))]
    for path in [given] if given else here:
        if not path.exists():
            raise InputError(f"expected a tokenizer at {path}, found nothing")
        if sha256_of(path) == sha256 or (given and decodes(load_tokenizer(path)[1], sha256)):
            return path
    searched = f"{given} is not it" if given else f"none of {', '.join(places)} is it"
    raise InputError(
        f"the generator was trained on codes of tokenizer {sha256[:12]}.., and {searched}; give "
        "its --tokenizer, or train on the codes of the one you have"
    )


def tokenizer_of(path: Path, codes: Codes) -> Tokenizer | None:
    """Return the tokenizer at `path` if it decodes these codes, else None."""
    if not path.exists():
        return None
    tokenizer, header = load_tokenizer(path)
    fits = decodes(header, codes.header["inputs"]["tokenizer"])
    return tokenizer.to(codes.label_N.device) if fits else None


def nearest_codes(codebook_VC: torch.Tensor, count: int = 8) -> torch.Tensor:
    """Return the codes with the nearest vectors, without the code itself: (V, count or V - 1)."""
    distance_VV = torch.cdist(codebook_VC.float(), codebook_VC.float()).fill_diagonal_(torch.inf)
    return distance_VV.topk(min(count, len(codebook_VC) - 1), largest=False).indices


def to_float(images_NHWC: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Turn uint8 (N, H, W, 3) into float (N, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(images_NHWC).to(device).permute(0, 3, 1, 2).float() / 255


def to_uint8(images_N3HW: torch.Tensor) -> np.ndarray:
    """Turn float (N, 3, H, W) in [0, 1] into uint8 (N, H, W, 3), rounded, not truncated."""
    pixels = (images_N3HW.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode_images(
    model: Tokenizer, images_NHWC: np.ndarray, batch: int = 64, sweeps: int = 0
) -> torch.Tensor:
    """Return codes_NT int64, on the CPU, of uint8 images; `sweeps` > 0 searches for better ones."""
    device, starts = next(model.parameters()).device, range(0, len(images_NHWC), batch)
    batches = (to_float(images_NHWC[i : i + batch], device) for i in starts)
    codes = (search_codes(model, x, sweeps) if sweeps else model.encode(x) for x in batches)
    return torch.cat([codes_NT.cpu() for codes_NT in codes])


def decode_codes(model: Tokenizer, codes_NT: torch.Tensor, batch: int = 64) -> np.ndarray:
    """Return uint8 images (N, H, W, 3) of codes_NT; an image is the same in any batch."""
    device = next(model.parameters()).device
    lone = len(codes_NT) % batch == 1  # products of a single row are rounded otherwise
    codes_MT = torch.cat((codes_NT, codes_NT[-1:])) if lone else codes_NT
    parts = [to_uint8(model.decode(c.to(device))) for c in codes_MT.split(batch)]
    return np.concatenate(parts)[: len(codes_NT)]


def mirror(images_NHWC: np.ndarray) -> np.ndarray:
    """Swap left and right of images."""
    return np.ascontiguousarray(images_NHWC[:, :, ::-1])


def mirror_grid(codes_NT: torch.Tensor, grid: int) -> torch.Tensor:
    """Swap left and right of code grids; the codes of mirrored images are others."""
    return codes_NT.unflatten(1, (grid, grid)).flip(2).flatten(1)


LATTICE = 2
"""cells two apart, in either direction, are tried at once by search_codes"""


@torch.no_grad()
def search_codes(tokenizer: Tokenizer, images_N3HW: torch.Tensor, sweeps: int) -> torch.Tensor:
    """Return codes_NT, int64, of images in [0, 1], that decode best (0 sweeps: that lie nearest).

    The nearest code of a cell ignores what the decoder makes of it beside its neighbours. Starting
    from the nearest codes, cells are visited in four interleaved lattices; each tries its second
    nearest code and keeps the one that decodes with the smaller squared error around the cell, the
    others held fixed (iterated conditional modes, Besag 1986). A sweep takes
    eight decodings, in bf16 where the device has it.
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
    tokenizer: Tokenizer, codes_NT: torch.Tensor, images_N3HW: torch.Tensor
) -> torch.Tensor:
    """Return the decoding's mean squared error in the 2x2 cells' area around each cell, (N, T)."""
    device = images_N3HW.device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16_is_native(images_N3HW.device)):
        decoded_N3HW = tokenizer.render(tokenizer.quantizer.codebook_VC[codes_NT])
    error_N1HW = (decoded_N3HW.float().clamp(0, 1) - images_N3HW).square().mean(1, keepdim=True)
    cell = images_N3HW.shape[-1] // tokenizer.grid
    padded = F.pad(error_N1HW, (cell // 2,) * 4)
    return F.avg_pool2d(padded, 2 * cell, stride=cell).flatten(1)


def area(mask: str | Path, grid: int, side: int, share: float, seed: int) -> torch.Tensor:
    """Return open_T, bool, of an area by name or of the white pixels of a picture."""
    open_hw = torch.zeros(grid, grid, dtype=torch.bool)
    half, quarter = grid // 2, grid // 4
    named = {
        "centre": np.s_[quarter : grid - quarter, quarter : grid - quarter],
        "left": np.s_[:, :half],
        "right": np.s_[:, half:],
        "top": np.s_[:half],
        "bottom": np.s_[half:],
    }
    if mask == "random":
        generator = torch.Generator().manual_seed(seed)
        open_hw.view(-1)[torch.randperm(grid**2, generator=generator)[: round(share * grid**2)]] = 1
    elif mask in named:
        open_hw[named[mask]] = True
    else:
        open_hw = read_mask(Path(mask), grid, side)
    return open_hw.flatten()


def read_mask(path: Path, grid: int, side: int) -> torch.Tensor:
    """Return open_hw, bool, of a picture: a cell is open if any of its pixels is white."""
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with Image.open(path) as image:
            if image.size not in ((grid, grid), (side, side)):
                raise ValueError(f"it is {image.width}x{image.height}")
            white_HW = torch.from_numpy(np.array(image.convert("L")) > 127)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        areas, sizes = ", ".join(get_args(Area)), f"{grid}x{grid} or {side}x{side}"
        raise InputError(
            f"--mask {path}: expected {areas}, or a picture of {sizes} pixels: {e}"
        ) from None
    return white_HW.unflatten(0, (grid, -1)).unflatten(2, (grid, -1)).any(3).any(1)
