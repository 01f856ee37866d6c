#!/usr/bin/env -S uv run
"""Stage 2: train the VQ-VAE tokenizer. Images -> tokenizer_vq/vqvae_cifar10.pth.

The notebook `vq-vae.ipynb` beside this file calls the same functions and shows what they make.
The same command resumes a run that was cut; the result does not depend on the cut.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from metrics.reconstruction import reconstruction_report
from models.artifacts import ROOT, header, load_checkpoint, save_checkpoint, sha256_of
from models.data import evenly, load_split
from models.errors import expect_at_least, expect_fraction, one_line_errors
from models.pictures import curve_figure, reconstruction_figure, save_figure
from models.tokenizer import decode_codes, encode_images, load_tokenizer, save_tokenizer, to_float
from models.training import (
    batch_rows,
    check_finite,
    gpu_memory,
    lr_at,
    pick_device,
    same_run,
    seed_step,
    start_fabric,
    write_log,
)
from models.vqvae import VQVAE, VQVAEConfig

STATE_KIND = "tokenizer training state"
PANELS = {
    "loss": ["loss", "commitment"],
    "PSNR, dB": ["psnr"],
    "codebook": ["codebook_usage"],
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Train the VQ-VAE tokenizer (stage 2)."""

    data: Path = ROOT / "data/cifar10"
    """folder of {train,test}_images.npy from data/load_CIFAR10.py"""
    out: Path = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    """where the tokenizer goes; its log, curve and training state lie beside it"""
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    steps: int = 6000
    """optimizer steps"""
    batch: int = 128
    """images a step; half of them mirrored"""
    lr: float = 2e-3
    """peak learning rate of AdamW; cosine to zero"""
    warmup: int = 200
    """steps of linear warm-up"""
    loss: Literal["l2", "l1"] = "l2"
    """reconstruction loss, in units of the pixels' standard deviation"""
    commitment: float = 0.25
    """weight of the commitment term"""
    init: Path | None = None
    """start from this tokenizer's weights and codes (fine-tuning) instead of from scratch"""
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    """steps between saves and test evaluations"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def check(self) -> None:
        """Raise InputError for numbers that no run can have."""
        expect_at_least(self, steps=1, batch=1, warmup=0, commitment=0, log_every=1, save_every=1)
        expect_fraction(self, "lr")

    @property
    def state(self) -> Path:
        """The training state, deleted when the run is finished."""
        return self.out.with_suffix(".state.pth")

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.out.with_suffix(".jsonl")


FREE = ("data", "out", "init", "device", "log_every", "save_every")
"""fields of the config that may change between the two halves of a run"""


def draw_images(
    images_NHWC: np.ndarray, cfg: TokenizerConfig, step: int, generator
) -> torch.Tensor:
    """Return a step's batch (batch, 3, H, W) in [0, 1], half of the images mirrored."""
    rows = batch_rows(len(images_NHWC), cfg.batch, step, cfg.seed).numpy()
    images_N3HW = to_float(images_NHWC[rows], generator.device)
    mirrored_N111 = (
        torch.rand(cfg.batch, 1, 1, 1, generator=generator, device=generator.device) < 0.5
    )
    return torch.where(mirrored_N111, images_N3HW.flip(3), images_N3HW)


def start_codebook(model: VQVAE, images_NHWC: np.ndarray, device: torch.device, seed: int) -> None:
    """Place the codes by k-means on about 50 vectors each."""
    seed_step(seed, 0, device)
    wanted = -(-50 * model.config.codebook_size // model.grid**2)
    rows = evenly(len(images_NHWC), wanted)
    with torch.no_grad():
        model.quantizer.start(model.vectors(to_float(images_NHWC[rows], device)))


def main(cfg: TokenizerConfig) -> dict:
    """Train, or go on training, and return the test set's PSNR, codebook usage and perplexity."""
    cfg.check()
    train, test = load_split(cfg.data, "train"), load_split(cfg.data, "test")
    inputs = {"train_images": train.sha256, "test_images": test.sha256}
    head = header("tokenizer", "tokenizer_vq/train_vqvae.py", cfg, inputs)
    head |= {"dataset": train.dataset, "classes": list(train.classes)}
    if cfg.init:
        inputs["init"] = head["inputs"]["init"] = sha256_of(cfg.init)
    if cfg.out.exists():
        model, found = load_tokenizer(cfg.out)
        same_run(found["config"] | found["inputs"], head["config"] | inputs, FREE, cfg.out)
        print(f"{cfg.out} is finished already: test PSNR {found['test']['psnr']:.2f} dB")
        return found["test"]

    fabric = start_fabric(pick_device(cfg.device))
    torch.manual_seed(cfg.seed)
    revive_below = 0.1 * cfg.batch * VQVAE.grid**2 / cfg.model.codebook_size
    model = VQVAE(cfg.model, revive_below).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=1e-4)
    net, optimizer = fabric.setup(model, optimizer)
    distance = F.mse_loss if cfg.loss == "l2" else F.l1_loss
    spread = float(train.images_NHWC[::10].std()) / 255  # so that the loss starts near 1
    step, rows = 0, []
    if cfg.state.exists():
        step, rows = _resume(cfg, head, model, optimizer)
    elif cfg.init:
        model.load_state_dict(load_tokenizer(cfg.init)[0].state_dict())
    else:
        start_codebook(model, train.images_NHWC, fabric.device, cfg.seed)

    bar = tqdm(initial=step, total=cfg.steps, desc="tokenizer", unit="step")
    logged, began = step, time.time()
    while step < cfg.steps:
        generator = seed_step(cfg.seed, step + 1, fabric.device)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg.lr, cfg.warmup, cfg.steps)
        images_N3HW = draw_images(train.images_NHWC, cfg, step, generator)
        decoded_N3HW, _, commitment = net(images_N3HW)
        reconstruction = distance(decoded_N3HW.float() / spread, images_N3HW / spread)
        fabric.backward(reconstruction + cfg.commitment * commitment)
        fabric.clip_gradients(net, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        at_save = step % cfg.save_every == 0 and step < cfg.steps
        if not (at_save or step % cfg.log_every == 0 or step == cfg.steps):
            continue
        row = {"step": step, "loss": reconstruction.item(), "commitment": commitment.item()}
        row["images_per_second"] = (step - logged) * cfg.batch / (time.time() - began)
        check_finite(row["loss"], step, cfg.state)
        rows.append(row)
        bar.set_postfix(loss=f"{row['loss']:.4f}")
        if at_save:
            rows[-1] |= _evaluate(model, test.images_NHWC, step, 1000)
            _save(cfg, head, model, optimizer, step, rows)
        logged, began = step, time.time()  # without the evaluation and the save
    bar.close()
    return _finish(cfg, head, model, test.images_NHWC, rows)


def _evaluate(model: VQVAE, images_NHWC: np.ndarray, step: int, count: int) -> dict:
    model.eval()
    report = reconstruction_report(model, images_NHWC[evenly(len(images_NHWC), count)])
    model.train()
    return {"step": step} | report


def _save(cfg: TokenizerConfig, head: dict, model, optimizer, step: int, rows: list[dict]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(cfg.state, head | {"kind": STATE_KIND}, step=step, rows=rows, **state)
    write_log(cfg.log, rows)


def _resume(cfg: TokenizerConfig, head: dict, model, optimizer) -> tuple[int, list[dict]]:
    found = load_checkpoint(cfg.state, STATE_KIND, rerun=f"rm {cfg.state}, then this command")
    saved = found["header"]
    same_run(saved["config"] | saved["inputs"], head["config"] | head["inputs"], FREE, cfg.state)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return found["step"], found["rows"]


def _finish(cfg, head, model, test_NHWC, rows) -> dict:
    """Evaluate on the whole test set, write everything, drop the training state."""
    report = _evaluate(model, test_NHWC, cfg.steps, len(test_NHWC))
    rows[-1] |= report | gpu_memory(next(model.parameters()).device)
    write_log(cfg.log, rows)
    save_figure(curve_figure(rows, PANELS), cfg.out.with_suffix(".png"))
    model.eval()
    shown_NHWC = test_NHWC[evenly(len(test_NHWC), 16)]
    decoded_NHWC = decode_codes(model, encode_images(model, shown_NHWC))
    figure = reconstruction_figure(shown_NHWC, decoded_NHWC)
    save_figure(figure, cfg.out.with_suffix(".reconstructions.png"))
    save_tokenizer(cfg.out, model, head | {"test": report})
    cfg.state.unlink(missing_ok=True)
    print(
        f"wrote {cfg.out}: test PSNR {report['psnr']:.2f} dB, "
        f"codebook usage {report['codebook_usage']:.1%}, perplexity {report['perplexity']:.0f}"
    )
    return report


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(TokenizerConfig))
