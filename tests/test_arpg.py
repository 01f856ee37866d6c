"""What is ARPG's own; the truths of the contract are in test_methods.py."""

import pytest
import torch
from helpers import draw, tiny

from models import arpg
from models.command import InputError
from models.method import ModelConfig
from models.methods import build

TOKENS = 16


@pytest.fixture
def model() -> arpg.ARPG:
    return tiny("arpg", layers=4)


@pytest.mark.parametrize("sizes", [[TOKENS], [1, 3, 2, 6, 4], [7, 9]])
def test_every_cell_of_a_group_depends_on_the_committed_codes_alone(model, sizes):
    """In any grouping, each cell gets the logits that forward gives it if it comes next."""
    codes_BT, label_B, order_BS = draw(model)
    cache, done = model.cache(label_B), 0
    cells = order_BS.split([0, *sizes], dim=1)
    for i, size in enumerate(sizes):
        decoded_BnV = model.decode(cache, codes_BT.gather(1, cells[i]), cells[i], cells[i + 1])
        for j in range(size):
            steps = list(range(TOKENS))
            steps[done], steps[done + j] = steps[done + j], steps[done]
            forced_BSV = model(codes_BT, label_B, order_BS[:, steps])
            torch.testing.assert_close(decoded_BnV[:, j], forced_BSV[:, done], rtol=0, atol=1e-10)
        done += size


def test_a_cell_is_not_moved_by_the_others_that_are_asked(model):
    """Asked alone, first, last, twice, or again without a commit: the same logits."""
    codes_BT, label_B, order_BS = draw(model)
    known_Bm, none_B0, asked_Bn = order_BS[:, :5], order_BS[:, :0], order_BS[:, 5:]
    cache = model.cache(label_B)
    together_BnV = model.decode(cache, codes_BT.gather(1, known_Bm), known_Bm, asked_Bn)
    for picked in ([0], [3], [7, 2], [10, 4, 4, 0]):
        some_Bn, fresh = asked_Bn[:, picked], model.cache(label_B)
        again_BnV = model.decode(cache, none_B0, none_B0, some_Bn)
        alone_BnV = model.decode(fresh, codes_BT.gather(1, known_Bm), known_Bm, some_Bn)
        for found_BnV in (again_BnV, alone_BnV):
            torch.testing.assert_close(found_BnV, together_BnV[:, picked], rtol=0, atol=1e-10)
    assert cache.slots == 6  # the class and five codes


def test_the_class_token_is_reached_through_its_value_alone(model, monkeypatch):
    """Its rotation is zero: no query prefers or avoids it, in any layer of either pass."""
    seen = []

    def spy(q_BHSK, k_BHLK, v_BHLK, slots, attend=arpg.attend):
        length = slots[-1] + 1
        seen.append((q_BHSK, k_BHLK[:, :, :length], v_BHLK[:, :, :length]))
        return attend(q_BHSK, k_BHLK, v_BHLK, slots)

    monkeypatch.setattr(arpg, "attend", spy)
    codes_BT, label_B, order_BS = draw(model)
    model(codes_BT, label_B, order_BS)
    model.decode(model.cache(label_B), codes_BT[:, :3], order_BS[:, :3], order_BS[:, 3:])
    assert len(seen) == 8
    for call, (q_BHSK, k_BHLK, v_BHLK) in enumerate(seen):
        assert k_BHLK[:, :, 0].abs().max() == 0
        assert k_BHLK[:, :, 1:].abs().amax(-1).min() > 0
        assert v_BHLK[:, :, 0].abs().amax(-1).min() > 0
        pass_2 = call % 4 >= 2
        assert (q_BHSK[:, :, 0].abs().max() == 0) != pass_2
    assert torch.equal(seen[2][1], seen[3][1])  # one set of keys for all of pass 2


def test_dropout_is_on_the_content_in_training_only(model):
    """Token dropout alone: the label and the codes are hit, the query never."""
    inputs = draw(model)
    whole_BSV = model(*inputs)
    model.token_dropout.p = 1.0
    assert torch.equal(model(*inputs), whole_BSV)
    dropped_BSV = model.train()(*inputs)
    assert not torch.allclose(dropped_BSV, whole_BSV)
    # no content at all: what is left is the query's own vector, the same for every cell
    assert torch.allclose(dropped_BSV, dropped_BSV[:1, :1].expand_as(dropped_BSV))
    assert dropped_BSV.std(-1).min() > 0.1


def test_ids_out_of_range_are_not_another_vector(model):
    """A code V would be the query in the published table, a label C + 1 its unused row."""
    codes_BT, label_B, order_BS = draw(model)
    for bad in ((codes_BT + 7, label_B), (codes_BT, label_B + 4)):
        with pytest.raises(IndexError):
            model(*bad, order_BS)


def test_odd_numbers_of_layers_are_refused():
    with pytest.raises(InputError, match=r"^arpg .* even number of layers, got 3$"):
        build("arpg", ModelConfig(layers=3))
