"""What each optimizer takes, what of it is decayed, and how its rate rises and falls."""

import itertools
from dataclasses import replace

import pytest
import torch

from models.method import ModelConfig
from models.methods import METHODS
from models.training import WideMuon, lr_at, make_optimizers

SIZES = ModelConfig(vocab_size=8, grid=2, layers=2, width=16, heads=2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_decayed_is_what_the_papers_decay(method, optimizer):
    model = METHODS[method](SIZES)
    optimizers = make_optimizers(model, optimizer, 1e-3, 0.05)
    groups = [group for each in optimizers for group in each.param_groups]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    found = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in found}
    every = [name for name, _ in model.named_parameters()]
    matrices = {name for name in every if "norm" not in name and not name.endswith("bias")}
    if method == "rar":  # no table of positions, codes or labels, and not the head's modulation
        matrices = {x for x in matrices if "embed" not in x and "adaln_before_head" not in x}
    assert names == matrices
    assert sum(len(group["params"]) for group in groups) == len(every)


@pytest.mark.parametrize("vocab_size", [8, 64, 256])  # RAR's fc1 and the others' w1 have 64 and 256
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(method, vocab_size):
    model = METHODS[method](replace(SIZES, vocab_size=vocab_size))
    (alone,) = make_optimizers(model, "adamw", 1e-3, 0.05)
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.05)
    every, rest, hidden = (
        [id(p) for group in optimizer.param_groups for p in group["params"]]
        for optimizer in (alone, adamw, muon)
    )
    assert sorted(rest + hidden) == sorted(every) == sorted(map(id, model.parameters()))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(hidden) == {id(m.weight) for name, m in linear.items() if name != model.head_name}


def test_muon_in_fp32_is_pytorchs_but_for_its_rounding():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (16, 16), (8, 8))]
    paths = []
    for kind in (torch.optim.Muon, WideMuon):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = kind(weights, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
        random = torch.Generator().manual_seed(0)
        for _ in range(3):
            for w in weights[:3]:  # the last one has no gradient, and stays
                w.grad = torch.randn(w.shape, generator=random)
            optimizer.step()
        paths.append([w.detach() - before for w, before in zip(weights, start, strict=True)])
        assert all("momentum_buffer" in optimizer.state[w] for w in weights[:3])
    for pytorch, ours in zip(*paths, strict=True):
        assert (pytorch - ours).norm() <= 0.01 * ours.norm()
    assert paths[1][0].norm() > 0.1 and not paths[1][3].any()


def test_learning_rate_rises_then_falls_to_its_floor():
    found = [lr_at(step, 1.0, 10, 110, floor=0.05) for step in range(110)]
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[60] == pytest.approx(0.05 + 0.95 / 2)
    assert found[-1] == pytest.approx(0.05, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
