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
