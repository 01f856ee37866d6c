"""Names and shapes of published weights, from their documented layouts, and random weights so."""

import torch

Shapes = dict[str, tuple[int, ...]]


def swiglu(at: str, width: int, hidden: int) -> Shapes:
    wide, narrow = (hidden, width), (width, hidden)
    return {f"{at}.w1.weight": wide, f"{at}.w3.weight": wide, f"{at}.w2.weight": narrow}


def gpt(layers: int, width: int, hidden: int, codes: int, classes: int) -> Shapes:
    found = {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "tok_embeddings.weight": (codes, width),
        "norm.weight": (width,),
        "output.weight": (codes, width),
    }
    for i in range(layers):
        found[f"layers.{i}.attention.wqkv.weight"] = (3 * width, width)
        found[f"layers.{i}.attention.wo.weight"] = (width, width)
        found |= swiglu(f"layers.{i}.feed_forward", width, hidden)
        found[f"layers.{i}.attention_norm.weight"] = (width,)
        found[f"layers.{i}.ffn_norm.weight"] = (width,)
    return found


def randar(layers: int, width: int, hidden: int, codes: int, classes: int) -> Shapes:
    return {"pos_instruct_embeddings": (1, width), **gpt(layers, width, hidden, codes, classes)}


def par(layers: int, width: int, hidden: int, codes: int, classes: int, regions: int) -> Shapes:
    special = {"spe_tok_embeddings.special_embeddings.weight": (regions - 1, width)}
    return special | gpt(layers, width, hidden, codes, classes)


def arpg(layers: int, width: int, hidden: int, codes: int, classes: int) -> Shapes:
    square = (width, width)
    found = {"embeddings.weight": (codes + classes + 3, width)}
    for part, names in (("self", ("to_q", "to_k", "to_v", "proj")), ("cross", ("to_q", "proj"))):
        for i in range(layers // 2):
            at = f"layers.{part}_dec.{i}"
            found |= {f"{at}.attn.{name}.weight": square for name in names}
            found |= swiglu(f"{at}.ffn", width, hidden)
            found |= {f"{at}.attn_norm.weight": (width,), f"{at}.ffn_norm.weight": (width,)}
    found |= {"layers.norm.weight": (width,), "norm.weight": (width,)}
    found |= {"layers.to_k.weight": square, "layers.to_v.weight": square}
    return found | {"head.weight": (codes, width)}


def with_bias(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def rar(
    layers: int, width: int, hidden: int, codes: int, classes: int, heads: int, tokens: int
) -> Shapes:
    found = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens + 1024, width),
        "target_aware_pos_embed": (1, tokens + 1024, width),
        "timesteps_embeddings": (1, tokens + 100, width),
    }
    for i in range(layers):
        at = f"blocks.{i}"
        found |= with_bias(f"{at}.norm1", (width,)) | with_bias(f"{at}.norm2", (width,))
        found |= with_bias(f"{at}.attn.qkv", (3 * width, width))
        found |= with_bias(f"{at}.attn.proj", (width, width))
        found |= with_bias(f"{at}.attn.q_norm", (width // heads,))
        found |= with_bias(f"{at}.attn.k_norm", (width // heads,))
        found |= with_bias(f"{at}.mlp.fc1", (hidden, width))
        found |= with_bias(f"{at}.mlp.fc2", (width, hidden))
        found |= with_bias(f"{at}.adaLN_modulation.1", (6 * width, width))
    found |= {"embeddings.weight": (codes + 1 + classes + 1, width)}
    found |= with_bias("adaln_before_head.adaLN_modulation.1", (2 * width, width))
    return found | with_bias("lm_head", (codes, width))


LAYOUTS = {"gpt": gpt, "randar": randar, "rar": rar, "arpg": arpg, "par": par}


def conv(name: str, outputs: int, inputs: int, side: int) -> Shapes:
    return with_bias(name, (outputs, inputs, side, side))


def vq_residual(at: str, inputs: int, outputs: int) -> Shapes:
    found = with_bias(f"{at}.norm1", (inputs,)) | conv(f"{at}.conv1", outputs, inputs, 3)
    found |= with_bias(f"{at}.norm2", (outputs,)) | conv(f"{at}.conv2", outputs, outputs, 3)
    return found if inputs == outputs else found | conv(f"{at}.nin_shortcut", outputs, inputs, 1)


def vq_attention(at: str, width: int) -> Shapes:
    found = with_bias(f"{at}.norm", (width,))
    for name in ("q", "k", "v", "proj_out"):
        found |= conv(f"{at}.{name}", width, width, 1)
    return found


def vq16(channels=128, multipliers=(1, 1, 2, 2, 4), vector_width=256, codes=16384, dim=8) -> Shapes:
    down = [channels * m for m in multipliers]
    up, found = down[::-1], {}
    deep, levels = down[-1], len(down)
    for side, widths, blocks, attention, resize in (
        ("encoder", [channels, *down], 2, levels - 1, "downsample"),
        ("decoder", [deep, *up], 3, 0, "upsample"),
    ):
        for level in range(levels):
            at, inputs, outputs = f"{side}.conv_blocks.{level}", *widths[level : level + 2]
            for j in range(blocks):
                found |= vq_residual(f"{at}.res.{j}", outputs if j else inputs, outputs)
                if level == attention:
                    found |= vq_attention(f"{at}.attn.{j}", outputs)
            if level < levels - 1:
                found |= conv(f"{at}.{resize}.conv", outputs, outputs, 3)
        found |= vq_residual(f"{side}.mid.0", deep, deep) | vq_attention(f"{side}.mid.1", deep)
        found |= vq_residual(f"{side}.mid.2", deep, deep)
        found |= with_bias(f"{side}.norm_out", (widths[-1],))
    for name, outputs, inputs, size in (
        ("encoder.conv_in", channels, 3, 3),
        ("encoder.conv_out", vector_width, deep, 3),
        ("decoder.conv_in", deep, vector_width, 3),
        ("decoder.conv_out", 3, channels, 3),
        ("quant_conv", dim, vector_width, 1),
        ("post_quant_conv", vector_width, dim, 1),
    ):
        found |= conv(name, outputs, inputs, size)
    return found | {"quantize.embedding.weight": (codes, dim), "quantize.codebook_used": (65536,)}


def baseline_vqvae(hiddens=128, residual=32, layers=2, codes=512, dim=64) -> Shapes:
    found = conv("_encoder._conv_1", hiddens // 2, 3, 4)
    found |= conv("_encoder._conv_2", hiddens, hiddens // 2, 4)
    found |= conv("_encoder._conv_3", hiddens, hiddens, 3)
    for side in ("_encoder", "_decoder"):
        for i in range(layers):
            at = f"{side}._residual_stack._layers.{i}._block"
            found[f"{at}.1.weight"] = (residual, hiddens, 3, 3)
            found[f"{at}.3.weight"] = (hiddens, residual, 1, 1)
    found |= conv("_pre_vq_conv", dim, hiddens, 1) | conv("_decoder._conv_1", hiddens, dim, 3)
    found |= {"_vq_vae._embedding.weight": (codes, dim), "_vq_vae._ema_w": (codes, dim)}
    found |= {"_vq_vae._ema_cluster_size": (codes,)}
    for name, inputs, outputs in (
        ("_decoder._conv_trans_1", hiddens, hiddens // 2),
        ("_decoder._conv_trans_2", hiddens // 2, 3),
    ):  # a transposed convolution has its inputs first
        found |= {f"{name}.weight": (inputs, outputs, 4, 4), f"{name}.bias": (outputs,)}
    return found


def draw(shapes: Shapes, seed: int = 0, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Random float32 weights; the scales of norms around 1, everything else around 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator)
        + float("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }
