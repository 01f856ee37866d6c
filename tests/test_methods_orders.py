"""The truths of the contract in every scan, under guidance, and in every number of steps."""

import itertools

import pytest
import torch
from test_methods import BATCH, CODES, GRID, TOKENS, draw, orders_of, tiny

from models import sampling
from models.methods import METHODS
from models.orders import SCANS, scan
from models.sampling import Plan, generate, sample_codes


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("order", SCANS)
def test_truths_hold_in_every_scan(name, order):
    """Causal, decoded as in teacher forcing, a distribution: in each order it can be trained in."""
    if order not in METHODS[name].scans:
        pytest.skip("is never trained in this order")
    model, (codes_BT, label_B) = tiny(name, scan=order), draw()
    order_BS = scan(order, GRID).expand(BATCH, TOKENS)
    forced_BSV, codes_BS = model(codes_BT, label_B, order_BS), codes_BT.gather(1, order_BS)
    for step in (0, 6, TOKENS - 6):  # PAR's last codes are seen by none
        cell = int(order_BS[0, step])
        changed_BT = codes_BT.clone()
        changed_BT[:, cell] = (changed_BT[:, cell] + 1) % CODES
        after_BSV = model(changed_BT, label_B, order_BS)
        assert torch.equal(forced_BSV[:, : step + 1], after_BSV[:, : step + 1])
        assert not torch.allclose(forced_BSV[:, step + 1 :], after_BSV[:, step + 1 :])
    cache = model.cache(label_B)
    for s in range(TOKENS):
        new = slice(max(s - 1, 0), s)
        found_B1V = model.decode(cache, codes_BS[:, new], order_BS[:, new], order_BS[:, s, None])
        torch.testing.assert_close(found_B1V[:, 0], forced_BSV[:, s], rtol=0, atol=1e-10)
    small = tiny(name, grid=2, codes=3, scan=order)
    grids_NT = torch.tensor(list(itertools.product(range(3), repeat=4)))
    order_NS = scan(order, 2).expand(len(grids_NT), 4)
    log_p = small(grids_NT, torch.zeros(len(grids_NT)).long(), order_NS).log_softmax(-1)
    chosen = log_p.gather(2, grids_NT.gather(1, order_NS).unsqueeze(2)).sum((1, 2))
    assert chosen.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [None, 5])
def test_guided_samples_are_drawn_from_guided_logits_of_forward(name, steps, monkeypatch):
    """Step by step: u + scale * (c - u), u being the null label's and the scale that of the step.

    Of a group only the first cell, unless the groups are the method's own.
    """
    model = tiny(name)
    if steps is not None and not (model.parallel and model.any_order):
        pytest.skip("has no such number of steps")
    picked, pick = [], sampling.pick
    monkeypatch.setattr(
        sampling, "pick", lambda logits, *more: picked.append(logits) or pick(logits, *more)
    )
    label_B, cfg = torch.tensor([0, 2, 2]), 3.0
    order_BS = orders_of(model, BATCH)[-1]
    sizes, scales = Plan(decode_steps=steps, cfg_scale=cfg, schedule="linear").groups(model)
    uniform_BS = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(3))
    codes_BT = generate(model, label_B, order_BS, uniform_BS, sizes, scales)
    cond_BSV, null_BSV = (
        model(codes_BT, y_B, order_BS) for y_B in (label_B, torch.full_like(label_B, 3))
    )
    done = 0
    for size, logits_BnV in zip(sizes, picked, strict=True):
        same = slice(done, done + (1 if steps else size))
        scale = 1 + (cfg - 1) * done / TOKENS
        expected = null_BSV[:, same] + scale * (cond_BSV[:, same] - null_BSV[:, same])
        found = logits_BnV[:, : same.stop - done]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        done += size
    picked.clear()
    generate(model, label_B, order_BS, uniform_BS, sizes, [1.0] * len(sizes))
    torch.testing.assert_close(picked[0][:, 0], cond_BSV[:, 0], rtol=0, atol=1e-9)


def test_groups_fill_the_whole_grid_in_every_number_of_steps(name, monkeypatch):
    """At 8x8: each cell asked for once, in a call a step, alike whatever else is in the batch."""
    model = tiny(name, grid=8)
    if not (model.parallel and model.any_order):
        pytest.skip("has no such numbers of steps")
    asked, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *a: asked.append(a[3]) or decode(*a))
    for steps in range(1, 65):
        asked.clear()
        plan = Plan(order="random", decode_steps=steps)
        codes_NT = sample_codes(model, torch.tensor([0, 2]), plan, seed=steps)
        assert codes_NT.min() >= 0 and codes_NT.max() < CODES and len(asked) == steps
        assert (torch.cat(asked, dim=1).sort(1).values == torch.arange(64)).all()
        if steps % 9 == 0:
            alone_1T = sample_codes(model, torch.tensor([2]), plan, seed=steps, first=1)
            assert torch.equal(alone_1T[0], codes_NT[1])
