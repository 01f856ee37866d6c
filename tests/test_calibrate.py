"""tools/calibrate.py end to end, over every method: what it writes, what it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import script
from tiny_extractor import write_extractor

from models.artifacts import header
from models.checkpoint import save_generator
from models.command import InputError, one_line_errors
from models.data import load_codes, save_codes
from models.methods import METHODS, build
from models.transformer import ModelConfig

tool = script("tools/calibrate.py")


@pytest.fixture
def config(world, tmp_path):
    """A cheap measurement of an untrained method; `changes` override it."""

    def make(method: str, **changes) -> "tool.CalibrateConfig":
        test = load_codes(world.codes, "test")
        inputs = {"tokenizer": test.header["inputs"]["tokenizer"]}
        order = METHODS[method].scans[0]
        about = {"method": method, "classes": test.header["classes"], "dataset": "shapes"}
        head = header("generator", "tests", {"order": order}, inputs) | about
        torch.manual_seed(0)
        size = ModelConfig(vocab_size=32, layers=2, heads=2, width=16, scan=order)
        model = build(method, size)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_generator(tmp_path / "run/last.pth", head, model)
        write_extractor(tmp_path / "extractor.pth", dataset="shapes")
        cheap = tool.CalibrateConfig(
            checkpoint=tmp_path / "run/last.pth", tokenizer=world.tokenizer, codes=world.codes,
            extractor=tmp_path / "extractor.pth", images=16, random_orders=2, num_samples=20,
            batch=10, out=tmp_path / "out", device="cpu",
        )  # fmt: skip
        return replace(cheap, **changes)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_the_command_measures_every_method(config, tmp_path, capsys, method):
    found = tool.main(config(method))
    assert json.loads((tmp_path / "out/calibration.json").read_text()) == found
    for name in ("reliability", "class_reliability", "likelihood_by_order", "steps", "risk"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert found["tokens"]["overall"]["tokens"] == 16 * 64
    by_step = found["tokens"]["by_step"]
    assert [row["tokens"] // 16 for row in by_step.values()] == [8, 25, 31]
    own = METHODS[method].scans[0]
    bits = found["orders"]["bits_per_image"]
    held_out = found["entropy"]["held_out_bits_per_image"]["value"]
    assert held_out == pytest.approx(bits[own]["value"], rel=1e-5)
    nats = found["tokens"]["overall"]["nll_bits"]["value"]
    assert nats * 64 == pytest.approx(held_out)
    assert found["inputs"].keys() == {"tokenizer", "checkpoint", "test_codes", "extractor"}
    assert len(found["quality"]) == 2 and found["git_commit"] and found["command"]
    said = capsys.readouterr().out
    assert "best temperature" in said and "bits per test image" in said and "nan" not in said

    def numbers(node):
        children = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict | list):
            return [x for child in children for x in numbers(child)]
        return [node] if isinstance(node, float) else []

    assert all(math.isfinite(x) for x in numbers(found))


def test_the_command_needs_no_judge_and_repeats_itself(config, tmp_path):
    cfg = config("randar", extractor=None, random_orders=0, images=8, num_samples=10, batch=5)
    if (tool.ROOT / "checkpoints/extractor_shapes.pth").exists():
        pytest.skip("this checkout has a judge of shapes")
    found = tool.main(cfg)
    assert found["quality"] == {} and "extractor" not in found["inputs"]
    again = tool.main(replace(cfg, batch=8, out=tmp_path / "again"))
    for part in ("tokens", "orders", "classes", "entropy"):
        a, b = (json.loads(json.dumps(x[part]), parse_float=lambda x: round(float(x), 3))
                for x in (found, again))  # fmt: skip
        assert a == b, part


def test_codes_of_another_tokenizer_are_refused_in_one_line(world, config, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "logit_batches", lambda *args, **more: pytest.fail("it measured"))
    codes = load_codes(world.codes, "test")
    inputs = codes.header["inputs"] | {"tokenizer": "0" * 64}
    other = tmp_path / "codes"
    save_codes(
        other, "test", codes.codes_NAT.numpy(), codes.label_N.numpy(),
        codes.header | {"inputs": inputs},
    )  # fmt: skip
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        tool.main(config("randar", codes=other))
    assert "codes of another tokenizer" in str(stopped.value) and "\n" not in str(stopped.value)
    for flag in ("checkpoint", "tokenizer", "extractor"):
        with pytest.raises(InputError):
            tool.main(config("randar", **{flag: tmp_path / "nowhere.pth"}))
