"""tools/measure_tokenizer.py: what it writes is of the codes it says, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from helpers import changed, other_codes, script

from metrics.extractor import classifier_extractor, reconstruction_report
from metrics.fidelity import features_of, fidelity, psnr
from models.command import InputError
from models.data import load_codes, load_split
from models.tokenizer import decode_codes, encode_images, load_tokenizer

tool = script("tools/measure_tokenizer.py")


@pytest.fixture
def config(cheap):
    return cheap(tool.MeasureTokenizerConfig, images=40)


def test_the_command_measures_both_kinds_of_codes(world, config, tmp_path, extractor_file, capsys):
    folder, extractor = (
        other_codes(world, tmp_path / "codes", change=1),
        classifier_extractor(extractor_file),
    )
    found = tool.main(changed(config, codes=folder))
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == found
    assert (tmp_path / "out/reconstructions.png").read_bytes().startswith(b"\x89PNG")
    model, test = load_tokenizer(world.tokenizer)[0], load_split(world.data, "test")
    known = reconstruction_report(model, test, len(test.labels_N))
    nearest, stored = found["codes"]["nearest"], found["codes"]["stored"]
    assert nearest["psnr"]["value"] == pytest.approx(known["psnr"], abs=1e-9)
    assert nearest["perplexity"] == known["perplexity"] and found["images"] == known["images"]
    decoded_NHWC = decode_codes(model, load_codes(folder, "test").codes_NAT[:, 0])
    assert stored["psnr"]["value"] == pytest.approx(psnr(test.images_NHWC, decoded_NHWC).mean())
    assert nearest["search"] == stored["search"] == 0
    features, of_test, of_train = (
        features_of(images, extractor)
        for images in (decoded_NHWC, test.images_NHWC, load_split(world.data, "train").images_NHWC)
    )

    def frechet(*pair):
        return pytest.approx(fidelity(*pair, extractor)["FD_shapes"], rel=1e-3)

    assert stored["rFD_shapes"] == frechet(features, of_test)
    assert stored["as_samples"]["FD_shapes"] == frechet(features, of_train)
    assert found["control"]["FD_shapes"] == frechet(of_test, of_train)
    accuracy = extractor.label_accuracy(features, test.labels_N)
    assert stored["as_samples"]["label_accuracy"] == accuracy
    said = capsys.readouterr().out
    assert f"{stored['rFD_shapes']:.3f}" in said and f"{found['control']['FD_shapes']:.3f}" in said


def test_what_is_given_back_whole_has_no_distance(world, config):
    images_NHWC = load_split(world.data, "test").images_NHWC
    reference = config.against.load("shapes", torch.device("cpu"))
    label_N = np.zeros(len(images_NHWC), np.int64)
    found = tool.measure(images_NHWC, images_NHWC, label_N, reference)
    assert abs(found["rFD_shapes"]) < 1e-6 and found["psnr"]["value"] == np.inf
    worse = tool.measure(255 - images_NHWC, images_NHWC, label_N, reference)
    assert worse["rFD_shapes"] > 0.001


def test_some_images_are_evenly_spaced(world, config):
    found = tool.main(changed(config, images=10, codes="none"))
    assert found["images"] == 10 and list(found["codes"]) == ["nearest"]
    images_NHWC = load_split(world.data, "test").images_NHWC
    images_NHWC = images_NHWC[[0, 4, 9, 13, 17, 22, 26, 30, 35, 39]]
    model = load_tokenizer(world.tokenizer)[0]
    decoded_NHWC = decode_codes(model, encode_images(model, images_NHWC))
    value = found["codes"]["nearest"]["psnr"]["value"]
    assert value == pytest.approx(psnr(images_NHWC, decoded_NHWC).mean())


def test_codes_of_others_are_refused(world, clustered, config, tmp_path):
    images = other_codes(world, tmp_path / "images", images="0" * 64)
    for changes, message in (
        ({"tokenizer": clustered.tokenizer}, "codes of another tokenizer than .*tokenizer.pth"),
        ({"codes": images}, "codes of other test images"),
        ({"codes": tmp_path / "nothing"}, "nothing"),
        ({"tokenizer": tmp_path / "no.pth"}, "no.pth"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(changed(config, **changes))
    assert not (tmp_path / "out").exists()
