"""What is RAR's own: what its two position tables must do, and how it starts."""

import math

import published_layouts
import pytest
import torch
from helpers import decoded, draw, tiny
from reference_rar import reference_logits

from models.method import ModelConfig
from models.methods import build
from models.orders import scan
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


def test_in_raster_order_the_target_table_folds_into_the_positions(model):
    folded = tiny("rar")
    with torch.no_grad():
        target = model.target_aware_pos_embed
        folded.pos_embed[0, 1 : TOKENS + 1] += target[0, 2 : TOKENS + 2]
        folded.target_aware_pos_embed.zero_()
    codes_BT, label_B, order_BS = draw(model)
    raster_BS = scan("raster", 4).expand_as(order_BS)
    one_BSV, other_BSV = (net(codes_BT, label_B, raster_BS) for net in (model, folded))
    torch.testing.assert_close(other_BSV, one_BSV, rtol=0, atol=1e-12)
    one_BSV, other_BSV = (net(codes_BT, label_B, order_BS) for net in (model, folded))
    assert not torch.allclose(one_BSV, other_BSV)


@pytest.mark.parametrize("step", [0, 5, TOKENS - 2])
def test_the_next_cell_is_told_by_the_target_table_alone(model, step):
    """Exchanging the cell of `step` with the last one changes the logits from `step` on."""
    codes_BT, label_B, order_BS = draw(model)
    swapped_BS = order_BS.clone()
    swapped_BS[:, [step, TOKENS - 1]] = order_BS[:, [TOKENS - 1, step]]
    before_BSV, after_BSV = (model(codes_BT, label_B, o_BS) for o_BS in (order_BS, swapped_BS))
    assert torch.equal(before_BSV[:, :step], after_BSV[:, :step])
    assert ((before_BSV[:, step] - after_BSV[:, step]).abs().amax(dim=1) > 1e-3).all()
    torch.nn.init.zeros_(model.target_aware_pos_embed)
    before_BSV, after_BSV = (model(codes_BT, label_B, o_BS) for o_BS in (order_BS, swapped_BS))
    assert torch.equal(before_BSV[:, : step + 1], after_BSV[:, : step + 1])


@pytest.mark.parametrize("seen", [1, 8, 14])
def test_the_order_of_later_cells_does_not_reach_back(model, seen):
    codes_BT, label_B, order_BS = draw(model)
    later_BS = torch.cat((order_BS[:, :seen], order_BS[:, seen:].flip(1)), dim=1)
    before_BSV, after_BSV = (model(codes_BT, label_B, o_BS) for o_BS in (order_BS, later_BS))
    assert torch.equal(before_BSV[:, :seen], after_BSV[:, :seen])
    assert not torch.allclose(before_BSV[:, seen], after_BSV[:, seen])


def test_images_of_a_label_share_their_modulation_and_nothing_else(model):
    """Labels repeated and out of order in a batch give what each image gives alone."""
    codes_BT, _, order_BS = draw(model)
    inputs = codes_BT, torch.tensor([3, 1, 3]), order_BS
    together_BSV = model(*inputs)
    for i in range(3):
        alone_BSV = model(*(x[i : i + 1] for x in inputs))
        torch.testing.assert_close(alone_BSV[0], together_BSV[i], rtol=0, atol=1e-12)
    found_BSV = decoded(model, *inputs, [1] * TOKENS)
    torch.testing.assert_close(found_BSV, together_BSV, rtol=0, atol=1e-10)


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
