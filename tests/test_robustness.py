"""Context corruption: what is replaced, and what a wrong context costs."""

import math

import pytest
import torch

from metrics.likelihood import bits_per_code, orders_for
from metrics.robustness import context_report, corrupt_context, corrupted_batches, nearest_codes
from models.errors import InputError
from models.methods import METHODS, build
from models.trunk import ModelConfig

CODES = 7


def tiny(method: str):
    torch.manual_seed(0)
    config = ModelConfig(
        codes=CODES, classes=3, grid=4, scan=METHODS[method].scans[0], layers=2, heads=2, width=16,
        token_dropout=0, residual_dropout=0, ffn_dropout=0,
    )  # fmt: skip
    model = build(method, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def inputs(model, count: int = 12):
    generator = torch.Generator().manual_seed(1)
    codes_NT = torch.randint(CODES, (count, 16), generator=generator)
    order = "random" if model.any_order else model.config.scan
    return codes_NT, torch.arange(count) % 3, orders_for(order, count, 4)


def test_a_share_of_codes_is_replaced_by_others():
    codes_NT = torch.randint(CODES, (500, 16))
    before_NT = codes_NT.clone()
    found = {rho: corrupt_context(codes_NT, rho, CODES, seed=3) for rho in (0.0, 0.1, 0.5, 1.0)}
    assert torch.equal(codes_NT, before_NT) and torch.equal(found[0.0], codes_NT)
    assert (found[1.0] != codes_NT).all()
    for rho, corrupted_NT in found.items():
        assert (corrupted_NT != codes_NT).double().mean().item() == pytest.approx(rho, abs=0.02)
        assert corrupted_NT.min() >= 0 and corrupted_NT.max() < CODES
    few_NT = found[0.1] != codes_NT  # nested, with the same new codes
    assert torch.equal(found[0.1][few_NT], found[0.5][few_NT])
    counts_V = torch.bincount((found[1.0] - codes_NT).flatten() % CODES, minlength=CODES)
    assert counts_V[0] == 0 and counts_V[1:].min() > 1200  # 8000 / 6 each
    assert not torch.equal(found[0.5], corrupt_context(codes_NT, 0.5, CODES, seed=4))
    for rho in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="rho in"):
            corrupt_context(codes_NT, rho, CODES)


def test_neighbours_are_the_nearest_other_codes():
    codebook_VC = torch.tensor([[0.0], [1.0], [1.5], [5.0], [5.1]])
    neighbours_VK = nearest_codes(codebook_VC, 2)
    expected = [{1, 2}, {2, 0}, {1, 0}, {4, 2}, {3, 2}]
    assert [set(row) for row in neighbours_VK.tolist()] == expected
    codes_NT = torch.randint(5, (200, 16))
    corrupted_NT = corrupt_context(codes_NT, 1.0, 5, neighbours_VK)
    for code, allowed in enumerate(expected):
        assert set(corrupted_NT[codes_NT == code].tolist()) == allowed


@pytest.mark.parametrize("method", METHODS)
def test_targets_stay_clean_and_the_context_does_not(method):
    model = tiny(method)
    codes_NT, label_N, order_NS = inputs(model)
    corrupted_NT = corrupt_context(codes_NT, 1.0, CODES)
    found = list(corrupted_batches(model, codes_NT, corrupted_NT, label_N, order_NS, batch=5))
    target_NS = torch.cat([target_BS for _, target_BS in found])
    assert torch.equal(target_NS, codes_NT.gather(1, order_NS))
    logits_NSV = torch.cat([logits_BSV for logits_BSV, _ in found])
    clean_NSV = model(codes_NT, label_N, order_NS)
    torch.testing.assert_close(logits_NSV[:, 0], clean_NSV[:, 0])  # the first step has no context
    assert not torch.allclose(logits_NSV[:, -1], clean_NSV[:, -1], atol=1e-3)


def test_a_clean_context_gives_the_likelihood_and_rhos_their_cost():
    model = tiny("randar")
    codes_NT, label_N, order_NS = inputs(model)
    rows = context_report(model, codes_NT, label_N, order_NS, (0.2, 0.0, 0.6), batch=5)
    assert [row["rho"] for row in rows] == [0.0, 0.2, 0.6]
    clean, low, high = rows
    bits = bits_per_code(model, codes_NT, label_N, order_NS).sum(1).mean().item()
    assert clean["bits_per_image"]["value"] == pytest.approx(bits, rel=1e-5)
    assert clean["more_bits_per_image"]["value"] == clean["replaced"] == 0
    for row in (low, high):
        more = row["bits_per_image"]["value"] - clean["bits_per_image"]["value"]
        assert row["more_bits_per_image"]["value"] == pytest.approx(more) != 0
        assert 0 <= row["ece_equal_width"]["value"] <= 1


class Repeats(torch.nn.Module):
    """Says, 0.97 sure, that the next code in raster order is the last one again."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(codes=4, classes=1, grid=4)
        self.some = torch.nn.Parameter(torch.zeros(()))

    def forward(self, codes_BT, label_B, order_BS):
        p_BSV = torch.full((*codes_BT.shape, 4), 0.01).double()
        p_BSV[:, 0] = 0.25
        p_BSV[:, 1:].scatter_(2, codes_BT.gather(1, order_BS)[:, :-1, None], 0.97)
        return p_BSV.log()


def test_a_model_that_trusts_its_context_is_overconfident_by_what_was_replaced():
    codes_NT = torch.full((40, 16), 2)  # every image is one code: a clean context is right
    order_NS = orders_for("raster", 40, 4)
    clean, wrong = context_report(Repeats(), codes_NT, codes_NT[:, 0] * 0, order_NS, (0.5,))
    bits = 2 - 15 * math.log2(0.97)
    assert clean["bits_per_image"]["value"] == pytest.approx(bits)
    corrupted_NT = corrupt_context(codes_NT, 0.5, 4)
    misled = (corrupted_NT[:, :-1] != codes_NT[:, :-1]).sum(1).double().mean().item()
    cost = misled * math.log2(97)
    assert wrong["more_bits_per_image"]["value"] == pytest.approx(cost)
    change = wrong["overconfidence_gap"]["value"] - clean["overconfidence_gap"]["value"]
    assert change == pytest.approx(misled / 16)
    assert wrong["ece_equal_width"]["value"] > 0.3
