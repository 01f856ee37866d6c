"""Files written before fields were renamed: they load, sample, and are trained on."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import script

from metrics.likelihood import split_bits
from models.artifacts import ROOT, header, load_checkpoint
from models.checkpoint import KIND, load_generator
from models.command import InputError
from models.data import load_codes, save_codes
from models.sampling import Plan, sample_codes

OLD = ROOT / "tests/old_run/last.pth"
"""a RAR of two steps on the codes below, by commit 0dd66c1"""
stage = script("train_c2i.py")


@pytest.fixture
def codes(tmp_path):
    about = {"codebook_size": 16, "grid": 2, "dataset": "tiny", "classes": [*map(str, range(10))]}
    inputs = {"tokenizer": "0" * 64, "images": "1" * 64}
    for split, count in (("train", 12), ("test", 4)):
        codes_NAT = np.arange(count * 8).reshape(count, 2, 4) * 7 % 16
        head = header("codes", "tests", {}, inputs) | about
        save_codes(tmp_path / "codes", split, codes_NAT, np.arange(count) % 10, head)
    return tmp_path / "codes"


def test_an_old_generator_predicts_what_it_did(codes):
    assert "codes" in load_checkpoint(OLD, KIND, rerun="")["model_config"]
    model = load_generator(OLD).model
    assert model.config.vocab_size == 16
    bits = split_bits(model, {"test": load_codes(codes, "test")}, "raster")["test"]
    assert bits == pytest.approx(4.004036903381348, abs=1e-6)


def test_an_old_run_is_gone_on_with_by_its_command(codes, tmp_path, monkeypatch):
    monkeypatch.setitem(stage.SIZES, "nano", {"layers": 1, "heads": 2, "width": 8})
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(OLD, out / "last.pth")
    cfg = stage.TrainConfig(
        method="rar", order="anneal", model="nano", codes=codes, out=out, steps=2, batch=4,
        heldout=2, eval_every=2, device="cpu", tokenizer=tmp_path / "none.pth",
    )  # fmt: skip
    stage.main(cfg)
    assert (out / "last.pth").read_bytes() == OLD.read_bytes()  # it was at its end
    with pytest.raises(InputError, match="order_seed 0 -> 1"):
        stage.main(replace(cfg, order_seed=1))


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("checkpoints/randar_*.pth")), ids=lambda p: p.stem
)
def test_shipped_generators_load_with_what_they_recommend(path):
    generator = load_generator(path)
    plan = Plan(**{"order": generator.order} | generator.sampling)
    assert generator.model.config.vocab_size == 1024
    assert (plan.cfg_scale == 1) == ("cca" in path.stem)  # whose guidance is in the weights
    codes_NT = sample_codes(generator.model, torch.arange(2), plan, seed=0)
    assert codes_NT.min() >= 0 and len(codes_NT.unique()) > 20
