"""How every method in METHODS is sampled: streams, what is kept, chosen orders, guidance."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import draw, order_of, orders_of, tiny

from models import sampling
from models.command import InputError
from models.method import groups_of
from models.methods import check_order
from models.orders import CHOSEN, known_first, sample_chance
from models.sampling import Plan, fill, generate, pick, sample_codes

CODES, GRID, BATCH = 7, 4, 3
TOKENS = GRID * GRID


@pytest.mark.parametrize(("cfg", "revise"), [(1.0, 0.0), (3.0, 0.0), (3.0, 0.25)])
def test_a_sample_is_the_same_whatever_batch_it_is_in(method, cfg, revise):
    model = tiny(method)
    label_N = torch.tensor([0, 1, 2, 0, 1])
    plan = Plan(order=order_of(model), cfg_scale=cfg, revise=revise * model.any_order, rounds=2)
    together = sample_codes(model, label_N, plan, seed=3)
    apart = [sample_codes(model, label_N[i : i + 1], plan, 3, first=i) for i in range(5)]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together, sample_codes(model, label_N, plan, seed=4))
    assert not torch.equal(together[0], together[3])  # one class, two streams


@pytest.mark.parametrize("known", [0, 6])
@pytest.mark.parametrize("cells", [1, 5])
def test_what_was_least_likely_is_drawn_anew_given_all_others(method, known, cells):
    model, label_N, open_T = tiny(method), torch.tensor([0, 1, 2]), torch.arange(TOKENS) >= known
    given_NT = torch.arange(3 * TOKENS).view(3, -1) % CODES
    plan = Plan(order="random", cfg_scale=2.0, temperature=0.0)  # the likeliest code, always
    once = replace(plan, revise=cells / TOKENS, revise_scale=3.0)
    inputs = given_NT, open_T, label_N
    if not model.any_order:
        with pytest.raises(InputError, match="cannot be given the cells to keep"):
            fill(model, *inputs, replace(once, order=model.config.scan), 4, past=True)
        return
    before_NT, after_NT = (fill(model, *inputs, one, 4) for one in (plan, once))
    order_NS = known_first(sample_chance(4, range(3), TOKENS)[1], open_T)
    logits_NSV, target_NS = model(before_NT, label_N, order_NS), before_NT.gather(1, order_NS)
    log_p_NS = -F.cross_entropy(logits_NSV.transpose(1, 2), target_NS, reduction="none")
    for i in range(3):
        ranked = sorted(range(known, TOKENS), key=lambda s: log_p_NS[i, s].item())
        anew = order_NS[i][sorted(ranked[:cells])]
        kept = order_NS[i][[s for s in range(TOKENS) if s not in ranked[:cells]]]
        assert torch.equal(before_NT[i, kept], after_NT[i, kept])
        order_1S = torch.cat((kept, anew)).unsqueeze(0)
        logits = [model(after_NT[i : i + 1], label, order_1S)[0, -cells:] for label in (
            label_N[i : i + 1], torch.tensor([model.null_label]))]  # fmt: skip
        guided_nV = logits[1] + 3 * (logits[0] - logits[1])
        assert torch.equal(after_NT[i, anew], guided_nV.argmax(-1))


def test_rounds_of_revising_go_on_with_other_chance_and_count_as_calls(method, monkeypatch):
    model, label_N = tiny(method), torch.zeros(20, dtype=torch.int64)
    if not model.any_order:
        return
    drawn_by = []

    def noted(logits_BnV, uniform_Bn, *how):
        drawn_by.extend(uniform_Bn.flatten().tolist())
        return pick(logits_BnV, uniform_Bn, *how)

    plan = Plan(order="random", revise=0.25)
    none, once, twice = (
        sample_codes(model, label_N, one, seed=1)
        for one in (replace(plan, revise=0.0), plan, replace(plan, rounds=2))
    )
    monkeypatch.setattr(sampling, "pick", noted)
    assert torch.equal(twice, sample_codes(model, label_N, replace(plan, rounds=2), seed=1))
    assert len(set(drawn_by)) == 20 * (16 + 4 + 4)
    for before, after in ((none, once), (once, twice)):
        assert 0 < (before != after).sum(1).float().mean() <= 4
        assert (before != after).sum(1).max() <= 4
    default, same, more = (
        sample_codes(model, label_N, replace(plan, cfg_scale=40.0, revise_scale=scale), seed=1)
        for scale in (None, 2.0, 40.0)
    )
    assert torch.equal(default, same) and not torch.equal(default, more)
    assert plan.calls(model) == 16 + 5 and replace(plan, rounds=2).calls(model) == 16 + 10
    assert replace(plan, revise=0.01, rounds=9).calls(model) == 16


@pytest.mark.parametrize("left", [0, 1, 5, TOKENS - 1, TOKENS])
def test_what_is_kept_is_never_rewritten_and_the_rest_is_drawn_given_all_of_it(method, left):
    model = tiny(method)
    codes_NT, label_N, _ = draw(model)
    open_T = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(left)) < left
    if not model.any_order:
        with pytest.raises(InputError, match="order only") if left < TOKENS else nullcontext():
            fill(model, codes_NT, open_T, label_N, Plan(order=order_of(model)), seed=3)
        return
    uniform_NS, random_NS = sample_chance(3, range(len(label_N)), TOKENS)
    for order in ("random", "spiral_in"):
        plan, before_NT = Plan(order=order), codes_NT.clone()
        filled_NT = fill(model, codes_NT, open_T, label_N, plan, seed=3)
        assert torch.equal(codes_NT, before_NT)
        assert torch.equal(filled_NT[:, ~open_T], codes_NT[:, ~open_T])
        if left == TOKENS:
            assert torch.equal(filled_NT, sample_codes(model, label_N, plan, seed=3))
        rows = random_NS if order == "random" else model.order(order).expand_as(random_NS)
        rows = [[c for keep in (0, 1) for c in row if open_T[c] == keep] for row in rows.tolist()]
        order_NS = torch.tensor(rows)
        drawn_NS = pick(model(filled_NT, label_N, order_NS), uniform_NS)  # by teacher forcing
        assert (
            torch.equal(drawn_NS[:, -left:], filled_NT.gather(1, order_NS)[:, -left:]) or not left
        )
    guided = Plan(order="random", cfg_scale=3.0, decode_steps=4 if model.parallel else None)
    filled_NT = fill(model, codes_NT, open_T, label_N, guided, seed=3)
    assert torch.equal(filled_NT[:, ~open_T], codes_NT[:, ~open_T])


@pytest.mark.parametrize("left", [1, 5, TOKENS])
def test_given_their_past_only_open_cells_are_drawn_as_their_turn_comes(method, left):
    model = tiny(method)
    codes_NT, label_N, _ = draw(model)
    open_T = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(left)) < left
    plan = Plan(order=order_of(model), temperature=0.7, top_k=3, top_p=0.7)
    filled_NT = fill(model, codes_NT, open_T, label_N, plan, seed=3, past=True)
    assert torch.equal(filled_NT[:, ~open_T], codes_NT[:, ~open_T])
    uniform_NS, order_NS = sample_chance(3, range(len(label_N)), TOKENS)
    if plan.order != "random":
        order_NS = model.order(plan.order).expand_as(order_NS)
    logits_NSV = model(filled_NT, label_N, order_NS)  # by teacher forcing
    drawn_NS = pick(logits_NSV, uniform_NS, temperature=0.7, top_k=3, top_p=0.7)
    there_NS = filled_NT.gather(1, order_NS)
    assert torch.equal(drawn_NS[open_T[order_NS]], there_NS[open_T[order_NS]])
    with pytest.raises(InputError, match="its turn"):
        fill(model, codes_NT, open_T, label_N, Plan(order="margin"), seed=3, past=True)


@pytest.mark.parametrize("policy", CHOSEN)
def test_an_order_that_the_model_chooses_writes_each_cell_once(method, policy):
    model, plan = tiny(method), Plan(order=policy, decode_steps=5, cfg_scale=2.0)
    if not (model.any_order and model.parallel):
        with pytest.raises(InputError, match="asks for all open cells"):
            check_order(method, policy)
        return
    label_N, steps = torch.tensor([0, 1, 2, 0]), []
    nothing_NT, open_T = torch.zeros(4, TOKENS).long(), torch.ones(TOKENS) > 0
    codes_NT = fill(model, nothing_NT, open_T, label_N, plan, seed=3, watch=steps.append)
    assert codes_NT.min() >= 0 and codes_NT.max() < CODES and len(steps) == 5
    for before_NT, after_NT in itertools.pairwise(steps):  # what is written stays
        assert torch.equal(after_NT[before_NT >= 0], before_NT[before_NT >= 0])
    apart = [sample_codes(model, label_N[i : i + 1], plan, 3, first=i) for i in range(4)]
    assert torch.equal(codes_NT, torch.cat(apart))
    # no step knows what an earlier one asked for and did not write
    calls, decode = [], model.decode
    model.decode = lambda *inputs: calls.append((*inputs[1:], decode(*inputs))) or calls[-1][-1]
    fill(model, nothing_NT, open_T, label_N, replace(plan, cfg_scale=1.0), seed=3)
    codes, cells, asked, logits = zip(*calls, strict=True)
    inputs = torch.cat(codes, dim=1), torch.cat(cells, dim=1), asked[-1]
    at_once_BlV = decode(model.cache(label_N), *inputs)
    torch.testing.assert_close(logits[-1], at_once_BlV, rtol=0, atol=1e-9)


def test_every_cell_is_asked_for_once_in_every_number_of_steps(method):
    model, asked, served = tiny(method), [], []
    decode = model.decode
    model.decode = lambda *inputs: asked.append(inputs[3]) or decode(*inputs)
    for steps in range(1, TOKENS + 1):
        try:
            model.groups(steps)
        except InputError:
            continue
        asked.clear()
        served.append(steps)
        plan = Plan(order=order_of(model), decode_steps=steps, cfg_scale=2.0, schedule="constant")
        codes_NT = sample_codes(model, torch.tensor([0, 2]), plan, seed=steps)
        assert codes_NT.shape == (2, TOKENS) and len(asked) == steps
        assert codes_NT.min() >= 0 and codes_NT.max() < CODES
        assert (torch.cat(asked, dim=1).sort(1).values == torch.arange(TOKENS)).all()
    assert served[-1] == TOKENS
    assert len(served) == TOKENS or not (model.parallel and model.any_order)


@pytest.mark.parametrize("steps", [None, 5])
def test_guided_samples_are_drawn_from_guided_logits_of_forward(method, steps, monkeypatch):
    """Step by step: u + scale * (c - u), u being the null label's and the scale that of the step.

    Of a group only the first cell, unless the groups are the method's own.
    """
    model = tiny(method)
    if steps is not None and not (model.parallel and model.any_order):
        pytest.skip("has no such number of steps")
    picked, pick = [], sampling.pick
    monkeypatch.setattr(
        sampling, "pick", lambda logits, *more: picked.append(logits) or pick(logits, *more)
    )
    label_B, cfg = torch.tensor([0, 2, 2]), 3.0
    order_BS = orders_of(model, BATCH)[-1]
    plan = Plan(decode_steps=steps, grouping="arccos", cfg_scale=cfg, schedule="linear")
    sizes, scales = plan.groups(model)
    assert steps is None or sizes == groups_of(TOKENS, steps, "arccos")
    uniform_BS = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(3))
    codes_BT = generate(model, label_B, order_BS, uniform_BS, sizes, scales)
    cond_BSV, null_BSV = (
        model(codes_BT, y_B, order_BS) for y_B in (label_B, torch.full_like(label_B, 3))
    )
    done = 0
    for size, logits_BnV in zip(sizes, picked, strict=True):
        at = slice(done, done + (1 if steps else size))
        scale = 1 + (cfg - 1) * done / TOKENS
        expected = null_BSV[:, at] + scale * (cond_BSV[:, at] - null_BSV[:, at])
        found = logits_BnV[:, : at.stop - done]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        done += size
    picked.clear()
    generate(model, label_B, order_BS, uniform_BS, sizes, [1.0] * len(sizes))
    torch.testing.assert_close(picked[0][:, 0], cond_BSV[:, 0], rtol=0, atol=1e-9)
