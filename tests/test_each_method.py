"""What is each method's own, and not PAR's; the truths of the contract are in test_methods.py."""

import math

import pytest
import torch
from helpers import draw, tiny
from reference_llamagen import CLASS, rope, transformer

from models.arpg import ARPG
from models.command import InputError
from models.method import ModelConfig
from models.methods import build

TOKENS = 16


def test_each_cell_of_a_group_of_randar_is_told_by_its_own_instruction():
    """The sequence is [c, p_1, x_1, .. p_m, x_m, p_a, p_b, ..], by the formulas."""
    model = tiny("randar")
    codes_BT, label_B, order_BS = draw(model)
    known_Bm, asked_Bn = order_BS[:, :5], order_BS[:, 5:9]
    given = codes_BT.gather(1, known_Bm), known_Bm, asked_Bn
    found_BnV = model.decode(model.cache(label_B), *given)
    w = {name: value.detach() for name, value in model.named_parameters()}
    vector_HK = w["pos_instruct_embeddings"].view(2, -1)
    for b, label in enumerate(label_B.tolist()):
        slots, cells = [w["cls_embedding.embedding_table.weight"][label]], [CLASS]
        for step, cell in enumerate(order_BS[b, :9].tolist()):
            code_D = w["tok_embeddings.weight"][codes_BT[b, cell]]
            slots += [rope(vector_HK, cell, 4).flatten(), code_D][: 2 if step < 5 else 1]
            cells += [cell] * (2 if step < 5 else 1)
        expected_nV = transformer(torch.stack(slots), w, cells, 2, 4)[-4:]
        torch.testing.assert_close(found_BnV[b], expected_nV, rtol=0, atol=1e-9)


@pytest.fixture
def arpg() -> ARPG:
    return tiny("arpg", layers=4)


@pytest.mark.parametrize("sizes", [[TOKENS], [1, 3, 2, 6, 4], [7, 9]])
def test_every_cell_of_a_group_of_arpg_depends_on_the_committed_codes_alone(arpg, sizes):
    """In any grouping, each cell gets the logits that forward gives it if it comes next."""
    codes_BT, label_B, order_BS = draw(arpg)
    cache, done = arpg.cache(label_B), 0
    cells = order_BS.split([0, *sizes], dim=1)
    for i, size in enumerate(sizes):
        decoded_BnV = arpg.decode(cache, codes_BT.gather(1, cells[i]), cells[i], cells[i + 1])
        for j in range(size):
            steps = list(range(TOKENS))
            steps[done], steps[done + j] = steps[done + j], steps[done]
            forced_BSV = arpg(codes_BT, label_B, order_BS[:, steps])
            torch.testing.assert_close(decoded_BnV[:, j], forced_BSV[:, done], rtol=0, atol=1e-10)
        done += size


def test_dropout_of_arpg_is_on_the_content_in_training_only(arpg):
    """Token dropout alone: the label and the codes are hit, the query never."""
    inputs = draw(arpg)
    whole_BSV = arpg(*inputs)
    arpg.token_dropout.p = 1.0
    assert torch.equal(arpg(*inputs), whole_BSV)
    dropped_BSV = arpg.train()(*inputs)
    assert not torch.allclose(dropped_BSV, whole_BSV)
    # no content at all: what is left is the query's own vector, the same for every cell
    assert torch.allclose(dropped_BSV, dropped_BSV[:1, :1].expand_as(dropped_BSV))
    assert dropped_BSV.std(-1).min() > 0.1


def test_ids_out_of_range_are_not_another_vector_of_arpg(arpg):
    """A code V would be the query in the published table, a label C + 1 its unused row."""
    codes_BT, label_B, order_BS = draw(arpg)
    for bad in ((codes_BT + 7, label_B), (codes_BT, label_B + 4)):
        with pytest.raises(IndexError):
            arpg(*bad, order_BS)


def test_odd_numbers_of_layers_of_arpg_are_refused():
    with pytest.raises(InputError, match=r"^arpg .* even number of layers, got 3$"):
        build("arpg", ModelConfig(layers=3))


def test_rows_that_rar_has_to_spare_change_nothing():
    model, spare = (tiny("rar", spare_rows=more) for more in (False, True))
    rows = {key: value.shape for key, value in model.state_dict().items()}
    weights = {
        key: value[:, : rows[key][1]] if value.ndim == 3 else value
        for key, value in spare.state_dict().items()
    }
    model.load_state_dict(weights)
    assert torch.equal(model(*draw(model)), spare(*draw(model)))


def test_initial_weights_of_rar():
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
