"""Stage 5, and the chain of all stages: what is written, what is refused, what is reproducible."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import changed, config_of, script

from metrics.extractor import Classifier, save_classifier
from metrics.likelihood import bits_per_code, orders_for
from models.artifacts import header, load_checkpoint, save_checkpoint, sha256_of
from models.checkpoint import load_generator
from models.command import InputError
from models.data import load_codes, load_split, save_codes
from models.methods import METHODS, build
from models.transformer import ModelConfig

stage, train = script("eval_c2i.py"), script("train_c2i.py")


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory) -> dict:
    """A run folder for every method, barely trained."""
    root = tmp_path_factory.mktemp("runs")
    nowhere, found = root / "none.pth", {}
    for method in METHODS:
        order = "random" if METHODS[method].any_order else METHODS[method].scans[0]
        found[method] = train.main(
            train.TrainConfig(
                method=method, order=order, model="nano", codes=world.codes, tokenizer=nowhere,
                out=root / method, steps=2, batch=8, eval_every=2, heldout=20, device="cpu",
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="session")
def extractor(world, tmp_path_factory):
    """An untrained classifier: distances need no training to be distances."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("extractor") / "extractor.pth"
    split = load_split(world.data, "train")
    head = header("extractor", "tests", {}, {"images": split.sha256})
    save_classifier(path, Classifier(8, 10), head | {"dataset": "shapes"})
    return path


@pytest.fixture
def config(world, extractor, tmp_path):
    """A cheap evaluation of a run; `changes` override it."""

    def make(run, **changes):
        cheap = config_of(
            stage.EvalConfig,
            checkpoint=run / "last.pth",
            tokenizer=world.tokenizer,
            codes=world.codes,
            data=world.data,
            extractor=extractor,
            inception_weights="none",
            num_samples=20,
            batch=20,
            out=tmp_path / "out",
            device="cpu",
        )
        return changed(cheap, **changes)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_writes_samples_and_numbers(runs, config, tmp_path, method):
    serves_any_steps = METHODS[method].parallel and METHODS[method].any_order
    steps = 8 if serves_any_steps else None
    found = stage.main(config(runs[method], decode_steps=steps))
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == found
    packed = np.load(tmp_path / "out/samples.npz")
    assert packed["arr_0"].shape == (20, 32, 32, 3) and packed["arr_0"].dtype == np.uint8
    assert packed["arr_1"].tolist() == [*range(10)] * 2
    assert (tmp_path / "out/samples.png").read_bytes().startswith(b"\x89PNG")
    assert found["samples"].keys() == found["control"].keys()
    assert {"FD_shapes", "KD_shapes", "IS_shapes", "label_accuracy"} < found["samples"].keys()
    assert not any(name.startswith("FID") for name in found["samples"])
    assert found["network_calls"] == (8 if steps else 19 if method == "par" else 64)
    assert found["images_per_second"] > 0 and found["parameters"] > 1e6
    orders = {"raster", "random"} if METHODS[method].any_order else {METHODS[method].scans[0]}
    assert found["bits_per_image"].keys() == orders
    for bits in found["bits_per_image"].values():
        assert 250 < bits["mean"] < 400 and bits["se"] > 0  # 64 * log2(32) = 320


def test_the_same_command_gives_the_same_images_in_any_batch(runs, config, tmp_path):
    images = []
    for batch, seed in ((20, 0), (7, 0), (20, 1)):
        stage.main(config(runs["randar"], decode_steps=8, batch=batch, seed=seed))
        images.append(np.load(tmp_path / "out/samples.npz")["arr_0"])
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_several_seeds_give_a_mean_and_a_spread(runs, config, tmp_path):
    cfg = config(runs["randar"], decode_steps=4)
    alone = [stage.main(changed(cfg, seed=seed))["samples"] for seed in (3, 4, 5)]
    found = stage.main(changed(cfg, seed=3, seeds=3))
    assert found["seeds"] == [3, 4, 5] and found["samples"] == alone[0]
    for name, both in found["over_seeds"].items():
        values = [one[name] for one in alone]
        assert both["mean"] == pytest.approx(sum(values) / 3)
        assert both["sd"] == pytest.approx(statistics.stdev(values))
    assert found["over_seeds"]["FD_shapes"]["sd"] > 0


def test_likelihood_is_averaged_over_random_orders(runs, config, world):
    cfg = config(runs["arpg"], decode_steps=4, data=None, random_orders=3)
    found = stage.main(cfg)["bits_per_image"]
    model, test = load_generator(cfg.checkpoint).model, load_codes(world.codes, "test")
    inputs = (test.codes_NAT[:, 0], test.label_N)
    bits = [
        bits_per_code(model, *inputs, orders_for(model, "random", len(test.label_N), seed)).sum(1)
        for seed in range(3)
    ]
    assert found["random"]["mean"] == pytest.approx(torch.stack(bits).mean().item(), rel=1e-5)
    assert found["random"]["orders"] == 3 and found["raster"]["orders"] == 1


def test_samples_of_others_are_measured_like_ours(runs, config, tmp_path):
    ours = stage.main(config(runs["randar"], decode_steps=4))
    file = tmp_path / "theirs.npz"
    file.write_bytes((tmp_path / "out/samples.npz").read_bytes())
    from_file = {"checkpoint": None, "samples": file, "out": tmp_path / "other"}
    theirs = stage.main(config(runs["randar"], **from_file))
    assert theirs["samples"] == ours["samples"] and theirs["control"] == ours["control"]
    assert theirs["num_samples"] == 20
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["metrics.json"]
    np.savez(file, arr_0=np.load(tmp_path / "out/samples.npz")["arr_0"])
    unlabelled = stage.main(config(runs["randar"], **from_file))
    assert "label_accuracy" not in unlabelled["samples"] | unlabelled["control"]
    assert unlabelled["samples"]["FD_shapes"] == ours["samples"]["FD_shapes"]


def test_samples_that_are_none_are_refused(runs, config, tmp_path):
    images, file = np.zeros((12, 32, 32, 3), np.uint8), tmp_path / "theirs.npz"

    def refused(message, **changes):
        wanted = {"checkpoint": None, "samples": file, "out": tmp_path / "other"} | changes
        with pytest.raises(InputError, match=message):
            stage.main(config(runs["randar"], **wanted))
        assert not (tmp_path / "other").exists()

    refused("found nothing")
    refused("either --checkpoint or --samples", samples=None)
    refused("either --checkpoint or --samples", checkpoint=file)
    file.write_bytes(b"no archive")
    refused("no .npz of samples")
    for arrays, message in [
        ({"images": images}, "no .npz of samples with an arr_0"),
        ({"arr_0": images.astype(float)}, "expected arr_0 uint8 .N, 32, 32, 3., found float64"),
        ({"arr_0": images[:, :28]}, "found uint8 .12, 28, 32, 3"),
        ({"arr_0": images, "arr_1": np.arange(12)}, "12 labels in 0..9"),
        ({"arr_0": images, "arr_1": np.arange(10)}, "12 labels in 0..9"),
        ({"arr_0": np.array([{}], dtype=object)}, "no .npz of samples"),
    ]:
        np.savez(file, **arrays)
        refused(message)


def test_an_exported_checkpoint_carries_how_to_sample(runs, config, tmp_path):
    export = script("tools/export_checkpoint.py")
    asked = stage.main(
        config(runs["randar"], decode_steps=4, cfg_scale=3.5, temperature=0.9, top_k=7)
    )
    found, run = tmp_path / "out/metrics.json", runs["randar"] / "last.pth"
    small = export.main(export.ExportConfig(run, found, tmp_path / "small.pth"))
    images = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert stage.main(config(runs["randar"], checkpoint=small))["plan"] == asked["plan"]
    same = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert np.abs(images.astype(int) - same).mean() < 8  # the same but for the weights' rounding
    plan = stage.main(config(runs["randar"], checkpoint=small, cfg_scale=1.0, decode_steps=2))[
        "plan"
    ]
    assert plan == asked["plan"] | {"cfg_scale": 1.0, "decode_steps": 2}  # a flag outdoes it
    with pytest.raises(InputError, match="expected samples of gpt"):
        export.main(export.ExportConfig(runs["gpt"] / "last.pth", found, tmp_path / "x.pth"))
    found.write_text("{}")
    with pytest.raises(InputError, match="expected a metrics.json"):
        export.main(export.ExportConfig(run, found, tmp_path / "x.pth"))
    assert not (tmp_path / "x.pth").exists()


def test_labels_can_be_chosen_and_are_held_against_real_images_of_theirs(
    world, runs, config, tmp_path
):
    found = stage.main(config(runs["randar"], decode_steps=4, labels=(3, 7, 8), num_samples=12))
    assert np.load(tmp_path / "out/samples.npz")["arr_1"].tolist() == [3, 7, 8] * 4
    train = load_split(world.data, "train")
    rows_N = np.isin(train.labels_N, (3, 7, 8))
    assert found["inputs"]["reference"] == sha256_of(train.images_NHWC[rows_N])
    assert found["reference_images"] == 36 and found["control_images"] == 12


def test_too_few_reference_images_are_refused_before_anything_is_sampled(runs, config, tmp_path):
    with pytest.raises(InputError, match="at least 10 test images"):
        stage.main(config(runs["randar"], labels=(3,)))
    assert not (tmp_path / "out").exists()


def test_a_cut_evaluation_goes_on_where_it_was(runs, config, tmp_path, monkeypatch):
    cfg = config(runs["randar"], decode_steps=4, seeds=2)
    whole = stage.main(changed(cfg, out=tmp_path / "whole"))
    calls = []

    def cut_after(count, name):
        original = getattr(stage, name)

        def call(*args, **kwargs):
            calls.append(name)
            if calls.count(name) > count:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    for count, name in ((1, "likelihood"), (0, "sample_images")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(stage, name, cut_after(count, name))
            stage.main(cfg)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "sample_images", cut_after(99, "sample_images"))
        before = calls.count("sample_images")
        found = stage.main(cfg)
    assert calls.count("sample_images") <= before + 1  # of the second seed only
    same = ("samples", "control", "bits_per_image", "over_seeds", "inputs")
    assert {key: found[key] for key in same} == {key: whole[key] for key in same}
    assert not (tmp_path / "out/.partial.json").exists()
    stage.main(changed(cfg, seed=5))  # another seed: nothing of the old samples is used
    assert stage.main(changed(cfg, seed=5))["samples"] != found["samples"]


def test_codes_of_another_search_are_refused_with_the_command(world, runs, config, tmp_path):
    contents = load_checkpoint(runs["randar"] / "last.pth", "generator", "")
    head = contents.pop("header") | {"search": 1}
    save_checkpoint(tmp_path / "searched/last.pth", head, **contents)
    with pytest.raises(InputError, match="another --search than .*--search 1 --out NEW"):
        stage.main(config(tmp_path / "searched"))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("randar", {"decode_steps": 65}, "steps in 1..64, got 65"),
        ("gpt", {"decode_steps": 8}, "GPT decodes one code a step"),
        ("gpt", {"order": "random"}, "trained in raster order"),
        ("gpt", {"order": "spiral_in"}, "trained in raster order"),
        ("randar", {"labels": (10,)}, "--labels in 0..9, got .10"),
        ("randar", {"top_p": 0.0}, "--top-p in"),
        ("randar", {"data": "nowhere"}, "load_CIFAR10"),
        ("randar", {"extractor": "nowhere.pth"}, "train_extractor"),
        ("randar", {"checkpoint": "nowhere.pth"}, "train_c2i"),
        ("randar", {"tokenizer": "nowhere.pth"}, "found nothing"),
        ("randar", {"inception_weights": "nowhere.pth"}, "no Inception weights at nowhere"),
    ],
)
def test_impossible_evaluations_are_refused_before_sampling(
    runs, config, tmp_path, monkeypatch, method, changes, message
):
    monkeypatch.setattr(stage, "sample_images", lambda *args: pytest.fail("it sampled"))
    paths = ("data", "extractor", "checkpoint", "tokenizer", "inception_weights")
    changes = {k: tmp_path / v if k in paths else v for k, v in changes.items()}
    if "inception_weights" in changes:
        message = "no Inception weights at"
    with pytest.raises(InputError, match=message):
        stage.main(config(runs[method], **changes))
    assert not (tmp_path / "out").exists()


def test_artifacts_of_another_kind_or_chain_are_refused(world, runs, config, tmp_path, extractor):
    for wrong in (world.tokenizer, extractor):
        with pytest.raises(InputError, match="expected generator, found"):
            stage.main(config(runs["randar"], checkpoint=wrong))
    with pytest.raises(InputError, match="expected tokenizer, found generator|is not it"):
        stage.main(config(runs["randar"], tokenizer=runs["randar"] / "last.pth"))
    codes = load_codes(world.codes, "test")
    inputs = codes.header["inputs"] | {"tokenizer": "0" * 64}
    other = tmp_path / "codes"
    save_codes(
        other, "test", codes.codes_NAT.numpy(), codes.label_N.numpy(),
        codes.header | {"inputs": inputs},
    )  # fmt: skip
    with pytest.raises(InputError, match="codes of another tokenizer"):
        stage.main(config(runs["randar"], codes=other))


def test_without_real_images_or_codes_it_still_samples(runs, config, tmp_path, capsys):
    cfg = config(runs["randar"], data=None, codes=tmp_path / "none", decode_steps=4)
    cfg = changed(cfg, extractor=None)
    head = load_generator(cfg.checkpoint).header
    if (stage.ROOT / "data" / head["dataset"]).exists():
        pytest.skip("this checkout has the real images")
    found = stage.main(cfg)
    said = capsys.readouterr().out
    assert "no real images" in said and "no codes" in said
    assert "samples" not in found and "bits_per_image" not in found
    assert (tmp_path / "out/samples.npz").exists()


def test_a_uniform_model_needs_the_logarithm_of_the_codebook():
    """Without weights all codes are alike: 64 * log2(V) bits an image, exactly."""
    for method in METHODS:
        torch.manual_seed(0)
        model = build(method, ModelConfig(vocab_size=32, layers=2, width=16, heads=2)).eval()
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        codes_NT = torch.randint(32, (4, 64))
        order_NS = orders_for(model, model.scans[0], 4)
        bits_NS = bits_per_code(model, codes_NT, torch.arange(4), order_NS)
        assert bits_NS.shape == (4, 64)
        assert bits_NS.sum(1).tolist() == pytest.approx([64 * math.log2(32)] * 4, rel=1e-6)


def test_labels_outside_the_classes_are_refused_on_reading(world, tmp_path):
    codes = load_codes(world.codes, "test")
    label_N = codes.label_N.numpy().copy()
    label_N[3] = 10
    save_codes(tmp_path, "test", codes.codes_NAT.numpy(), label_N, codes.header)
    with pytest.raises(InputError, match="labels in 0..9"):
        load_codes(tmp_path, "test")


def test_codes_are_those_of_the_images_and_their_mirror_images(world):
    from models.tokenizer import encode_images, load_tokenizer

    model, _ = load_tokenizer(world.tokenizer)
    split, codes = load_split(world.data, "test"), load_codes(world.codes, "test")
    mirrored_NHWC = split.images_NHWC[:, :, ::-1].copy()
    assert codes.codes_NAT.shape == (40, 2, 64)
    assert torch.equal(codes.codes_NAT[:, 0], encode_images(model, split.images_NHWC))
    assert torch.equal(codes.codes_NAT[:, 1], encode_images(model, mirrored_NHWC))
    assert torch.equal(codes.label_N, torch.from_numpy(split.labels_N))


def test_a_tokenizer_of_other_images_is_refused(world, tmp_path):
    shapes, extract = script("data/shapes.py"), script("tools/extract_latent_codes.py")
    other = tmp_path / "other"
    shapes.main(shapes.ShapesConfig(out=other, count_train=20, count_test=10, seed=9))
    with pytest.raises(InputError, match="trained on other images"):
        extract.main(
            extract.ExtractConfig(tokenizer=world.tokenizer, data=other, out=tmp_path / "codes")
        )
    assert not (tmp_path / "codes").exists()


def test_an_exported_checkpoint_is_small_and_samples_as_the_run(runs, config, tmp_path):
    export = script("tools/export_checkpoint.py")
    small = export.main(
        export.ExportConfig(runs["randar"] / "last.pth", out=tmp_path / "small.pth")
    )
    assert small.stat().st_size * 6 < (runs["randar"] / "last.pth").stat().st_size
    whole, half = load_generator(runs["randar"] / "last.pth"), load_generator(small)
    assert half.header["inputs"] == whole.header["inputs"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(half.model.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert stage.main(config(runs["randar"], checkpoint=small, decode_steps=4))["parameters"] > 1e6
    out, codes = tmp_path / "run", Path(half.header["config"]["codes"])
    out.mkdir()
    (out / "last.pth").write_bytes(small.read_bytes())
    with pytest.raises(InputError, match="exported"):
        train.main(
            train.TrainConfig(
                method="randar", order="random", model="nano", codes=codes, out=out,
                steps=2, batch=8, eval_every=2, heldout=20, device="cpu",
            )
        )  # fmt: skip
