"""tools/report.py: the page, the kept numbers, and what it refuses."""

import base64
import json
import re

import pytest
from helpers import script
from tiny_report import (
    calibration_of,
    metrics_of,
    robustness_of,
    write_pair,
    write_run,
)
from tiny_report import report_config as config

from metrics.report_runs import LEFT_OUT, read_run
from metrics.report_tables import (
    calibration_table,
    differences_table,
    likelihood_table,
    quality_table,
    robustness_tables,
    runs_table,
)
from models.artifacts import ROOT
from models.errors import InputError

tool = script("tools/report.py")


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def test_the_page_is_one_file_with_both_runs(tmp_path, pair):
    page = tool.main(config(tmp_path, *pair)).read_text()
    links = re.findall(r'(?:src|href|url|action|data)\s*[=(]\s*["\']?([^"\'>)]*)', page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in page and "<link" not in page and "@import" not in page
    for folder in pair:
        assert base64.b64encode((folder / "samples.png").read_bytes()).decode() in page
        assert f"<pre>{metrics_of(folder.name.split('_')[1], 0)['command']}" in page.replace(
            "\n", "<pre>"
        )
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in page.split("<tr>")]
    assert ["raster order", "500.1 ± 0.5", "500.4 ± 0.5"] in cells
    assert ["8 random orders (mean)", "510.0 ± 0.3", "510.2 ± 0.3"] in cells
    assert ["FD_c10", "0.800", "1.050", "0.011"] in cells
    assert ["label_accuracy", "70.0%", "69.8%", "88.1%"] in cells
    assert ["images per second", "31.2", "31.5", ""] in cells
    assert ["training: order", "raster", "random"] in cells
    assert not any(cell[:1] == ["evaluation: batch"] for cell in cells)  # it does not differ
    assert ["code accuracy", "0.0331 [0.0231, 0.0431]", "0.0333 [0.0233, 0.0433]"] in cells
    assert [f"{pair[1].name}, neighbours", "0.1", "2.0 [2.0, 2.0]"] in [c[:3] for c in cells]
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[2:] == ["Training", "Samples, one class a row", "Likelihood by order",
                          "Quality of samples", "Calibration", "Robustness"]  # fmt: skip
    text = (tmp_path / "page/report.md").read_text()
    assert (
        "| FD_c10 | 0.800 | 1.050 | 0.011 |" in text
        and "| raster order | 500.1 ± 0.5 | 500.4 ± 0.5 |" in text
    )
    assert "ln p(class \\| sample)" in text and "uv run tools/calibrate.py" in text


def test_a_run_with_less_has_fewer_sections(tmp_path):
    bare = write_run(tmp_path / "bare", "raster", studies=False)
    for name in ("metrics.jsonl", "config.json", "samples.png"):
        (bare / name).unlink()
    found = json.loads((bare / "metrics.json").read_text())
    for key in ("samples", "control", "bits_per_image", "baseline_bits"):
        del found[key]
    (bare / "metrics.json").write_text(json.dumps(found))
    page = tool.main(config(tmp_path, bare)).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Runs"]
    other = write_run(tmp_path / "other", "random", studies=False)
    page = tool.main(config(tmp_path, other, bare)).read_text()
    assert re.findall("<h2>(.*?)</h2>", page)[-1] == "Quality of samples"
    assert "against speed" not in page  # one of the two has a quality


def tables_of(runs) -> list[str]:
    """All tables, without the time that pictures take."""
    tables = [runs_table(runs), differences_table(runs), likelihood_table(runs)]
    tables += [quality_table(runs), calibration_table(runs), *robustness_tables(runs)]
    return [table.markdown() for table in tables]


def test_kept_numbers_are_small_and_make_the_same_tables(tmp_path, pair, capsys):
    tool.main(config(tmp_path, *pair, keep=True))
    assert "risk_coverage" in capsys.readouterr().out
    for folder in pair:
        kept = tmp_path / "kept" / folder.name
        names = {path.name for path in kept.iterdir()}
        assert names == {path.name for path in folder.iterdir()} - {"samples.png"}
        text = "".join(path.read_text() for path in kept.iterdir())
        assert not any(f'"{name}"' in text for name in LEFT_OUT)
        assert '"data/codes"' in text and str(ROOT) not in text and "500.123456" not in text
        rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) <= 302 and sum("heldout_bits" in row for row in rows) == 2
        assert rows[0]["step"] == 1 and rows[-1]["step"] == 1000
    whole, small = (
        tables_of([read_run(folder) for folder in folders])
        for folders in (pair, [tmp_path / "kept" / folder.name for folder in pair])
    )
    assert len(whole) == 9 and whole == small
    with pytest.raises(InputError, match="nothing was kept"):
        big = {"samples": {f"{i:0100d}": 0.0 for i in range(1000)}}
        tool.main(config(tmp_path, write_run(tmp_path / "big", "raster", **big), keep=True))
    assert not (tmp_path / "kept/big").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", None, "expected a run at .*found no metrics.json"),
        ("metrics.json", "{", "metrics.json is broken .*run eval_c2i.py again"),
        ("metrics.json", "[]", "metrics.json has no num_samples, so no eval_c2i.py wrote it"),
        ("calibration.json", '{"inputs": 1}', "calibration.json has no images"),
        ("robustness.json", "\x00", "robustness.json is broken"),
        ("config.json", "{}", "config.json has no config"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl has no .*step"),
        (
            "calibration.json",
            json.dumps(calibration_of("raster")),
            "of another model .*raster, not",
        ),
    ],
)
def test_files_that_are_not_a_run_are_refused_in_one_line(tmp_path, pair, name, content, message):
    (pair[1] / name).unlink()
    if content is not None:
        (pair[1] / name).write_text(content)
    for keep in (False, True):
        with pytest.raises(SystemExit) as stopped, tool.one_line_errors():
            tool.main(config(tmp_path, *pair, keep=keep))
        said = str(stopped.value)
        assert re.search(message, said) and said.startswith("error: ") and "\n" not in said
    assert not (tmp_path / "kept").exists() and not (tmp_path / "page").exists()


def test_samples_of_another_project_stand_beside_ours(tmp_path, pair):
    found = metrics_of("raster", 0.5)
    ours = "method trained_order parameters train_steps plan seeds images_per_second cluster_weight"
    ours += " network_calls"
    for key in (*ours.split(), "bits_per_image", "baseline_bits"):
        del found[key]
    found["inputs"] = {"samples": "1"}
    other = write_run(tmp_path / "theirs", "raster", studies=False)
    for name in ("config.json", "metrics.jsonl"):
        (other / name).unlink()
    (other / "metrics.json").write_text(json.dumps(found))
    (pair[0] / "calibration.json").unlink()
    (pair[0] / "robustness.json").unlink()
    cells = tool.main(config(tmp_path, pair[0], other)).read_text()
    assert "<td>0.800</td><td>1.300</td><td>0.011</td>" in cells
    assert "<td>theirs</td>" + "<td></td>" * 6 + "<td>cpu</td>" in cells


def test_an_exported_again_checkpoint_is_noted(tmp_path, pair, capsys):
    path = pair[1] / "calibration.json"
    path.write_text(json.dumps(calibration_of("random") | {"inputs": {"checkpoint": "f" * 64}}))
    tool.main(config(tmp_path, *pair, keep=True))
    said = capsys.readouterr().out
    assert said.count("note: ") == 1
    assert f"calibration.json of {pair[1].name} was measured on checkpoint ffffffff, its" in said


def test_options_that_make_no_sense_are_refused(tmp_path, pair):
    for runs, more, message in (
        ((), {}, "no runs in .*kept"),
        ((), {"keep": True}, "--keep needs RUNS"),
        (pair, {"readme": True}, "add --keep"),
        ((pair[0], pair[0] / "../" / pair[0].name), {}, "more than once"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(config(tmp_path, *runs, **more))


def without_one(found):
    """Yield copies of parsed JSON that each lack one entry outside of numbers with intervals."""
    if isinstance(found, dict) and not found.keys() & {"value", "mean"}:
        for key, item in found.items():
            yield {k: v for k, v in found.items() if k != key}
            yield from (found | {key: less} for less in without_one(item))


def test_a_file_that_lacks_an_entry_is_shown_or_refused(tmp_path, pair):
    whole = (metrics_of("raster", 0.0), calibration_of("raster"), robustness_of("raster"))
    shown = refused = 0
    for name, found in zip(("metrics", "calibration", "robustness"), whole, strict=True):
        path = pair[0] / f"{name}.json"
        for less in without_one(found):
            path.write_text(json.dumps(less))
            try:
                tables_of([read_run(folder) for folder in pair])
                shown += 1
            except InputError:
                refused += 1
        path.write_text(json.dumps(found))
    assert shown > 20 and refused > 20
