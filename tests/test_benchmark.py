"""The benchmark: every number is a stage's own record, and a failure leaves the last one alone."""

import contextlib
import io
import json
import statistics
import typing

import pytest
import tyro
from helpers import log_of, script

from models import processes
from models.artifacts import load_checkpoint
from models.command import InputError, one_line_errors

tool = script("tools/benchmark.py")
SMALL = {"methods": ("par", "randar"), "batch": 4, "steps": 5, "tokenizer_steps": 2, "images": 20}
SMALL |= {"num_samples": 12, "sample_batch": 10, "threads": 1, "seed": 3, "device": "cpu"}


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


def test_every_speed_is_the_stages_own_record_and_in_the_table(finished):
    found, ran, _, table = finished
    assert {"device": "cpu", "threads": 1}.items() <= found.items()
    assert {"cpu", "torch", "git_commit", "command", "peak_memory"} < found.keys()
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
            rows = log_of(out.with_suffix(".jsonl") if row["stage"] == 2 else out / "metrics.jsonl")
            assert rows[-1]["step"] == (2 if row["stage"] == 2 else 5)
            speeds = [one["images_per_second"] for one in rows[1:]]
            assert row["images_per_second"] == statistics.median(speeds)
            assert row["peak_memory_gb"] == rows[-1]["peak_memory_gb"]
        memory = "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f}"
        ends = f"{row['images_per_second']:9.1f} {memory:>6}\n"
        assert f"{row['parameters']:,}" in table and ends in table


def test_what_was_trained_is_what_the_row_says(finished):
    found, _, work, _ = finished
    head = load_checkpoint(work / "tokenizer.pth", "tokenizer", "")["header"]
    assert head["dataset"] == "shapes" and head["config"]["batch"] == 128
    size = {"codebook_size": 1024, "width": 64, "blocks": 2}  # the README's
    assert size.items() <= head["config"]["model"].items()
    sizes = {}
    for row in found["rows"]:
        sizes.setdefault(row["method"], set()).add(row["parameters"])
        if row["stage"] == 4:
            config = json.loads((work / row["method"] / "config.json").read_text())["config"]
            wanted = {key: row[key] for key in ("method", "order", "model", "batch")}
            assert (wanted | {"optimizer": "muon", "seed": 3}).items() <= config.items()
    assert all(len(each) == 1 for each in sizes.values())  # training and sampling agree


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


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "run_stages", lambda *args: pytest.fail("a stage ran"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work/tokenizer.pth").write_bytes(b"finished")
    for changes, message in (
        ({"methods": ("gpt", "magic")}, "--methods to be .*par.*got .*magic"),
        ({"methods": ("gpt", "gpt")}, "each once"),
        ({"methods": ()}, "--methods of"),
        ({"device": "tpu"}, "--device to be 'auto' or 'cpu'"),
        ({"work": tmp_path / "work"}, "new or empty folder"),
        ({"work": tmp_path / "work/tokenizer.pth"}, "new or empty folder"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(tool.BenchmarkConfig(out=tmp_path / "out", **{**SMALL, **changes}))
        assert not (tmp_path / "out").exists()
