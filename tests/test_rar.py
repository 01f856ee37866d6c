"""What is RAR's own: what its two position tables must do, and how it starts."""

import math

import published_layouts
import pytest
import torch
from helpers import draw, tiny
from reference_rar import reference_logits

from models.method import ModelConfig
from models.methods import build
from models.rar import RAR

TOKENS = 16


@pytest.fixture
def model() -> RAR:
    return tiny("rar")


def test_logits_are_those_of_the_formulas_with_a_narrow_feed_forward():
    """The usual width is in test_import.py, as for every method."""
    model = tiny("rar", spare_rows=True, ffn_width=24)
    weights = published_layouts.draw(published_layouts.rar(2, 16, 24, 7, 3, 2, TOKENS))
    weights = {name: value.double() for name, value in weights.items()}
    model.load_state_dict(weights)
    expected_BSV = reference_logits(weights, *draw(model), heads=2)
    torch.testing.assert_close(model(*draw(model)), expected_BSV, rtol=0, atol=1e-9)


def test_spare_rows_change_nothing(model):
    spare = tiny("rar", spare_rows=True)
    rows = {key: value.shape for key, value in model.state_dict().items()}
    weights = {
        key: value[:, : rows[key][1]] if value.ndim == 3 else value
        for key, value in spare.state_dict().items()
    }
    model.load_state_dict(weights)
    assert torch.equal(model(*draw(model)), spare(*draw(model)))


def test_initial_weights():
    """Blocks are the identity; ln sum exp - mean of the logits is ln V + 0.02^2 * D / 2."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=512, classes=3, grid=4, layers=2, heads=4, width=256)
    model = build("rar", config).eval()
    assert model.cls_token.count_nonzero() == 0
    zero = [name for name, value in model.named_parameters() if not value.any()]
    assert all(f"blocks.{i}.adaLN_modulation.1.weight" in zero for i in range(2))
    assert "adaln_before_head.adaLN_modulation.1.weight" in zero
    for name, value in model.named_parameters():
        if value.ndim > 1 and name not in zero:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
    codes_BT, label_B, order_BS = draw(model)
    logits_BSV = model(codes_BT, label_B, order_BS)
    expected = math.log(512) + 0.02**2 * 256 / 2
    excess = (logits_BSV.logsumexp(-1) - logits_BSV.mean(-1)).mean().item() - math.log(512)
    assert excess == pytest.approx(0.02**2 * 256 / 2, rel=0.1)
    assert model.loss(logits_BSV, codes_BT, order_BS)[0].item() == pytest.approx(expected, abs=0.2)
