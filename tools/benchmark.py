#!/usr/bin/env -S uv run
"""How fast this machine trains, encodes and samples with every method; results/benchmark.

Everything runs in this process on drawn codes and images, with the functions of the stages: what a
checkpoint holds does not change its speed. In a round every case is measured once, so that whatever
else the machine does meets all of them alike; a number is the median of the rounds.

training    a step as stage 4's (forward, backward, Muon, EMA), or stage 2's with squared error
encoding    an image and its mirror image, counted as one
sampling    from labels to pixels, with guidance
GFLOP/s     of matrix products, attentions and convolutions, for one image of a batch; and their
            share of what a matrix product does here in that precision on as many threads
memory      the most that a batch took beyond what was there before it
"""

import contextlib
import copy
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from metrics.report import Run, write_record
from metrics.tables import speed
from models import command, machine, training
from models.artifacts import ROOT
from models.command import InputError, run
from models.machine import flops_of, matmul_peak
from models.method import SIZES, ModelConfig
from models.methods import METHODS, build
from models.orders import mixed_order
from models.published.authors import AUTHORS, Authors
from models.sampling import ImageSampler, Plan
from models.tokenizer import decode_codes, encode_images, mirror, to_uint8
from models.vqvae import VQVAE, VQVAEConfig

CALLS = (64, 16)
"""network calls of the methods that can choose"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST = 0.2
"""seconds that one measurement takes at least: small batches are repeated"""
Case = tuple[dict, Callable[[int], object], float]
"""the start of its row; what does it with a batch of so many images; operations for one of them"""


@dataclass(frozen=True)
class BenchmarkConfig(command.Config):
    """Measure the speed and memory of every method on this machine."""

    methods: tuple[Literal[tuple(METHODS)], ...] = tuple(METHODS)
    """each in random order if it can be, else in its own; none: the tokenizer only"""
    model: Literal[tuple(SIZES)] = "nano"
    """size of the generators; the tokenizer is the README's"""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ()
    """of the generators; default fp32, and bf16 where the hardware has it"""
    batches: tuple[command.Batch, ...] = (1, 64, 500)
    """images at once"""
    threads: tuple[Annotated[int, command.Range(1, 1024)], ...] = ()
    """default one, and all"""
    rounds: Annotated[int, command.Range(1, 1000)] = 3
    """of measuring everything; three take some 20 minutes on 2 cores"""
    seed: command.Seed = 0
    device: command.DeviceName = "auto"
    against: Path | None = None
    """a folder of the authors' own checkouts (AUTHORS), whose code is run and timed beside ours"""
    out: command.OutFolder = ROOT / "results/benchmark"
    """benchmark.json goes here, at the end"""

    def check(self) -> None:
        for name in ("methods", "precisions", "batches", "threads"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"expected each of --{name} once, got {values}")
        if not self.batches:
            raise InputError("expected at least one of --batches")
        if self.against and not self.authors:
            names = ", ".join(kind.checkout for kind in AUTHORS.values())
            raise InputError(f"expected a checkout of --methods in {self.against}: {names}")

    @property
    def authors(self) -> dict[str, type[Authors]]:
        """Those of the methods whose authors' code is there."""
        if (folder := self.against) is None:
            return {}
        there = {name: kind for name, kind in AUTHORS.items() if (folder / kind.checkout).is_dir()}
        return {name: kind for name, kind in there.items() if name in self.methods}


def training_case(
    model: torch.nn.Module, loss_of: Callable, flops: float, precision: str, device, most: int
) -> Case:
    """Return a model's training; `loss_of` takes it as it was set up, codes_BT and label_B."""
    fabric = machine.start_fabric(device, precision=precision)
    optimizers = training.make_optimizers(model, "muon", 3e-3, 0.05)
    net, *optimizers = fabric.setup(model, *optimizers)
    ema, config = training.averaged(model, 0.999), model.config
    codes_BT = torch.randint(config.vocab_size, (most, config.tokens), device=device)
    label_B = torch.randint(config.classes, (most,), device=device)

    def train(batch: int) -> None:
        loss = loss_of(net, codes_BT[:batch], label_B[:batch])
        training.descend(fabric, net, optimizers, loss, 3e-3)
        ema.update_parameters(model)

    return {"what": "training", "network_calls": None}, train, flops


def generator_cases(
    method: str, config: ModelConfig, tokenizer: VQVAE, precision: str, device, most: int
) -> Iterator[Case]:
    """Yield a generator's training, and its sampling in all its numbers of network calls."""
    trained = build(method, config).to(device).train()
    base_T, chance = trained.order(config.scan).to(device), torch.Generator(device).manual_seed(0)

    def loss_of(net, codes_BT: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        order_BS = mixed_order(base_T, len(label_B), float(trained.any_order), chance)
        return trained.loss(net(codes_BT, label_B, order_BS), codes_BT, order_BS)[0]

    yield training_case(trained, loss_of, training.flops(trained, most), precision, device, most)
    model = build(method, config).to(device, DTYPES[precision]).eval().requires_grad_(False)
    sampler = ImageSampler(model, tokenizer)

    def sample(plan: Plan, batch: int) -> None:
        sampler(torch.arange(batch) % config.classes, plan, 0, 0)

    for steps in CALLS if model.parallel and model.any_order else (None,):
        order = "random" if model.any_order else config.scan
        plan = Plan(order=order, decode_steps=steps, cfg_scale=3.0)
        row = {"what": "sampling", "network_calls": plan.calls(model)}
        yield row, (work := partial(sample, plan)), flops_of(work, most)


def author_cases(
    make: Callable[[], Authors], config: ModelConfig, tokenizer: VQVAE, precision: str, device, most
) -> Iterator[Case]:
    """Yield the training and the sampling of a method by its authors' own code."""
    trained, model = make().to(device), make().to(device)
    codes_BT = torch.zeros(most, config.tokens, dtype=int, device=device)
    flops = flops_of(lambda batch: trained(codes_BT[:batch], codes_BT[:batch, 0]).backward(), most)
    trained.zero_grad(set_to_none=True)

    def loss_of(net, codes_BT: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        return net(codes_BT, label_B)

    yield training_case(trained, loss_of, flops, precision, device, most)
    model = model.to(DTYPES[precision]).eval().requires_grad_(False)

    def sample(steps: int | None, batch: int) -> None:
        label_B = torch.arange(batch, device=device) % config.classes
        decode_codes(tokenizer, model.sample(label_B, steps, 3.0).long())

    for steps in model.steps:
        row = {"what": "sampling", "network_calls": steps or config.tokens}
        yield row, (work := partial(sample, steps)), flops_of(work, most)


def tokenizer_cases(tokenizer: VQVAE, device, most: int) -> Iterator[Case]:
    """Yield the tokenizer's training, and its encoding without and with search."""
    images_N3HW = torch.rand(most, 3, 32, 32)
    images_NHWC, images_N3HW = to_uint8(images_N3HW), images_N3HW.to(device)
    fabric, model = machine.start_fabric(device), copy.deepcopy(tokenizer).train()
    net, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))

    def train(batch: int) -> None:
        with fabric.autocast():
            decoded_N3HW, _, commitment = net(images_N3HW[:batch], None)
        loss = F.mse_loss(decoded_N3HW.float(), images_N3HW[:batch]) + commitment
        training.descend(fabric, net, [optimizer], loss, 1e-3)

    yield {"what": "training"}, train, flops_of(train, most)

    def encode(sweeps: int, batch: int) -> None:
        for views_NHWC in (images_NHWC[:batch], mirror(images_NHWC[:batch])):
            encode_images(tokenizer, views_NHWC, batch, sweeps)

    for sweeps in (0, 1):
        work = partial(encode, sweeps)
        yield {"what": f"encoding, --search {sweeps}"}, work, flops_of(work, most)


def all_cases(cfg: BenchmarkConfig, precisions: tuple[str, ...], device) -> Iterator[Case]:
    """Yield every case, with what all rows say of theirs."""
    torch.manual_seed(cfg.seed)
    config = VQVAEConfig()
    tokenizer = VQVAE(config).to(device).eval().to(memory_format=torch.channels_last)
    tokenizer.quantizer.start(torch.randn(1, config.codebook_size, config.code_dim, device=device))
    native = machine.pick_precision("auto", device)
    size = training.parameters(tokenizer)
    case = {"method": "vqvae", "order": None, "network_calls": None, "parameters": size}
    for row, work, flops in tokenizer_cases(tokenizer, device, max(cfg.batches)):
        precision = "fp32" if row["what"].endswith("search 0") else native
        yield case | row | {"precision": precision}, work, flops
    for method in cfg.methods:
        kind = METHODS[method]
        config = ModelConfig(scan=kind.scans[0], **SIZES[cfg.model])
        size = training.parameters(build(method, config))
        case = {"order": "random" if kind.any_order else kind.scans[0], "parameters": size}
        for precision in precisions:
            how = (config, tokenizer, precision, device, max(cfg.batches))
            cases = {method: generator_cases(method, *how)}
            if method in cfg.authors:
                make = partial(cfg.authors[method], config, cfg.against)
                cases[f"{method}, by its authors"] = author_cases(make, *how)
            for name, of_one in cases.items():
                for row, work, flops in of_one:
                    yield {"method": name} | case | row | {"precision": precision}, work, flops


def measured(work: Callable, batch: int, repeats: int, device) -> dict[str, float]:
    """Return the wall and CPU seconds of an image."""
    since, cpu = machine.now(device), time.process_time()
    for _ in range(repeats):
        work(batch)
    wall, cpu, images = machine.now(device) - since, time.process_time() - cpu, batch * repeats
    return {"seconds": wall / images, "cpu_seconds": cpu / images}


def warmed_up(work: Callable, batch: int, device) -> tuple[float, float | None]:
    """Return the seconds of a first batch and the 1e9 bytes it added at most, if that is known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # another system than Linux
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the process is now
    before = machine.peak_memory(device).get("peak_memory_gb")
    seconds = batch * measured(work, batch, 1, device)["seconds"]
    after = machine.peak_memory(device).get("peak_memory_gb")
    return seconds, None if before is None else max(0.0, after - before)


def measure(cfg: BenchmarkConfig, precisions: tuple, threads: tuple, device) -> list[dict]:
    """Measure every case in every batch and number of threads; return their rows."""
    peaks, rows, works = {}, [], []
    cases = list(all_cases(cfg, precisions, device))
    for number in threads:
        torch.set_num_threads(number)
        for precision in {case["precision"] for case, _, _ in cases}:
            peaks[precision, number] = matmul_peak(device, precision)
    for case, work, flops in tqdm(cases, desc="warm-up", unit="case"):
        for number in threads:
            torch.set_num_threads(number)
            for batch in cfg.batches:
                seconds, taken = warmed_up(work, batch, device)
                works.append((work, batch, max(1, round(LEAST / seconds)), number))
                row = case | {"batch": batch, "threads": number, "gflop": flops / 1e9}
                rows.append(row | {"memory_gb": taken, "rounds": []})
    for _ in range(cfg.rounds):
        for row, (work, batch, repeats, number) in zip(rows, tqdm(works, "round"), strict=True):
            torch.set_num_threads(number)
            row["rounds"].append(measured(work, batch, repeats, device))
    for row in rows:
        rounds = row.pop("rounds")
        row |= {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        peak = peaks[row["precision"], row["threads"]]
        row |= machine.rates(1 / row["seconds"], row["gflop"] * 1e9, VQVAE.grid**2, peak)
    return rows


def main(cfg: BenchmarkConfig) -> Path:
    """Measure everything, write and print it; return the path of benchmark.json."""
    device = machine.pick_device(cfg.device)
    native = ("fp32", "bf16") if machine.bf16_is_native(device) else ("fp32",)
    before = torch.get_num_threads()
    threads = cfg.threads or tuple(sorted({1, before}))
    rows = measure(cfg, cfg.precisions or native, threads, device)
    torch.set_num_threads(before)
    where = {"device": machine.device_name(device), "cpu": machine.processor()}
    path = cfg.out / "benchmark.json"
    record = write_record(path, where | {"torch": torch.__version__, "rows": rows}, cfg, {})
    print(speed({"benchmark": Run("benchmark", {"benchmark": record}, [])}) + f"-> {path}")
    return path


if __name__ == "__main__":
    run(main, BenchmarkConfig)
