"""Which orders a training sees: adaptive shuffling, and PAR's number of regions."""

import json

import pytest
import torch
from test_training import config, results, same, stage

from models.checkpoint import load_generator
from models.errors import InputError
from models.orders import Adaptive, Anneal, OrderPolicy, region_scan, scan, shuffled_order


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
    assert seen == [0, 0, *measured[:1] * 2, *measured[1:2] * 2]
    assert 0 < measured[0] != measured[1] < 1
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
