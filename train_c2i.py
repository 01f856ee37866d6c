#!/usr/bin/env -S uv run
"""Stage 4: train a generator on codes. Codes -> checkpoints/runs/<run>/last.pth.

The same command resumes a run that was cut, bit for bit: all chance in a step is a function of the
seed and the step, and the log, the EMA and the optimizer are in last.pth.
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from models import command, machine, training
from models.artifacts import ROOT, header, sha256_of, write_text
from models.checkpoint import KIND, locked, resume, save_generator, start_from
from models.cluster_loss import cluster_cross_entropy
from models.command import InputError, run
from models.data import Codes, draw_batch, load_both_codes, split_heldout, swap_codes
from models.method import DROPOUTS, SIZES, ModelConfig
from models.methods import METHODS, build, check_order
from models.orders import OrderName
from models.tokenizer import tokenizer_of
from models.training import Adaptive, Alignment, Anneal, LoggerName, OptimizerName, OrderPolicy


@dataclass(frozen=True)
class TrainConfig(command.Config):
    """Train one method on codes (stage 4)."""

    method: Literal[tuple(METHODS)] = "randar"
    order: OrderName | Path | None = None
    """raster (the default, but for a method that has an order of its own), another scan, an .npy
    with one of your own, int (T,); fixed_random (one order, of --order-seed), random (a new one for
    every image and step), anneal: random falling to a fixed one, or adaptive: the more shuffled,
    the worse the held-out calibration"""
    order_seed: command.Seed = 0
    """of --order fixed_random"""
    init: Path | None = None
    """start from the weights of this generator, of the same method, --model and tokenizer"""
    cca: Alignment = field(default_factory=Alignment)
    anneal: Anneal = field(default_factory=Anneal)
    adaptive: Adaptive = field(default_factory=Adaptive)
    regions: command.Count = 4
    """of the order `regions`: 4 or 16; PAR decodes as many codes at once"""
    model: Literal[tuple(SIZES)] = "small"
    """nano 1.3M, small 5.6M, base 15M, large 42M parameters (at V = 1024)"""
    codes: Path = ROOT / "data/codes"
    """folder from tools/extract_latent_codes.py"""
    out: command.OutFolder | None = None
    """run folder; default checkpoints/runs/<method>_<order>_<model>_<dataset>[_cluster][_cca]"""
    steps: command.Count = 20_000
    """optimizer steps"""
    batch: command.Batch = 256
    """images a step, over all devices"""
    optimizer: OptimizerName = "adamw"
    """adamw as the papers, or muon for the hidden matrices: further in the same steps"""
    lr: command.Share = 1e-3
    """peak learning rate; linear warm-up, cosine to 5%"""
    warmup: command.Fraction = 0.05
    """share of the steps"""
    weight_decay: command.Amount = 0.05
    """on tensors of two or more dimensions"""
    dropout: command.Fraction = 0.1
    """of tokens, residuals and feed-forward outputs"""
    drop_label: command.Fraction = 0.1
    """share of labels replaced by the null label, for guidance"""
    context_noise: command.Fraction = 0.0
    """share of the codes read while training that are wrong: a sampler reads its own mistakes"""
    ema: command.Fraction = 0.999
    """decay of the averaged weights, warmed up; they are the ones that are evaluated and used"""
    cluster_weight: command.Amount = 0.0
    """IAR: weight of the loss of a code's cluster; needs codes from tools/cluster_codebook.py"""
    heldout: command.Count = 2_000
    """train images kept out of training to watch overfitting"""
    seed: command.Seed = 0
    eval_every: command.Count = 1_000
    """steps between held-out and test likelihoods, sample grids and saves"""
    tokenizer: Path = ROOT / "tokenizer_vq/vqvae_cifar10.pth"
    """decodes the sample grids; without it there are none"""
    logger: LoggerName = "none"
    """where else the rows of metrics.jsonl go; tensorboard: uv sync --extra tensorboard"""
    compile: bool = False
    """torch.compile the network; for a GPU, where it was not run yet: on a CPU it is slower"""
    devices: command.Devices = 1
    device: command.DeviceName = "auto"

    def check(self) -> None:
        batch, devices, start, end = self.batch, self.devices, self.anneal.start, self.anneal.end
        if batch % devices:
            raise InputError(f"expected --devices to divide --batch {batch}, got {devices}")
        if start > end:
            raise InputError(f"expected --anneal.start <= --anneal.end, got {start} and {end}")
        if self.cca.weight and (self.init is None or self.cluster_weight):
            raise InputError("--cca.weight needs the generator to align, --init, and no other loss")
        if self.cca.weight and self.context_noise:
            raise InputError("--cca.weight compares what is read as it is: no --context-noise")
        if self.order is not None:
            check_order(self.method, self.policy.name)

    @property
    def policy(self) -> OrderPolicy:
        return OrderPolicy(self.order, self.anneal, self.adaptive, self.order_seed)


FREE = ("init", "codes", "out", "tokenizer", "logger", "devices", "device")
"""fields of the config that may change between the two halves of a run"""
ECE = "heldout_ece"
SPEED = (
    "{images_per_second:.0f} images/s, {gflops_per_second:.0f} GFLOP/s, {peak_share:.0%} of peak"
)


def model_config(cfg: TrainConfig, codes: Codes) -> ModelConfig:
    """Return the model's config: its size from --model, its vocabulary from the codes.

    Raises InputError for a cluster loss on codes without clusters.
    """
    if cfg.cluster_weight and "cluster_size" not in codes.header:
        raise InputError(
            f"--cluster-weight needs codes in clusters, which {cfg.codes} are not; run: uv run "
            f"tools/cluster_codebook.py --codes {cfg.codes}, then give its --out as --codes"
        )
    return ModelConfig(
        vocab_size=codes.header["codebook_size"],
        classes=len(codes.header["classes"]),
        grid=codes.header["grid"],
        scan=cfg.policy.scan,
        cells=cfg.policy.cells(codes.header["grid"]),
        regions=cfg.regions,
        **dict.fromkeys(DROPOUTS, cfg.dropout),
        **SIZES[cfg.model],
    )


def describe(cfg: TrainConfig, codes: Codes) -> dict:
    """Return the header of everything this run writes."""
    inputs = {"tokenizer": codes.header["inputs"]["tokenizer"], "codes": codes.header["sha256"]}
    if isinstance(cfg.order, Path):
        inputs["order"] = sha256_of(cfg.order)
    if cfg.init is not None:
        inputs["init"] = sha256_of(cfg.init)
    inputs["labels"] = codes.header.get("labels")
    return header(KIND, "train_c2i.py", cfg, inputs) | {
        "method": cfg.method,
        "dataset": codes.header["dataset"],
        "classes": codes.header["classes"],
        "search": codes.header["config"].get("search", 0),
    }


def train_step(
    cfg: TrainConfig, fabric, net, model, before, optimizers, train: Codes, ece: float, step: int
):
    """Take one optimizer step; return nats per code, scalar: (2,) with those of its cluster.

    `before` is the model as it was, for an alignment; `ece` the last one of held-out codes, for
    --order adaptive.
    """
    generator = training.seed_step(cfg.seed, step, fabric.device, fabric.global_rank)
    rows_B = training.batch_rows(len(train.label_N), cfg.batch, step, cfg.seed)
    rows_B = rows_B[fabric.global_rank :: fabric.world_size]
    dropped = cfg.drop_label if before is None else 0.0
    codes_BT, label_B = draw_batch(train, rows_B, dropped, generator)
    base_T, progress = model.own_order(), step / cfg.steps
    order_BS = cfg.policy.draw(base_T, len(codes_BT), progress, ece, generator)
    if before is not None:  # each image under its own label, and under that of another
        other_B = torch.randperm(len(label_B), generator=generator, device=fabric.device)
        codes_BT, order_BS = codes_BT.repeat(2, 1), order_BS.repeat(2, 1)
        label_B = torch.cat((label_B, label_B[other_B]))
    read_BT = codes_BT
    if cfg.context_noise:
        read_BT = swap_codes(codes_BT, cfg.context_noise, model.config.vocab_size, generator)
    logits_BSV = net(read_BT, label_B, order_BS)
    if before is None:
        loss, parts = model.loss(logits_BSV, codes_BT, order_BS)
    else:
        with torch.no_grad(), fabric.autocast():
            before_BSV = before(read_BT, label_B, order_BS)
        loss = cfg.cca.loss(logits_BSV, before_BSV, codes_BT.gather(1, order_BS))
        own = (x[: len(rows_B)] for x in (logits_BSV.detach(), codes_BT, order_BS))
        _, parts = model.loss(*own)
    nats = parts["nats"]
    if cfg.cluster_weight:
        size, target_BS = train.header["cluster_size"], codes_BT.gather(1, order_BS)
        cluster = cluster_cross_entropy(logits_BSV, target_BS, size)
        loss = loss + cfg.cluster_weight * cluster
        nats = torch.stack((nats, cluster.detach()))
    lr = training.lr_at(step, cfg.lr, int(cfg.warmup * cfg.steps), cfg.steps, floor=0.05)
    training.descend(fabric, net, optimizers, loss, lr)
    return nats


def evaluate(model, ema, heldout: Codes, test: Codes, order: str) -> dict[str, float]:
    """Return the bits per code of the averaged weights, and of the raw ones beside them."""
    from metrics.likelihood import split_bits

    bits = split_bits(ema.module, {"heldout_bits": heldout, "test_bits": test}, order)
    bits |= split_bits(model, {"raw_heldout_bits": heldout}, order)
    model.train()
    return bits


def main(cfg: TrainConfig) -> Path:
    """Train, or go on training; return the run folder, which is locked meanwhile."""
    cfg = replace(cfg, order=cfg.order or METHODS[cfg.method].scans[0])
    fabric = machine.start_fabric(machine.pick_device(cfg.device), cfg.devices)
    train, test = (codes.to(fabric.device) for codes in load_both_codes(cfg.codes))
    config, head = model_config(cfg, train), describe(cfg, train)
    head["machine"] = machine.machine_name(fabric.device)
    name = f"{cfg.method}_{Path(cfg.policy.name).stem}_{cfg.model}_{head['dataset']}"
    name += "_cluster" * (cfg.cluster_weight > 0) + "_cca" * (cfg.cca.weight > 0)
    out = cfg.out or ROOT / "checkpoints/runs" / name
    with locked(out) if fabric.is_global_zero else contextlib.nullcontext():
        fit(cfg, fabric, config, train, test, head, out)
    return out


def begin(out: Path, head: dict, model, tokenizer, order: str, rows: list[dict], step: int) -> None:
    """Write the config; say how far the run is, and write what belongs to its last save."""
    from metrics.plots import show_progress

    write_text(out / "config.json", json.dumps(head, indent=1) + "\n")
    size = f"{training.parameters(model):,} parameters"
    print(f"{out}: {size}, step {step} of {head['config']['steps']}", flush=True)
    if rows:  # killed after its last save, it may not have come to these
        missing = None if (out / f"samples/{step:07d}.png").exists() else tokenizer
        show_progress(out, rows, model, missing, head["classes"], order)


def fit(
    cfg: TrainConfig, fabric, config: ModelConfig, train: Codes, test: Codes, head: dict, out: Path
) -> None:
    """Train from the last save in `out`, if there is one, to the end."""
    from metrics.likelihood import token_ece
    from metrics.plots import show_progress

    torch.manual_seed(cfg.seed)
    model = build(cfg.method, config).to(fabric.device)
    first = cfg.init and start_from(cfg.init, model, head["inputs"]["tokenizer"])
    before = first if cfg.cca.weight else None
    optimizers = training.make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    net = machine.compiled(model, fabric.device) if cfg.compile else model
    net, *optimizers = fabric.setup(net, *optimizers)
    ema = training.averaged(model, cfg.ema)
    last = out / "last.pth"
    step, rows = resume(last, head, FREE, model, ema, optimizers)
    train, heldout = split_heldout(train, cfg.heldout, cfg.seed)
    tokenizer, order = tokenizer_of(cfg.tokenizer, test), cfg.policy.sampled
    log = training.start_logger(cfg.logger if fabric.is_global_zero else "none", out, head)
    if fabric.is_global_zero:
        begin(out, head, ema.module, tokenizer, order, rows, step)
    peak = machine.matmul_peak(fabric.device) * cfg.devices
    # an alignment has the images under other labels too, and runs the frozen model forward
    flops = training.flops(model, cfg.batch // cfg.devices) * (8 / 3 if before else 1)
    bar = tqdm(initial=step, total=cfg.steps, unit="step", disable=not fabric.is_global_zero)
    ece = next((row[ECE] for row in reversed(rows) if ECE in row), 0.0)
    if cfg.order == "adaptive" and step == 0:
        ece = token_ece(ema.module, heldout, order)
    nats, since, began = 0.0, 0, time.time()
    while step < cfg.steps:
        nats += train_step(cfg, fabric, net, model, before, optimizers, train, ece, step)
        ema.update_parameters(model)
        since, step = since + 1, step + 1
        bar.update()
        at_save = step % cfg.eval_every == 0 or step == cfg.steps
        if not (at_save or step % training.LOG_EVERY == 0):
            continue
        nats = fabric.all_reduce(nats, reduce_op="mean")  # NaN on one device stops all
        bits, *of_cluster = (float(n) / since / math.log(2) for n in nats.flatten())
        training.check_finite(bits, step, last)
        row = {"step": step, "train_bits": bits, "lr": optimizers[0].param_groups[0]["lr"]}
        row |= dict(zip(["cluster_bits"], of_cluster, strict=False))
        speed = since * cfg.batch / (time.time() - began)
        row |= machine.rates(speed, flops, config.tokens, peak)
        rows.append(row)
        bar.set_postfix_str(f"{bits:.3f} bits a code, " + SPEED.format(**row))
        if at_save and cfg.order == "adaptive":  # on every device: all of them draw orders by it
            row[ECE] = ece = token_ece(ema.module, heldout, order)
        if at_save and fabric.is_global_zero:
            row |= evaluate(model, ema, heldout, test, order) | machine.peak_memory(fabric.device)
        training.check_finite(fabric.broadcast(row.get("test_bits", 0.0)), step, last)
        if at_save and fabric.is_global_zero:
            states = [optimizer.state_dict() for optimizer in optimizers]
            raw = {"weights": model.state_dict(), "optimizers": states}
            save_generator(last, head, ema.module, **raw, step=step, rows=rows)
            show_progress(out, rows, ema.module, tokenizer, head["classes"], order)
        log(row)
        nats, since, began = 0.0, 0, time.time()
    bar.close()


if __name__ == "__main__":
    run(main, TrainConfig)
