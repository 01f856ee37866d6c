"""RESULTS.md is what its kept numbers make, and README.md states no other; runs side by side."""

import json
import re

import pytest
from helpers import script

from metrics.report import LARGEST, LEFT_OUT, REPORTS, keep_run, read_reports, read_run, show
from models.artifacts import ROOT
from models.command import InputError

tool = script("tools/report.py")


def test_results_are_what_the_kept_numbers_make(tmp_path):
    tool.main(tool.ReportConfig(out=tmp_path / "RESULTS.md"))
    made = (tmp_path / "RESULTS.md").read_bytes()
    assert made == (ROOT / "RESULTS.md").read_bytes(), "run: uv run tools/report.py"
    for path in REPORTS.rglob("*.json"):
        assert path.stat().st_size <= LARGEST
        assert not re.search(r"(?<![\w.:])(/|\.\./)\w", path.read_text()), path  # no other folder


def test_every_measured_figure_of_the_readme_stands_in_the_results():
    text = (ROOT / "README.md").read_text()
    for what in (r"\]\([^)]*\)", r"\[\d{4}\.\d{5}", r"`[^`\n]+`", r"Python 3\.\d+", r"1\.3M"):
        text = re.sub(what, "", text)
    text = re.sub(r"^(uv|cp) .*", "", text, flags=re.M)  # of the blocks their comments count
    figures = re.findall(r"\d+\.\d+|\d+(?=%)|\d+(?= (?:minutes|dB|bits))", text)
    results = (ROOT / "RESULTS.md").read_text()
    missing = [
        x for x in figures if not re.search(rf"(?<![\d.]){re.escape(x)}(?![\d.]*\d)", results)
    ]
    assert len(figures) > 20 and missing == []


def test_the_tests_that_the_readme_names_are_there():
    names = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)`", (ROOT / "README.md").read_text())
    assert names and all([*(ROOT / "tests").rglob(name)] for name in names), names


@pytest.fixture
def run(tmp_path):
    """A run folder with a curve, made-up numbers and a long list."""
    folder = tmp_path / "results/some_run"
    folder.mkdir(parents=True)
    command = f"eval_c2i.py --checkpoint {ROOT}/a.pth --inception-weights /elsewhere/b.pth"
    plan = {"order": "raster", "cfg_scale": 2.0}
    metrics = {"num_samples": 100, "plan": plan, "command": command}
    metrics |= {"samples": {"FD_c10": 1.23456789}, "control": {"FD_c10": 0.5}}
    metrics |= {"bits_per_image": {"raster": {"mean": 500.0, "se": 0.5}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "calibration.json").write_text(json.dumps({"risk_coverage": [0.1] * 5000}))
    rows = [{"step": s} | ({"heldout_bits": 8.0} if s % 500 == 0 else {}) for s in range(1, 1001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_kept_numbers_are_small_and_name_no_other_folder(run, tmp_path):
    keep_run(run, tmp_path / "kept")
    kept = read_reports(tmp_path / "kept")["some_run"]
    assert kept.at("metrics.samples.FD_c10") == 1.23457
    assert kept.at("metrics.command").endswith("--checkpoint a.pth --inception-weights b.pth")
    assert "risk_coverage" in LEFT_OUT and kept.files["calibration"] == {}
    assert sum("heldout_bits" in row for row in kept.curve) == 2 and len(kept.curve) <= 302
    big = json.dumps({"samples": {f"{i:0100d}": 0 for i in range(LARGEST // 100)}})
    (run / "metrics.json").write_text(big)
    with pytest.raises(InputError, match="nothing was kept"):
        keep_run(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_runs_stand_side_by_side_with_the_notes_of_their_files(run, capsys):
    (run / "calibration.json").unlink()
    pair = [REPORTS / name for name in tool.PAIR.values()]
    tool.main(tool.ReportConfig(runs=(run, *pair)))
    said = capsys.readouterr().out
    cells = [show(read_run(folder).at("metrics.samples.FD_c10")) for folder in pair]
    real = show(read_run(pair[0]).at("metrics.control.FD_c10"))
    assert f"| FD_c10 | 1.235 | {cells[0]} | {cells[1]} | 0.500 / {real} |" in said
    assert "| bits per test image, raster order | 500.0 ± 0.5 | 5" in said
    metrics = json.loads((run / "metrics.json").read_text()) | {"note": "of one seed"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    tool.main(tool.ReportConfig(runs=(run,)))
    assert capsys.readouterr().out.count("**Note:** of one seed.") == 1


def test_what_is_no_run_is_refused_in_one_line(run, tmp_path):
    for name, content in (("metrics.json", "{"), ("metrics.json", "[]"), ("metrics.jsonl", "\x00")):
        before = (run / name).read_text()
        (run / name).write_text(content)
        with pytest.raises(InputError, match=f"{name} is broken"):
            read_run(run)
        (run / name).write_text(before)
    with pytest.raises(InputError, match="no measurements in"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="metrics.json has no plan.steps"):
        read_run(run).at("metrics.plan.steps")
