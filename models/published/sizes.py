"""Which model published weights are of, and of which size: read off their names and shapes.

What cannot be told from them: the grid of all but RAR, so --grid says it; the number of heads of
all but RAR, for which the published widths are known; and IAR's relabelled codes, whose files are
LlamaGen's in every name and shape but need IAR's own order of the codebook. Out of scope: the
MaskGIT-VQGAN tokenizer (RAR's, and one of RandAR's two), and the text-to-image models.
"""

import math
from typing import Any

from models.command import InputError
from models.method import ModelConfig
from models.published.baseline_vqvae import BaselineConfig
from models.published.vq16 import VQ16Config

Shapes = dict[str, tuple[int, ...]]

HEADS = {352: 8, 768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
"""heads by width, as published by LlamaGen, RandAR, ARPG and PAR, and (352) by the baseline"""
SIGNS = {
    "rar": ("target_aware_pos_embed", "timesteps_embeddings", "adaln_before_head."),
    "arpg": ("layers.self_dec.", "layers.cross_dec."),
    "par": ("spe_tok_embeddings.",),
    "randar": ("pos_instruct_embeddings",),
    "gpt": ("tok_embeddings.", "layers.0.attention.wqkv."),
    "vq16": ("encoder.conv_blocks.", "decoder.conv_blocks."),
    "baseline_vqvae": ("_vq_vae.", "_pre_vq_conv."),
}
"""starts of names that tell a model; the first model with one of them in the file is it"""
OTHERS = {
    "encoder.down.": "a MaskGIT-VQGAN tokenizer, which this repo does not have",
    "cls_embedding.cap_proj.": "a text-to-image model; only class labels are supported",
}


def recognise(shapes: Shapes) -> str:
    """Return the method or tokenizer by its name in METHODS or TOKENIZERS.

    Raises InputError for weights of something else.
    """

    def has(start: str) -> bool:
        return any(name.startswith(start) for name in shapes)

    for start, what in OTHERS.items():
        if has(start):
            raise InputError(f"this is {what}")
    for model, starts in SIGNS.items():
        if any(map(has, starts)):
            return model
    first = ", ".join(list(shapes)[:3]) or "none at all"
    raise InputError(f"expected weights of {', '.join(SIGNS)}; these names are of none: {first}")


def infer_config(model: str, shapes: Shapes, heads: int | None, grid: int | None) -> Any:
    """Return the config of a recognised model; `heads` and `grid` are what the user says.

    Raises InputError if a shape that tells a size is missing or impossible, or if the user says
    something else than the shapes.
    """
    if model == "vq16":
        return _vq16(shapes, grid or VQ16Config.grid)
    if model == "baseline_vqvae":
        return _baseline(shapes)
    sizes = {"rar": _rar, "arpg": _arpg}.get(model, _llama)(shapes)
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"the shapes give {name} = {size}")
    for name, given in (("heads", heads), ("grid", grid)):
        if given is not None and sizes.setdefault(name, given) != given:
            raise InputError(f"the weights have {name} {sizes[name]}, got --{name} {given}")
    if "heads" not in sizes and sizes["width"] not in HEADS:
        raise InputError(
            f"the number of heads is not in the weights, and width {sizes['width']} is of no "
            "published size: give --heads"
        )
    scan = "regions" if model == "par" else "raster"
    return ModelConfig(**{"heads": HEADS.get(sizes["width"]), "grid": 16, "scan": scan} | sizes)


def _size(shapes: Shapes, name: str, axis: int = 0) -> int:
    if len(shapes.get(name, ())) <= axis:
        raise InputError(
            f"expected {name} with a dimension {axis}, found {shapes.get(name, 'no such tensor')}"
        )
    return shapes[name][axis]


def _layers(shapes: Shapes, start: str) -> int:
    """Return how many of start.0., start.1., .. there are before the first gap."""
    count = 0
    while any(name.startswith(f"{start}.{count}.") for name in shapes):
        count += 1
    return count


def _llama(shapes: Shapes) -> dict:
    """LlamaGen, RandAR and PAR; PAR has one special token fewer than there are regions."""
    special = "spe_tok_embeddings.special_embeddings.weight"
    regions = {"regions": _size(shapes, special) + 1} if special in shapes else {}
    return regions | {
        "vocab_size": _size(shapes, "tok_embeddings.weight"),
        "width": _size(shapes, "tok_embeddings.weight", 1),
        "classes": _size(shapes, "cls_embedding.embedding_table.weight") - 1,
        "layers": _layers(shapes, "layers"),
    }


def _arpg(shapes: Shapes) -> dict:
    """ARPG: one table of V codes, the query, C labels, the null label, and a row of no use."""
    vocabulary = _size(shapes, "head.weight")
    return {
        "vocab_size": vocabulary,
        "width": _size(shapes, "head.weight", 1),
        "classes": _size(shapes, "embeddings.weight") - vocabulary - 3,
        "layers": _layers(shapes, "layers.self_dec") + _layers(shapes, "layers.cross_dec"),
    }


def _rar(shapes: Shapes) -> dict:
    """RAR: one table of V codes, a mask, C labels and the null label; T + 1024 positions."""
    vocabulary, width = _size(shapes, "lm_head.weight"), _size(shapes, "lm_head.weight", 1)
    head_width = _size(shapes, "blocks.0.attn.q_norm.weight")
    tokens = _size(shapes, "pos_embed", 1) - 1024
    grid = math.isqrt(max(tokens, 0))
    if tokens < 1 or grid * grid != tokens or width % head_width:
        raise InputError(
            f"expected pos_embed with 1024 rows more than a square grid has cells, and a width "
            f"that is a multiple of q_norm's, got {tokens + 1024} rows and {width} / {head_width}"
        )
    return {
        "vocab_size": vocabulary,
        "width": width,
        "classes": _size(shapes, "embeddings.weight") - vocabulary - 2,
        "layers": _layers(shapes, "blocks"),
        "heads": width // head_width,
        "grid": grid,
        "ffn_width": _size(shapes, "blocks.0.mlp.fc1.weight"),
        "spare_rows": True,
    }


def _vq16(shapes: Shapes, grid: int) -> VQ16Config:
    channels = _size(shapes, "encoder.conv_in.weight")
    levels = range(_layers(shapes, "encoder.conv_blocks"))
    first = "encoder.conv_blocks.{}.res.0.conv1.weight"
    return VQ16Config(
        codebook_size=_size(shapes, "quantize.embedding.weight"),
        code_dim=_size(shapes, "quantize.embedding.weight", 1),
        channels=channels,
        multipliers=tuple(_size(shapes, first.format(i)) // channels for i in levels),
        vector_width=_size(shapes, "quant_conv.weight", 1),
        grid=grid,
    )


def _baseline(shapes: Shapes) -> BaselineConfig:
    stack = "_encoder._residual_stack._layers"
    return BaselineConfig(
        codebook_size=_size(shapes, "_vq_vae._embedding.weight"),
        code_dim=_size(shapes, "_vq_vae._embedding.weight", 1),
        hiddens=_size(shapes, "_encoder._conv_3.weight"),
        residual_hiddens=_size(shapes, f"{stack}.0._block.1.weight"),
        residual_layers=_layers(shapes, stack),
    )
