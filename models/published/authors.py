"""The authors' own models, for `tools/benchmark.py --against`: their files imported, not changed.

A project is found by its repository's name in a folder of checkouts. Each adapter gives its model
our sizes, and two calls: the loss of a training step, and codes from labels with guidance.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from models.command import InputError, one_line
from models.method import ModelConfig


def import_file(checkout: Path, file: str) -> ModuleType:
    """Run a file of a checkout as its own code would be imported there; this executes it.

    It and what it imports from there leave no trace: two projects have a `utils`, and one a
    `models`.
    Raises InputError if it is not there, or needs what is not installed.
    """
    if not (checkout / file).is_file():
        raise InputError(f"expected {file} in {checkout}, a checkout of the authors' code")
    name = ".".join(Path(file).with_suffix("").parts)  # relative imports go by it
    spec = importlib.util.spec_from_file_location(name, checkout / file)
    module, before = importlib.util.module_from_spec(spec), dict(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        raise InputError(f"{checkout / file}: {one_line(e)}; run: uv pip install it") from None
    finally:
        sys.path.remove(str(checkout))
        for other in sys.modules.keys() - before.keys():
            if str(checkout) in repr(getattr(sys.modules[other], "__spec__", None)):
                del sys.modules[other]
    return module


class Authors(nn.Module):
    """A method by its authors, at the sizes of `config`."""

    checkout: str
    """folder of the repository"""
    steps: tuple[int | None, ...] = (None,)
    """network calls that it samples in; None: the only number"""
    head_name: str = "model.output"
    no_decay: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def forward(self, codes_BT: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        """Return the loss of a training step, in the method's own orders."""
        raise NotImplementedError

    def sample(self, label_B: torch.Tensor, steps: int | None, cfg_scale: float) -> torch.Tensor:
        """Return codes_BT in raster positions."""
        raise NotImplementedError


def llama_sizes(config: ModelConfig) -> dict:
    """Return the names that LlamaGen and its forks have for our sizes."""
    sizes = {"dim": config.width, "n_layer": config.layers, "n_head": config.heads}
    sizes |= {"vocab_size": config.vocab_size, "num_classes": config.classes}
    sizes |= {"block_size": config.tokens, "token_dropout_p": config.token_dropout}
    return sizes | {"resid_dropout_p": config.residual_dropout, "ffn_dropout_p": config.ffn_dropout}


class LlamaGen(Authors):
    """GPT, github.com/FoundationVision/LlamaGen; its samples always take a call for each code."""

    checkout = "LlamaGen"

    def __init__(self, config: ModelConfig, folder: Path):
        super().__init__(config)
        gpt = import_file(folder / self.checkout, "autoregressive/models/gpt.py")
        sampling = import_file(folder / self.checkout, "autoregressive/models/generate.py")
        self.generate = sampling.generate
        self.model = gpt.Transformer(gpt.ModelArgs(**llama_sizes(config)))

    def forward(self, codes_BT, label_B):
        return self.model(codes_BT[:, :-1], label_B, targets=codes_BT)[1]

    def sample(self, label_B, steps, cfg_scale):
        return self.generate(self.model, label_B, self.config.tokens, cfg_scale=cfg_scale)


class RandAR(Authors):
    """RandAR, github.com/ziqipang/RandAR."""

    checkout = "RandAR"
    steps = (64, 16)

    def __init__(self, config: ModelConfig, folder: Path):
        super().__init__(config)
        randar = import_file(folder / self.checkout, "RandAR/model/randar_gpt.py")
        sizes = llama_sizes(config)  # without checkpointing: it computes the forward pass twice
        self.model = randar.RandARTransformer(**sizes, grad_checkpointing=False)

    def forward(self, codes_BT, label_B):
        return self.model(codes_BT, label_B, targets=codes_BT)[1]

    @torch.no_grad()
    def sample(self, label_B, steps, cfg_scale):
        return self.model.generate(label_B, None, (1.0, cfg_scale), steps)


class ARPG(Authors):
    """ARPG, github.com/hp-l33/ARPG: training only, its samples are of 256 tokens whatever its size.

    It needs einops and transformers.
    """

    head_name = "model.head"
    checkout = "ARPG"
    steps = ()

    def __init__(self, config: ModelConfig, folder: Path):
        super().__init__(config)
        arpg = import_file(folder / self.checkout, "models/arpg.py")
        self.model = arpg.Transformer(arpg.ModelArgs(**llama_sizes(config)))

    def forward(self, codes_BT, label_B):
        return self.model(codes_BT, label_B, codes_BT)[1]


class Named(SimpleNamespace):
    """Values by name, with what RAR asks of OmegaConf."""

    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


class RAR(Authors):
    """RAR, github.com/bytedance/1d-tokenizer, in random orders; it needs timm."""

    head_name = "model.lm_head"
    checkout = "1d-tokenizer"

    def __init__(self, config: ModelConfig, folder: Path):
        super().__init__(config)
        sizes = {"hidden_size": config.width, "num_hidden_layers": config.layers}
        sizes |= {"num_attention_heads": config.heads, "intermediate_size": 4 * config.width}
        sizes |= {"image_seq_len": config.tokens, "condition_num_classes": config.classes}
        sizes |= {"dropout": config.residual_dropout, "attn_drop": 0.0}
        vq_model = Named(codebook_size=config.vocab_size)
        rar = import_file(folder / self.checkout, "modeling/rar.py")
        self.model = rar.RAR(Named(model=Named(generator=Named(**sizes), vq_model=vq_model)))
        self.model.set_random_ratio(1.0)

    def forward(self, codes_BT, label_B):
        label_B = self.model.preprocess_condition(label_B, 0.1)
        logits_BLV, codes_BS = self.model(codes_BT, label_B, return_labels=True)
        return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), codes_BS.flatten())

    def sample(self, label_B, steps, cfg_scale):
        return self.model.generate(label_B, cfg_scale, 1.0, 2.75)


AUTHORS = {"gpt": LlamaGen, "randar": RandAR, "rar": RAR, "arpg": ARPG}
"""by the name in METHODS"""
