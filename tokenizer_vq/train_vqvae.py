#!/usr/bin/env -S uv run
"""Stage 2: train the VQ-VAE tokenizer. Images -> tokenizer_vq/vqvae_cifar10.pth.

By default it goes on from the shipped tokenizer, with an L1 and a perceptual loss in place of the
squared error. That one's own recipe, from scratch, is `--init None --loss l2 --perceptual 0
--steps 5000 --batch 128 --lr 2e-3`. The same command resumes a cut run, bit for bit. The notebook
`vq-vae.ipynb` shows what these functions make.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from metrics.extractor import reconstruction_report
from metrics.pictures import plot_reconstructions, save_figure
from metrics.plots import plot_curves
from metrics.report import Run
from models import command, machine, training
from models.artifacts import ROOT, header, sha256_of
from models.checkpoint import load_state, same_run, save_state
from models.classifier import PerceptualNet, load_perceptual, perceptual_distance
from models.command import InputError, run
from models.data import Split, evenly, load_splits, swap_codes
from models.tokenizer import (
    CODES_OF,
    decode_codes,
    encode_images,
    load_tokenizer,
    nearest_codes,
    save_tokenizer,
    to_float,
)
from models.training import batch_rows, seed_step, write_log
from models.vqvae import VQVAE, VQVAEConfig

PANELS = {
    "loss": ["loss", "perceptual", "commitment"],
    "PSNR, dB": ["psnr"],
    "codebook": ["codebook_usage"],
}
SPREAD = 0.25
"""about the standard deviation of CIFAR-10's pixels: the losses start near 1"""
NEIGHBOURS = 16
"""--perturb swaps a code for one of this many nearest"""


@dataclass(frozen=True)
class TokenizerConfig(command.Config):
    """Train the VQ-VAE tokenizer (stage 2)."""

    data: Path = ROOT / "data/cifar10"
    """folder of {train,test}_images.npy from data/load_CIFAR10.py"""
    out: command.OutFile = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    """where the tokenizer goes; its log, curve and training state lie beside it"""
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    init: Path | None = ROOT / "checkpoints/vqvae_cifar10.pth"
    """start from this tokenizer's weights, and its codes if as many are asked for; None: anew"""
    train: Literal["all", "decoder"] = "all"
    """decoder: encoder and codebook stay as in --init, and with them every code of an image"""
    perturb: command.Fraction = 0.0
    """with --train decoder: share of the codes swapped for near ones: a generator makes mistakes
    that the encoder never does (RobusTok, arXiv 2503.08354)"""
    steps: command.Count = 12_000
    """optimizer steps"""
    batch: command.Batch = 32
    """images a step; half of them mirrored"""
    lr: command.Share = 5e-4
    """peak learning rate of AdamW; cosine to 5% of it; 1e-3 hurts a trained decoder"""
    warmup: command.Natural = 200
    """steps of linear warm-up"""
    loss: Literal["l2", "l1"] = "l1"
    """reconstruction loss, in units of the pixels' standard deviation"""
    perceptual: command.Amount = 1.0
    """weight of the perceptual loss; 0: without"""
    perceptual_weights: Path = ROOT / "checkpoints/perceptual_cifar10.pth"
    """net of the perceptual loss, from tools/train_perceptual.py"""
    commitment: command.Amount = 0.25
    """weight of the commitment term"""
    ema: command.Fraction = 0.999
    """decay of the averaged weights, which are those evaluated and saved; 0: the last step's"""
    seed: command.Seed = 0
    log_every: command.Count = 50
    save_every: command.Count = 500
    """steps between saves and test evaluations"""
    device: command.DeviceName = "auto"

    def check(self) -> None:
        if self.train == "decoder" and self.init is None:
            raise InputError("--train decoder needs a trained encoder: give --init")
        if self.train == "all" and self.perturb:
            raise InputError("--perturb needs --train decoder")

    @property
    def state(self) -> Path:
        return self.out.with_suffix(".state.pth")  # deleted when the run is finished

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".jsonl")


FREE = ("data", "out", "init", "perceptual_weights", "device", "log_every", "save_every")
"""fields of the config that may change between the two halves of a run"""


def start_weights(cfg: TokenizerConfig, model: VQVAE, images_NHWC: np.ndarray, device) -> None:
    """Take the weights of --init, and its codes or else k-means' on about 50 vectors each."""
    if cfg.init:
        first = load_tokenizer(cfg.init)[0]
        if replace(first.config, codebook_size=cfg.model.codebook_size) != cfg.model:
            raise InputError(f"{cfg.init} is of another size than asked for: {first.config}")
        if first.config == cfg.model:
            model.load_state_dict(first.state_dict())
            return
        model.encoder.load_state_dict(first.encoder.state_dict())
        model.decoder.load_state_dict(first.decoder.state_dict())
    seed_step(cfg.seed, 0, device)
    rows_N = evenly(len(images_NHWC), -(-50 * cfg.model.codebook_size // model.grid**2))
    with torch.no_grad():
        model.quantizer.start(model.vectors(to_float(images_NHWC[rows_N], device)))


def draw_images(images_NHWC, cfg: TokenizerConfig, step: int, generator) -> torch.Tensor:
    """Return a step's batch (batch, 3, H, W) in [0, 1], half of the images mirrored."""
    rows = batch_rows(len(images_NHWC), cfg.batch, step, cfg.seed).numpy()
    images_N3HW = to_float(images_NHWC[rows], generator.device)
    draw_N111 = torch.rand(cfg.batch, 1, 1, 1, generator=generator, device=generator.device)
    return torch.where(draw_N111 < 0.5, images_N3HW.flip(3), images_N3HW)


def train_step(
    net,
    images_N3HW: torch.Tensor,
    perceptual: PerceptualNet | None,
    cfg: TokenizerConfig,
    generator,
) -> dict[str, torch.Tensor]:
    """Return the terms of the loss, weighted, by name; net is a VQVAE as Fabric wraps it."""
    codes_NT = net.module.encode(images_N3HW) if cfg.train == "decoder" else None
    if cfg.perturb:  # which needs --train decoder
        near_VK = nearest_codes(net.module.codebook_VC, NEIGHBOURS)
        codes_NT = swap_codes(codes_NT, cfg.perturb, near_VK, generator)
    decoded_N3HW, _, commitment = net(images_N3HW, codes_NT)
    distance = F.mse_loss if cfg.loss == "l2" else F.l1_loss
    reconstruction = distance(decoded_N3HW.float() / SPREAD, images_N3HW / SPREAD)
    terms = {"loss": reconstruction, "commitment": cfg.commitment * commitment}
    if perceptual is not None:
        terms["perceptual"] = cfg.perceptual * perceptual_distance(
            perceptual, decoded_N3HW, images_N3HW
        )
    return terms


def main(cfg: TokenizerConfig) -> dict:
    """Train, or go on training, and return the test set's PSNR, codebook usage and perplexity."""
    train, test = load_splits(cfg.data)
    inputs = {"train_images": train.sha256, "test_images": test.sha256}
    sources = {"init": cfg.init, "perceptual": cfg.perceptual_weights if cfg.perceptual else None}
    inputs |= {name: sha256_of(path) for name, path in sources.items() if path}
    head = header("tokenizer", "tokenizer_vq/train_vqvae.py", cfg, inputs)
    head |= {"dataset": train.dataset, "classes": list(train.classes)}
    if cfg.train == "decoder":
        head[CODES_OF] = load_tokenizer(cfg.init)[1].get(CODES_OF, inputs["init"])
    if cfg.out.exists():
        saved = load_tokenizer(cfg.out)[1]
        same_run(saved, head, FREE, cfg.out)
        print(f"{cfg.out.name} is finished already: test PSNR {saved['test']['psnr']:.2f} dB")
        return saved["test"]
    model, rows = fit(cfg, head, train, test)
    trained = model.decoder if cfg.train == "decoder" else model  # rounding an encoder moves codes
    trained.half().float()  # rounded to what the file holds
    report = reconstruction_report(model.eval(), test, len(test.labels_N))
    rows[-1] |= report | machine.peak_memory(next(model.parameters()).device)
    write_log(cfg.log, rows)
    save_figure(plot_curves([Run("tokenizer", {}, rows)], PANELS), cfg.out.with_suffix(".png"))
    shown_NHWC = test.images_NHWC[evenly(len(test.labels_N), 16)]
    figure = plot_reconstructions(shown_NHWC, decode_codes(model, encode_images(model, shown_NHWC)))
    save_figure(figure, cfg.out.with_suffix(".reconstructions.png"))
    trained.half()
    save_tokenizer(cfg.out, model, head | {"test": report})
    cfg.state.unlink(missing_ok=True)
    text = (
        "test PSNR {psnr:.2f} dB, codebook usage {codebook_usage:.1%}, perplexity {perplexity:.0f}"
    )
    print(f"wrote {cfg.out}:", text.format(**report))
    return report


def fit(cfg: TokenizerConfig, head: dict, train: Split, test: Split) -> tuple[VQVAE, list[dict]]:
    """Train, from the saved state if there is one; return the averaged model and the log."""
    fabric = machine.start_fabric(machine.pick_device(cfg.device))
    torch.manual_seed(cfg.seed)
    revive_below = 0.1 * cfg.batch * VQVAE.grid**2 / cfg.model.codebook_size
    model = VQVAE(cfg.model, revive_below).to(memory_format=torch.channels_last)
    perceptual = (
        load_perceptual(cfg.perceptual_weights).to(fabric.device) if cfg.perceptual else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.99), weight_decay=1e-4)
    net, optimizer = fabric.setup(model, optimizer)
    if not cfg.state.exists():
        start_weights(cfg, model, train.images_NHWC, fabric.device)
    ema, step, rows = training.averaged(model, cfg.ema), 0, []
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    if cfg.state.exists():
        step, rows = load_state(cfg.state, head, FREE, parts)
    bar = tqdm(initial=step, total=cfg.steps, desc="tokenizer", unit="step")
    logged, began = step, time.time()
    while step < cfg.steps:
        generator = seed_step(cfg.seed, step + 1, fabric.device)
        images_N3HW = draw_images(train.images_NHWC, cfg, step, generator)
        with fabric.autocast():
            terms = train_step(net, images_N3HW, perceptual, cfg, generator)
        lr = training.lr_at(step, cfg.lr, cfg.warmup, cfg.steps, floor=0.05)
        training.descend(fabric, net, [optimizer], sum(terms.values()), lr)
        ema.update_parameters(model)
        step += 1
        bar.update()
        at_save = step % cfg.save_every == 0 and step < cfg.steps
        if not (at_save or step % cfg.log_every == 0 or step == cfg.steps):
            continue
        losses = {name: term.item() for name, term in terms.items()}
        training.check_finite(sum(losses.values()), step, cfg.state)
        bar.set_postfix(losses)
        speed = (step - logged) * cfg.batch / (time.time() - began)
        rows.append({"step": step} | losses | {"images_per_second": speed})
        if at_save:
            rows[-1] |= reconstruction_report(ema.module.eval(), test, 1000)
            save_state(cfg.state, head, step, rows, parts)
            write_log(cfg.log, rows)
        logged, began = step, time.time()  # without the evaluation and the save
    bar.close()
    return ema.module, rows


if __name__ == "__main__":
    run(main, TokenizerConfig)
