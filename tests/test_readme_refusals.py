"""What the README's blocks refuse: files that lack something, runs that cannot be compared."""

import json
import shutil

import pytest
from helpers import script
from tiny_report import (
    metrics_of,
    quickstart_of,
    readme_of,
    sweep_of,
    write_everything,
    write_pair,
    write_run,
)
from tiny_report import report_config as config

from metrics.report_readme import BLOCKS, regenerate
from models.errors import InputError

tool = script("tools/report.py")


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def everything(tmp_path) -> list:
    return write_everything(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing marked", "got none"),
        ("<!-- report:first_run -->\n", "by turns"),
        ("<!-- /report -->\n<!-- report:first_run -->\n", "by turns"),
        ("<!-- report:a -->\n<!-- report:b -->\n<!-- /report -->\n<!-- /report -->\n", "by turns"),
        ("<!-- report:pace -->\n<!-- /report -->\n", "blocks of quickstart, .*got pace"),
    ],
)
def test_a_readme_with_wrong_markers_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        regenerate(text, tmp_path)


@pytest.mark.parametrize("file", ["metrics", "calibration", "robustness"])
def test_a_block_without_its_files_is_refused(tmp_path, pair, file):
    (pair[1] / f"{file}.json").unlink()
    block = {"metrics": "first_run"}.get(file, file)
    with pytest.raises(InputError, match=f"{pair[1].name}.*{file}.json|{file}.json.*--out"):
        regenerate(readme_of([block]), tmp_path / "results")
    with pytest.raises(InputError, match="five_"):
        regenerate(readme_of(["methods"]), tmp_path / "results")


def test_runs_that_cannot_be_compared_are_refused(tmp_path, pair):
    about = metrics_of("random", 0.0)
    for changes, message in (
        ({"num_samples": 500}, "one num_samples, got 2000 .*500"),
        ({"control": about["control"] | {"FD_c10": 0.5}}, "one control"),
    ):
        (pair[1] / "metrics.json").write_text(json.dumps(about | changes))
        with pytest.raises(InputError, match=message):
            regenerate(readme_of(["first_run"]), tmp_path / "results")


@pytest.mark.parametrize(
    ("folder", "name", "block"),
    [
        ("vqvae_cifar10", "tokenizer.json", "parts"),
        ("benchmark", "benchmark.json", "stages"),
        ("quickstart", "quickstart.json", "quickstart"),
    ],
)
def test_a_single_file_is_needed_whole(tmp_path, everything, folder, name, block):
    path = tmp_path / "results" / folder / name
    path.write_text("{}")
    with pytest.raises(InputError, match=f"{name} has no .*: run tools/.* again"):
        tool.main(config(tmp_path, *everything, keep=True))
    assert not (tmp_path / "kept").exists()
    path.unlink()
    with pytest.raises(InputError, match=name):
        BLOCKS[block](tmp_path / "results")


def without_one(found):
    """Yield copies of parsed JSON that each lack one entry outside of numbers with intervals."""
    if isinstance(found, dict) and not found.keys() & {"value", "mean"}:
        for key, item in found.items():
            yield {k: v for k, v in found.items() if k != key}
            yield from (found | {key: less} for less in without_one(item))
    for i, item in enumerate(found) if isinstance(found, list) else ():
        yield from ([*found[:i], less, *found[i + 1 :]] for less in without_one(item))


@pytest.mark.parametrize(("path", "blocks"), [
    ("randar_random_nano_cifar10/metrics.json", "first_run first_run_setting beside_it finding"),
    ("randar_random_nano_cifar10/calibration.json", "calibration finding"),
    ("randar_random_nano_cifar10/robustness.json", "robustness finding"),
    ("randar_random_nano_cifar10/config.json", "first_run_setting stages"),
    ("five_gpt_raster/sweep.json", "calls"),
    ("b_randar_raster/config.json", "training_seeds"),
    ("b_randar_raster/metrics.json", "training_seeds"),
    ("b_randar_raster/robustness.json", "training_seeds"),
    ("vqvae_cifar10/tokenizer.json", "stages beside_it parts"),
    ("benchmark/benchmark.json", "stages speed"),
    ("quickstart/quickstart.json", "quickstart"),
])  # fmt: skip
def test_a_file_that_lacks_an_entry_is_read_or_refused(tmp_path, everything, path, blocks):
    file, refused = tmp_path / "results" / path, 0
    for less in without_one(json.loads(file.read_text())):
        file.write_text(json.dumps(less))
        for block in blocks.split():
            try:
                BLOCKS[block](tmp_path / "results")
            except InputError as e:
                assert "\n" not in str(e)
                refused += 1
    assert refused > 0


def test_a_resumed_quickstart_is_refused(tmp_path, everything):
    path = tmp_path / "results/quickstart/quickstart.json"
    path.write_text(json.dumps(quickstart_of() | {"resumed": True}))
    with pytest.raises(InputError, match="went on from a cut one"):
        BLOCKS["quickstart"](tmp_path / "results")


def test_training_seeds_are_compared_one_by_one(tmp_path, everything):
    results = tmp_path / "results"
    for order in ("raster", "random"):
        write_run(results / f"again_randar_{order}", order, studies=False, seed=0)
    with pytest.raises(InputError, match=r"got \[0, 0, 1\] and \[0, 0, 1\]"):
        BLOCKS["training_seeds"](results)
    for name in ("again_randar_raster", "again_randar_random", "b_randar_random"):
        shutil.rmtree(results / name)
    with pytest.raises(InputError, match=r"same training seeds.*got \[0, 1\] and \[1\]"):
        BLOCKS["training_seeds"](results)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"config": {"batch": 32}}, "one batch, got .*32"),
        ("metrics.json", {"plan": {"cfg": 5.0}}, "one plan.cfg, got .*5.0"),
        ("metrics.json", {"reference_images": 7}, "one reference_images, got .*7"),
        ("metrics.json", {"num_samples": 7}, "one num_samples, got .*7"),
    ],
)
def test_training_seeds_of_other_settings_are_refused(tmp_path, everything, file, changes, message):
    path = tmp_path / "results/b_randar_random" / file
    found = json.loads(path.read_text())
    for key, value in changes.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(found))
    for block in ("training_seeds", "finding"):
        with pytest.raises(InputError, match=message):
            BLOCKS[block](tmp_path / "results")


def test_sweeps_over_more_than_the_calls_are_refused(tmp_path, everything):
    path = tmp_path / "results/five_gpt_raster/sweep.json"
    for change in ({"plan": {"steps": 16, "cfg": 7.0}}, {"num_samples": 3}, {"control": {}}):
        found = sweep_of()
        found["rows"][1] |= change
        path.write_text(json.dumps(found))
        with pytest.raises(InputError, match="over the network calls only, got 2 settings"):
            BLOCKS["calls"](tmp_path / "results")
