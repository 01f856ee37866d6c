"""Stage 2: it learns, a cut run ends as a whole one, and the decoder can be trained alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cut_at, log_of, same, script
from tiny_extractor import write_extractor

from metrics import extractor
from metrics.extractor import load_classifier
from metrics.fidelity import psnr
from models.artifacts import load_checkpoint
from models.classifier import label_accuracy
from models.command import InputError
from models.data import Codes, load_split
from models.tokenizer import (
    decode_codes,
    encode_images,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_of,
)
from models.training import averaged
from models.vqvae import VQVAE, VQVAEConfig

TINY = VQVAEConfig(codebook_size=32, width=8, blocks=1)
stage = script("tokenizer_vq/train_vqvae.py")


def config(world, out, **changes):
    plain = {"init": None, "loss": "l2", "perceptual": 0.0}
    plain |= {"model": TINY, "steps": 4, "batch": 16, "warmup": 1, "save_every": 2}
    return stage.TokenizerConfig(data=world.data, out=out, **plain | changes)


def decoder_alone(world, perceptual, out, **changes):
    """A config of one step of the decoder, from the tokenizer of `world`, with all losses."""
    losses = {"loss": "l1", "perceptual": 1.0, "perceptual_weights": perceptual}
    rest = {"init": world.tokenizer, "train": "decoder", "steps": 1, "ema": 0.0}
    return config(world, out, **losses, **rest | changes)


def log(path) -> list[dict]:
    """The rows of a log, without what may depend on a cut: speed, and memory on a GPU."""
    rows = log_of(path)
    assert all(row.pop("images_per_second") > 0 for row in rows)
    return [{key: row[key] for key in row if key != "peak_memory_gb"} for row in rows]


@pytest.mark.parametrize("with_net", [False, True])
def test_a_cut_run_ends_as_an_undisturbed_one(world, perceptual, tmp_path, monkeypatch, with_net):
    changes = {"init": world.tokenizer, "loss": "l1", "perceptual": 1.0}
    changes = changes | {"perceptual_weights": perceptual} if with_net else {}
    stage.main(config(world, tmp_path / "whole.pth", **changes))
    taken = cut_at(monkeypatch, stage, "batch_rows", 4)
    with pytest.raises(KeyboardInterrupt):
        stage.main(config(world, tmp_path / "cut.pth", **changes))
    assert not (tmp_path / "cut.pth").exists()
    stage.main(config(world, tmp_path / "cut.pth", **changes))
    assert [step for _, _, step, _ in taken] == [0, 1, 2, 3, 2, 3]
    whole, cut = (load_checkpoint(tmp_path / f, "tokenizer", "") for f in ("whole.pth", "cut.pth"))
    assert same(whole["model"], cut["model"])
    assert log(tmp_path / "whole.jsonl") == log(tmp_path / "cut.jsonl")
    assert not (tmp_path / "cut.state.pth").exists()
    assert ("perceptual" in log(tmp_path / "cut.jsonl")[0]) == with_net


def test_a_finished_run_is_not_run_again_nor_another_over_it(world, perceptual, tmp_path, capsys):
    """Though the paths of its files may change, and one of them has the name of a weight."""
    stage.main(config(world, tmp_path / "a.pth"))
    with pytest.raises(InputError, match="seed 0 -> 1"):
        stage.main(config(world, tmp_path / "a.pth", seed=1))
    cfg = decoder_alone(world, perceptual, tmp_path / "b.pth")
    stage.main(cfg)
    before, moved = (tmp_path / "b.pth").read_bytes(), tmp_path / "moved.pth"
    moved.write_bytes(world.tokenizer.read_bytes())
    capsys.readouterr()
    stage.main(replace(cfg, init=moved))
    assert "finished already" in capsys.readouterr().out
    changes = {"init": tmp_path / "a.pth", "perceptual_weights": moved, "perceptual": 2.0}
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"config .{name.removesuffix('_weights')} .* -> "):
            stage.main(replace(cfg, **{name: value}))
    assert (tmp_path / "b.pth").read_bytes() == before


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
    monkeypatch.setattr(extractor, "ROOT", tmp_path)
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
def test_the_decoder_trained_alone_leaves_every_code_valid(world, perceptual, tmp_path, perturb):
    """From a file of fp32 too, whose encoder fp16 would round; and twice over."""
    paths = [tmp_path / name for name in ("first.pth", "a.pth", "b.pth")]
    model, head = load_tokenizer(world.tokenizer)
    for value in model.parameters():
        value.mul_(1 + 1e-5)
    save_tokenizer(paths[0], model, head)
    for init, out in itertools.pairwise(paths):
        stage.main(decoder_alone(world, perceptual, out, perturb=perturb, init=init))
        before, after = (load_tokenizer(path)[0].state_dict() for path in (init, out))
        same = {name: torch.equal(before[name], after[name]) for name in before}
        assert all(same[name] for name in same if not name.startswith("decoder"))
        assert not any(v for name, v in same.items() if "decoder" in name and "conv1.w" in name)
        first = load_tokenizer(paths[0])[1]["sha256"]
        assert find_tokenizer(first, out) == out
        codes = Codes(torch.zeros(1, 2, 64), torch.zeros(1), {"inputs": {"tokenizer": first}})
        assert tokenizer_of(out, codes) is not None
    with pytest.raises(InputError, match="trained on codes of tokenizer"):
        find_tokenizer(load_tokenizer(paths[1])[1]["sha256"], paths[2])


def test_what_does_not_fit_is_refused(world, perceptual, tmp_path):
    larger = {"train": "all", "model": replace(TINY, width=2 * TINY.width)}
    for changes, message in (
        (larger, "another size than asked for"),
        ({"init": None}, "give --init"),
        ({"train": "all", "perturb": 0.1}, "needs --train decoder"),
    ):
        with pytest.raises(InputError, match=message):
            stage.main(decoder_alone(world, perceptual, tmp_path / "a.pth", **changes))


def test_with_another_number_of_codes_the_networks_of_the_first_are_taken(world, tmp_path):
    nine = {"init": world.tokenizer, "model": replace(TINY, codebook_size=9)}
    cfg = config(world, tmp_path / "a.pth", **nine)
    model, first = VQVAE(cfg.model), load_tokenizer(world.tokenizer)[0]
    images_NHWC = load_split(world.data, "train").images_NHWC
    stage.start_weights(cfg, model, images_NHWC, torch.device("cpu"))
    for part in ("encoder", "decoder"):
        assert same(getattr(model, part).state_dict(), getattr(first, part).state_dict())
    assert len(model.quantizer.codebook_VC.unique(dim=0)) == 9


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
