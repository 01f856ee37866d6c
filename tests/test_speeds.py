"""The speeds that stages record are of their work alone: clocks here only tick when told to."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import script

from metrics.speeds import of_encoding, of_training, processor
from models import training
from models.errors import InputError
from models.vqvae import VQVAEConfig


class Clock:
    """A module `time` whose seconds pass in the functions that it slows, and nowhere else."""

    def __init__(self, monkeypatch, stage):
        self.now, self.monkeypatch, self.stage = 0.0, monkeypatch, stage
        monkeypatch.setattr(stage, "time", SimpleNamespace(time=lambda: self.now))

    def slow(self, name: str, *seconds: float) -> None:
        """Let the calls of a function of the stage take so long; the last number for all later."""
        function, left = getattr(self.stage, name), list(seconds)

        def slowed(*args, **options):
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return function(*args, **options)

        self.monkeypatch.setattr(self.stage, name, slowed)


def log_of(path) -> list[float]:
    return [json.loads(line)["images_per_second"] for line in path.read_text().splitlines()]


def test_stage_2_times_its_steps_alone(world, tmp_path, monkeypatch):
    stage = script("tokenizer_vq/train_vqvae.py")
    clock = Clock(monkeypatch, stage)
    clock.slow("start_codebook", 1000)
    clock.slow("draw_images", 4, 4, 2, 2, 1)  # once a step
    clock.slow("_evaluate", 1000)
    clock.slow("save_checkpoint", 1000)
    size = VQVAEConfig(codebook_size=32, width=8, blocks=1)
    stage.main(
        stage.TokenizerConfig(
            data=world.data, out=tmp_path / "a.pth", model=size, steps=5, batch=16, warmup=1,
            init=None, perceptual=0,
            save_every=2, device="cpu",
        )
    )  # fmt: skip
    assert log_of(tmp_path / "a.jsonl") == [4, 8, 16]


def test_stage_3_times_its_encoding_alone_and_counts_a_mirrored_pair_once(
    world, tmp_path, monkeypatch, capsys
):
    stage = script("tools/extract_latent_codes.py")
    clock = Clock(monkeypatch, stage)
    clock.slow("encode_images", *[3] * 12, 1)  # six batches of train images, two of test images
    clock.slow("decode_codes", 1000)
    stage.main(
        stage.ExtractConfig(
            tokenizer=world.tokenizer, data=world.data, out=tmp_path, batch=20, device="cpu"
        )
    )
    said = capsys.readouterr().out
    assert of_encoding(said) == {"images_per_second": 40 / 4}
    train, _, last = said.splitlines()
    assert train.endswith(f"{120 / 36:.1f} images/s") and last.endswith("1040 s")
    with pytest.raises(InputError, match="printed no speed"):
        of_encoding(train)


def test_stage_4_times_its_steps_alone(world, tmp_path, monkeypatch):
    stage = script("train_c2i.py")
    clock = Clock(monkeypatch, stage)
    clock.slow("train_step", 4, 4, 2, 2, 1)
    for name in ("split_bits", "save_generator", "show_progress"):
        clock.slow(name, 1000)
    out = stage.main(
        stage.TrainConfig(
            codes=world.codes, tokenizer=tmp_path / "none.pth", out=tmp_path / "run", model="nano",
            steps=5, batch=8, eval_every=2, heldout=20, device="cpu",
        )
    )  # fmt: skip
    assert log_of(out / "metrics.jsonl") == [2, 4, 8]


def test_the_median_leaves_the_first_row_out(tmp_path):
    log = tmp_path / "metrics.jsonl"

    def write(*speeds, **more):
        rows = [{"step": i, "images_per_second": speed} for i, speed in enumerate(speeds)]
        rows[-1] |= more
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(1, 90, 30, 50)
    assert of_training(log) == {"images_per_second": 50}
    write(1000, 7, peak_memory_gb=2.5)
    assert of_training(log) == {"images_per_second": 7, "peak_memory_gb": 2.5}
    write(3)
    with pytest.raises(InputError, match="one row, the warm-up"):
        of_training(log)


def test_memory_of_a_gpu_is_what_its_tensors_took(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000)
    assert training.gpu_memory(torch.device("cuda")) == {"peak_memory_gb": 2.5}
    assert training.gpu_memory(torch.device("cpu")) == {}


def test_the_processor_has_a_name():
    assert processor().strip()
