"""What a training sees: codes of one run, orders, PAR's regions, the cluster term; its log."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    cut_at,
    last,
    log_of,
    other_codes,
    results,
    run_cut_and_again,
    same,
    script,
    train_config,
)
from lightning_fabric import Fabric

from models.artifacts import ROOT
from models.checkpoint import load_generator
from models.command import InputError
from models.data import SPLITS, load_codes, save_codes
from models.methods import METHODS, check_order
from models.orders import region_scan, scan, shuffled_order
from models.sampling import Plan, sample_codes
from models.training import Adaptive, Anneal, OrderPolicy, batch_rows

pytestmark = pytest.mark.usefixtures("no_pictures")
stage = script("train_c2i.py")


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

    assert policy.sampled == "raster"
    assert (policy.draw(base_T, 9, 0.9, 0.0, generator()) == base_T).all()
    assert moved(0.05) == pytest.approx(16, abs=0.2)  # half the threshold, half of 0.5
    assert moved(0.1) == moved(0.9) == pytest.approx(32, abs=0.2)


def test_adaptive_trains_by_what_it_measured_and_resumes_bit_for_bit(world, tmp_path, monkeypatch):
    cfg = {"order": "adaptive", "adaptive": Adaptive(threshold=0.01), "steps": 6}
    calls = cut_at(monkeypatch, stage, "train_step", 6 + 4)  # step 3 of the second run
    stage.main(train_config(world, tmp_path / "whole", **cfg))
    seen = [args[-2] for args in calls]
    measured = [row["heldout_ece"] for row in log_of(tmp_path / "whole/metrics.jsonl")]
    before = seen[0]  # measured before the first step
    assert seen == [before, before, *measured[:1] * 2, *measured[1:2] * 2]
    assert 0 < before != measured[0] > 0
    assert measured[0] != measured[1] < 1
    run_cut_and_again(stage.main, train_config(world, tmp_path / "cut", **cfg))
    assert same(results(tmp_path / "whole"), results(tmp_path / "cut"))


def test_par_trains_with_sixteen_regions(world, tmp_path):
    out = stage.main(train_config(world, tmp_path / "run", method="par", regions=16))
    model = load_generator(out / "last.pth").model
    assert torch.equal(model.order("regions"), region_scan(8, 16))
    assert model.groups(None) == [1] * 16 + [16] * 3


@pytest.mark.parametrize("method", ["gpt", "randar"])
def test_an_order_of_ones_own_is_trained_in_kept_and_compared(world, tmp_path, method, monkeypatch):
    path = tmp_path / "mine.npy"
    np.save(path, np.arange(64)[::-1])
    cfg = train_config(world, tmp_path / "run", method=method, order=path, steps=2)
    stage.main(cfg)
    np.save(path, np.roll(np.arange(64), 1))
    with pytest.raises(InputError, match="another config .*order"):
        stage.main(cfg)
    path.unlink()  # the contents are in the checkpoint
    loaded = load_generator(tmp_path / "run/last.pth")
    assert loaded.order == "mine.npy"
    assert loaded.model.order("mine.npy").tolist() == [*range(63, -1, -1)]
    codes_NT = sample_codes(loaded.model, torch.arange(2), Plan(order=loaded.order), seed=0)
    assert codes_NT.shape == (2, 64) and codes_NT.min() >= 0
    monkeypatch.chdir(tmp_path)
    np.save(path, np.arange(64)[::-1])
    check_order(method, str(path), loaded.order)
    np.save(path, np.roll(np.arange(64), 1))
    with pytest.raises(InputError, match="is not the mine.npy that this was trained in"):
        loaded.model.order("mine.npy")
    with pytest.raises(InputError, match="PAR|--order regions"):
        stage.main(train_config(world, tmp_path / "other", method="par", order=path))


def test_fixed_random_is_one_order_for_all_from_its_seed(world, tmp_path):
    cfg = {"method": "gpt", "order": "fixed_random", "order_seed": 5, "steps": 2}
    out = stage.main(train_config(world, tmp_path / "run", **cfg))
    expected, other = (scan("fixed_random", 8, seed=seed) for seed in (5, 0))
    assert torch.equal(expected.sort().values, scan("raster", 8))
    assert not torch.equal(expected, other)
    assert torch.equal(load_generator(out / "last.pth").model.order("fixed_random"), expected)


def test_wandb_gets_the_rows_of_the_log_if_it_is_installed(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        stage.main(train_config(world, tmp_path / "none", logger="wandb"))
    seen = []
    run = SimpleNamespace(log=lambda row, step: seen.append((step, row["train_bits"])))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    stage.main(train_config(world, tmp_path / "run", logger="wandb"))
    assert [step for step, _ in seen] == [2, 4]


def test_two_processes_train_as_one(world, tmp_path):
    """Gradients are averaged: where nothing is drawn, the moments of two are those of one."""
    for split in SPLITS:
        codes = load_codes(world.codes, split)  # without mirror images, that would be drawn
        given = codes.codes_NAT[:, :1].numpy(), codes.label_N.numpy(), codes.header
        save_codes(tmp_path, split, *given)
    usual = {"method": "gpt", "model": "nano", "codes": tmp_path, "heldout": 20, "device": "cpu"}
    usual |= {"batch": 8, "steps": 3, "dropout": 0.0, "drop_label": 0.0}
    stage.main(stage.TrainConfig(**usual, out=tmp_path / "1"))
    flags = (f"--{key.replace('_', '-')}={value}" for key, value in usual.items())
    line = [sys.executable, ROOT / "train_c2i.py", *flags, "--devices=2", f"--out={tmp_path}/2"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(line, check=True, capture_output=True, env=threads)
    one, two = (last(tmp_path / run)["optimizers"][0]["state"] for run in "12")
    assert one.keys() == two.keys()
    for name in one:
        first, second = (state[name]["exp_avg"] for state in (one, two))
        assert (first - second).norm() < 0.1 * first.norm()  # bf16 rounds halves of a sum otherwise


def test_devices_share_the_rows_of_a_step_and_draw_apart(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.training, "descend", lambda *args: None)
    cfg = train_config(world, tmp_path, order="random", drop_label=0.0)
    codes, rows_B, seen = load_codes(world.codes, "train"), batch_rows(120, 8, 5, cfg.seed), []
    model = METHODS["randar"](stage.model_config(cfg, codes))

    def net(*inputs):
        seen.append(inputs)
        return model(*inputs)

    for rank in (0, 1):
        fabric = SimpleNamespace(device=torch.device("cpu"), global_rank=rank, world_size=2)
        stage.train_step(cfg, fabric, net, model, None, [], codes, 0.0, 5)
        own = codes.rows(rows_B[rank::2])
        assert torch.equal(seen[rank][1], own.label_N)
        assert (seen[rank][0].unsqueeze(1) == own.codes_NAT).all(2).any(1).all()
    assert not torch.equal(seen[0][2], seen[1][2])


SIZE = 4


def watched_steps(monkeypatch, method: str) -> list[tuple]:
    """Fill the list that is returned: (codes, label, order, logits) of every training step."""
    steps, forward = [], METHODS[method].forward

    def watched(model, *inputs):
        logits_BSV = forward(model, *inputs)
        if torch.is_grad_enabled():
            logits_BSV.retain_grad()
            steps.append((*inputs, logits_BSV))
        return logits_BSV

    monkeypatch.setattr(METHODS[method], "forward", watched)
    monkeypatch.setattr(stage.training, "flops", lambda model, batch: 1.0)  # no step is done for it
    return steps


@pytest.mark.parametrize(
    ("method", "order"),
    [("rar", "anneal"), ("randar", "random"), ("gpt", "spiral_out"), ("par", "regions")],
)
def test_every_step_is_in_the_orders_that_were_asked_for(
    world, tmp_path, monkeypatch, method, order
):
    seen = watched_steps(monkeypatch, method)
    small = {"steps": 8, "eval_every": 8, "batch": 32, "anneal": Anneal(0.25, 0.625, "spiral_in")}
    stage.main(train_config(world, tmp_path / "run", method=method, order=order, **small))
    base_T = scan({"anneal": "spiral_in", "random": "raster"}.get(order, order), 8)
    fixed = [(order_BS == base_T).all(1).double().mean().item() for _, _, order_BS, _ in seen]
    assert all((order_BS.sort(1).values == torch.arange(64)).all() for _, _, order_BS, _ in seen)
    # random until a quarter of the steps, all fixed from five eighths on, a mixture in between
    expected = {"random": [0] * 8, "anneal": [0] * 3 + [1 / 3, 2 / 3] + [1] * 3}.get(order, [1] * 8)
    assert fixed == pytest.approx(expected, abs=0.3)
    assert [s for s in fixed if s in (0, 1)] == [e for e in expected if e in (0, 1)]


@pytest.mark.parametrize(("method", "weight"), [*((m, 0.5) for m in METHODS), ("randar", 0.0)])
def test_the_loss_is_that_of_the_code_and_weight_times_that_of_its_cluster(
    clustered, tmp_path, monkeypatch, method, weight
):
    """In value and in gradient, from the logits and codes that the steps were given."""
    steps, losses, backward = watched_steps(monkeypatch, method), [], Fabric.backward

    def watched(fabric, loss):
        losses.append(loss.item())
        backward(fabric, loss)

    monkeypatch.setattr(Fabric, "backward", watched)
    order = "random" if METHODS[method].any_order else None
    small = {"steps": 3, "eval_every": 3, "lr": 0.1}
    run = train_config(clustered, tmp_path / "run", method=method, order=order, **small)
    stage.main(replace(run, cluster_weight=weight))
    expected_bits = [0.0, 0.0]
    for (codes_BT, _, order_BS, given_BSV), loss in zip(steps, losses, strict=True):
        logits_BSV = given_BSV.detach().requires_grad_()
        target_BS = codes_BT.gather(1, order_BS)
        p_BSV = logits_BSV.softmax(-1)
        code = -p_BSV.gather(2, target_BS.unsqueeze(2)).log().mean()
        p_BSJ = p_BSV.unflatten(2, (-1, SIZE)).sum(-1)
        cluster = -p_BSJ.gather(2, target_BS.unsqueeze(2) // SIZE).log().mean()
        expected = code + weight * cluster
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        (gradient_BSV,) = torch.autograd.grad(expected, logits_BSV)
        torch.testing.assert_close(given_BSV.grad, gradient_BSV, rtol=1e-3, atol=1e-7)
        expected_bits = [expected_bits[0] + code.item(), expected_bits[1] + cluster.item()]
    assert cluster < code - 0.1  # the last step tells them apart
    row, bit = last(run.out)["rows"][-1], 3 * math.log(2)
    assert row["train_bits"] == pytest.approx(expected_bits[0] / bit, abs=1e-5)
    if weight:
        assert row["cluster_bits"] == pytest.approx(expected_bits[1] / bit, abs=1e-5)
    else:
        assert "cluster_bits" not in row


def test_train_and_test_codes_of_two_tokenizers_are_refused(world, tmp_path):
    """What a stage 3 that was killed between the two leaves in a folder with older codes."""
    mixed = other_codes(world, tmp_path / "mixed", tokenizer="another")
    for path in world.codes.glob("test_*"):
        shutil.copy(path, mixed)
    with pytest.raises(InputError, match="train and test codes are not of one run"):
        stage.main(train_config(world, tmp_path / "run", codes=mixed))
