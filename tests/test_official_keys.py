"""Names and shapes of every tensor, against lists that were read from the official code."""

import hashlib

import pytest
import torch

from models.methods import build
from models.published.vq16 import VQ16, VQ16Config
from models.transformer import ModelConfig


def digest(model: torch.nn.Module) -> tuple[int, str]:
    """Return the number of tensors, and a hash of the sorted lines `name <tab> 1x2x3`."""
    lines = [f"{k}\t{'x'.join(map(str, v.shape))}" for k, v in model.state_dict().items()]
    return len(lines), hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]


LISTS = [
    ("gpt", 12, 12, 768, 16384, (88, "9fad22ac16afe7630de8dbfb03fb2f7f")),  # llamagen_b
    ("randar", 24, 16, 1024, 16384, (173, "0236692edec8b5a94d938a2b8fda6ff0")),  # randar_l_llamagen
    ("randar", 24, 16, 1024, 1024, (173, "b70ff661eca465047d96d8c061fcd270")),  # randar_l_maskgit
    ("rar", 24, 16, 768, 1024, (441, "fe1311f0e1b237ea8ff7028af31aa324")),  # rar_b
    ("arpg", 24, 16, 1024, 16384, (198, "c8f2518c1c3a416c2e676a504c8e44c6")),  # arpg_l
]


@pytest.mark.parametrize(("method", "layers", "heads", "width", "codes", "listed"), LISTS)
def test_generators_have_the_listed_tensors(method, layers, heads, width, codes, listed):
    sizes = {"layers": layers, "heads": heads, "width": width, "vocab_size": codes}
    with torch.device("meta"):
        model = build(method, ModelConfig(classes=1000, grid=16, spare_rows=True, **sizes))
    assert digest(model) == listed


def test_the_tokenizer_has_the_listed_tensors():
    with torch.device("meta"):
        model = VQ16(VQ16Config())
    assert digest(model) == (344, "4ddc1fdb11a70354a610274ceb616102")
