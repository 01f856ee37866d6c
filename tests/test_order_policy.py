"""Which orders a training sees: adaptive shuffling, and PAR's number of regions."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training import config, results, same, stage

from models.checkpoint import load_generator
from models.command import InputError
from models.orders import region_scan, scan, shuffled_order
from models.sampling import Plan, sample_codes
from models.training import Adaptive, Anneal, OrderPolicy, averaged, start_logger


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1])
def test_a_share_of_the_cells_changes_places_among_themselves(share):
    base_T = scan("z_curve", 8)
    order_BS = shuffled_order(base_T, 4000, share, generator())
    assert (order_BS.sort(1).values == torch.arange(64)).all()
    moved_BS = order_BS != base_T
    # of m cells in random places one stays where it was, on average
    expected = max(0, share * 64 - 1) / 64
    assert moved_BS.double().mean().item() == pytest.approx(expected, abs=0.002)
    assert moved_BS.sum(1).max() <= share * 64
    if share:  # every step is as likely as any other to hold another cell
        assert moved_BS.double().mean(0).tolist() == pytest.approx([expected] * 64, abs=0.05)
        assert len(order_BS.unique(dim=0)) == 4000


def test_adaptive_shuffles_in_proportion_to_the_ece():
    policy = OrderPolicy("adaptive", Anneal(), Adaptive(most=0.5, threshold=0.1))
    base_T = scan("raster", 8)

    def moved(ece):
        order_BS = policy.draw(base_T, 2000, 0.9, ece, generator())
        return ((order_BS != base_T).sum(1) + 1).double().mean().item()

    assert policy.asked == "raster"
    assert (policy.draw(base_T, 9, 0.9, 0.0, generator()) == base_T).all()
    assert moved(0.05) == pytest.approx(16, abs=0.2)  # half the threshold, half of 0.5
    assert moved(0.1) == moved(0.9) == pytest.approx(32, abs=0.2)


def test_adaptive_trains_by_what_it_measured_and_resumes_bit_for_bit(world, tmp_path, monkeypatch):
    changes = {"order": "adaptive", "adaptive": Adaptive(threshold=0.01), "steps": 6}
    whole = config(world, tmp_path / "whole", **changes)
    seen, train_step = [], stage.train_step

    def watched(*args):
        seen.append(args[-2])
        if len(seen) == 6 + 4:  # step 3 of the second run
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(stage, "train_step", watched)
    stage.main(whole)
    rows = [json.loads(row) for row in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    measured = [row["heldout_ece"] for row in rows]
    before = seen[0]  # measured before the first step
    assert seen == [before, before, *measured[:1] * 2, *measured[1:2] * 2]
    assert 0 < before != measured[0] > 0
    assert measured[0] != measured[1] < 1
    cut = config(world, tmp_path / "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        stage.main(cut)
    stage.main(cut)
    assert same(results(tmp_path / "whole"), results(tmp_path / "cut"))


def test_adaptive_needs_a_method_that_takes_any_order(world, tmp_path):
    with pytest.raises(InputError, match="needs a method that is told which cell comes next"):
        stage.main(config(world, tmp_path / "run", method="gpt", order="adaptive"))
    with pytest.raises(InputError, match="threshold"):
        stage.main(config(world, tmp_path / "run", adaptive=Adaptive(threshold=0)))


def test_par_trains_with_sixteen_regions(world, tmp_path):
    out = stage.main(config(world, tmp_path / "run", method="par", regions=16))
    model = load_generator(out / "last.pth").model
    assert torch.equal(model.order("regions"), region_scan(8, 16))
    assert model.groups(None) == [1] * 16 + [16] * 3
    with pytest.raises(InputError, match="regions"):
        stage.main(config(world, tmp_path / "other", method="par", regions=9))


@pytest.mark.parametrize("method", ["gpt", "randar"])
def test_an_order_of_ones_own_is_trained_in_kept_and_compared(world, tmp_path, method):
    path = tmp_path / "mine.npy"
    np.save(path, np.arange(64)[::-1])
    cfg = config(world, tmp_path / "run", method=method, order=path, steps=2)
    stage.main(cfg)
    np.save(path, np.roll(np.arange(64), 1))
    with pytest.raises(InputError, match="another config .*order"):
        stage.main(cfg)
    path.unlink()  # the contents are in the checkpoint
    generator = load_generator(tmp_path / "run/last.pth")
    assert generator.order == "mine.npy"
    assert generator.model.order("mine.npy").tolist() == [*range(63, -1, -1)]
    codes_NT = sample_codes(generator.model, torch.arange(2), Plan(order=generator.order), seed=0)
    assert codes_NT.shape == (2, 64) and codes_NT.min() >= 0
    with pytest.raises(InputError, match="PAR|--order regions"):
        stage.main(config(world, tmp_path / "other", method="par", order=path))


def test_fixed_random_is_one_order_for_all_from_its_seed(world, tmp_path):
    changes = {"method": "gpt", "order": "fixed_random", "order_seed": 5, "steps": 2}
    out = stage.main(config(world, tmp_path / "run", **changes))
    expected = scan("fixed_random", 8, seed=5)
    assert torch.equal(load_generator(out / "last.pth").model.order("fixed_random"), expected)


def test_the_average_of_constant_weights_is_those_weights():
    model = torch.nn.Linear(3, 3)
    ema = averaged(model, 0.999)
    ema.module.weight.data.zero_()  # whatever it starts from
    for _ in range(5):
        ema.update_parameters(model)
    assert torch.equal(ema.module.weight, model.weight)


def test_the_average_of_a_short_run_is_not_mostly_its_start():
    """Weights 0, 1, .. 1: without warm-up 0.999^99 = 91% of it would be the first."""
    model = torch.nn.Linear(1, 1)
    ema = averaged(model, 0.999)
    for value in (0.0, *[1.0] * 99):
        model.weight.data.fill_(value)
        ema.update_parameters(model)
    assert ema.module.weight.item() > 0.999


def test_bits_of_raw_and_averaged_weights_are_logged_side_by_side(world, tmp_path):
    out = stage.main(config(world, tmp_path / "run"))
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["heldout_bits"] != row["raw_heldout_bits"] for row in rows)


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        start_logger("wandb", tmp_path, {})
    start_logger("none", tmp_path, {})({"step": 1})


def test_wandb_gets_the_rows_of_the_log(world, tmp_path, monkeypatch):
    seen = []
    run = SimpleNamespace(log=lambda row, step: seen.append((step, row["train_bits"])))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    stage.main(config(world, tmp_path / "run", logger="wandb"))
    assert [step for step, _ in seen] == [2, 4]
