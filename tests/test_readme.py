"""The README's blocks: made of the kept numbers, between their markers only, or refused."""

import json
import re

import pytest
from helpers import script
from PIL import Image
from tiny_report import (
    readme_of,
    tokenizer_of,
    write_everything,
    write_pair,
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


@pytest.fixture
def everything(tmp_path) -> list:
    return write_everything(tmp_path)


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


def test_a_run_with_a_single_file_beside_it_is_a_run(tmp_path, pair):
    (pair[0] / "tokenizer.json").write_text(json.dumps(tokenizer_of()))
    tool.main(config(tmp_path, *pair, keep=True))
    assert (tmp_path / "kept" / pair[0].name / "metrics.json").exists()
    assert kept_folders(tmp_path / "kept") == sorted(tmp_path.glob("kept/*"))
