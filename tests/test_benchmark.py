"""The benchmark: every case once, rows that agree with themselves, and the authors' own code."""

import itertools
import json
import sys

import pytest
import torch
from helpers import script

from models.command import InputError
from models.method import SIZES, ModelConfig
from models.published.authors import AUTHORS, import_file

tool = script("tools/benchmark.py")
SMALL = {"methods": ("par", "randar"), "batches": (1, 3), "threads": (1,), "rounds": 2}
SMALL |= {"precisions": ("fp32",), "device": "cpu"}


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "LEAST", 0.01)
        patch.setattr(tool, "matmul_peak", lambda *_: 60e9)
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
        assert row["peak_share"] == pytest.approx(row["gflops_per_second"] / 60)
        assert row["cpu_seconds"] > 0
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


CONFIG = ModelConfig(**SIZES["nano"])
THEIRS = """
import torch
from dataclasses import make_dataclass

SIZES = "dim n_layer n_head vocab_size num_classes block_size"
DROPOUTS = "token_dropout_p resid_dropout_p ffn_dropout_p"
ModelArgs = make_dataclass("ModelArgs", [*SIZES.split(), *DROPOUTS.split()])


class Net(torch.nn.Module):
    def __init__(self, vocab_size, dim, block_size, num_classes, **others):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, dim)
        self.label = torch.nn.Embedding(num_classes + 1, dim)
        self.output = torch.nn.Linear(dim, vocab_size)
        self.tokens, self.others = block_size, others

    def loss(self, codes, label, targets):
        logits = self.output(self.table(codes) + self.label(label)[:, None])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Transformer(Net):
    def __init__(self, args):
        super().__init__(**vars(args))

    def forward(self, idx, cond_idx, targets):  # LlamaGen's is not given the last code
        assert idx.shape[1] == self.tokens - ("autoregressive" in __name__)
        return None, self.loss(idx, cond_idx, targets[:, -idx.shape[1] :])


def generate(model, cond, max_new_tokens, cfg_scale=1.0):
    assert cfg_scale == 3 and not model.training
    return torch.full((len(cond), max_new_tokens), 5, dtype=torch.int32)


class RAR(Net):
    def __init__(self, config):
        sizes = config.model.generator
        assert not sizes.get("use_checkpoint", False) and sizes.intermediate_size == 512
        more = {"block_size": sizes.image_seq_len, "num_classes": sizes.condition_num_classes}
        super().__init__(config.model.vq_model.codebook_size, sizes.hidden_size, **more)

    def set_random_ratio(self, ratio):
        self.ratio = ratio

    def preprocess_condition(self, condition, cond_drop_prob):
        return condition + 1

    def forward(self, input_ids, condition, return_labels):
        assert self.ratio == 1 and return_labels and condition.min() > 0
        x = self.table(input_ids) + self.label(condition)[:, None]
        return self.output(torch.cat((x, x[:, :1]), 1)), input_ids

    def generate(self, condition, guidance_scale, randomize_temperature, guidance_scale_pow):
        assert (guidance_scale, randomize_temperature, guidance_scale_pow) == (3, 1, 2.75)
        return torch.full((len(condition), self.tokens), 1)


class RandARTransformer(Net):
    def forward(self, idx, cond_idx, targets):
        assert not self.others["grad_checkpointing"]
        return None, self.loss(idx, cond_idx, targets), None

    def generate(self, cond, token_order, cfg_scales, num_inference_steps):
        assert cfg_scales == (1.0, 3.0) and num_inference_steps in (64, 16)
        return torch.full((len(cond), self.tokens), num_inference_steps)
"""
FILES = {
    "LlamaGen/utils/drop_path.py": "DROP = 'LlamaGen'",
    "LlamaGen/autoregressive/models/gpt.py": f"from utils.drop_path import DROP{THEIRS}",
    "LlamaGen/autoregressive/models/generate.py": THEIRS,
    "ARPG/models/arpg.py": THEIRS,
    "1d-tokenizer/modeling/rar.py": THEIRS,
    "RandAR/RandAR/model/utils.py": "DROP = 'RandAR'",
    "RandAR/RandAR/model/randar_gpt.py": f"from .utils import DROP{THEIRS}",
}


@pytest.fixture
def checkouts(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "checkouts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkouts"


def test_the_authors_code_is_measured_beside_ours(checkouts, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "LEAST", 0.001)
    monkeypatch.setattr(tool, "tokenizer_cases", lambda *how: [])
    small = {"methods": ("par", "randar"), "batches": (2,), "threads": (1,), "rounds": 1}
    small |= {"precisions": ("fp32",), "device": "cpu", "out": tmp_path / "out"}
    path = tool.main(tool.BenchmarkConfig(against=checkouts, **small))
    rows = json.loads(path.read_text())["rows"]
    assert [row["network_calls"] for row in rows] == [None, 19, *[None, 64, 16] * 2]
    ours, theirs = rows[2:5], rows[5:]
    for own, other in zip(ours, theirs, strict=True):
        assert other["method"] == "randar, by its authors" and own["what"] == other["what"]
        assert own["gflop"] > other["gflop"] and other["images_per_second"] > 0
    assert theirs[0]["gflop"] == 3 * 2 * 64 * 128 * 1024 / 1e9  # the output of a Net, and back


def test_an_adapter_gives_the_sizes_the_loss_and_the_codes(checkouts):
    for kind in AUTHORS.values():
        model = kind(CONFIG, checkouts)
        assert model.model.table.weight.shape == (1024, 128)
        codes_BT, label_B = torch.zeros(3, 64, dtype=int), torch.arange(3)
        model(codes_BT, label_B).backward()
        assert model.model.output.weight.grad.abs().sum() > 0
        model.eval()
        for steps in kind.steps:
            codes_BT = model.sample(label_B, steps, 3.0)
            assert codes_BT.shape == (3, 64) and not codes_BT.is_floating_point()


def test_a_file_is_imported_without_a_trace(tmp_path):
    file = tmp_path / "models/arpg.py"
    file.parent.mkdir()
    file.write_text("import sibling\nWIDTH = sibling.WIDTH")
    (tmp_path / "sibling.py").write_text("WIDTH = 7")
    ours, path = sys.modules["models"], list(sys.path)
    assert import_file(tmp_path, "models/arpg.py").WIDTH == 7
    assert sys.modules["models"] is ours and sys.path == path
    assert not [n for n, m in sys.modules.items() if str(tmp_path) in repr(m)]


def test_what_is_not_there_is_said_in_a_line(checkouts, tmp_path):
    with pytest.raises(InputError, match="expected models/arpg.py in .*a checkout"):
        import_file(tmp_path, "models/arpg.py")
    (checkouts / "RandAR/RandAR/model/utils.py").write_text("import no_such_package")
    with pytest.raises(InputError, match="No module named 'no_such_package'"):
        AUTHORS["randar"](CONFIG, checkouts)
    with pytest.raises(InputError, match="a checkout of --methods in .*LlamaGen, RandAR"):
        tool.BenchmarkConfig(methods=("par",), against=checkouts)
