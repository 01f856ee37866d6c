"""PAR: its groups, its mask and its sequence."""

import pytest
import torch
from helpers import decoded, draw, tiny
from reference_par import reference_logits

from models.command import InputError
from models.method import ModelConfig
from models.methods import METHODS, build, check_order
from models.orders import region_scan
from models.sampling import generate

BATCH = 3


def par(grid: int, regions: int, **more):
    return tiny("par", grid=grid, regions=regions, **more)


CASES = [(4, 4), (8, 4), (8, 16), (4, 16), (6, 9)]


@pytest.mark.parametrize(("grid", "regions"), CASES[:3])
def test_agrees_with_the_formulas(grid, regions):
    model = par(grid, regions)
    codes_BT, label_B, order_BS = draw(model)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    expected_BSV = reference_logits(weights, codes_BT, label_B, 2, regions)
    found_BSV = model(codes_BT, label_B, order_BS).detach()
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("grid", "regions"), CASES)
def test_decoding_in_groups_is_teacher_forcing_in_every_cell(grid, regions):
    model = par(grid, regions)
    forced_BSV = model(*draw(model))
    for sizes in (model.groups(None), model.groups(grid**2)):
        found_BSV = decoded(model, *draw(model), sizes)
        torch.testing.assert_close(found_BSV, forced_BSV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("known", [1, 3, 4, 5, 8, 10, 15])
def test_known_codes_are_committed_at_once(known):
    """And a group that they reach into is served in any parts."""
    model = par(4, 4)
    rest = 16 - known
    forced_BSV = model(*draw(model))[:, known:]
    ones = max(0, 4 - known)
    whole = [*[1] * ones, *[(rest - ones) % 4 or 4], *[4] * ((rest - ones - 1) // 4)]
    for sizes in ([1] * rest, whole):
        found_BSV = decoded(model, *draw(model), sizes, known)
        torch.testing.assert_close(found_BSV, forced_BSV, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "regions", "steps"), [(24, 4, 147), (24, 16, 51), (8, 4, 19), (8, 16, 19), (2, 4, 4)]
)
def test_numbers_of_steps(grid, regions, steps):
    model, tokens = par(grid, regions, layers=1), grid**2
    own = model.groups(None)
    assert own == [1] * regions + [regions] * (tokens // regions - 1)
    assert len(own) == steps and sum(own) == tokens and model.groups(steps) == own
    assert model.groups(tokens) == [1] * tokens
    with pytest.raises(InputError, match=rf"{steps} steps, or in {tokens} .*got --decode-steps 3$"):
        model.groups(3)


def test_groups_of_one_take_no_more_runs_of_the_network(monkeypatch):
    model, runs = par(4, 4), []
    run = model._run
    monkeypatch.setattr(model, "_run", lambda *args: runs.append(args[2:4]) or run(*args))
    for sizes in (model.groups(None), model.groups(16)):
        runs.clear()
        decoded(model, *draw(model), sizes)
        assert runs == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (8, 12), (12, 16)]


def test_cells_of_two_groups_are_refused_and_leave_the_cache_as_it_was():
    model = par(4, 4)
    codes_BT, label_B, order_BS = draw(model)
    cache, codes_BS = model.cache(label_B), codes_BT.gather(1, order_BS)
    for known, asked, most in ((0, 2, 1), (3, 2, 1), (4, 5, 4), (6, 3, 2)):
        with pytest.raises(ValueError, match=f"at most {most} cells.*asked for {asked}"):
            cells = order_BS[:, known : known + asked]
            model.decode(cache, codes_BS[:, :known], order_BS[:, :known], cells)
    none = order_BS[:, :0]
    found_B1V = model.decode(cache, none, none, order_BS[:, :1])
    torch.testing.assert_close(found_B1V, model(codes_BT, label_B, order_BS)[:, :1])
    with pytest.raises(ValueError, match="at most"):
        generate(model, label_B, order_BS, torch.rand(BATCH, 16), [8, 8], [1.0, 1.0])


def test_other_orders_and_numbers_of_regions_are_refused():
    model = par(8, 16)
    codes_BT, label_B, _ = draw(model)
    with pytest.raises(ValueError, match="order of its 16 regions"):
        model(codes_BT, label_B, region_scan(8, 4).expand(BATCH, -1))
    for regions in (0, 1, 2, 3, 9):
        with pytest.raises(InputError, match=f"regions.*square of a divisor of 8, got {regions}$"):
            build("par", ModelConfig(regions=regions))
    check_order("par", "regions")
    for order in ("raster", "random", "subsample"):
        with pytest.raises(InputError, match="--order regions"):
            check_order("par", order)


def test_order_is_that_of_the_regions_whatever_the_scan():
    assert METHODS["par"].scans == ("regions",)
    assert build("par", ModelConfig(layers=1, scan="raster")).config.scan == "regions"


def test_specials_learn_and_are_dropped_like_codes():
    model = par(4, 4).train()
    for kept in (True, False):
        model(*draw(model)).sum().backward()
        gradient = model.spe_tok_embeddings.special_embeddings.weight.grad
        assert gradient.shape == (3, 16) and ((gradient != 0).any(1) == kept).all()
        model.zero_grad()
        model.token_dropout.p = 1.0
