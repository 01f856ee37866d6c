"""The benchmark: every number is a stage's own record, and a failure leaves the last one alone."""

import contextlib
import io
import json
import re
import statistics
import typing

import pytest
import tyro
from helpers import script

from models import processes
from models.artifacts import load_checkpoint
from models.command import InputError, one_line_errors
from models.methods import METHODS

tool = script("tools/benchmark.py")
SMALL = {
    "methods": ("par", "randar"),
    "batch": 4,
    "steps": 5,
    "tokenizer_steps": 2,
    "images": 20,
    "num_samples": 12,
    "sample_batch": 10,
    "threads": 1,
    "seed": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark of two methods: (what benchmark.json holds, the stages that ran, its folder)."""
    root, ran = tmp_path_factory.mktemp("benchmark"), []

    def run_here(stages, threads, output=None):
        """Run a stage's command line in this process, which has torch imported."""
        assert threads == 1
        ((name, line),) = stages
        module = script(line[0])
        config = tyro.cli(typing.get_type_hints(module.main)["cfg"], args=line[1:])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            module.main(config)
        (output or io.StringIO()).write(said.getvalue())
        ran.append((name, line, said.getvalue()))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(tool, "run_stages", run_here)
        path = tool.main(tool.BenchmarkConfig(out=root / "out", work=root / "work", **SMALL))
    return json.loads(path.read_text()), ran, root / "work", said.getvalue()


def option(line: list[str], name: str) -> str:
    (value,) = (part.split("=", 1)[1] for part in line if part.startswith(f"--{name}="))
    return value


def test_there_is_a_row_for_every_measurement_in_order(finished):
    found, ran, _, _ = finished
    rows = found["rows"]
    asked = ("stage", "method", "order", "what", "batch", "network_calls")
    assert [tuple(row[key] for key in asked) for row in rows] == [
        (2, None, None, "training", 128, None),
        (3, None, None, "encoding, --search 0", 20, None),
        (3, None, None, "encoding, --search 1", 20, None),
        (4, "par", "regions", "training", 4, None),
        (5, "par", "regions", "sampling", 10, 19),
        (4, "randar", "random", "training", 4, None),
        (5, "randar", "random", "sampling", 10, 64),
        (5, "randar", "random", "sampling", 10, 16),
    ]
    assert [row["model"] for row in rows] == ["vqvae"] * 3 + ["nano"] * 5
    names = [name for name, *_ in ran[1:]]  # the first drew the shapes
    assert all(name.startswith(f"{i} of 8: stage") for i, name in enumerate(names, 1))
    assert all(row["seconds"] > 0 for row in rows)


def test_every_speed_is_the_stages_own_record(finished):
    found, ran, _, _ = finished
    for row, (_, line, said) in zip(found["rows"], ran[1:], strict=True):
        out = tool.Path(option(line, "out"))
        if row["stage"] == 3:
            shown = next(x for x in said.splitlines() if "test_codes.npy" in x)
            assert f"; {row['images_per_second']:.1f} images/s" in shown
            assert option(line, "search") == row["what"][-1] and row["peak_memory_gb"] is None
        elif row["stage"] == 5:
            record = json.loads((out / "metrics.json").read_text())
            for key in ("images_per_second", "parameters", "network_calls", "peak_memory_gb"):
                assert row[key] == record[key]
            assert record["plan"]["order"] == row["order"] and record["num_samples"] == 12
        else:
            log = out.with_suffix(".jsonl") if row["stage"] == 2 else out / "metrics.jsonl"
            rows = [json.loads(text) for text in log.read_text().splitlines()]
            assert rows[-1]["step"] == (2 if row["stage"] == 2 else 5)
            speeds = [one["images_per_second"] for one in rows[1:]]
            assert row["images_per_second"] == statistics.median(speeds)
            assert row["peak_memory_gb"] == rows[-1]["peak_memory_gb"]


def test_what_was_trained_is_what_the_row_says(finished):
    found, ran, work, _ = finished
    head = load_checkpoint(work / "tokenizer.pth", "tokenizer", "")["header"]
    assert head["dataset"] == "shapes" and head["config"]["batch"] == 128
    size = {"codebook_size": 1024, "width": 64, "blocks": 2}  # the README's
    assert size.items() <= head["config"]["model"].items()
    for row in (row for row in found["rows"] if row["stage"] == 4):
        config = json.loads((work / row["method"] / "config.json").read_text())["config"]
        asked = {key: row[key] for key in ("method", "order", "model", "batch")}
        assert (asked | {"optimizer": "muon", "seed": 3}).items() <= config.items()
    size = {row["method"]: set() for row in found["rows"]}
    for row in found["rows"]:
        size[row["method"]].add(row["parameters"])
    assert all(len(sizes) == 1 for sizes in size.values())  # training and sampling agree
    assert size[None] != size["par"] != size["randar"]


def test_the_record_says_where_and_how_and_the_table_shows_it(finished):
    found, _, _, said = finished
    assert {"device": "cpu", "threads": 1}.items() <= found.items()
    assert {"cpu", "torch", "git_commit", "command", "peak_memory"} < found.keys()
    assert found["config"]["methods"] == ["par", "randar"] and found["config"]["steps"] == 5
    for row in found["rows"]:
        memory = "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f}"
        ends = f"{row['images_per_second']:9.1f} {memory:>6}\n"
        assert f"{row['parameters']:,}" in said and ends in said


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_its_own_order_and_in_the_calls_it_can_take(tmp_path, method):
    asked = {
        "gpt": ("raster", [None]),
        "randar": ("random", ["64", "16"]),
        "rar": ("random", [None]),
        "arpg": ("random", ["64", "16"]),
        "par": ("regions", [None]),
    }
    train, *samples = tool.method_measurements(
        tool.BenchmarkConfig(), method, tmp_path, "--device=cpu"
    )
    calls = [re.findall(r"--decode-steps=(\d+)", " ".join(sample.line)) for sample in samples]
    assert (option(train.line, "order"), [c[0] if c else None for c in calls]) == asked[method]
    assert len({option(sample.line, "out") for sample in samples}) == len(samples)


@pytest.mark.parametrize(("steps", "first"), [(2, 1), (51, 26), (99, 50), (100, 100), (150, 150)])
def test_a_short_training_has_a_warm_up_and_a_row_after_it(tmp_path, steps, first):
    cfg = tool.BenchmarkConfig(steps=steps)
    train, *_ = tool.method_measurements(cfg, "gpt", tmp_path, "--device=cpu")
    assert int(option(train.line, "eval-every")) == first


def test_a_stage_that_fails_is_one_line_and_leaves_the_last_record(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    scripts = {"data/shapes.py": "", "tokenizer_vq/train_vqvae.py": "exit('error: no luck')"}
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    old = tmp_path / "out/benchmark.json"
    old.parent.mkdir()
    old.write_text("measured before")
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        tool.main(tool.BenchmarkConfig(out=old.parent, **SMALL))
    assert str(stopped.value) == "error: stage '1 of 8: stage 2 training' failed: see above"
    assert "no luck" in capfd.readouterr().err
    assert old.read_text() == "measured before" and list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("gpt", "magic")}, "--methods of gpt, .* got .*magic"),
        ({"methods": ("gpt", "gpt")}, "each once"),
        ({"methods": ()}, "--methods of"),
        ({"device": "tpu"}, "device auto, cpu or"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(tool, "run_stages", lambda *args: pytest.fail("a stage ran"))
    with pytest.raises(InputError, match=message):
        tool.main(tool.BenchmarkConfig(out=tmp_path / "out", **{**SMALL, **changes}))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_finished_stages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "run_stages", lambda *args: pytest.fail("a stage ran"))
    (tmp_path / "tokenizer.pth").write_bytes(b"finished")
    for work in (tmp_path, tmp_path / "tokenizer.pth"):
        with pytest.raises(InputError, match="new or empty folder"):
            tool.main(tool.BenchmarkConfig(out=tmp_path / "out", work=work, **SMALL))
