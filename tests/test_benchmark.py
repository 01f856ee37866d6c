"""The benchmark: every case once, rows that agree with themselves, and a table that shows them."""

import itertools
import json

import pytest
from helpers import script

from models.command import InputError

tool = script("tools/benchmark.py")
SMALL = {"methods": ("par", "randar"), "batches": (1, 3), "threads": (1,), "rounds": 2}
SMALL |= {"precisions": ("fp32",), "device": "cpu"}


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "LEAST", 0.01)
        path = tool.main(tool.BenchmarkConfig(out=tmp_path_factory.mktemp("benchmark"), **SMALL))
    return json.loads(path.read_text())


def test_there_is_a_row_for_every_case(record):
    whole = [
        ("par", "regions", "training", None, "fp32"),
        ("par", "regions", "sampling", 19, "fp32"),
        ("randar", "random", "training", None, "fp32"),
        ("randar", "random", "sampling", 64, "fp32"),
        ("randar", "random", "sampling", 16, "fp32"),
    ]
    keys = ("method", "order", "what", "network_calls", "precision")
    rows = [row for row in record["rows"] if row["method"] != "vqvae"]
    assert [tuple(row[key] for key in (*keys, "batch")) for row in rows] == [
        (*case, batch) for case, batch in itertools.product(whole, (1, 3))
    ]
    tokenizer = [row["what"] for row in record["rows"] if row["method"] == "vqvae"]
    assert tokenizer[::2] == ["training", "encoding, --search 0", "encoding, --search 1"]
    assert {"device": "cpu"}.items() <= record.items() and {"cpu", "torch"} < record.keys()


def test_what_a_row_says_hangs_together(record):
    for row in record["rows"]:
        rate = row["images_per_second"]
        assert rate == pytest.approx(1 / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(64 * rate)
        assert row["gflops_per_second"] == pytest.approx(rate * row["gflop"])
        assert row["peak_share"] > 0 and row["cpu_seconds"] > 0
        assert row["memory_gb"] is None or 0 <= row["memory_gb"] < 10
    of = {
        (row["method"], row["what"], row["network_calls"]): row["gflop"] for row in record["rows"]
    }
    # 128 slots in 4 layers of width 128, half of them to 1024 logits, and back; attention is 2%
    products = 3 * 2 * (128 * 4 * (4 * 128**2 + 3 * 128 * 512) + 64 * 128 * 1024)
    assert of["randar", "training", None] == pytest.approx(products / 1e9, rel=0.05)
    # with guidance an image is generated twice over, but for its first step
    assert of["randar", "sampling", 16] > of["randar", "training", None] / 3


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "measure", lambda *args: pytest.fail("it was measured"))
    for changes, message in (
        ({"methods": ("gpt", "magic")}, "--methods.*magic"),
        ({"methods": ("gpt", "gpt")}, "each of --methods once"),
        ({"batches": ()}, "at least one of --batches"),
        ({"batches": (1, 1)}, "each of --batches once"),
        ({"device": "tpu"}, "--device to be 'auto' or 'cpu'"),
    ):
        with pytest.raises(InputError, match=message):
            tool.main(tool.BenchmarkConfig(out=tmp_path / "out", **{**SMALL, **changes}))
        assert not (tmp_path / "out").exists()
