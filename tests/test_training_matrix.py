"""Training: methods x orders x the cluster term, on and off."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import script
from lightning_fabric import Fabric
from test_training import config, cut_and_resumed, last, results, same, stage

from models.methods import METHODS
from models.orders import scan
from models.transformer import ModelConfig

SIZE = 4


@pytest.fixture(scope="module")
def clustered(world, tmp_path_factory):
    """The world's codes in 8 clusters of 4, as a world."""
    tool, out = script("tools/cluster_codebook.py"), tmp_path_factory.mktemp("clustered")
    tool.main(tool.ClusterConfig(world.tokenizer, world.codes, out, cluster_size=SIZE))
    return replace(world, codes=out)


def tiny_runs(monkeypatch) -> None:
    """Add --model tiny, of which many runs are quick, and draw no pictures."""
    monkeypatch.setitem(stage.SIZES, "tiny", {"layers": 2, "heads": 2, "width": 16})
    monkeypatch.setattr("metrics.plots.show_progress", lambda *_: None)


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
    return steps


@pytest.mark.parametrize(
    ("method", "order"),
    [("rar", "anneal"), ("randar", "random"), ("gpt", "spiral_out"), ("par", "regions")],
)
def test_every_step_is_in_the_orders_that_were_asked_for(
    world, tmp_path, monkeypatch, method, order
):
    tiny_runs(monkeypatch)
    seen = watched_steps(monkeypatch, method)
    small = {"model": "tiny", "steps": 8, "eval_every": 8, "batch": 32}
    stage.main(config(world, tmp_path / "run", method=method, order=order, **small))
    base_T = scan("raster" if order in ("anneal", "random") else order, 8)
    fixed = [(order_BS == base_T).all(1).double().mean().item() for _, _, order_BS, _ in seen]
    assert all((order_BS.sort(1).values == torch.arange(64)).all() for _, _, order_BS, _ in seen)
    # random until half of the steps, all fixed from three quarters on, in between half of both
    expected = {"random": [0] * 8, "anneal": [0] * 5 + [0.5, 1, 1]}.get(order, [1] * 8)
    assert fixed == pytest.approx(expected, abs=0.3)
    assert [share for share in fixed if share in (0, 1)] == [e for e in expected if e != 0.5]


@pytest.mark.parametrize(("method", "weight"), [*((m, 0.5) for m in METHODS), ("randar", 0.0)])
def test_the_loss_is_that_of_the_code_and_weight_times_that_of_its_cluster(
    clustered, tmp_path, monkeypatch, method, weight
):
    """In value and in gradient, from the logits and codes that the steps were given."""
    tiny_runs(monkeypatch)
    steps, losses, backward = watched_steps(monkeypatch, method), [], Fabric.backward

    def watched(fabric, loss):
        losses.append(loss.item())
        backward(fabric, loss)

    monkeypatch.setattr(Fabric, "backward", watched)
    order = "random" if METHODS[method].any_order else None
    small = {"model": "tiny", "steps": 3, "eval_every": 3, "lr": 0.1}
    run = config(clustered, tmp_path / "run", method=method, order=order, **small)
    stage.main(replace(run, cluster_weight=weight))
    expected_bits = [0.0, 0.0]
    for (codes_BT, _, order_BS, given_BSV), loss in zip(steps, losses, strict=True):
        logits_BSV = given_BSV.detach().requires_grad_()
        target_BS = codes_BT.gather(1, order_BS)
        p_BSV = logits_BSV.softmax(-1)
        code = -p_BSV.gather(2, target_BS.unsqueeze(2)).log().mean()
        p_BSJ = p_BSV.unflatten(2, (-1, SIZE)).sum(-1)
        cluster = -p_BSJ.gather(2, target_BS.unsqueeze(2) // SIZE).log().mean()
        within = -(
            F.log_softmax(logits_BSV.unflatten(2, (-1, SIZE)), -1)
            .flatten(2)
            .gather(2, target_BS.unsqueeze(2))
            .mean()
        )
        assert (cluster + within).item() == pytest.approx(code.item(), abs=1e-5)
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


@pytest.mark.parametrize("method", METHODS)
def test_with_the_cluster_term_two_and_two_steps_are_four_bit_for_bit(
    clustered, tmp_path, monkeypatch, method
):
    """In RAR's order where the method takes it, and into a file like any other run's."""
    tiny_runs(monkeypatch)
    order, small = "anneal" if METHODS[method].any_order else None, {"model": "tiny", "batch": 16}
    whole = config(clustered, tmp_path / "whole", method=method, order=order, **small)
    whole = replace(whole, cluster_weight=0.5)
    stage.main(whole)
    cut = cut_and_resumed(whole, tmp_path / "cut", monkeypatch)
    assert same(results(whole.out), results(cut.out))
    found = last(whole.out)
    plain = METHODS[method](ModelConfig(**found["model_config"]))  # no head for clusters, or such
    assert found["model"].keys() == plain.state_dict().keys()
    assert all(row["cluster_bits"] < row["train_bits"] for row in found["rows"])
