"""The README's blocks: made of the kept numbers, between their markers only, or refused."""

import json
import re
import shutil

import pytest
from helpers import script
from PIL import Image
from tiny_report import (
    benchmark_of,
    metrics_of,
    quickstart_of,
    robustness_of,
    sweep_of,
    tokenizer_of,
    write_pair,
    write_run,
    write_single,
)
from tiny_report import report_config as config

from metrics.readme_prose import PROSE_BLOCKS, TEXTS, fill
from metrics.report_readme import BLOCKS, regenerate
from metrics.report_runs import kept_folders
from models.artifacts import ROOT
from models.errors import InputError

tool = script("tools/report.py")


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def test_the_readme_is_what_its_kept_numbers_make():
    text = (ROOT / "README.md").read_bytes().decode()
    made, names = regenerate(text, ROOT / "checkpoints/reports")
    assert made == text, "run: uv run tools/report.py --readme"
    assert sorted(names) == sorted(BLOCKS)
    for path in (ROOT / "checkpoints/reports").rglob("*.*"):
        assert path.stat().st_size <= 100_000 and '"/' not in path.read_text(), path


def readme_of(names) -> str:
    """A README with these blocks, and text around them that must stay."""
    blocks = "".join(f"<!-- report:{name} -->\nold {name}\n<!-- /report -->\n\n" for name in names)
    return f"# Title \t\r\n| 1 | ± |\r\n\n{blocks}last line without end  "


@pytest.fixture
def everything(tmp_path, pair) -> list:
    """All folders that the README's blocks ask for; the pair comes first."""
    results = tmp_path / "results"
    spread = {"FD_c10": {"mean": 0.9, "sd": 0.0123}, "label_accuracy": {"mean": 0.71, "sd": 0.004}}
    for name, weight in (("five_rar_anneal", 0.5), ("five_gpt_raster", 0.0)):
        _, method, order = name.split("_")
        about = {"method": method, "trained_order": order, "cluster_weight": weight}
        folder = write_run(results / name, "raster", studies=False, seeds=[0, 1, 2],
                           over_seeds=spread, **about)  # fmt: skip
        pair.append(folder)
    (pair[-1] / "sweep.json").write_text(json.dumps(sweep_of()))
    for order, sd in (("raster", 0.0125), ("random", 0.025)):
        name, both = f"randar_{order}_nano_cifar10_seeds", {"mean": 0.7, "sd": sd}
        folder = write_run(results / name, order, studies=False, seeds=[0, 1],
                           over_seeds={"FD_c10": both})  # fmt: skip
        found = json.loads((folder / "metrics.json").read_text())
        del found["bits_per_image"]
        (folder / "metrics.json").write_text(json.dumps(found))
        pair.append(folder)
        for seed in (0, 1):
            shift = (seed + 1) * (3 if order == "random" else 1)
            first = "ab"[seed] if order == "raster" else "ba"[seed]
            name = f"{first}_randar_{order}"  # in the order of names their seeds differ
            pair.append(write_run(results / name, order, shift, studies=False, seed=seed))
            (pair[-1] / "robustness.json").write_text(json.dumps(robustness_of(order, shift)))
    singles = {"vqvae_cifar10/tokenizer": tokenizer_of(), "benchmark/benchmark": benchmark_of(),
               "quickstart/quickstart": quickstart_of()}  # fmt: skip
    for path, found in singles.items():
        folder, name = path.split("/")
        pair.append(write_single(results / folder, f"{name}.json", found))
    return pair


def test_the_readme_is_remade_between_its_markers_only(tmp_path, everything, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_bytes(readme_of(BLOCKS).encode())
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    tool.main(config(tmp_path, *everything, keep=True, readme=True))
    made = readme.read_bytes().decode()
    outside = re.compile(r"(<!-- report:\w+ -->\n).*?(<!-- /report -->)", re.DOTALL)
    assert outside.sub(r"\1\2", made) == outside.sub(r"\1\2", readme_of(BLOCKS))
    for line in (
        "| measured on 2,000 samples | raster order | random order | real test images |",
        "| bits per test image, read in raster order | 500.1 ± 0.5 | 500.4 ± 0.5 | |",
        "| bits per test image, read in 8 random orders (mean) | 510.0 ± 0.3 | 510.2 ± 0.3 | |",
        "| FD_c10 | 0.800 | 1.050 | 0.011 |",
        "| label_accuracy | 70.0% | 69.8% | 88.1% |",
        "| FD_c10 | 0.700 ± 0.013 | 0.700 ± 0.025 | 0.011 |",
        "± of samples: sd over 2 sampling seeds.",
        "| gpt | raster | no | 1,234,567 | 500.1 ± 0.5 | 510.0 ± 0.3 | 3 | 71.0 ± 0.4% "
        "| 0.900 ± 0.012 | 64 |",
        "| rar | anneal | 0.5 | 1,234,567 | 500.1 ± 0.5 | 510.0 ± 0.3 | 3 | 71.0 ± 0.4% "
        "| 0.900 ± 0.012 | 64 |",
        "| real test images | | | | | | | 88.1% | 0.011 | |",
        "| top-label ECE | 0.0321 [0.0221, 0.0421] | 0.0323 [0.0223, 0.0423] |",
        "| ECE by chance alone | 0.0361 [0.0261, 0.0461] | 0.0363 [0.0263, 0.0463] |",
        "| ECE, t < 8 | 0.0770 [0.0670, 0.0870] | 0.0772 [0.0672, 0.0872] |",
        "| best temperature | 0.910 [0.900, 0.920] | 0.930 [0.920, 0.940] |",
        "| 8 random orders together gain, bits per image | 1.5 [1.5, 1.5] | 1.7 [1.7, 1.7] |",
        "| class accuracy by Bayes (500 images) | 45.6% [44.6, 46.6] | 47.6% [46.6, 48.6] |",
        "| 5 | 0.2 [0.1, 0.2] | 0.3 [0.2, 0.3] | 0.2100 [0.2000, 0.2200] "
        "| 0.3100 [0.3000, 0.3200] | 25.0% [24.0, 26.0] | 23.3% [22.3, 24.3] |",
        "| 0.1 | 7.7 [7.7, 7.7] | 6.9 [6.9, 6.9] | 2.2 [2.2, 2.2] | 2.0 [2.0, 2.0] |",
        "200 test images above, 2,000 below; in brackets: 95% interval over images.",
        "| 2 training seeds, 300 steps | raster order | random order | random - raster |",
        "| bits per test image, own order | 501.6 ± 0.7 | 514.5 ± 2.1 | 12.9 ± 1.4 |",
        "| bits per test image, 8 random orders (mean) | 511.5 ± 0.7 | 514.5 ± 2.1 | 3.0 ± 1.4 |",
        "| label_accuracy | 68.5 ± 0.7% | 65.5 ± 2.1% | -3.0 ± 1.4 points |",
        "| FD_c10 | 2.30 ± 0.71 | 5.30 ± 2.12 | 3.00 ± 1.41 |",
        "| top-label ECE | 0.0301 ± 0.0001 | 0.0315 ± 0.0002 | 0.0013 ± 0.0001 |",
        "| 40% of the codes replaced by any others, more bits per image | 31.4 ± 0.3 | 29.5 ± 0.8 "
        "| -1.9 ± 0.6 |",
        "| 40% of the codes replaced by similar ones, more bits per image | 9.4 ± 0.3 | 9.7 ± 0.8 "
        "| 0.3 ± 0.6 |",
        "| gpt | raster | 16 | 40.0% | 1.062 |",
        "| real test images | | | 88.0% | 0.050 |",
        "1,000 samples each, guidance 3.",
        "| randar | random | 100 | 50 (64), 70 (16) | 1.4 |",
        "| gpt | raster | 200 | 90 (64) | 1.3 |",
        "Images/s of `nano` with 2 threads on A CPU; GB, the larger of both: resident.",
    ):
        assert f"\n{line}\n" in made, line
    assert made.index("| gpt |") < made.index("| rar |") and "sd over 3 sampling seeds" in made
    assert regenerate(made, tmp_path / "kept")[0] == made
    with Image.open(tmp_path / "report.png") as picture:
        halves = [(0, picture.width // 2), (picture.width // 2, picture.width)]
        for left, right in halves:
            for top in (0, picture.height // 2):
                part = picture.crop((left, top, right, top + picture.height // 2))
                assert len(part.getcolors(part.width * part.height)) > 50  # curves, not white


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


def test_the_prose_says_the_kept_numbers(tmp_path, everything):
    kept = tmp_path / "results"
    said = {name: " ".join(make(kept).split()) for name, make in PROSE_BLOCKS.items()}
    for name, words in {
        "quickstart": "On 2 CPU cores the quickstart takes 4 minutes; of 500 samples each, 98%",
        "stages": "| 33 | test PSNR 25.8 dB from the nearest codes, codebook usage 100% |",
        "first_run_setting": "`nano` (1.2M parameters), 300 steps of 64 images",
        "beside_it": "take 640.0 bits (uniform), 624.2 (label and cell), 584.5 (the code before)",
        "parts": "| test PSNR 26.30 dB, usage 100%, perplexity 947, rFD_c10 0.610, rFID768 0.110 |",
    }.items():
        assert words in said[name], (name, said[name])
    for words in (
        "minutes (2 CPU cores)", "| 16 (2 without `--search`)", "--batch 64 --steps 300`",
        "| 3 | 510 bits per test image (raster: 500) |", "| under 1 for 2,000 samples |",
    ):  # fmt: skip
        assert words in said["stages"], said["stages"]
    assert (
        "FD_c10 0.700, FID768 0.200, recall768 0.130 and label accuracy 76.0%" in said["beside_it"]
    )
    assert "--steps 5000` | test PSNR 25.80 dB, usage 100%, perplexity 957" in said["parts"]
    assert "88.09% test accuracy" in said["parts"] and "1.9M parameters" in said["parts"]
    for words in (
        "over 2 training seeds of 300 steps",
        "costs 10.1 ± 0.6 bits an image (510.2 ± 0.3 against 500.1 ± 0.5)",
        "own order {12.9 ± 1.4}", "all 2 scans and 1 random orders alike: 503.0 to 507.0 bits",
        "(2,000 images), where the raster model needs 501.0 in its own order and 503.0 to 505.0",
        "together gain 1.7 [1.7, 1.7] bits (raster: 1.5 [1.5, 1.5])",
        "ECE 0.0323 [0.0223, 0.0423] against 0.0321 [0.0221, 0.0421] {0.0013 ± 0.0001}",
        "0.93 [0.92, 0.94] and 0.91 [0.90, 0.92]", "by 14 [14, 14] and 12 [12, 12] bits",
        "40% of the codes replaced by any others 27.7 [27.7, 27.7] bits against 30.8 [30.8, 30.8]",
        "{-1.9 ± 0.6}, by similar ones 7.9 [7.9, 7.9] against 8.8 [8.8, 8.8] {0.3 ± 0.6}",
        "(200): raster order is ahead in class accuracy by Bayes by -10.0 to 5.0 points",
        "over severity 0 to 5; the intervals are apart at 4 of 6",
        "ECE at severity 5 is 0.3100 [0.3000, 0.3200] against 0.2100 [0.2000, 0.2200]",
        "label accuracy {-3.0 ± 1.4 points}", "from 80% [79, 81] to 40% [39, 41] (raster)",
        "from 90% [89, 91] to 50% [49, 51], FD_c10 rises from 1.0 to 1.4 and from 0.9 to 1.3",
    ):  # fmt: skip
        assert words in said["finding"], words


def test_a_text_and_its_facts_must_agree(tmp_path):
    (tmp_path / "text.md").write_text("{a} and {b:>3}\n")
    assert fill("text", {"a": "1", "b": "2"}, tmp_path) == "1 and   2\n"
    for facts, message in (
        ({"a": "1"}, "no such facts .'b'."),
        ({"a": "1", "b": "2", "c": "3"}, "without a place .'c'."),
    ):
        with pytest.raises(InputError, match=message):
            fill("text", facts, tmp_path)
    assert {path.stem for path in TEXTS.glob("*.md")} == set(PROSE_BLOCKS)


def test_no_measured_number_stands_outside_of_the_blocks():
    text = (ROOT / "README.md").read_text()
    for what in (
        r"<!-- report:.*?<!-- /report -->", r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)",
        r"\[\d{4}\.\d{5}", r"Python 3\.\d+",
    ):  # fmt: skip
        text = re.sub(what, "", text, flags=re.DOTALL)
    measured = r"\d+\.\d+|\d+%|\d+ (?:bits|dB|minutes|images/s|kB|MB|hours|seconds)"
    assert re.findall(measured, text) == []


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


def test_a_run_with_a_single_file_beside_it_is_a_run(tmp_path, pair):
    (pair[0] / "tokenizer.json").write_text(json.dumps(tokenizer_of()))
    tool.main(config(tmp_path, *pair, keep=True))
    assert (tmp_path / "kept" / pair[0].name / "metrics.json").exists()
    assert kept_folders(tmp_path / "kept") == sorted(tmp_path.glob("kept/*"))


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
