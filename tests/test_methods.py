"""The truths of the contract, over every method in METHODS: a new method gets them for free."""

import itertools
import math

import pytest
import torch
from helpers import decoded, draw, order_of, orders_of, tiny

from models.method import ModelConfig
from models.methods import METHODS, build
from models.orders import scan
from models.sampling import Plan, generate, sample_codes

CODES, GRID, BATCH = 7, 4, 3
TOKENS = GRID * GRID


def orders_2x2(model) -> list:
    """Every order of four cells that the method supports."""
    if model.any_order:
        return list(itertools.permutations(range(4)))
    return [scan(model.config.scan, 2)]


def log_p_of(model, grids_NT: torch.Tensor, order) -> torch.Tensor:
    """Return log p (N,) of whole grids of label 0, generated in one order."""
    order_NS = torch.tensor(list(order)).expand(len(grids_NT), -1)
    log_p_NSV = model(grids_NT, torch.zeros(len(grids_NT)).long(), order_NS).log_softmax(-1)
    return log_p_NSV.gather(2, grids_NT.gather(1, order_NS).unsqueeze(2)).sum((1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_no_step_sees_its_own_or_a_later_code(method, training):
    model = tiny(method, dropout=0.3).train(training)
    codes_BT, label_B, _ = draw(model)
    for order_BS in orders_of(model, BATCH):

        def logits(codes, order_BS=order_BS):
            torch.manual_seed(5)  # the same dropout every time
            return model(codes, label_B, order_BS)

        before_BSV = logits(codes_BT)
        for step in (0, 1, 7, TOKENS - 1):
            cell_B1 = order_BS[:, step : step + 1]
            changed_BT = codes_BT.scatter(1, cell_B1, (codes_BT.gather(1, cell_B1) + 1) % CODES)
            after_BSV = logits(changed_BT)
            assert torch.equal(before_BSV[:, : step + 1], after_BSV[:, : step + 1])
            if step + 1 < TOKENS:
                assert not torch.allclose(before_BSV[:, step + 1], after_BSV[:, step + 1])


def test_every_dropout_acts_and_in_training_alone(method):
    model = tiny(method, dropout=0.5)
    inputs, parts = draw(model), [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    whole_BSV = model(*inputs)
    assert len(parts) >= 2 * model.config.layers and {part.p for part in parts} == {0.5}
    for part in parts:
        for other in parts:
            other.p = 0.5 * (other is part)
        assert torch.equal(model.eval()(*inputs), whole_BSV)
        assert not torch.allclose(model.train()(*inputs), whole_BSV)


def test_label_matters_from_the_first_step(method):
    model = tiny(method)
    codes_BT, _, order_BS = draw(model)
    one, other = (model(codes_BT, torch.full((BATCH,), k), order_BS) for k in (0, 1))
    assert not torch.allclose(one[:, 0], other[:, 0])


@pytest.mark.parametrize("known", [0, 1, 5, TOKENS - 1])
def test_decoding_one_cell_at_a_time_is_teacher_forcing(method, known):
    model = tiny(method)
    codes_BT, label_B, _ = draw(model)
    for order_BS in orders_of(model, BATCH):
        forced_BSV = model.train()(codes_BT, label_B, order_BS)[:, known:]
        inputs = codes_BT, label_B, order_BS, [1] * (TOKENS - known), known
        torch.testing.assert_close(decoded(model.eval(), *inputs), forced_BSV, rtol=0, atol=1e-10)


def test_groups_see_the_committed_codes_as_in_teacher_forcing(method):
    """The first cell of every group has the context of its step, however codes were grouped.

    In a method that chooses the groups by itself, all cells of a group have the context that they
    have in teacher forcing.
    """
    model = tiny(method)
    if not model.parallel:
        pytest.skip("decodes one cell at a time")
    codes_BT, label_B, _ = draw(model)
    sizes = [1, 3, 2, 6, 4] if model.any_order else model.groups(None)
    firsts = list(itertools.accumulate([0, *sizes[:-1]])) if model.any_order else range(TOKENS)
    for order_BS in orders_of(model, BATCH):
        found_BSV = decoded(model, codes_BT, label_B, order_BS, sizes)
        forced_BSV = model(codes_BT, label_B, order_BS)
        assert found_BSV.shape == forced_BSV.shape
        torch.testing.assert_close(found_BSV[:, firsts], forced_BSV[:, firsts], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kept", [0, 2, 5, 8])
def test_a_rewound_cache_has_forgotten_the_rest(method, kept):
    """Nine other codes committed and a tenth asked for: after `rewind` nothing of them is left."""
    model = tiny(method)
    codes_BT, label_B, order_BS = draw(model)
    cache, codes_BS = model.cache(label_B), codes_BT.gather(1, order_BS)
    wrong_BS = torch.cat((codes_BS[:, :kept], (codes_BS[:, kept:] + 1) % CODES), dim=1)
    wrong = order_BS
    if model.any_order:
        wrong = torch.cat((order_BS[:, :kept], order_BS[:, kept:].flip(1)), dim=1)
    for step in range(10):
        new = slice(max(step - 1, 0), step)
        model.decode(cache, wrong_BS[:, new], wrong[:, new], wrong[:, step : step + 1])
    cache.rewind(kept)
    forced_BSV = model(codes_BT, label_B, order_BS)
    for after in range(kept + (kept > 0), TOKENS):
        new = slice(max(after - 1, 0), after)
        found_B1V = model.decode(
            cache, codes_BS[:, new], order_BS[:, new], order_BS[:, after : after + 1]
        )
        torch.testing.assert_close(found_B1V[:, 0], forced_BSV[:, after], rtol=0, atol=1e-10)


def test_probabilities_of_all_grids_sum_to_one(method):
    model = tiny(method, grid=2, vocab_size=3)
    grids_NT = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for order in orders_2x2(model):
        total = log_p_of(model, grids_NT, order).exp().sum().item()
        assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("fixed", "order"), [(m, s) for m, k in METHODS.items() if not k.any_order for s in k.scans]
)
def test_a_method_of_one_order_keeps_the_truths_in_each_it_can_have(monkeypatch, fixed, order):
    monkeypatch.setattr(METHODS[fixed], "scans", (order,))  # helpers.tiny takes the first
    test_no_step_sees_its_own_or_a_later_code(fixed, False)
    test_decoding_one_cell_at_a_time_is_teacher_forcing(fixed, 0)
    test_probabilities_of_all_grids_sum_to_one(fixed)


def test_orders_and_groups_that_a_method_does_not_serve_are_refused(method):
    model = tiny(method)
    codes_BT, label_B, order_BS = draw(model)
    uniform_BS, other_BS = (
        torch.zeros(BATCH, TOKENS),
        scan("raster", GRID).flip(0).expand(BATCH, -1),
    )
    if not model.any_order:
        with pytest.raises(ValueError, match="order"):
            model(codes_BT, label_B, other_BS)
        with pytest.raises(ValueError, match="order"):
            generate(model, label_B, other_BS, uniform_BS, [1] * TOKENS, [1.0] * TOKENS)
    if not model.parallel:
        with pytest.raises(ValueError, match="one"):
            decoded(model, codes_BT, label_B, order_BS, [2, 14])
        with pytest.raises(ValueError, match="one code a step"):
            generate(model, label_B, order_BS, uniform_BS, [1, 15], [1.0, 1.0])


def test_a_whole_decoding_runs_where_there_are_no_values(method):
    """On the meta device: shapes follow from shapes alone, as CUDA graphs and compilers need."""
    model = tiny(method).to("meta")
    label_B, order_BS = (torch.zeros(shape, dtype=int, device="meta") for shape in (3, (3, TOKENS)))
    uniform_BS = torch.zeros(BATCH, TOKENS, device="meta")
    sizes, scales = Plan(cfg_scale=3.0).groups(model)
    model.check_order = lambda order_BS: None  # the caller's look at values
    codes_BT = generate(model, label_B, order_BS, uniform_BS, sizes, scales, 1.0, 2, 0.9)
    assert codes_BT.is_meta and codes_BT.shape == (BATCH, TOKENS)


@pytest.mark.parametrize("weights", [False, True], ids=["autocast", "weights"])
def test_bf16_is_near_fp32_and_its_logits_are_fp32(method, weights):
    """In forward, in steps of one code and, where the method can, of several; and no NaN."""
    model = tiny(method).float()
    codes_BT, label_B, order_BS = draw(model)
    exact_BSV = model(codes_BT, label_B, order_BS)
    model = model.bfloat16() if weights else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not weights):
        found = [model(codes_BT, label_B, order_BS)]
        for sizes in ([1] * TOKENS, model.groups(None)):
            found.append(decoded(model, codes_BT, label_B, order_BS, sizes))
    for found_BSV in found:
        assert found_BSV.dtype == torch.float32
        assert (found_BSV - exact_BSV).abs().max() < 0.1 * exact_BSV.abs().max()


FIRST_EXCESS = {"rar": (0.02**2 * 16 / 2, 0.03)}
"""nats above ln V and their tolerance, where the head does not start at zero: variance / 2"""


def test_first_loss_is_log_of_the_codebook(method):
    torch.manual_seed(0)
    sizes = {"vocab_size": CODES, "classes": 3, "grid": GRID, "layers": 2, "width": 16, "heads": 2}
    model = build(method, ModelConfig(**sizes))
    codes_BT, label_B, order_BS = draw(model)
    loss, parts = model.loss(model(codes_BT, label_B, order_BS), codes_BT, order_BS)
    excess, tolerance = FIRST_EXCESS.get(method, (0, 1e-6))
    for nats in (loss, parts["nats"]):
        assert nats.item() == pytest.approx(math.log(CODES) + excess, abs=tolerance)


def test_one_batch_is_memorised(method):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "classes": 3, "grid": GRID, "layers": 2, "width": 32, "heads": 2}
    model = build(method, ModelConfig(**sizes)).train()
    codes_BT, label_B, order_BS = draw(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss, _ = model.loss(model(codes_BT, label_B, order_BS), codes_BT, order_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert model.loss(model(codes_BT, label_B, order_BS), codes_BT, order_BS)[0] < 0.1


def test_sampling_follows_the_likelihood(method):
    """Frequencies of sampled grids agree with the exact probabilities (2x2 cells, 2 codes)."""
    model, count = tiny(method, grid=2, vocab_size=2), 10_000
    codes_NT = sample_codes(model, torch.zeros(count).long(), Plan(order=order_of(model)), seed=0)
    frequency = torch.bincount((codes_NT * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / count
    grids_NT = torch.tensor(list(itertools.product(range(2), repeat=4)))
    orders = orders_2x2(model)
    p = sum(log_p_of(model, grids_NT, order).exp() for order in orders) / len(orders)
    error = (p * (1 - p) / count).sqrt()
    assert ((frequency - p).abs() < 5 * error + 1e-4).all()
