"""Which model published weights are of, and of which size: read off their names and shapes.

What cannot be told from them: the grid of all but RAR, so --grid says it; the number of heads of
all but RAR, for which the published widths are known; and IAR's relabelled codes, whose files are
LlamaGen's in every name and shape but need IAR's own order of the codebook. Out of scope: the
MaskGIT-VQGAN tokenizer (RAR's, and one of RandAR's two), and the text-to-image models.
"""

import math
from typing import Any

from models.command import InputError
from models.methods import METHODS
from models.published.baseline_vqvae import BaselineConfig
from models.published.vq16 import VQ16Config
from models.transformer import ModelConfig

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
    found = {"rar": _rar, "arpg": _arpg}.get(model, _llama)(shapes)
    for name, size in found.items():
        if size < 1:
            raise InputError(f"the shapes give {name} = {size}")
    for name, said in (("heads", heads), ("grid", grid)):
        if said is not None and found.setdefault(name, said) != said:
            raise InputError(f"the weights have {name} {found[name]}, got --{name} {said}")
    if "heads" not in found and found["width"] not in HEADS:
        raise InputError(
            f"the number of heads is not in the weights, and width {found['width']} is of no "
            "published size: give --heads"
        )
    found.setdefault("heads", HEADS.get(found["width"]))
    found.setdefault("grid", 16)
    method = METHODS[model]
    return ModelConfig(**found, scan="raster" if method.any_order else method.scans[0])


def _sizes(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor that tells a size."""
    if len(shapes.get(name, ())) != dims:
        raise InputError(
            f"expected {name} with {dims} dimensions, found {shapes.get(name, 'no such tensor')}"
        )
    return shapes[name]


def _layers(shapes: Shapes, start: str) -> int:
    """Return how many of start.0., start.1., .. there are before the first gap."""
    count = 0
    while any(name.startswith(f"{start}.{count}.") for name in shapes):
        count += 1
    return count


def _llama(shapes: Shapes) -> dict:
    """LlamaGen, RandAR and PAR."""
    codes, width = _sizes(shapes, "tok_embeddings.weight", 2)
    labels, _ = _sizes(shapes, "cls_embedding.embedding_table.weight", 2)
    found = {"vocab_size": codes, "width": width, "classes": labels - 1}
    special = "spe_tok_embeddings.special_embeddings.weight"
    if special in shapes:  # PAR: one token fewer than there are regions
        found["regions"] = _sizes(shapes, special, 2)[0] + 1
    return found | {"layers": _layers(shapes, "layers")}


def _arpg(shapes: Shapes) -> dict:
    """ARPG: one table of V codes, the query, C labels, the null label, and a row of no use."""
    codes, width = _sizes(shapes, "head.weight", 2)
    rows, _ = _sizes(shapes, "embeddings.weight", 2)
    layers = _layers(shapes, "layers.self_dec") + _layers(shapes, "layers.cross_dec")
    return {"vocab_size": codes, "width": width, "classes": rows - codes - 3, "layers": layers}


def _rar(shapes: Shapes) -> dict:
    """RAR: one table of V codes, a mask, C labels and the null label; T + 1024 positions."""
    codes, width = _sizes(shapes, "lm_head.weight", 2)
    rows, _ = _sizes(shapes, "embeddings.weight", 2)
    (head_width,) = _sizes(shapes, "blocks.0.attn.q_norm.weight", 1)
    hidden, _ = _sizes(shapes, "blocks.0.mlp.fc1.weight", 2)
    tokens = _sizes(shapes, "pos_embed", 3)[1] - 1024
    grid = math.isqrt(max(tokens, 0))
    if tokens < 1 or grid * grid != tokens or width % head_width:
        raise InputError(
            f"expected pos_embed with 1024 rows more than a square grid has cells, and a width "
            f"that is a multiple of q_norm's, got {tokens + 1024} rows and {width} / {head_width}"
        )
    return {
        "vocab_size": codes,
        "width": width,
        "classes": rows - codes - 2,
        "layers": _layers(shapes, "blocks"),
        "heads": width // head_width,
        "grid": grid,
        "ffn_width": hidden,
        "spare_rows": True,
    }


def _vq16(shapes: Shapes, grid: int) -> VQ16Config:
    channels = _sizes(shapes, "encoder.conv_in.weight", 4)[0]
    levels = range(_layers(shapes, "encoder.conv_blocks"))
    first = "encoder.conv_blocks.{}.res.0.conv1.weight"
    return VQ16Config(
        *_sizes(shapes, "quantize.embedding.weight", 2),
        channels=channels,
        multipliers=tuple(_sizes(shapes, first.format(i), 4)[0] // channels for i in levels),
        vector_width=_sizes(shapes, "quant_conv.weight", 4)[1],
        grid=grid,
    )


def _baseline(shapes: Shapes) -> BaselineConfig:
    stack = "_encoder._residual_stack._layers"
    return BaselineConfig(
        *_sizes(shapes, "_vq_vae._embedding.weight", 2),
        hiddens=_sizes(shapes, "_encoder._conv_3.weight", 4)[0],
        residual_hiddens=_sizes(shapes, f"{stack}.0._block.1.weight", 4)[0],
        residual_layers=_layers(shapes, stack),
    )
