"""What every training script shares: chance by step, learning rate, devices, checks, log."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from models.artifacts import write_text
from models.command import InputError
from models.method import Method

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OptimizerName = Literal["adamw", "muon"]
LoggerName = Literal["none", "tensorboard", "wandb"]
LOG_EVERY = 50
"""steps between the rows of a generator's log"""


def seed_step(seed: int, step: int, device: torch.device, rank: int = 0) -> torch.Generator:
    """Make all chance in a step a function of (seed, step, rank): a resume needs no RNG state.

    Seeds torch's global generator (dropout, codebook revival) and returns another for the rest.
    """
    a, b = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint64).tolist()
    torch.manual_seed(a)
    return torch.Generator(device).manual_seed(b)


def batch_rows(rows: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Return the row numbers of a step's batch, int64 (batch,): every epoch visits each row once.

    Epoch e is a permutation that depends on (seed, e) only; a batch may straddle two epochs.
    """
    wanted = torch.arange(step * batch, (step + 1) * batch)
    parts = []
    for epoch in wanted.div(rows, rounding_mode="floor").unique().tolist():
        (state,) = np.random.SeedSequence([seed, epoch, rows]).generate_state(1, np.uint64).tolist()
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(state))
        parts.append(order[wanted[wanted // rows == epoch] % rows])
    return torch.cat(parts)


def lr_at(step: int, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Return the learning rate of a step: linear 0 -> peak, then cosine to `floor` * peak.

    As RandAR (its floor is 0.05). `warmup` and `total` count optimizer steps.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def pick_device(name: str) -> torch.device:
    """Return the device called auto (a GPU if there is one), cpu or cuda.

    Raises InputError for another name, or for cuda without a GPU.
    """
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"expected device auto, cpu or (with a GPU) cuda, got {name}")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return {"peak_memory_gb"}, in 1e9 bytes: of tensors on a GPU, else of this process so far.

    {} on the CPU of a system that does not tell.
    """
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    status = Path("/proc/self/status")  # getrusage would count the starter's memory too
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return {"peak_memory_gb": kilobytes[0] * 1024 / 1e9} if kilobytes else {}


def bf16_is_native(device: torch.device) -> bool:
    """Tell whether bf16 arithmetic is done by the hardware, and so is faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def start_fabric(device: torch.device, devices: int = 1) -> "Fabric":
    """Return Fabric, launched, in bf16 where that is native, else in fp32."""
    from lightning_fabric import Fabric  # takes longer to import than torch

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    precision = "bf16-mixed" if bf16_is_native(device) else "32-true"
    fabric = Fabric(accelerator=device.type, devices=devices, precision=precision)
    fabric.launch()
    return fabric


def averaged(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Return the moving average of the weights, warmed up: decay min(decay, (1 + t) / (10 + t)).

    Buffers are the model's own (a codebook is an average already).
    """

    @torch.no_grad()
    def average(ema: list[torch.Tensor], now: list[torch.Tensor], t: torch.Tensor) -> None:
        torch._foreach_lerp_(ema, now, 1 - min(decay, (1 + int(t)) / (10 + int(t))))

    return AveragedModel(model, multi_avg_fn=average)


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float, no_decay: tuple[str, ...]
) -> list[dict]:
    """Return an optimizer's groups: decay for tensors of two or more dimensions, else none.

    None either for a name that contains one of `no_decay`, see `Method.no_decay`.
    """
    decayed, others = [], []
    for name, p in named:
        exempt = p.ndim < 2 or any(part in name for part in no_decay)
        (others if exempt else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_optimizers(
    model: Method, name: OptimizerName, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return AdamW over everything, or Muon over the hidden matrices and AdamW over the rest.

    Muon (Jordan et al., "Muon: an optimizer for hidden layers", 2024) makes a step of every hidden
    matrix orthogonal; scaled to AdamW's step size (Liu et al., arXiv 2502.16982, section 2.2), so
    that both take the same learning rate. Embeddings, norms and the output head are AdamW's.
    """
    hidden = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features != model.config.vocab_size
    ]
    if name == "adamw":
        hidden = []
    ours = {id(p) for p in hidden}

    def groups(of_muon: bool) -> list[dict]:
        named = ((name, p) for name, p in model.named_parameters() if (id(p) in ours) == of_muon)
        return [g for g in parameter_groups(named, weight_decay, model.no_decay) if g["params"]]

    optimizers = [torch.optim.AdamW(groups(False), lr=lr, betas=(0.9, 0.95))]
    if hidden:
        optimizers.append(torch.optim.Muon(groups(True), lr=lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def parameters(model: torch.nn.Module) -> int:
    """Return the number of learned values."""
    return sum(p.numel() for p in model.parameters())


def check_finite(loss: float, step: int, kept: Path) -> None:
    """Raise InputError when a loss is NaN or infinite, naming the last good checkpoint."""
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step}: stopped; the last good checkpoint is {kept}; "
            "try a lower --lr"
        )


def same_run(saved: dict, wanted: dict, free: Iterable[str], path: Path) -> None:
    """Raise InputError if two configs differ in more than the fields `free`, naming them."""
    differ = sorted(
        key
        for key in saved.keys() | wanted.keys()
        if key not in set(free) and saved.get(key) != wanted.get(key)
    )
    if differ:
        pairs = ", ".join(f"{key} {saved.get(key)} -> {wanted.get(key)}" for key in differ)
        raise InputError(
            f"{path} was made with another config ({pairs}); "
            "choose another --out, or delete the file to start over"
        )


def write_log(path: Path, rows: list[dict]) -> None:
    """Write the log so far, one JSON object a line, in one rename."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def start_logger(name: LoggerName, out: Path, head: dict) -> Callable[[dict], None]:
    """Return what takes a row of the log, with its `step`, besides metrics.jsonl.

    Raises InputError, with the command to install it, for a logger that is not there.
    """
    try:
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            board = TensorBoardLogger(out, name="", version="")
            return lambda row: board.log_metrics(dict(row), row["step"])
        if name == "wandb":
            import wandb

            run = wandb.init(
                project="any-order-cifar", name=out.name, id=out.name, resume="allow", config=head
            )
            return lambda row: run.log(row, step=row["step"])
    except ModuleNotFoundError:
        install = {"tensorboard": "uv sync --extra tensorboard", "wandb": "uv pip install wandb"}
        raise InputError(f"--logger {name} is not installed; run: {install[name]}") from None
    return lambda row: None
