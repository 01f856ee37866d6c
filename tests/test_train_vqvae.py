"""Stage 2: it learns, a cut run ends as a whole one, and the decoder can be trained alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import script
from tiny_extractor import write_extractor

from metrics.extractor import label_accuracy, load_classifier
from metrics.fidelity import psnr
from models.artifacts import load_checkpoint
from models.classifier import KIND, PerceptualNet, save_perceptual
from models.command import InputError
from models.data import load_split
from models.tokenizer import decode_codes, encode_images, load_tokenizer
from models.training import averaged
from models.vqvae import VQVAE, VQVAEConfig

TINY = VQVAEConfig(codebook_size=32, width=8, blocks=1)
stage = script("tokenizer_vq/train_vqvae.py")


@pytest.fixture(scope="session")
def judge(tmp_path_factory) -> Path:
    """An untrained net for the perceptual loss."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "perceptual.pth"
    save_perceptual(path, PerceptualNet((4, 6, 8, 10)).fold(), {"kind": KIND})
    return path


def config(world, out, **changes):
    plain = {"init": None, "loss": "l2", "perceptual": 0.0}
    plain |= {"model": TINY, "steps": 4, "batch": 16, "warmup": 1, "save_every": 2}
    return stage.TokenizerConfig(data=world.data, out=out, **plain | changes)


def decoder_alone(world, judge, out, **changes):
    """A config of one step of the decoder, from the tokenizer of `world`, with all losses."""
    losses = {"loss": "l1", "perceptual": 1.0, "perceptual_weights": judge}
    rest = {"init": world.tokenizer, "train": "decoder", "steps": 1, "ema": 0.0}
    return config(world, out, **losses, **rest | changes)


def log(path) -> list[dict]:
    """The rows of a log, without what may depend on a cut: speed, and memory on a GPU."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("images_per_second") > 0 for row in rows)
    return [{key: row[key] for key in row if key != "peak_memory_gb"} for row in rows]


@pytest.mark.parametrize("perceptual", [False, True])
def test_a_cut_run_ends_as_an_undisturbed_one(world, judge, tmp_path, monkeypatch, perceptual):
    changes = {"init": world.tokenizer, "loss": "l1", "perceptual": 1.0}
    changes = changes | {"perceptual_weights": judge} if perceptual else {}
    stage.main(config(world, tmp_path / "whole.pth", **changes))
    taken = []

    def cut_at_step_3(rows, batch, step, seed):
        taken.append(step)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return batch_rows(rows, batch, step, seed)

    batch_rows = stage.batch_rows
    monkeypatch.setattr(stage, "batch_rows", cut_at_step_3)
    with pytest.raises(KeyboardInterrupt):
        stage.main(config(world, tmp_path / "cut.pth", **changes))
    assert not (tmp_path / "cut.pth").exists()
    stage.main(config(world, tmp_path / "cut.pth", **changes))
    assert taken == [0, 1, 2, 3, 2, 3]
    whole, cut = (load_checkpoint(tmp_path / f, "tokenizer", "") for f in ("whole.pth", "cut.pth"))
    for key, value in whole["model"].items():
        assert torch.equal(value, cut["model"][key]), key
    assert log(tmp_path / "whole.jsonl") == log(tmp_path / "cut.jsonl")
    assert not (tmp_path / "cut.state.pth").exists()
    assert ("perceptual" in log(tmp_path / "cut.jsonl")[0]) == perceptual


def test_a_finished_run_is_not_run_again_and_another_config_is_refused(world, tmp_path, capsys):
    stage.main(config(world, tmp_path / "a.pth"))
    before = (tmp_path / "a.pth").read_bytes()
    stage.main(config(world, tmp_path / "a.pth"))
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(InputError, match="seed 0 -> 1"):
        stage.main(config(world, tmp_path / "a.pth", seed=1))
    assert (tmp_path / "a.pth").read_bytes() == before


def test_training_learns(world, tmp_path):
    longer = config(world, tmp_path / "a.pth", lr=5e-3)
    report = stage.main(replace(longer, steps=60, save_every=100))
    images_NHWC = load_split(world.data, "test").images_NHWC
    mean = np.broadcast_to(images_NHWC.mean(0).round().astype(np.uint8), images_NHWC.shape)
    assert report["psnr"] > psnr(images_NHWC, mean).mean() + 1.2
    model, about = load_tokenizer(tmp_path / "a.pth")
    again = psnr(images_NHWC, decode_codes(model, encode_images(model, images_NHWC))).mean()
    assert about["test"]["psnr"] == pytest.approx(again)


def test_decoded_images_are_classified_where_there_is_a_classifier(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    write_extractor(tmp_path / "checkpoints/extractor_shapes.pth", dataset="shapes")
    report = stage.main(config(world, tmp_path / "a.pth"))
    model, test = load_tokenizer(tmp_path / "a.pth")[0], load_split(world.data, "test")
    decoded_NHWC = decode_codes(model, encode_images(model, test.images_NHWC))
    classifier = load_classifier(tmp_path / "checkpoints/extractor_shapes.pth")[0]
    share = label_accuracy(decoded_NHWC, test.labels_N, classifier)
    assert report["label_accuracy"] == pytest.approx(share)


def test_a_loss_that_is_not_a_number_stops_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.F, "mse_loss", lambda a, b: (a - b).mean() * torch.nan)
    with pytest.raises(InputError, match="loss is nan"):
        stage.main(replace(config(world, tmp_path / "a.pth"), log_every=1))
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("perturb", [0.0, 0.3])
def test_the_decoder_trained_alone_leaves_every_code_valid(world, judge, tmp_path, perturb):
    stage.main(decoder_alone(world, judge, tmp_path / "a.pth", perturb=perturb))
    before, after = (
        load_tokenizer(p)[0].state_dict() for p in (world.tokenizer, tmp_path / "a.pth")
    )
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(same[name] for name in same if not name.startswith("decoder"))
    assert not any(same[name] for name in same if name.startswith("decoder") and "conv1.w" in name)


def test_a_start_of_another_size_is_refused(world, tmp_path):
    larger = replace(TINY, codebook_size=64)
    with pytest.raises(InputError, match="another size than asked for: .*codebook_size=32"):
        stage.main(config(world, tmp_path / "a.pth", init=world.tokenizer, model=larger))


def test_what_a_decoder_alone_needs_and_what_needs_it(world, judge, tmp_path):
    with pytest.raises(InputError, match="give --init"):
        stage.main(decoder_alone(world, judge, tmp_path / "a.pth", init=None))
    with pytest.raises(InputError, match="--perturb needs --train decoder"):
        stage.main(decoder_alone(world, judge, tmp_path / "a.pth", train="all", perturb=0.1))


def test_averaged_weights_forget_the_first_ones():
    """Weights that jump after the first step: of 300 steps' average the first is a thousandth."""
    model = VQVAE(TINY)
    ema = averaged(model, 0.999)
    for step in range(300):
        torch.nn.init.constant_(model.decoder[0].bias, float(step > 0))
        model.quantizer.codebook_VC.fill_(step)
        ema.update_parameters(model)
    assert ((ema.module.decoder[0].bias - 1).abs() < 1e-3).all()
    assert (ema.module.quantizer.codebook_VC == 299).all()  # an average already: taken as it is


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": 0}, {"lr": -1.0}])
def test_impossible_numbers_are_refused(world, tmp_path, change):
    with pytest.raises(InputError, match=next(iter(change))):
        stage.main(replace(config(world, tmp_path / "a.pth"), **change))
