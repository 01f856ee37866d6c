"""Stage 5, and the chain of all stages: what is written, what is refused, what is reproducible."""

import json
import statistics

import numpy as np
import pytest
import torch
from helpers import changed, cut_at, eval_config, other_codes, script, train_config

import metrics.likelihood
from metrics.likelihood import bits_per_code, orders_for
from models.artifacts import load_checkpoint, save_checkpoint, sha256_of
from models.checkpoint import load_generator, locked
from models.command import InputError
from models.data import load_codes, load_split
from models.methods import METHODS
from models.tokenizer import encode_images, load_tokenizer

stage, train = script("eval_c2i.py"), script("train_c2i.py")
export = script("tools/export_checkpoint.py")


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory) -> dict:
    """A run folder for every method, barely trained."""
    root = tmp_path_factory.mktemp("runs")
    orders = {m: "random" if METHODS[m].any_order else METHODS[m].scans[0] for m in METHODS}
    short = {"steps": 2, "eval_every": 2}
    return {
        method: train.main(train_config(world, root / method, method=method, order=order, **short))
        for method, order in orders.items()
    }


@pytest.fixture
def config(world, extractor_file, tmp_path):
    """A cheap evaluation of a run; `changes` override it."""

    def make(run, **changes):
        cheap = {"checkpoint": run / "last.pth", "out": tmp_path / "out"}
        cheap |= {"extractor": extractor_file, "num_samples": 20, "batch": 20}
        return eval_config(world, **cheap | changes)

    return make


def samples_in(folder, key="arr_0") -> np.ndarray:
    return np.load(folder / "out/samples.npz")[key]


def test_evaluation_writes_samples_and_numbers(runs, config, tmp_path, method):
    serves_any_steps = METHODS[method].parallel and METHODS[method].any_order
    steps = 8 if serves_any_steps else None
    found = stage.main(config(runs[method], decode_steps=steps))
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == found
    images_NHWC = samples_in(tmp_path)
    assert images_NHWC.shape == (20, 32, 32, 3) and images_NHWC.dtype == np.uint8
    assert samples_in(tmp_path, "arr_1").tolist() == [*range(10)] * 2
    assert (tmp_path / "out/samples.png").read_bytes().startswith(b"\x89PNG")
    assert found["samples"].keys() == found["control"].keys()
    assert {"FD_shapes", "KD_shapes", "IS_shapes", "label_accuracy"} < found["samples"].keys()
    assert not any(name.startswith("FID") for name in found["samples"])
    assert found["network_calls"] == (8 if steps else 19 if method == "par" else 64)
    assert found["images_per_second"] > 0 and found["parameters"] > 1e4
    orders = {"raster", "random"} if METHODS[method].any_order else {METHODS[method].scans[0]}
    assert found["bits_per_image"].keys() == orders
    for bits in found["bits_per_image"].values():
        assert 250 < bits["mean"] < 400 and bits["se"] > 0  # 64 * log2(32) = 320


def test_precision_is_that_of_samples_and_never_of_likelihoods(runs, config, method):
    """In fp32 or bf16 images hardly differ, nor with the batch; bits are the same to the last."""
    cfg, images, bits = config(runs[method]), {}, []
    for precision, batch in (("fp32", 20), ("bf16", 20), ("bf16", 7)):
        found = stage.main(changed(cfg, precision=precision, batch=batch))
        assert found["precision"] == precision
        images[precision, batch] = samples_in(cfg.out.parent).astype(int)
        bits.append(found["bits_per_image"])
    assert np.array_equal(images["bf16", 20], images["bf16", 7])
    assert (images["bf16", 20] == images["fp32", 20]).all((1, 2, 3)).mean() > 0.5
    sampler = changed(cfg, precision="bf16").sampler(cfg.load()).function
    assert next(sampler.model.parameters()).dtype == torch.bfloat16
    assert bits[0] == bits[1] == bits[2]


def test_two_processes_make_the_samples_of_one(runs, config, tmp_path):
    """To the byte; and they are gone when it is done."""
    files = []
    for devices in (1, 2):
        cfg = config(runs["randar"], decode_steps=4, batch=7, devices=devices)
        stage.main(changed(cfg, codes=tmp_path / "none", out=tmp_path / str(devices)))
        files.append((tmp_path / str(devices) / "samples.npz").read_bytes())
    assert files[0] == files[1]


def test_seeds_and_not_batches_make_the_images_and_give_a_mean_and_a_spread(runs, config, tmp_path):
    cfg = config(runs["randar"], decode_steps=4, codes=tmp_path / "none")
    alone, images = [], []
    for seed, batch in ((3, 20), (4, 20), (5, 20), (3, 7)):
        alone.append(stage.main(changed(cfg, seed=seed, batch=batch))["samples"])
        images.append(samples_in(tmp_path))
    assert np.array_equal(images[0], images[3]) and not np.array_equal(images[0], images[1])
    found = stage.main(changed(cfg, seed=3, seeds=3))
    assert found["seeds"] == [3, 4, 5] and found["samples"] == alone[0]
    for name, both in found["over_seeds"].items():
        values = [one[name] for one in alone[:3]]
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
    np.savez(file, arr_0=samples_in(tmp_path))
    unlabelled = stage.main(config(runs["randar"], **from_file))
    assert "label_accuracy" not in unlabelled["samples"] | unlabelled["control"]
    assert unlabelled["samples"]["FD_shapes"] == ours["samples"]["FD_shapes"]


def test_samples_that_are_none_are_refused(runs, config, tmp_path, monkeypatch):
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
    refused("no samples with an arr_0")
    for arrays, message in (
        ({"images": images}, "no samples with an arr_0"),
        ({"arr_0": images.astype(float)}, "expected arr_0 uint8 .N, 32, 32, 3., found float64"),
        ({"arr_0": images[:, :28]}, "found uint8 .12, 28, 32, 3"),
        ({"arr_0": images, "arr_1": np.arange(12)}, "12 labels in 0..9"),
        ({"arr_0": images, "arr_1": np.arange(10)}, "12 labels in 0..9"),
        ({"arr_0": np.array([{}], dtype=object)}, "no samples with an arr_0"),
    ):
        np.savez(file, **arrays)
        refused(message)
    np.savez_compressed(file, arr_0=images)
    monkeypatch.setattr("metrics.report.LARGEST_SAMPLES", images.nbytes)  # and a header
    refused(f"unpacked, it is of more than {images.nbytes} bytes")


def test_an_exported_checkpoint_is_small_and_carries_how_to_sample(world, runs, config, tmp_path):
    how = {"decode_steps": 4, "cfg_scale": 3.5, "temperature": 0.9, "top_k": 7}
    plan = stage.main(config(runs["randar"], **how))["plan"]
    metrics, run = tmp_path / "out/metrics.json", runs["randar"] / "last.pth"
    small = export.main(export.ExportConfig(run, metrics, tmp_path / "exported/last.pth"))
    assert small.stat().st_size * 4 < run.stat().st_size
    whole, half = load_generator(run), load_generator(small)
    assert half.header["inputs"] == whole.header["inputs"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(half.model.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    images = samples_in(tmp_path).astype(int)
    assert stage.main(config(runs["randar"], checkpoint=small))["plan"] == plan
    assert np.abs(images - samples_in(tmp_path)).mean() < 8  # but for the weights' rounding
    found = stage.main(config(runs["randar"], checkpoint=small, cfg_scale=1.0, decode_steps=2))
    assert found["plan"] == plan | {"cfg_scale": 1.0, "decode_steps": 2}  # a flag outdoes it
    with pytest.raises(InputError, match="exported"):  # no optimizer to go on with
        train.main(train_config(world, small.parent, order="random", steps=2))
    with pytest.raises(InputError, match="expected samples of gpt"):
        export.main(export.ExportConfig(runs["gpt"] / "last.pth", metrics, tmp_path / "x.pth"))
    assert not (tmp_path / "x.pth").exists()


def test_labels_can_be_chosen_and_are_held_against_real_images_of_theirs(
    world, runs, config, tmp_path
):
    found = stage.main(config(runs["randar"], decode_steps=4, labels=(3, 7, 8), num_samples=12))
    assert samples_in(tmp_path, "arr_1").tolist() == [3, 7, 8] * 4
    train = load_split(world.data, "train")
    rows_N = np.isin(train.labels_N, (3, 7, 8))
    assert found["inputs"]["reference"] == sha256_of(train.images_NHWC[rows_N])
    assert found["reference_images"] == 36 and found["control_images"] == 12


@pytest.mark.parametrize("torn", [False, True])
def test_a_cut_evaluation_goes_on_where_it_was(runs, config, tmp_path, monkeypatch, torn):
    cfg = config(runs["randar"], decode_steps=4, seeds=2)
    whole = stage.main(changed(cfg, out=tmp_path / "whole"))
    for owner, name, call in ((metrics.likelihood, "likelihood", 2), (stage, "sample_images", 1)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            cut_at(patched, owner, name, call)
            stage.main(cfg)
    if torn:
        (tmp_path / "out/samples.npz").write_bytes(b"PK")
    sampled = cut_at(monkeypatch, stage, "sample_images", 99)
    found = stage.main(cfg)
    assert len(sampled) == (3 if torn else 1)  # of the second seed only; or warm-up and first too
    same = ("samples", "control", "bits_per_image", "over_seeds", "inputs")
    assert {key: found[key] for key in same} == {key: whole[key] for key in same}
    assert not (tmp_path / "out/.partial.json").exists()
    other = stage.main(changed(cfg, seed=5))  # another seed: nothing of the old samples is used
    assert other["samples"] != found["samples"]


def test_codes_of_another_search_are_refused_with_the_command(runs, config, tmp_path):
    contents = load_checkpoint(runs["randar"] / "last.pth", "generator", "")
    head = contents.pop("header") | {"search": 1}
    save_checkpoint(tmp_path / "searched/last.pth", head, **contents)
    with pytest.raises(InputError, match="another --search than .*--search 1 --out NEW"):
        stage.main(config(tmp_path / "searched"))


def test_impossible_evaluations_are_refused_before_sampling(
    world, runs, config, tmp_path, extractor_file, monkeypatch
):
    monkeypatch.setattr(stage, "sample_images", lambda *args: pytest.fail("it sampled"))
    nowhere = tmp_path / "nowhere.pth"
    another = other_codes(world, tmp_path / "codes", tokenizer="0" * 64)
    for method, changes, message in (
        ("randar", {"decode_steps": 65}, "steps in 1..64, got 65"),
        ("gpt", {"decode_steps": 8}, "GPT decodes one code a step"),
        ("gpt", {"order": "random"}, "trained in raster order"),
        ("randar", {"cfg_from": 0.6, "cfg_to": 0.5}, "expected --cfg-from up to --cfg-to 0.5"),
        ("randar", {"order": "confidence", "revise": 0.1}, "--order confidence is chosen"),
        ("gpt", {"order": "spiral_in"}, "trained in raster order"),
        ("randar", {"labels": (10,)}, "--labels in 0..9, got .10"),
        ("randar", {"labels": (3,)}, "at least 10 test images"),
        ("randar", {"data": nowhere}, "load_CIFAR10"),
        ("randar", {"extractor": nowhere}, "train_extractor"),
        ("randar", {"checkpoint": nowhere}, "train_c2i"),
        ("randar", {"checkpoint": world.tokenizer}, "expected generator, found"),
        ("randar", {"checkpoint": extractor_file}, "expected generator, found"),
        ("randar", {"tokenizer": nowhere}, "found nothing"),
        ("randar", {"tokenizer": runs["gpt"] / "last.pth"}, "found generator|is not it"),
        ("randar", {"inception_weights": nowhere}, "expected Inception weights at"),
        ("randar", {"codes": another}, "codes of another tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            stage.main(config(runs[method], **changes))
        assert not (tmp_path / "out").exists()
    with locked(tmp_path / "out"), pytest.raises(InputError, match="is being written by"):
        stage.main(config(runs["gpt"]))
    for idle in ({"labels": (3,)}, {"cfg_scale": 2.0}):
        with pytest.raises(InputError, match=f"expected no --{next(iter(idle))}"):
            stage.EvalConfig(samples=nowhere, **idle)


def test_without_real_images_or_codes_it_still_samples(runs, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metrics.evaluation.ROOT", tmp_path)
    codes = tmp_path / "none"
    cfg = config(runs["randar"], data=None, codes=codes, decode_steps=4, extractor=None)
    found = stage.main(cfg)
    said = capsys.readouterr().out
    assert "no real images" in said and "no codes" in said
    assert "samples" not in found and "bits_per_image" not in found
    assert (tmp_path / "out/samples.npz").exists()


def test_codes_are_those_of_the_images_and_their_mirror_images(world):
    model, _ = load_tokenizer(world.tokenizer)
    split, codes = load_split(world.data, "test"), load_codes(world.codes, "test")
    mirrored_NHWC = split.images_NHWC[:, :, ::-1].copy()
    assert codes.codes_NAT.shape == (40, 2, 64)
    assert torch.equal(codes.codes_NAT[:, 0], encode_images(model, split.images_NHWC))
    assert torch.equal(codes.codes_NAT[:9, 0], encode_images(model, split.images_NHWC[:9]))
    assert torch.equal(codes.codes_NAT[:, 1], encode_images(model, mirrored_NHWC))
    assert torch.equal(codes.label_N, torch.from_numpy(split.labels_N))


def test_a_tokenizer_of_other_images_is_refused(world, tmp_path):
    shapes, extract = script("data/shapes.py"), script("tools/extract_latent_codes.py")
    other, out = tmp_path / "other", tmp_path / "codes"
    shapes.main(shapes.ShapesConfig(out=other, count_train=20, count_test=10, seed=9))
    with pytest.raises(InputError, match="trained on other images"):
        extract.main(extract.ExtractConfig(tokenizer=world.tokenizer, data=other, out=out))
    assert not out.exists()
