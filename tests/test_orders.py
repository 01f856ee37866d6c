"""Orders, groups and ranks: published fixtures first, then what must hold for all of them."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.command import InputError
from models.method import Grouping, ModelConfig, groups_of
from models.methods import METHODS
from models.orders import ORDERS, mixed_order, random_fraction_at, scan

TABLES = {  # of grids of 4 x 4 and 8 x 8
    "raster": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "spiral_in": "15 11 7 3 2 1 0 4 8 12 13 14 10 6 5 9",
    "column": "0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15",
    "diagonal": "0 1 4 2 5 8 3 6 9 12 7 10 13 11 14 15",
    "halton": "9 6 12 1 11 4 14 3 8 5 0 7 13 2 15 10",
    "multiscale": "0 2 8 10 1 3 4 5 6 7 9 11 12 13 14 15",
    "checkerboard": "0 2 5 7 8 10 13 15 1 3 4 6 9 11 12 14",
    "alternate": """0 1 2 3 4 5 6 7 15 14 13 12 11 10 9 8 16 17 18 19 20 21 22 23 31 30 29 28 27
        26 25 24 32 33 34 35 36 37 38 39 47 46 45 44 43 42 41 40 48 49 50 51 52 53 54 55 63 62 61
        60 59 58 57 56""",
    "z_curve": """0 1 8 9 2 3 10 11 16 17 24 25 18 19 26 27 4 5 12 13 6 7 14 15 20 21 28 29 22 23
        30 31 32 33 40 41 34 35 42 43 48 49 56 57 50 51 58 59 36 37 44 45 38 39 46 47 52 53 60 61
        54 55 62 63""",
    "subsample": """0 4 32 36 2 6 34 38 16 20 48 52 18 22 50 54 1 5 33 37 3 7 35 39 17 21 49 53 19
        23 51 55 8 12 40 44 10 14 42 46 24 28 56 60 26 30 58 62 9 13 41 45 11 15 43 47 25 29 57 61
        27 31 59 63""",
    "spiral_out": """35 27 28 36 44 43 42 34 26 18 19 20 21 29 37 45 53 52 51 50 49 41 33 25 17 9 10
        11 12 13 14 22 30 38 46 54 62 61 60 59 58 57 56 48 40 32 24 16 8 0 1 2 3 4 5 6 7 15 23 31
        39 47 55 63""",
    "regions": """0 4 32 36 1 5 33 37 2 6 34 38 3 7 35 39 8 12 40 44 9 13 41 45 10 14 42 46 11 15
        43 47 16 20 48 52 17 21 49 53 18 22 50 54 19 23 51 55 24 28 56 60 25 29 57 61 26 30 58 62
        27 31 59 63""",
}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("name", TABLES)
def test_scans_equal_the_published_tables(name):
    table = numbers(TABLES[name])
    assert scan(name, math.isqrt(len(table))).tolist() == table


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("grid", [2, 4, 8, 16])
def test_scans_are_permutations(name, grid):
    assert scan(name, grid).sort().values.tolist() == list(range(grid * grid))


@pytest.mark.parametrize(
    ("name", "grid"), [("z_curve", 6), ("subsample", 12), ("spiral_in", 5), ("nowhere", 4)]
)
def test_scans_refuse_grids_they_are_not_defined_on(name, grid):
    with pytest.raises(InputError):
        scan(name, grid)


def test_orders_are_uniform_in_the_share_of_rows_that_is_asked_for():
    generator, base_T = torch.Generator().manual_seed(0), scan("spiral_in", 4)
    shares = (random_fraction_at(progress, 0.5, 0.75) for progress in (0.8, 0.625))  # RAR's
    mixed = (mixed_order(base_T, 1000, share, generator) for share in shares)
    none, half = ((order_BS == base_T).all(1).sum() for order_BS in mixed)
    assert none == 1000 and 420 < half < 580  # binomial(1000, 1/2): five standard deviations
    order_BS = mixed_order(base_T, 16_000, 1.0, generator)
    first = torch.bincount(order_BS[:, 0], minlength=16)
    assert ((first - 1000).abs() < 5 * 1000**0.5).all()
    assert len(order_BS.unique(dim=0)) > 15_990


GROUPS = {  # curve, tokens, steps -> sizes: RandAR's, ARPG's and RAR's own tables
    ("cosine", 64, 22): "1 1 1 1 1 1 2 3 2 3 3 4 3 4 4 4 4 4 5 4 5 4",
    ("cosine", 64, 16): "1 1 1 2 3 3 4 4 5 5 5 6 6 6 6 6",
    ("cosine", 64, 8): "1 4 6 8 10 11 12 12",
    # where the cosine hits 32 exactly other arithmetic gives other sizes
    ("cosine", 64, 6): "1 8 10 13 16 16",
    ("cosine", 64, 12): "1 2 2 4 5 5 7 6 8 8 8 8",
    ("cosine", 64, 24): "1 1 1 1 1 1 1 2 2 3 2 3 3 4 3 3 4 4 4 4 4 4 4 4",
    ("cosine", 64, 39): "1 " * 20 + "2 2 2 2 2 3 2 2 2 3 2 3 2 3 2 3 2 3 2",
    ("arccos", 64, 4): "11 11 13 29",
    ("arccos", 64, 8): "6 5 5 6 6 7 9 20",
    ("arccos", 64, 16): "3 3 2 3 2 3 3 3 3 3 3 4 4 5 6 14",
    ("arccos", 64, 32): "2 1 1 2 1 1 1 2 1 1 2 1 2 1 1 2 1 2 1 2 2 1 2 2 2 2 2 3 3 3 4 10",
    ("arpg_cosine", 64, 4): "5 14 21 24",
    ("arpg_cosine", 64, 8): "2 3 6 8 10 11 12 12",
    ("arpg_cosine", 64, 16): "1 1 1 2 3 3 4 4 5 5 5 6 6 6 6 6",
    ("arpg_cosine", 64, 32): "1 " * 13 + "2 2 2 3 2 2 3 3 2 3" + " 3" * 9,
}


@pytest.mark.parametrize(("curve", "tokens", "steps"), GROUPS)
def test_groups_equal_the_published_tables(curve, tokens, steps):
    assert groups_of(tokens, steps, curve) == numbers(GROUPS[curve, tokens, steps])


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from(get_args(Grouping)), st.data())
def test_groups_fill_the_grid_in_exactly_the_steps_asked(tokens, grouping, data):
    steps = data.draw(st.integers(1, tokens))
    sizes = groups_of(tokens, steps, grouping)
    assert len(sizes) == steps and sum(sizes) == tokens and min(sizes) >= 1
    assert groups_of(tokens, tokens, grouping) == [1] * tokens


def test_an_order_of_ones_own_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setitem(ORDERS, "mine", lambda grid: torch.arange(grid * grid).flip(0))
    assert scan("mine", 4).tolist() == [*range(15, -1, -1)]
    assert METHODS["gpt"](ModelConfig(scan="mine")).order("mine").tolist() == [*range(63, -1, -1)]


def test_an_order_is_read_from_a_file_and_must_be_a_permutation(tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, np.arange(16, dtype=np.int32)[::-1])
    assert scan(path, 4).tolist() == scan(str(path), 4).tolist() == [*range(15, -1, -1)]
    for wrong in (np.zeros(16, int), np.arange(64), np.arange(16.0), np.arange(16).reshape(4, 4)):
        np.save(path, wrong)
        with pytest.raises(InputError, match="each of 0..15 once"):
            scan(path, 4)
    with pytest.raises(InputError, match="found nothing"):
        scan(tmp_path / "none.npy", 4)
