"""Stage 4: resuming, refusals, and the arithmetic that all training shares."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

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
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.likelihood import bits_per_code, orders_for, split_bits
from models.artifacts import sha256_of
from models.checkpoint import load_generator
from models.command import InputError
from models.data import draw_batch, load_codes, split_heldout
from models.method import ModelConfig
from models.methods import METHODS
from models.training import Alignment, batch_rows, seed_step

stage = script("train_c2i.py")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("method", "optimizer", "cluster_weight"),
    [*((m, "adamw", 0.5) for m in METHODS), ("gpt", "adamw", 0.0), ("randar", "muon", 0.0)],
)
def test_two_and_two_steps_are_four_bit_for_bit(
    clustered, tmp_path, monkeypatch, method, optimizer, cluster_weight
):
    """In RAR's order where the method takes it, and into a file like any other run's."""
    cfg = {"method": method, "optimizer": optimizer, "cluster_weight": cluster_weight}
    cfg["order"] = "anneal" if METHODS[method].any_order else None
    stage.main(train_config(clustered, tmp_path / "whole", **cfg))
    taken = cut_at(monkeypatch, stage, "train_step", 4)
    run_cut_and_again(stage.main, train_config(clustered, tmp_path / "cut", **cfg))
    assert [args[-1] for args in taken] == [0, 1, 2, 3, 2, 3]
    assert same(results(tmp_path / "whole"), results(tmp_path / "cut"))
    assert [row["step"] for row in log_of(tmp_path / "cut/metrics.jsonl")] == [2, 4]
    found = last(tmp_path / "whole")
    plain = METHODS[method](ModelConfig(**found["model_config"]))  # no head for clusters, or such
    assert found["model"].keys() == plain.state_dict().keys()
    assert all((row.get("cluster_bits", 0) > 0) == (cluster_weight > 0) for row in found["rows"])
    with pytest.raises(InputError, match=f"cluster_weight {cluster_weight} -> 1.0"):
        stage.main(train_config(clustered, tmp_path / "cut", **cfg | {"cluster_weight": 1.0}))


def test_a_run_writes_what_it_should(world, tmp_path):
    cfg = train_config(world, tmp_path / "run", order="random", tokenizer=world.tokenizer)
    out = stage.main(cfg)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    grids = {"samples/0000002.png", "samples/0000004.png"}
    assert names == grids | {"config.json", "curves.png", "last.pth", "metrics.jsonl"}
    head = json.loads((out / "config.json").read_text())
    assert head["machine"].endswith((" 1 thread", f" {torch.get_num_threads()} threads"))
    assert head["method"] == "randar" and head["config"]["order"] == "random"
    assert head["inputs"]["tokenizer"] and head["inputs"]["codes"]
    for row in log_of(out / "metrics.jsonl"):
        assert {"train_bits", "heldout_bits", "test_bits", "lr", "images_per_second"} < row.keys()
        assert row["heldout_bits"] != row["raw_heldout_bits"]  # of averaged and of raw weights
        assert 4 < row["test_bits"] < 6  # of 32 codes: log2 is 5
    heldout = split_heldout(load_codes(world.codes, "train"), cfg.heldout, cfg.seed)[1]
    bits = split_bits(load_generator(out / "last.pth").model, {"heldout_bits": heldout}, "random")
    assert row["heldout_bits"] == pytest.approx(bits["heldout_bits"], abs=1e-6)


def test_a_share_of_what_is_read_is_wrong_and_nothing_of_what_is_asked_for(
    world, tmp_path, monkeypatch
):
    read, asked, gpt = [], [], METHODS["gpt"]
    forward, loss = gpt.forward, gpt.loss

    def reads(self, codes_BT, *inputs):
        read.extend([codes_BT] if self.training else [])
        return forward(self, codes_BT, *inputs)

    def asks(self, logits_BSV, codes_BT, order_BS):
        asked.append(codes_BT)
        return loss(self, logits_BSV, codes_BT, order_BS)

    monkeypatch.setattr(gpt, "forward", reads)
    monkeypatch.setattr(gpt, "loss", asks)
    for noise in (0.0, 0.25):
        stage.main(train_config(world, tmp_path / f"{noise}", method="gpt", context_noise=noise))
        wrong = (torch.cat(read[-4:]) != torch.cat(asked[-4:])).double().mean().item()
        assert wrong == pytest.approx(noise, abs=0.04)
    first = load_codes(world.codes, "train").codes_NAT.flatten(0, 1).tolist()
    assert all(row in first for row in torch.cat(asked[-4:]).tolist())


def test_compile_trains_the_compiled_network_or_says_why_not(world, tmp_path, monkeypatch, capsys):
    """Without a compiler: the same bits as without the flag. With one: what it made is called."""
    plain = stage.main(train_config(world, tmp_path / "plain"))

    def no_compiler(function, **how):
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    without = stage.main(train_config(world, tmp_path / "without", compile=True))
    assert "not compiled, since nothing can be here: no g++ here\n" in capsys.readouterr().out
    assert same(results(plain), results(without))

    class Compiled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *inputs):
            made.append(self)
            return self.inner(*inputs)

    made = []
    monkeypatch.setattr(torch, "compile", Compiled)
    with_one = stage.main(train_config(world, tmp_path / "with", compile=True))
    assert len(made) == 1 + 4  # the trial, and every step
    assert same(results(plain), results(with_one))


def test_what_was_trained_otherwise_is_not_trained_on(world, tmp_path, monkeypatch):
    """With another seed, method or rate, of other codes, by another version, or from no file."""
    cfg = train_config(world, tmp_path / "run", method="rar", order="random", steps=2)
    stage.main(cfg)
    before = (tmp_path / "run/last.pth").read_bytes()

    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            stage.main(replace(cfg, **changes))
        assert (tmp_path / "run/last.pth").read_bytes() == before

    refused("seed 0 -> 1", seed=1)
    refused("method rar -> gpt", method="gpt", order="raster")
    refused("lr 0.001 -> 0.5", lr=0.5)
    refused("extract_latent_codes", codes=tmp_path)
    refused("codes .* -> ", codes=other_codes(world, tmp_path / "other", change=1))
    with monkeypatch.context() as patch:  # its optimizer had other groups then
        patch.setattr(METHODS["rar"], "no_decay", ())
        refused("no training state that is whole")
    before = b"not a checkpoint"
    (tmp_path / "run/last.pth").write_bytes(before)
    refused("broken or unsafe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gpt", "order": "random"}, "random needs a method that is told"),
        ({"method": "gpt", "order": "adaptive"}, "adaptive needs a method that is told"),
        ({"devices": 3}, "--devices to divide --batch 8"),
        ({"heldout": 120}, "--heldout in 1..119"),
        ({"device": "tpu"}, "--device to be 'auto' or 'cpu'"),
        ({"cluster_weight": 1.0}, r"tools/cluster_codebook.py --codes .*--out as --codes"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(world, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        stage.main(train_config(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    world, tmp_path, monkeypatch
):
    train_step = stage.train_step

    def poisoned(*args):
        nats = train_step(*args)
        return nats * math.nan if args[-1] == 2 else nats

    monkeypatch.setattr(stage, "train_step", poisoned)
    with pytest.raises(InputError, match="loss is nan at step 4.*last good checkpoint.*last.pth"):
        stage.main(train_config(world, tmp_path / "run"))
    found = last(tmp_path / "run")
    assert found["step"] == 2
    assert all(torch.isfinite(value).all() for value in found["model"].values())


def start_and_go_on(world, tmp_path, method: str, **changes) -> tuple[Path, Path]:
    """Train a run; train another that starts from it. Return both folders."""
    order = "random" if METHODS[method].any_order else None
    first = train_config(world, tmp_path / "first", method=method, order=order)
    stage.main(first)
    how = {"out": tmp_path / "then", "init": tmp_path / "first/last.pth", "steps": 40, "lr": 0.01}
    return first.out, stage.main(replace(first, **how | changes))


@pytest.mark.usefixtures("no_pictures")
def test_a_run_starts_from_another_ones_averaged_weights(world, tmp_path):
    first, then = start_and_go_on(world, tmp_path, "randar", lr=0.0, steps=2)
    assert same(last(first)["model"], last(then)["model"])
    assert last(then)["header"]["inputs"]["init"] == sha256_of(first / "last.pth")
    cfg = train_config(world, tmp_path / "other", init=first / "last.pth", steps=2)
    other = other_codes(world, tmp_path / "codes", tokenizer="0" * 64)
    refusals = {"method": "arpg", "model": "nano", "codes": other, "order": "column"}
    for name, value in refusals.items():
        with pytest.raises(InputError, match="--init of the --method.*got .*last.pth"):
            stage.main(replace(cfg, **{name: value}))
    with pytest.raises(InputError, match="--cca.weight needs .* --init"):
        stage.main(replace(cfg, init=None, cca=Alignment(weight=1.0)))
    with pytest.raises(InputError, match="no --context-noise"):
        replace(cfg, cca=Alignment(weight=1.0), context_noise=0.1)


def margins(model, codes) -> torch.Tensor:
    """Return ln p(codes | own label) - ln p(codes | another's), (N,)."""
    codes_NT, label_N, bits = codes.codes_NAT[:, 0], codes.label_N, []
    order_NS = orders_for(model, "random" if model.any_order else model.config.scan, len(label_N))
    for shift in (0, 3):
        bits.append(bits_per_code(model, codes_NT, (label_N + shift) % 10, order_NS).sum(1))
    return bits[1] - bits[0]


@pytest.mark.usefixtures("no_pictures")
def test_an_alignment_begins_where_nothing_has_changed(world, tmp_path, monkeypatch, method):
    """Every log-ratio is 0 in the first step, whatever order and label: the loss is known."""
    losses, descend = [], stage.training.descend
    seen = lambda *args: losses.append(args[3].item()) or descend(*args)  # noqa: E731
    monkeypatch.setattr(stage.training, "descend", seen)
    how = {"cca": Alignment(weight=3.0), "steps": 2, "dropout": 0.0}
    start_and_go_on(world, tmp_path, method, **how)
    assert losses[-2] == pytest.approx(4 * math.log(2), abs=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_alignment_tells_labels_apart_further_than_training_on_alone(world, tmp_path):
    codes, more = load_codes(world.codes, "train"), {}
    first = train_config(world, tmp_path / "first", order="random", steps=150, lr=0.01)
    stage.main(first)
    for weight in (0.0, 10.0):
        how = {"out": tmp_path / str(weight), "init": first.out / "last.pth", "steps": 80}
        cca = Alignment(weight=weight, beta=0.3)
        then = stage.main(replace(first, **how, lr=0.003, cca=cca))
        more[weight] = margins(load_generator(then / "last.pth").model, codes).mean().item()
    assert more[10.0] > more[0.0] + 0.4  # 1.1, 2.8, 1.1 for three seeds


def test_the_loss_of_an_alignment_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    now_PSV, was_PSV = torch.randn(2, 6, 4, 7, generator=generator).double()
    target_PS = torch.randint(7, (6, 4), generator=generator)
    ratio_P = torch.zeros(6).double()
    for i, step in itertools.product(range(6), range(4)):
        p_now, p_was = (x[i, step].softmax(0)[target_PS[i, step]] for x in (now_PSV, was_PSV))
        ratio_P[i] += (p_now / p_was).log()
    own_B, other_B = (1 / (1 + (-0.4 * ratio_P).exp())).chunk(2)  # sigmoids
    expected = -(own_B.log() + 5 * (1 - other_B).log()).mean()
    found = Alignment(weight=5.0, beta=0.4).loss(now_PSV, was_PSV, target_PS)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_both_views_are_drawn_anew_in_every_step_and_labels_dropped_as_often_as_asked(world):
    codes, patterns, dropped = load_codes(world.codes, "train"), set(), 0

    def drawn(step: int, seed: int = 0):
        rows_B = batch_rows(120, 120, step, 0)  # one epoch
        return rows_B, *draw_batch(codes, rows_B, 0.2, seed_step(seed, step, torch.device("cpu")))

    assert same(drawn(0), drawn(0)) and not same(drawn(0), drawn(0, seed=1))
    for step in range(50):
        rows_B, drawn_BT, label_B = drawn(step)
        dropped += (label_B == 10).sum()
        straight, mirrored = ((drawn_BT == codes.codes_NAT[rows_B, view]).all(1) for view in (0, 1))
        assert (straight | mirrored).all() and straight.sum() > 30 and mirrored.sum() > 30
        patterns.add(tuple(straight.tolist()))  # by place in the batch: the rows differ anyway
    assert len(patterns) == 50
    assert 1076 < dropped < 1324  # binomial(6000, 0.2): four standard deviations are 124


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
def test_every_epoch_visits_every_row_once_and_epochs_differ(rows, batch, seed):
    steps = range(-(-2 * rows // batch))
    drawn = torch.cat([batch_rows(rows, batch, step, seed) for step in steps])
    for epoch in range(2):
        assert drawn[epoch * rows : (epoch + 1) * rows].sort().values.tolist() == list(range(rows))
    assert not torch.equal(batch_rows(50, 50, 0, seed), batch_rows(50, 50, 1, seed))
    assert not torch.equal(batch_rows(50, 50, 0, seed), batch_rows(50, 50, 0, seed + 1))


def test_heldout_images_are_kept_out(world):
    codes = load_codes(world.codes, "train")
    train, heldout = split_heldout(codes, 20, seed=0)
    seen = {tuple(row) for row in train.codes_NAT.flatten(0, 1).tolist()}
    kept = [tuple(row) for row in heldout.codes_NAT.flatten(0, 1).tolist()]
    assert len(train.label_N) == 100 and len(kept) == 40
    assert not seen & set(kept)
